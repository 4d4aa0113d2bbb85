"""The tuner without a GPU: keys, the cache, candidates, the search, and that ranks agree."""

import dataclasses
import json
import logging
import sys
from types import SimpleNamespace
from typing import ClassVar
from unittest.mock import MagicMock

import numpy as np
import pytest

import cometrt
from cometrt.agreement import agree
from cometrt.cuda import trials
from cometrt.cuda.buffers import has_room_for
from cometrt.cuda.fused import num_comm_ctas
from cometrt.cuda.trials import counts_for
from cometrt.errors import CallNotBegun
from cometrt.legality import check_layer
from cometrt.node_specs import spec_of_node
from cometrt.plan import PlanShape
from cometrt.specs import Geometry
from cometrt.tuner import cache, rail, search, tune
from cometrt.tuner.cache import Key, load, look_up, store
from cometrt.world.link import link_share

SPEC = cometrt.MoESpec(hidden=2048, intermediate=768, num_experts=16, topk=4, max_tokens=1000)
KEY = Key("a GPU", 16, 8, 8, 1, 2048, 768, 16, 4, 1024, "bfloat16", "h100")
FOUND = cometrt.TileConfig(order="columns", n_chunk=512, raster_group=8, dispatch_ctas=3)
MS = {"forward": 1.0}


