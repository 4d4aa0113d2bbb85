"""The tuner without a GPU: keys, the cache, candidates, the search, and that ranks agree."""

import dataclasses
import json
import logging
from types import SimpleNamespace

import pytest

import cometrt
from cometrt.cuda.fused import num_comm_ctas
from cometrt.legality import check_layer
from cometrt.tuner import cache, search, tune
from cometrt.tuner.cache import Key, load, look_up, store
from cometrt.world.link import link_share

SPEC = cometrt.MoESpec(hidden=2048, intermediate=768, num_experts=16, topk=4, max_tokens=1000)
KEY = Key("a GPU", 16, 8, 8, 1, 2048, 768, 16, 4, 1024, "bfloat16", "h100")
FOUND = cometrt.TileConfig(order="columns", n_chunk=512, raster_group=8, dispatch_ctas=3)


@pytest.fixture(autouse=True)
def machine(monkeypatch, tmp_path):
    """A GPU's name and its SMs, and a cache of its own."""
    monkeypatch.setenv("COMETRT_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(cache, "gpu_name", lambda: "a GPU")
    for module in (cache, tune):
        monkeypatch.setattr(module, "num_sms", lambda: 16)


def fake_world(**changes):
    world = {"device": "cuda", "rank": 0, "size": 8, "link": link_share("h100", 16, 132)}
    return SimpleNamespace(**(world | changes))


# ---- the cache -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "differs"),
    [
        ({}, {}),
        ({"max_tokens": 1024}, {}),
        ({"max_tokens": 1025}, {"tokens": 2048}),
        ({"max_tokens": 1}, {"tokens": 1}),
        ({"tp": 2}, {"ep": 4, "tp": 2}),
        ({"topk": 3}, {"topk": 3}),
        ({"intermediate": 64}, {"intermediate": 64}),
    ],
)
def test_keys(change, differs):
    key = cache.key_of(fake_world(), dataclasses.replace(SPEC, **change))
    assert key == dataclasses.replace(KEY, **differs)


def test_keys_tell_links_and_ranks_apart():
    spec = SPEC
    worlds = [fake_world(), fake_world(link=None), fake_world(link=link_share("h800", 16, 132))]
    keys = [cache.key_of(world, spec) for world in (*worlds, fake_world(size=4))]
    assert [key.link for key in keys] == ["h100", "none", "h800", "h100"]
    assert len({str(key) for key in keys}) == 4


def test_what_is_stored_is_found_and_nothing_else(tmp_path):
    path = tmp_path / "new" / "tuned.json"
    other = dataclasses.replace(KEY, tokens=2048)
    assert load(path, KEY) is None
    store(path, KEY, FOUND, 1.5)
    store(path, other, cometrt.TileConfig(), 2.5)
    assert load(path, KEY) == FOUND
    assert load(path, other) == cometrt.TileConfig()
    assert load(path, dataclasses.replace(KEY, sms=24)) is None
    assert [p.name for p in path.parent.iterdir()] == ["tuned.json"]


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", '{"format": "cometrt tuner 1", "entries": {}}', b"\xff\xfe",
     '{"schema": 1, "entries": {}}', '{"schema": 3, "entries": {}}', '{"schema": 2}',
     '{"schema": "2", "entries": {}}', '{"schema": 2, "entries": []}'],
)  # fmt: skip
def test_a_file_of_another_schema_is_ignored_until_tune_replaces_it(text, caplog):
    path, data = cache.cache_file(), text if isinstance(text, bytes) else text.encode()
    path.write_bytes(data)
    with caplog.at_level(logging.WARNING, "cometrt"):
        for _ in range(3):
            assert look_up(fake_world(), SPEC, None) is None
    assert len(caplog.records) == 1
    assert f"{path} is ignored" in caplog.text
    assert path.read_bytes() == data
    store(path, KEY, FOUND, 1.0)
    assert len(caplog.records) == 1
    assert load(path, KEY) == FOUND
    assert json.loads(path.read_text())["schema"] == 2


def test_entries_of_another_schema_are_not_used(caplog):
    """Not even where they would be legal today: a field may have changed its meaning."""
    path = cache.cache_file()
    store(path, KEY, FOUND, 1.0)
    old = json.loads(path.read_text()) | {"schema": 1}
    path.write_text(json.dumps(old))
    assert look_up(fake_world(), SPEC, None) is None
    assert "schema must be 2 (got 1)" in caplog.text


@pytest.mark.parametrize(
    "entry",
    [7, {}, {"config": None}, {"config": {"num_phases": 0}}, {"config": {"of_another_version": 1}},
     {"config": {"n_chunk": "512"}}, {"config": {"order": "columns", "n_chunk": 384}},
     {"config": {"gemm": "cublas"}}],
)  # fmt: skip
def test_an_entry_that_cannot_be_used_is_ignored(entry, caplog):
    path = cache.cache_file()
    path.write_text(json.dumps({"schema": 2, "entries": {str(KEY): entry}}))
    with caplog.at_level(logging.WARNING, "cometrt"):
        assert look_up(fake_world(), SPEC, None) is None
    assert "is ignored" in caplog.text