@pytest.fixture(autouse=True)
def machine(monkeypatch, tmp_path):
    """A GPU's name and its SMs, and a cache of its own."""
    monkeypatch.setenv("COMETRT_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(cache, "gpu_name", lambda: "a GPU")
    for module in (cache, tune):
        monkeypatch.setattr(module, "num_sms", lambda: 16)


def fake_world(**changes):
    world = {"device": "cuda", "rank": 0, "size": 8, "link": link_share("h100", 16, 132)}
    world |= {"nodes": 1, "node_index": 0} | changes
    made = SimpleNamespace(**world, ranks_per_node=world["size"] // world["nodes"])
    made.node = world.get("node", made)
    return made


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


def test_keys_tell_nodes_apart_and_those_of_one_node_stay_as_they_were():
    keys = [cache.key_of(fake_world(nodes=nodes, link=None), SPEC) for nodes in (1, 2, 4)]
    assert [key.nodes for key in keys] == [1, 2, 4]
    assert "nodes" not in str(keys[0])
    assert str(keys[1]) == f"{keys[0]}, nodes=2"


NODES_KEY = dataclasses.replace(KEY, nodes=2)
SLICED = dataclasses.replace(FOUND, rail_slices=4)


def nodes_world(max_ctas=4, bounds=None, clusters=True, **changes):
    """Rank 0 of two nodes of four ranks; NCCL's CTAs on each rank."""

    def allgather(value, purpose):
        if isinstance(value, tuple) and purpose == "MoELayer":
            return [value] * 8
        if isinstance(value, bool):  # clusters
            return [value] * 8
        return [value, *(bounds if bounds is not None else [value] * 7)]

    # The node's layer has other keys: it has four ranks, and half of the experts.
    node = fake_world(size=4, link=None, gpu=SimpleNamespace(last_call=None))
    given = {"nodes": 2, "link": None, "node": node, "num_layers": 0, "barrier": lambda: None}
    nccl = SimpleNamespace(max_ctas=max_ctas, clusters=clusters)
    given |= {"nccl": nccl, "allgather": allgather}
    return fake_world(**(given | changes))


def test_a_layer_over_nodes_takes_what_was_tuned_over_as_many_else_for_its_node(monkeypatch):
    monkeypatch.setattr("cometrt.nodes.nccl_sms.num_sms", lambda: 132)
    world, of_node = nodes_world(), spec_of_node(SPEC, 2)
    alone = dataclasses.replace(FOUND, raster_group=16)
    assert agree(world, SPEC, None, None)[2] == cometrt.TileConfig()
    store(cache.cache_file(), cache.key_of(world.node, of_node), alone, MS)
    assert agree(world, SPEC, None, None)[2] == alone
    store(cache.cache_file(), dataclasses.replace(NODES_KEY, link="none", nodes=4), SLICED, MS)
    assert agree(world, SPEC, None, None)[2] == alone
    store(cache.cache_file(), dataclasses.replace(NODES_KEY, link="none"), SLICED, MS)
    assert agree(world, SPEC, None, None)[2] == SLICED


@pytest.mark.parametrize("bounds", [None, [""] * 6 + ["NCCL_MAX_CTAS is missing here"]])
def test_tuned_slices_are_not_used_where_nccl_has_no_bound(monkeypatch, caplog, bounds):
    """A cache keeps no layer from being made. A config that is given is refused instead."""
    monkeypatch.setattr("cometrt.nodes.nccl_sms.num_sms", lambda: 132)
    world = nodes_world(max_ctas=4 if bounds else None, bounds=bounds)
    store(cache.cache_file(), dataclasses.replace(NODES_KEY, link="none"), SLICED, MS)
    assert agree(world, SPEC, None, None)[2] == FOUND
    assert "the tuned rail_slices=4 is not used" in caplog.text
    late = dataclasses.replace(FOUND, rail_parts=2)
    assert agree(nodes_world(clusters=False), SPEC, None, late)[2] == late
    store(cache.cache_file(), dataclasses.replace(NODES_KEY, link="none"), late, MS)
    assert agree(world, SPEC, None, None)[2] == FOUND
    assert "the tuned rail_parts=2 is not used: rail_parts must be 0 unless NCCL's" in caplog.text
    assert agree(world, SPEC, None, SLICED)[2] == SLICED


def test_what_is_stored_is_found_and_nothing_else(tmp_path):
    path = tmp_path / "new" / "tuned.json"
    other = dataclasses.replace(KEY, tokens=2048)
    assert load(path, KEY) is None
    store(path, KEY, FOUND, {"forward": 1.5, "backward": 3.25})
    store(path, other, cometrt.TileConfig(), {"forward": 2.5}, commit="abc")
    assert load(path, KEY) == FOUND
    entries = cache.read_entries(path)
    assert entries[str(KEY)]["ms"] == {"forward": 1.5, "backward": 3.25}
    assert (entries[str(other)]["ms"], entries[str(other)]["commit"]) == ({"forward": 2.5}, "abc")
    assert load(path, other) == cometrt.TileConfig()
    assert load(path, dataclasses.replace(KEY, sms=24)) is None
    assert [p.name for p in path.parent.iterdir()] == ["tuned.json"]


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", '{"format": "cometrt tuner 1", "entries": {}}', b"\xff\xfe",
     '{"schema": 2, "entries": {}}', '{"schema": 4, "entries": {}}', '{"schema": 3}',
     '{"schema": "3", "entries": {}}', '{"schema": 3, "entries": []}', "[" * 100_000],
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
    store(path, KEY, FOUND, MS)
    assert len(caplog.records) == 1
    assert load(path, KEY) == FOUND
    assert json.loads(path.read_text())["schema"] == 3


def test_entries_of_another_schema_are_not_used(caplog):
    """Not even where they would be legal today: a field may have changed its meaning."""
    path = cache.cache_file()
    store(path, KEY, FOUND, MS)
    old = json.loads(path.read_text()) | {"schema": 2}
    path.write_text(json.dumps(old))
    assert look_up(fake_world(), SPEC, None) is None
    assert "schema must be 3 (got 2)" in caplog.text


@pytest.mark.parametrize(
    "entry",
    [7, {}, {"config": None}, {"config": {"num_phases": 0}}, {"config": {"of_another_version": 1}},
     {"config": {"n_chunk": "512"}}, {"config": {"order": "columns", "n_chunk": 384}},
     {"config": {"gemm": "cublas"}},
     {"config": {"backward_order": "columns", "backward_n_chunk": 384}}],
)  # fmt: skip
def test_an_entry_that_cannot_be_used_is_ignored(entry, caplog):
    path = cache.cache_file()
    path.write_text(json.dumps({"schema": 3, "entries": {str(KEY): entry}}))
    with caplog.at_level(logging.WARNING, "cometrt"):
        assert look_up(fake_world(), SPEC, None) is None
    assert "is ignored" in caplog.text


def test_a_folder_that_cannot_be_written_is_a_warning(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    store(tmp_path / "file" / "tuned.json", KEY, FOUND, MS)
    assert "is not stored" in caplog.text


def test_the_users_file_comes_before_the_shipped_one(monkeypatch, tmp_path):
    shipped = tmp_path / "defaults.json"
    monkeypatch.setattr(cache, "SHIPPED", shipped)
    world = fake_world()
    assert look_up(world, SPEC, None) is None
    store(shipped, KEY, cometrt.TileConfig(raster_group=6), MS)
    assert look_up(world, SPEC, None) == cometrt.TileConfig(raster_group=6)
    store(cache.cache_file(), KEY, FOUND, MS)
    assert look_up(world, SPEC, "fused") == FOUND
    assert look_up(world, SPEC, "sequential") is look_up(world, SPEC, "chunked") is None
    assert look_up(fake_world(device="host"), SPEC, None) is None


@pytest.mark.parametrize(
    ("tokens", "group"),
    [(1000, 10), (1024, 10), (513, 10), (512, 10), (256, 10), (129, 10), (128, 6), (1, 6),
     (2048, 10), (2049, 12), (1 << 20, 12)],
)  # fmt: skip
def test_the_nearest_token_bucket_counts(tokens, group):
    """Of 64, 1024 and 8192; between two that are equally near, the larger one."""
    for bucket, raster_group in ((64, 6), (1024, 10), (8192, 12)):
        key = dataclasses.replace(KEY, tokens=bucket)
        store(cache.cache_file(), key, cometrt.TileConfig(raster_group=raster_group), MS)
    spec = dataclasses.replace(SPEC, max_tokens=tokens)
    assert look_up(fake_world(), spec, None).raster_group == group
    other = dataclasses.replace(spec, topk=3)
    assert look_up(fake_world(), other, None) is None


def test_a_nearer_bucket_that_is_shipped_comes_before_the_users(monkeypatch, tmp_path):
    monkeypatch.setattr(cache, "SHIPPED", tmp_path / "defaults.json")
    far = dataclasses.replace(KEY, tokens=4096)
    store(cache.cache_file(), far, cometrt.TileConfig(raster_group=6), MS)
    assert look_up(fake_world(), SPEC, None).raster_group == 6
    store(cache.SHIPPED, KEY, FOUND, MS)
    assert look_up(fake_world(), SPEC, None) == FOUND


def test_a_gpu_without_entries_takes_what_is_shipped_for_another(monkeypatch, tmp_path):
    monkeypatch.setattr(cache, "SHIPPED", tmp_path / "defaults.json")
    store(cache.SHIPPED, dataclasses.replace(KEY, gpu="Another", sms=KEY.sms + 1), FOUND, MS)
    assert look_up(fake_world(), SPEC, None) is None
    store(cache.SHIPPED, dataclasses.replace(KEY, gpu="Another"), FOUND, MS)
    assert look_up(fake_world(), SPEC, None) == FOUND
    far = dataclasses.replace(KEY, tokens=1 << 15)
    store(cache.SHIPPED, far, cometrt.TileConfig(raster_group=6), MS)
    assert look_up(fake_world(), SPEC, None).raster_group == 6  # its own come first


def test_the_users_entries_of_another_gpu_do_not_count(monkeypatch, tmp_path):
    monkeypatch.setattr(cache, "SHIPPED", tmp_path / "defaults.json")
    store(cache.cache_file(), dataclasses.replace(KEY, gpu="Another"), FOUND, MS)
    assert look_up(fake_world(), SPEC, None) is None


def test_a_bucket_that_cannot_be_used_gives_way_to_the_next(caplog):
    store(cache.cache_file(), KEY, cometrt.TileConfig(gemm="cublas"), MS)
    store(cache.cache_file(), dataclasses.replace(KEY, tokens=256), FOUND, MS)
    assert look_up(fake_world(), SPEC, None) == FOUND
    assert "is ignored: gemm must be" in caplog.text


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
        link = None if of["link"] == "none" else SimpleNamespace(name=of["link"])
        world = fake_world(size=int(of["ranks"]), link=link)
        config = look_up(world, spec, None)
        assert config == cometrt.TileConfig(**entry["config"])
        check_layer(spec, world.size, "cuda", "fused", config)
        assert all(ms > 0 for ms in entry["ms"].values())
        assert set(entry["ms"]) in ({"forward"}, {"forward", "backward"})
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


def settings_of(base, spec, size, sms, training):
    base = search.with_own_backward(base, sms) if training else base
    return base, search.candidates(base, spec, size, sms, training=training)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("size", "sms"), [(1, 132), (1, 2), (2, 66), (4, 32), (8, 16), (8, 8)])
@pytest.mark.parametrize("hidden", [48, 512, 2048, 7168])
@pytest.mark.parametrize("save", ["rows", "nothing"])
def test_candidates_are_legal_few_and_different(size, sms, hidden, training, save):
    spec = dataclasses.replace(SPEC, hidden=hidden, save=save)
    base, settings = settings_of(cometrt.TileConfig(), spec, size, sms, training)
    assert sum(len(setting.changes) for setting in settings) <= (32 if training else 20)
    fields = set()
    for passes, changes in settings:
        configs = [search.legal(base, change, spec, size) for change in changes]
        assert None not in configs
        assert base in configs
        assert len(set(configs)) == len(configs)
        fields |= set(changes[0])
        for which in search.PASSES if training else ("forward",):
            schedules = {search.schedule(config, which, spec) for config in configs}
            assert len(schedules) == (len(configs) if which in passes else 1)
        if "num_phases" in changes[0]:
            assert len({tuple(c.last_distances(size)) for c in configs}) == len(configs)
    own = {"backward_order", "backward_n_chunk", "backward_dispatch_ctas", "backward_combine_ctas"}
    assert fields & own == (own if training else set())
    assert {"order", "n_chunk", "num_phases", "dispatch_ctas", "combine_ctas"} <= fields


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    "base",
    [{}, {"order": "columns", "n_chunk": 256}, {"backward_order": "columns",
     "backward_n_chunk": 768}, {"order": "columns", "n_chunk": 4096}],
)  # fmt: skip
def test_one_executor_has_room_for_all_candidates(base, training):
    """But for the number of phases, on which the plan depends; and for an odd N-chunk, whose walk
    may take more steps."""
    spec, size = dataclasses.replace(SPEC, hidden=7168), 8
    base, settings = settings_of(cometrt.TileConfig(**base), spec, size, 16, training)
    geometry = Geometry(spec, 0, size)
    room = PlanShape(geometry, search.roomiest(base, settings))
    for setting in settings:
        for change in setting.changes:
            shape = PlanShape(geometry, search.legal(base, change, spec, size))
            same_plan = shape.digest == PlanShape(geometry, base).digest
            odd = 768 in (shape.config.n_chunk, shape.config.backward_n_chunk)
            assert has_room_for(room, shape) or not same_plan or odd
            if not same_plan:
                assert not has_room_for(room, shape)
    small = PlanShape(geometry, dataclasses.replace(base, order="phases", backward_order="phases"))
    assert not has_room_for(small, room)


def test_a_backward_keeps_its_fields_when_those_of_forward_change():
    base = search.with_own_backward(cometrt.TileConfig(order="columns", n_chunk=512), 17)
    assert base.of_backward() == cometrt.TileConfig(
        order="columns", n_chunk=512, dispatch_ctas=16, combine_ctas=16
    )
    changed = dataclasses.replace(base, order="phases", n_chunk=1024, dispatch_ctas=2)
    assert search.schedule(changed, "backward", SPEC) == search.schedule(base, "backward", SPEC)
    assert search.schedule(changed, "forward", SPEC) != search.schedule(base, "forward", SPEC)
    assert search.with_own_backward(changed, 17) == changed


def test_a_backward_that_computes_z_again_depends_on_the_forwards_dispatch_ctas():
    spec = dataclasses.replace(SPEC, save="nothing")
    base, settings = settings_of(cometrt.TileConfig(), spec, 8, 16, True)
    passes = {name: of for of, changes in settings for name in changes[0] if len(changes[0]) == 1}
    assert passes["dispatch_ctas"] == search.PASSES
    assert passes["combine_ctas"] == ("forward",)
    assert passes["backward_dispatch_ctas"] == ("backward",)

    def time(config, which, counts=None):
        """With few comm CTAs forward is a little faster, its kernel in a backward much slower."""
        few = search.schedule(config, which, spec).dispatch_ctas == 4
        return {"forward": 0.9 if few else 1.0, "backward": 3.0 if few else 2.0}[which]

    found = search.search(base, settings, spec, 8, time)
    swept = search.sweep(base, found, settings, spec, 8, time, lambda: False)
    for result in (found, swept):
        assert result.config.dispatch_ctas != 4
        assert result.ms == {"forward": 1.0, "backward": 2.0}


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
        cometrt.TileConfig(),
        [search.Setting(("forward",), changes)],
        SPEC,
        8,
        lambda config, which: timed.append(config) or 1.0,
    )
    assert [config.n_chunk for config in timed] == [256, 512]