def test_a_folder_that_cannot_be_written_is_a_warning(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    store(tmp_path / "file" / "tuned.json", KEY, FOUND, 1.0)
    assert "is not stored" in caplog.text


def test_the_users_file_comes_before_the_shipped_one(monkeypatch, tmp_path):
    shipped = tmp_path / "defaults.json"
    monkeypatch.setattr(cache, "SHIPPED", shipped)
    world = fake_world()
    assert look_up(world, SPEC, None) is None
    store(shipped, KEY, cometrt.TileConfig(raster_group=6), 1.0)
    assert look_up(world, SPEC, None) == cometrt.TileConfig(raster_group=6)
    store(cache.cache_file(), KEY, FOUND, 1.0)
    assert look_up(world, SPEC, "fused") == FOUND
    assert look_up(world, SPEC, "sequential") is look_up(world, SPEC, "chunked") is None
    assert look_up(fake_world(device="host"), SPEC, None) is None


def test_all_shipped_entries_can_be_used(caplog, monkeypatch):
    """`look_up` gives every entry of the shipped file to the layer that it is for."""
    entries = json.loads(cache.SHIPPED.read_text())["entries"]
    assert entries
    for text, entry in entries.items():
        of = dict(item.split("=") for item in text.split(", "))
        sizes = ("hidden", "intermediate", "num_experts", "topk", "tp")
        spec = cometrt.MoESpec(**{n: int(of[n]) for n in sizes}, max_tokens=int(of["tokens"]))
        monkeypatch.setattr(cache, "gpu_name", lambda of=of: of["gpu"])
        monkeypatch.setattr(cache, "num_sms", lambda of=of: int(of["sms"]))
        world = fake_world(size=int(of["ranks"]), link=None)
        config = look_up(world, spec, None)
        assert config == cometrt.TileConfig(**entry["config"])
        check_layer(spec, world.size, "cuda", "fused", config)
    assert not caplog.records


def test_all_ranks_use_what_rank_0_finds(monkeypatch):
    # On the host nothing is looked up: as if it were.
    monkeypatch.setattr(
        "cometrt.agreement.look_up",
        lambda world, spec, mode: cometrt.TileConfig(num_phases=3 + world.rank),
    )

    def fn(world):
        spec = dataclasses.replace(SPEC, max_tokens=8)
        assert (
            cometrt.MoELayer(world, spec, config=cometrt.TileConfig(num_phases=7)).config.num_phases
            == 7
        )
        return cometrt.MoELayer(world, spec).config

    assert cometrt.spawn(fn, 4) == [cometrt.TileConfig(num_phases=3)] * 4


# ---- candidates and the search -------------------------------------------------------------------


@pytest.mark.parametrize(("size", "sms"), [(1, 132), (1, 1), (2, 66), (4, 32), (8, 16), (8, 8)])
@pytest.mark.parametrize("hidden", [48, 512, 2048, 7168])
def test_candidates_are_legal_few_and_different(size, sms, hidden):
    spec = dataclasses.replace(SPEC, hidden=hidden)
    base = cometrt.TileConfig()
    settings = search.candidates(base, spec, size, sms)
    assert sum(map(len, settings)) <= 20
    for changes in settings:
        configs = [search.legal(base, change, spec, size) for change in changes]
        assert None not in configs
        assert base in configs
        assert len(set(configs)) == len(configs)
        walks = {(c.order, len(c.n_chunks(hidden))) for c in configs}
        assert len(walks) == (len(configs) if "order" in changes[0] else 1)
        num_phases = {tuple(c.last_distances(size)) for c in configs}
        assert len(num_phases) == (len(configs) if "num_phases" in changes[0] else 1)


def test_illegal_changes_are_not_tried():
    base = cometrt.TileConfig()
    assert search.legal(base, {}, SPEC, 8) == base
    assert search.legal(base, {"order": "columns", "n_chunk": 384}, SPEC, 8) is None
    assert search.legal(base, {"gemm": "cublas"}, SPEC, 8) is None
    assert search.legal(base, {"raster_group": 0}, SPEC, 8) is None
    assert search.legal(base, {}, dataclasses.replace(SPEC, num_experts=125), 125) is None


def test_the_search_times_no_illegal_config():
    changes = [{"order": "columns", "n_chunk": n_chunk} for n_chunk in (384, 512)]
    timed = []
    search.search(
        cometrt.TileConfig(), [changes], SPEC, 8, lambda config: timed.append(config) or 1.0
    )
    assert [config.n_chunk for config in timed] == [256, 512]


@pytest.mark.parametrize(
    "best",
    [{}, {"num_phases": 1}, {"dispatch_ctas": 4, "combine_ctas": 2},
     {"order": "columns", "n_chunk": 1024}, {"order": "columns", "n_chunk": 512, "num_phases": 4,
      "raster_group": 4, "combine_ctas": 8}],
)  # fmt: skip
def test_the_search_finds_the_best_where_settings_are_independent(best):
    base = cometrt.TileConfig()
    wanted = dataclasses.asdict(dataclasses.replace(base, **best))
    timed = []

    def time(config):
        timed.append(config)
        found = dataclasses.asdict(config)
        return 1.0 + sum(0.1 for name, value in wanted.items() if found[name] != value)

    settings = search.candidates(base, SPEC, 8, 16)
    config, ms = search.search(base, settings, SPEC, 8, time)
    assert config == dataclasses.replace(base, **best)
    assert ms == time(config)
    assert len(timed) - 1 == len(set(timed)) <= 40


def test_what_gains_less_than_noise_is_not_taken():
    base = cometrt.TileConfig()
    settings = search.candidates(base, SPEC, 8, 16)
    assert search.search(base, settings, SPEC, 8, lambda c: 1.0 - 0.005 * (c != base))[0] == base


def test_comm_ctas_are_at_most_those_of_the_launch():
    counts = [num_comm_ctas(wanted, 16).value.tolist() for wanted in (None, 1, 15, 16, 17, 132)]
    assert counts == [[16], [1], [15], [16], [16], [16]]