def distance(config, wanted, which):
    """Milliseconds of a pass, the fewer the more fields of its schedule are as wanted."""
    one, other = (dataclasses.asdict(search.schedule(c, which, SPEC)) for c in (config, wanted))
    return 1.0 + sum(0.1 for name in one if one[name] != other[name])


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    "best",
    [{}, {"num_phases": 1}, {"dispatch_ctas": 4, "combine_ctas": 2},
     {"order": "columns", "n_chunk": 1024}, {"order": "columns", "n_chunk": 512, "num_phases": 4,
      "raster_group": 4, "combine_ctas": 8}],
)  # fmt: skip
def test_the_search_finds_the_best_where_settings_are_independent(best, training):
    base, settings = settings_of(cometrt.TileConfig(), SPEC, 8, 16, training)
    if training:
        best = best | {"backward_order": "columns", "backward_n_chunk": 1024}
        best["backward_combine_ctas"] = 4
    wanted, timed = dataclasses.replace(base, **best), []

    def time(config, which):
        timed.append((which, search.schedule(config, which, SPEC)))
        return distance(config, wanted, which)

    found = search.search(base, settings, SPEC, 8, time)
    assert found.config == wanted
    assert found.ms == dict.fromkeys(found.ms, 1.0)
    assert set(found.ms) == ({"forward", "backward"} if training else {"forward"})
    assert found.base_ms == {p: distance(base, wanted, p) for p in found.ms}
    assert len(timed) == len(set(timed)) <= (70 if training else 40)


def test_who_only_infers_makes_no_backward():
    base, settings = settings_of(FOUND, SPEC, 8, 16, training=False)
    timed = set()
    found = search.search(base, settings, SPEC, 8, lambda config, which: timed.add(which) or 1.0)
    assert timed == set(found.ms) == {"forward"}
    assert found.config.backward_order is None


def test_what_both_passes_share_is_judged_by_both():
    """Two phases make the forward faster, and the backward slower by more."""
    base, settings = settings_of(cometrt.TileConfig(num_phases=1), SPEC, 8, 16, training=True)
    ms = {("forward", 1): 1.0, ("forward", 2): 0.8, ("backward", 1): 2.0, ("backward", 2): 2.5}

    def time(config, which):
        return ms.get((which, config.num_phases), 9.0)

    assert search.search(base, settings, SPEC, 8, time).config.num_phases == 1
    ms["backward", 2] = 2.1
    assert search.search(base, settings, SPEC, 8, time).config.num_phases == 2


def test_no_trial_begins_when_the_time_is_over():
    base, settings = settings_of(cometrt.TileConfig(), SPEC, 8, 16, training=True)
    wanted, timed = dataclasses.replace(base, order="columns", n_chunk=512), []

    def time(config, which):
        timed.append(which)
        return distance(config, wanted, which)

    def run(count):
        timed.clear()
        return search.search(base, settings, SPEC, 8, time, lambda: len(timed) >= count)

    assert run(0).config == base
    assert timed == ["forward", "backward"]
    assert run(3).config == wanted
    assert timed == ["forward", "backward", "forward"]


def test_what_gains_less_than_noise_is_not_taken():
    base, settings = settings_of(cometrt.TileConfig(), SPEC, 8, 16, training=True)
    found = search.search(base, settings, SPEC, 8, lambda c, _: 1.0 - 0.005 * (c != base))
    assert found.config == base


def sweep_of(time, training=True, expired=lambda: False):
    base, settings = settings_of(cometrt.TileConfig(), SPEC, 8, 16, training)
    found = search.search(base, settings, SPEC, 8, lambda config, which: time(config, which, None))
    return found, search.sweep(base, found, settings, SPEC, 8, time, expired)


@pytest.mark.parametrize("training", [False, True])
def test_a_sweep_finds_what_gains_only_together(training):
    """Of the forward, and in training of the backward too, which shares the phases."""

    def time(config, which, counts):
        of = search.schedule(config, which, SPEC)
        return 1.0 if (of.num_phases, of.order, of.combine_ctas) == (1, "columns", 4) else 2.0

    found, swept = sweep_of(time, training)
    assert found.ms == dict.fromkeys(found.ms, 2.0)
    assert swept.ms == dict.fromkeys(found.ms, 1.0)
    assert swept.base_ms == found.base_ms
    for which in swept.ms:
        assert time(swept.config, which, None) == 1.0


def test_a_sweep_keeps_what_is_not_slower_than_the_rest():
    found, swept = sweep_of(lambda config, which, counts: 1.0)
    assert swept == found


def test_a_sweep_returns_to_the_base_where_the_search_was_misled():
    """By a GPU that was faster at that moment."""
    base, settings = settings_of(cometrt.TileConfig(), SPEC, 8, 16, training=True)
    misled = dataclasses.replace(base, order="columns", n_chunk=512)
    ms = dict.fromkeys(search.PASSES, 0.5)
    found = search.Found(misled, ms, dict.fromkeys(search.PASSES, 1.0))
    swept = search.sweep(
        base, found, settings, SPEC, 8, lambda config, *_: 1.0 + (config != base), lambda: True
    )
    assert swept.config == base
    assert swept.ms == dict.fromkeys(search.PASSES, 1.0)


@pytest.mark.parametrize("gain", [0.0, 0.5])
def test_times_of_a_result_are_of_the_same_moments(gain):
    """The GPU becomes slower: times of the search are not beside those of the turns."""
    base, settings = settings_of(cometrt.TileConfig(), SPEC, 8, 16, training=True)
    best = dataclasses.replace(base, order="columns", n_chunk=512)
    ms = dict.fromkeys(search.PASSES, 0.5)

    def time(config, which, counts):
        faster = config.order == "columns" and which == "forward"
        return 2.0 - gain * faster

    swept = search.sweep(base, search.Found(best, ms, ms), settings, SPEC, 8, time, lambda: True)
    assert swept.config == best
    assert swept.ms == {"forward": 2.0 - gain, "backward": 2.0}
    assert swept.base_ms == {"forward": 2.0, "backward": 2.0}


def test_a_sweep_takes_the_fastest_of_each_pass():
    """Where the passes share the rest: here what was found has the faster forward, and the base
    the faster backward."""
    base, settings = settings_of(cometrt.TileConfig(), SPEC, 8, 16, training=True)
    best = dataclasses.replace(base, combine_ctas=4, backward_combine_ctas=4)
    found = search.Found(best, {"forward": 1.0, "backward": 2.0}, {"forward": 1.1, "backward": 2.1})

    def time(config, which, counts):
        if which == "forward":
            return 1.1 - 0.1 * (config.combine_ctas == 4)
        return 2.0 + 0.1 * (config.backward_combine_ctas == 4)

    swept = search.sweep(base, found, settings, SPEC, 8, time, lambda: True)
    own = base.backward_combine_ctas
    assert swept.config == dataclasses.replace(best, backward_combine_ctas=own)
    assert swept.ms == {"forward": 1.0, "backward": 2.0}


def test_a_sweep_begins_with_what_differs_least():
    base, settings = settings_of(cometrt.TileConfig(), SPEC, 8, 16, training=False)
    found = search.Found(base, {"forward": 1.0}, {"forward": 1.0})
    changed = []

    def time(config, which, counts):
        names = [of.changes[0] for of in settings]
        changed.append(sum(any(getattr(config, n) != getattr(base, n) for n in of) for of in names))
        return 1.0

    search.sweep(base, found, settings, SPEC, 8, time, lambda: len(changed) >= 60)
    assert changed[:60] == sorted(changed[:60])
    assert {0, 1, 2} <= set(changed[:60])


def test_a_sweep_ends_when_the_time_is_over():
    quick = []

    def time(config, which, counts):
        if counts:
            quick.append((config, which))
        return 1.0

    sweep_of(time, expired=lambda: len(quick) >= 100)
    turns = quick[100:]  # then the fastest of each pass take turns
    finalists = set(turns)
    assert len(turns) == 7 * len(finalists)
    assert len(finalists) <= 2 * (2 + 2 * 2)


def test_a_sweep_times_each_schedule_once():
    quick = []

    def time(config, which, counts):
        if counts:
            quick.append((which, search.schedule(config, which, SPEC)))
        return 1.0

    sweep_of(time)
    turn = next(n for n in range(1, 99) if quick[-n:] == quick[-2 * n : -n])
    combinations = quick[: -7 * turn]
    assert len(combinations) == len(set(combinations))
    assert len(combinations) > 500


def test_a_config_is_told_by_what_differs_from_the_usual():
    assert search.describe(cometrt.TileConfig()) == "TileConfig()"
    config = cometrt.TileConfig(n_chunk=512, order="columns")
    assert search.describe(config) == "TileConfig(order=columns, n_chunk=512)"


# ---- several nodes -------------------------------------------------------------------------------


def changes_of(settings):
    return [[tuple(change.items()) for change in setting.changes] for setting in settings]


def test_settings_of_the_rail():
    base = cometrt.TileConfig()
    slices, sms = rail.rail_settings(base, 2, 8, 132, training=True)
    assert slices.passes == sms.passes == search.PASSES
    none = {"rail_parts": 0, "nccl_sms": None}
    assert slices.changes == [{"rail_slices": n} | none for n in (1, 3, 4, 6)]
    assert sms.changes == [{"nccl_sms": None}, {"nccl_sms": 16}]
    (slices,) = rail.rail_settings(base, 4, 8, 16, training=False)  # no SMs for more than eight
    assert slices.passes == ("forward",)
    assert [change["rail_slices"] for change in slices.changes] == [1, 3, 4, 6, 8]
    other = dataclasses.replace(base, rail_slices=12)
    slices, _ = rail.rail_settings(other, 16, 8, 132, training=True)
    assert [change["rail_slices"] for change in slices.changes] == [1, 3, 4, 6, 12, 16]
    other = dataclasses.replace(base, rail_parts=4)
    late, _ = rail.rail_settings(other, 2, 8, 132, training=True, late=True)
    parts = [(of["rail_slices"], of["rail_parts"]) for of in late.changes if of["rail_parts"]]
    assert parts == [(1, 1), (1, 2), (1, 4)]


@pytest.mark.parametrize(("least", "sms"), [(None, 132), (8, 8), (132, 132)])
def test_one_slice_alone_is_tried_where_more_are_refused(least, sms):
    assert rail.rail_settings(cometrt.TileConfig(), 2, least, sms, training=True) == []


def test_sms_are_left_to_nccl_with_several_slices_alone():
    """And no schedule is timed twice."""
    timed = []

    def time(config, which):
        timed.append((which, config))
        own = {1: 5.0, 3: 4.0, 4: 3.0, 6: 3.5}[config.rail_slices] - 0.5 * config.rail_parts
        return own - (0.5 if config.nccl_sms == 16 else 0.0)

    base, settings = (
        cometrt.TileConfig(),
        rail.rail_settings(cometrt.TileConfig(), 2, 8, 132, training=True, late=True),
    )
    found = search.search(base, settings, SPEC, 8, time, nodes=2)
    assert found.config == cometrt.TileConfig(rail_slices=4, nccl_sms=16)
    assert found.ms == {"forward": 2.5, "backward": 2.5}
    assert len(timed) == len(set(timed)) == 2 * 7
    none = [config for _, config in timed if config.rail_slices == 1 and not config.rail_parts]
    assert none
    assert all(config.nccl_sms is None for config in none)
    alone = search.search(base, settings, SPEC, 8, time)  # on one node slices are illegal
    assert alone.config == base


# ---- tune() with trials that a table answers ---------------------------------------------------


class FakeTrials:
    """Of a layer whose forward is fastest in columns, and whose backward with eight comm CTAs."""

    made: ClassVar[list] = []

    full: ClassVar[dict] = {}  # rail_slices -> the error of its first call

    def __init__(self, world, geometry, make, inputs, training, room):
        self.elapsed_sec, self.longest_sec, self.timed = 0.0, 0.0, []
        self.over_nodes = world.nodes > 1
        self.training, self.closed, self.rails = training, False, []
        FakeTrials.made.append(self)

    def time(self, config, which, counts=None):
        if config.rail_slices in self.full:
            raise self.full[config.rail_slices]
        self.timed.append(which)
        self.rails.append((config.rail_slices, config.nccl_sms))
        self.elapsed_sec, self.longest_sec = self.elapsed_sec + 1.0, 1.0
        of = search.schedule(config, which, SPEC)
        rail_ms = {4: 1.0, 3: 2.0, 1: 4.0}.get(config.rail_slices, 3.0) if self.over_nodes else 0.0
        if which == "forward":
            return rail_ms + (1.0 if of.order == "columns" else 2.0)
        return rail_ms + (3.0 if of.combine_ctas == 8 else 4.0)

    def close(self):
        self.closed = True


@pytest.fixture
def tuned(monkeypatch):
    """`tune` on the host, with those trials; returns the config."""
    FakeTrials.made.clear()
    monkeypatch.setattr("cometrt.cuda.trials.Trials", FakeTrials)
    monkeypatch.setattr("cometrt.cuda.executor.CudaExecutor", lambda *_: "executor")
    monkeypatch.setattr("cometrt.cuda.arrays.CudaArrays", lambda: None)
    one = {"size": 1, "link": None, "gpu": SimpleNamespace(last_call=None)}
    one |= {"allgather": lambda value, purpose: [value], "barrier": lambda: None}
    world = fake_world(**one)

    def run(training=True, budget_sec=45.0, problem="", progress=None):
        geometry, base = Geometry(SPEC, 0, 1), cometrt.TileConfig()
        given = (None, training, budget_sec, problem, progress)
        return tune.tune(world, geometry, 0, base, *given)

    return run


def test_both_passes_are_tuned_and_stored(tuned):
    config, executor = tuned()
    assert executor == "executor"
    assert (config.order, config.backward_order, config.backward_combine_ctas) == (
        "columns",
        "phases",
        8,
    )
    (entry,) = cache.read_entries(cache.cache_file()).values()
    assert entry["ms"] == {"forward": 1.0, "backward": 3.0}
    assert cometrt.TileConfig(**entry["config"]) == config
    assert FakeTrials.made[0].closed


def test_progress_is_told_after_each_trial(tuned):
    told = []
    tuned(progress=lambda count, best_ms: told.append((count, best_ms)))
    (trials,) = FakeTrials.made
    assert [count for count, _ in told] == list(range(1, len(trials.timed) + 1))
    assert told[0] == (1, {"forward": 2.0})
    assert told[1] == (2, {"forward": 2.0, "backward": 4.0})
    assert told[-1][1] == {"forward": 1.0, "backward": 3.0}


def test_without_training_the_forward_alone_is_tuned(tuned):
    config, _ = tuned(training=False)
    (trials,) = FakeTrials.made
    assert set(trials.timed) == {"forward"}
    assert not trials.training
    (entry,) = cache.read_entries(cache.cache_file()).values()
    assert entry["ms"] == {"forward": 1.0}
    assert config == cometrt.TileConfig(order="columns", n_chunk=512)


def test_one_config_can_be_chosen_for_tests_of_layers(tuned, monkeypatch):
    """As tests on GPUs do."""
    from tests.device.test_tune import COLUMNS, choose

    choose(monkeypatch, COLUMNS)
    config, _ = tuned()
    assert config == COLUMNS
    assert FakeTrials.made[0].timed == ["forward", "backward"]


def test_the_budget_ends_the_search(tuned):
    tuned(budget_sec=5.0)
    of_base, orders, group = ["forward", "backward"], 2 * ["forward"], ["forward", "backward"]
    assert FakeTrials.made[0].timed == of_base + orders + group


def test_a_wrong_argument_is_raised_before_any_trial(tuned):
    with pytest.raises(ValueError, match=r"no such rows \[rank 0\]"):
        tuned(problem="no such rows")
    assert not FakeTrials.made


@pytest.fixture
def tuned_over_nodes(monkeypatch):
    """The same over two nodes; also returns what `make` was called with."""
    FakeTrials.made.clear()
    monkeypatch.setattr(FakeTrials, "full", {})
    monkeypatch.setattr("cometrt.cuda.trials.Trials", FakeTrials)
    monkeypatch.setattr(rail, "room_problem", lambda *_, **__: "")
    monkeypatch.setattr(rail.Rail, "make", lambda self, config: ("executor", config))
    monkeypatch.setattr(tune, "num_sms", lambda: 132)

    def run(budget_sec=1e9, training=True, **of_world):
        world, base = nodes_world(**of_world), cometrt.TileConfig()
        given = (None, training, budget_sec, "", None)
        return tune.tune(world, Geometry(SPEC, 0, 8), 0, base, *given)

    return run


def test_slices_are_tuned_over_nodes_and_stored_with_their_number(tuned_over_nodes):
    config, executor = tuned_over_nodes()
    assert (config.rail_slices, config.nccl_sms) == (4, None)
    assert config.order == "columns"
    assert executor == ("executor", config)
    ((key, entry),) = cache.read_entries(cache.cache_file()).items()
    assert key.endswith("nodes=2")
    assert entry["ms"] == {"forward": 2.0, "backward": 5.0}
    assert cometrt.TileConfig(**entry["config"]) == config
    (made,) = FakeTrials.made
    assert set(made.rails) == {(1, None), (3, None), (4, None), (6, None), (4, 16)}
    swept = made.rails[-200:]  # the sweep changes no slices
    assert set(swept) == {(4, None)}


@pytest.mark.parametrize("bounds", [[None] * 7, [8] * 6 + [None]])
def test_without_a_bound_of_nccl_one_slice_alone_is_timed(tuned_over_nodes, caplog, bounds):
    world = nodes_world(max_ctas=None if bounds[0] is None else 4, bounds=bounds)
    made = rail.Rail(world, Geometry(SPEC, 0, 8), 0)
    assert made.settings(cometrt.TileConfig(), 132, training=True) == []
    assert caplog.text.count("tries rail_slices=1 alone: NCCL_MAX_CTAS is not set") == 1
    config, _ = tuned_over_nodes(max_ctas=None)
    assert config.rail_slices == 1
    assert set(FakeTrials.made[0].rails) == {(1, None)}


def test_the_layer_gets_an_executor_even_if_its_config_stays(tuned_over_nodes):
    """Those of the trials have named themselves in its errors."""
    config, executor = tuned_over_nodes(budget_sec=1e-3)
    assert config.rail_slices == 1
    assert FakeTrials.made[0].timed[:2] == ["forward", "backward"]
    assert executor == ("executor", config)


def test_slices_without_room_are_passed_over(tuned_over_nodes, monkeypatch):
    """In memory, or for rows: the whole layer's config is never among them."""
    asked = []

    def problem(world, shape, mode, slices, training):
        asked.append(slices.count)
        return "too little" if slices.count == 4 else ""

    monkeypatch.setattr(rail, "room_problem", problem)
    FakeTrials.full[3] = cometrt.CapacityError("too many rows")
    config, _ = tuned_over_nodes()
    assert config.rail_slices == 6
    assert asked == [3, 4, 6]
    assert {slices for slices, _ in FakeTrials.made[0].rails} == {1, 6}
    FakeTrials.full[1] = cometrt.CapacityError("too many rows")
    with pytest.raises(cometrt.CapacityError, match="too many rows"):
        tuned_over_nodes()


class FakeExecutor:
    """Takes any config with the phases of its own; records its calls."""

    made: ClassVar[list] = []

    def __init__(self, config):
        self.phases, self.configs, self.log = config.num_phases, [], []
        self.graphs = SimpleNamespace(enabled=True)
        self.retired = self.given_up = False
        FakeExecutor.made.append(self)

    def reschedule(self, config):
        fits = config.num_phases == self.phases
        self.configs += [config] if fits else []
        return fits

    def forward(self, *inputs, training, out, tracer):
        self.log.append("forward")
        return dict.fromkeys(("epoch", "x", "z", "tables")) if training else None

    def backward(self, dy, saved, *, out, accumulate, tracer):
        assert saved.num_tokens == len(dy) == SPEC.max_tokens
        self.log.append("backward")

    def synchronize(self):
        self.log.append("wait")

    def retire(self):
        self.retired = True

    def give_up(self):
        self.given_up = True


@pytest.fixture
def new_trials(monkeypatch):
    cupy = MagicMock()
    cupy.empty_like = np.empty_like
    cupy.cuda.get_elapsed_time.return_value = 6.0
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    FakeExecutor.made = []
    barrier = SimpleNamespace(close=lambda: None, open=lambda: None)
    monkeypatch.setattr(trials, "StartBarrier", lambda timeout_sec: barrier)
    monkeypatch.setattr(trials, "_normal", lambda shape, *_: np.zeros(shape, np.float32))
    x = np.zeros((SPEC.max_tokens, 8), np.float32)
    inputs = (x, *(np.zeros(1, np.float32) for _ in range(4)))
    world = fake_world(
        timeout_sec=1, barrier=lambda: None, allgather=lambda value, purpose: [value, value]
    )

    def make(training):
        room = cometrt.TileConfig(order="columns", n_chunk=512)
        return trials.Trials(world, Geometry(SPEC, 0, 8), FakeExecutor, inputs, training, room)

    return make


def test_trials_of_launch_arguments_share_an_executor(new_trials):
    made = new_trials(True)
    for config in (cometrt.TileConfig(), FOUND, cometrt.TileConfig(backward_combine_ctas=2)):
        assert made.time(config, "forward") == 2.0
    assert len(FakeExecutor.made) == 1
    made.time(cometrt.TileConfig(num_phases=4), "forward")
    made.time(FOUND, "forward")
    first, second = FakeExecutor.made
    assert [config.num_phases for config in second.configs] == [4]
    assert first.configs[-1] == FOUND
    assert not first.graphs.enabled
    assert made.elapsed_sec >= made.longest_sec >= 0
    made.close()
    assert first.given_up
    assert second.given_up


def test_executors_of_other_slices_are_given_up_first(new_trials):
    made = new_trials(True)
    sliced = cometrt.TileConfig(rail_slices=3)
    for config in (cometrt.TileConfig(), sliced, FOUND):
        made.time(config, "forward")
    one, three, again = FakeExecutor.made
    assert [one.given_up, three.given_up, again.given_up] == [True, True, False]
    made.time(dataclasses.replace(sliced, nccl_sms=16), "backward")
    assert again.given_up


def test_what_is_wrong_is_found_by_the_first_call_alone(new_trials, monkeypatch):
    """Behind it no rank has queued another call, of which others might know nothing."""
    log = []

    def synchronize(self):
        log.extend(self.log)
        raise cometrt.CapacityError("too many rows")

    made = new_trials(True)
    monkeypatch.setattr(FakeExecutor, "synchronize", synchronize)
    with pytest.raises(cometrt.CapacityError):
        made.time(FOUND, "backward")
    assert log == ["forward"]


def test_backwards_are_timed_in_a_row_of_one_forward(new_trials):
    made = new_trials(True)
    made.time(FOUND, "backward")
    (executor,) = FakeExecutor.made
    # One round of one call to see how long they take; then five rounds of three, after a warm-up.
    first = ["forward", "wait", "forward", *2 * ["backward"], "wait", *2 * ["backward"], "wait"]
    rest = ["forward", *4 * ["backward"], "wait", *20 * ["backward"], "wait"]
    assert executor.log == first + rest


def test_a_trial_that_fails_keeps_what_its_kernels_use(new_trials, monkeypatch):
    made = new_trials(False)

    def forward(*_, **__):
        raise CallNotBegun(cometrt.RoutingError("wrong"))

    monkeypatch.setattr(FakeExecutor, "forward", forward)
    with pytest.raises(cometrt.RoutingError, match="wrong"):
        made.time(FOUND, "forward")
    assert FakeExecutor.made[0].retired


@pytest.mark.parametrize(("ms", "counts"), [(0.1, (5, 3)), (20.0, (5, 1)), (400.0, (3, 1))])
def test_long_calls_are_timed_less_often(ms, counts):
    assert counts_for(ms) == counts


def test_comm_ctas_are_at_most_those_of_the_launch():
    counts = [num_comm_ctas(wanted, 16).value.tolist() for wanted in (None, 1, 15, 16, 17, 132)]
    assert counts == [[16], [1], [15], [16], [16], [16]]
