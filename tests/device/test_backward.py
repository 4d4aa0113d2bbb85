"""The fused backward gives the bits of the sequential one, since both sum in the same order."""

import dataclasses
import functools
import itertools
import zlib

import numpy as np
import pytest

import cometrt
from cometrt.bench.workloads import distinct_experts, random_inputs
from tests.cases import (
    ACTIVATIONS,
    ROUTINGS,
    Case,
    Output,
    check_case,
    make_inputs,
    on_device,
    on_host,
    run_case,
)
from tests.device.pauses import Pauses
from tests.device.test_failures import Rank
from tests.device.test_orders import run_orders
from tests.host.test_failures import caught
from tests.host.test_orders import batches_of

pytestmark = pytest.mark.gpu

RANKS = [(1, 1), (2, 1), (4, 1), (8, 1), (2, 2), (4, 2), (8, 4)]
_TURNS = itertools.cycle(
    itertools.product(
        ACTIVATIONS, [16, 80, 272], ["rows", "z", "nothing"], ["phases", "columns"], [0, 1]
    )
)
CASES = [
    Case(ranks, routing, activation, "bfloat16", columns, save, order, "fused", seed, "engine")
    for (ranks, routing), (activation, columns, save, order, seed) in zip(
        itertools.product(RANKS, ROUTINGS), _TURNS, strict=False
    )
]


def bits(output):
    return {name: value.tobytes() for name, value in output.grads._asdict().items()}


def compare(case, inputs, timeout_sec=10, link=None):
    """Run both modes on the same inputs; compare them with each other and with the reference."""

    def fn(world):
        return [
            run_case(world, dataclasses.replace(case, mode=mode), inputs)
            for mode in ("fused", "sequential")
        ]

    results = cometrt.spawn(fn, case.size, "cuda", timeout_sec=timeout_sec, link=link)
    check_case(case, inputs, [fused for fused, _ in results])
    for rank, (fused, sequential) in enumerate(results):
        found, expected = bits(fused), bits(sequential)
        differ = [name for name in expected if found[name] != expected[name]]
        assert not differ, f"rank {rank}: {differ}"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_small_layers_of_every_routing(case):
    compare(case, make_inputs(case))


@dataclasses.dataclass(frozen=True)
class Wide(Case):
    """Experts of several M-tiles, rows of several copy chunks, several N-tiles and N-chunks."""

    changes: tuple = ()  # pairs (field, value) of the config

    @property
    def spec(self):
        size, tp = self.ranks
        return cometrt.MoESpec(
            hidden=1552,
            intermediate=self.shard_columns * tp,
            num_experts=4 * (size // tp),
            topk=4,
            max_tokens=400,
            tp=tp,
            activation=self.activation,
            save=self.save,
            capacity_factor=4.0 * size,
        )

    @property
    def config(self):
        return cometrt.TileConfig(**dict(self.changes))


def wide_inputs(case):
    """One of two draws for the case's shape, which cases share: references take long."""
    return shared_inputs(
        Wide(case.ranks, activation=case.activation, shard_columns=case.shard_columns),
        zlib.crc32(str(case).encode()) % 2,
    )


@functools.lru_cache(maxsize=4)
def shared_inputs(case, seed):
    rng = np.random.default_rng((seed, zlib.crc32(str(case).encode())))
    scores = rng.normal(size=case.spec.num_experts)
    ids = [
        distinct_experts(rng, (400 - 37 * rank,), scores, case.spec.topk)
        for rank in range(case.size)
    ]
    return random_inputs(case.spec, ids, rng)


CHANGES = [
    {},
    {"order": "columns", "n_chunk": 512},
    {"backward_order": "columns", "backward_n_chunk": 256},
    {"order": "columns", "n_chunk": 256, "backward_order": "phases"},
    {"backward_dispatch_ctas": 1, "backward_combine_ctas": 1},
    {"raster_group": 2, "num_phases": 4, "block_tokens": 16, "min_token_blocks": 1},
]


@pytest.mark.parametrize("save", ["rows", "z", "nothing"])
@pytest.mark.parametrize("changes", CHANGES, ids=str)
@pytest.mark.parametrize("ranks", [(1, 1), (4, 1), (4, 2)], ids=str)
def test_wide_layers_in_every_order(ranks, changes, save):
    case = Wide(
        ranks, shard_columns=592, save=save, mode="fused", gemm="engine", seed=len(changes) % 2,
        changes=tuple(changes.items()),
    )  # fmt: skip
    compare(case, wide_inputs(case))


@pytest.mark.parametrize(
    ("mode", "gemm", "changes"),
    [
        ("fused", "engine", {}),
        ("fused", "engine", {"raster_group": 2, "num_phases": 4, "dispatch_ctas": 1}),
        ("sequential", "engine", {}),
        ("chunked", "engine", {"pipeline_chunks": 3}),
        ("sequential", "cublas", {"gemm": "cublas"}),
    ],
    ids=str,
)
@pytest.mark.parametrize("activation", ["geglu", "relu2"])
@pytest.mark.parametrize("ranks", [(1, 1), (4, 1), (4, 2)], ids=str)
def test_every_save_has_the_same_bits(ranks, activation, mode, gemm, changes):
    case = Wide(
        ranks, activation=activation, shard_columns=592, mode=mode, gemm=gemm,
        changes=tuple(changes.items()),
    )  # fmt: skip
    inputs = wide_inputs(case)

    def fn(world):
        saves = (dataclasses.replace(case, save=save) for save in ("rows", "z", "nothing"))
        return [run_case(world, each, inputs) for each in saves]

    results = cometrt.spawn(fn, case.size, "cuda", timeout_sec=10)
    check_case(case, inputs, [outputs[-1] for outputs in results])
    for rank, (rows, *others) in enumerate(results):
        for save, output in zip(("z", "nothing"), others, strict=True):
            assert output.y.tobytes() == rows.y.tobytes(), f"rank {rank}, {save}"
            differ = [name for name, value in bits(rows).items() if bits(output)[name] != value]
            assert not differ, f"rank {rank}, {save}: {differ}"


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(activation):
    case = Wide((2, 1), activation=activation, shard_columns=272, mode="fused", gemm="engine")
    compare(case, wide_inputs(case))


@pytest.mark.parametrize("save", ["rows", "z", "nothing"])
def test_with_an_emulated_link(save):
    case = Wide((4, 1), shard_columns=272, save=save, mode="fused", gemm="engine")
    compare(case, wide_inputs(case), link="h100")


@pytest.mark.parametrize("wide", [(False, False), (True, True), (True, False)], ids=str)
@pytest.mark.parametrize("ranks", [(1, 1), (4, 2)], ids=str)
def test_gradients_are_added_to_what_is_there(ranks, wide):
    case = Wide(ranks, shard_columns=272, mode="fused", gemm="engine")
    inputs = wide_inputs(case)

    def fn(world):
        results, move = [], on_device(world)
        for mode in ("fused", "sequential"):
            rank = Rank(world, inputs, case.spec, case.config, mode)
            geometry = rank.layer.geometry
            shapes = geometry.w_up_shape, geometry.w_down_shape
            totals = [
                move(np.full(shape, 0.5, np.float32 if is_wide else case.spec.numpy_dtype))
                for shape, is_wide in zip(shapes, wide, strict=True)
            ]
            for _ in range(2):
                _, saved = rank.forward()
                out = cometrt.Gradients(None, None, *totals)
                rank.layer.backward(rank.dy, saved, out=out, accumulate=True)
            rank.layer.synchronize()
            results.append([on_host(total).tobytes() for total in totals])
            rank.layer.close()
        assert results[0] == results[1]
        return totals[0].dtype == np.float32

    assert cometrt.spawn(fn, case.size, "cuda", timeout_sec=10) == [wide[0]] * case.size


@pytest.mark.parametrize("save", ["rows", "z", "nothing"])
@pytest.mark.parametrize("order", ["f0 f1 f2 b2 b0 b1", "f0 f1 b1 f2 b2 b0", "f0 b0 f1 b1 f2 b2"])
@pytest.mark.parametrize("ranks", [(4, 1), (4, 2)], ids=str)
def test_micro_batches_in_any_order_with_a_slow_rank(ranks, order, save):
    case = Case(ranks, save=save, mode="fused", gemm="engine")
    batches = batches_of(case, 3, ("uniform", "one_token", "skewed"))
    run_orders(case, batches, order)


# publish, prepare, the launches of `FusedBackward`, finish
@pytest.mark.parametrize(
    ("save", "before"),
    [(s, i) for s, launches in {"rows": 5, "z": 5, "nothing": 6}.items() for i in range(launches)],
)
def test_a_rank_that_is_late_before_any_launch(before, save):
    case = Wide((4, 1), shard_columns=80, save=save, mode="fused", gemm="engine")
    inputs = wide_inputs(case)

    def fn(world):
        rank = Rank(world, inputs, case.spec, case.config, "fused")
        rank.layer.executor.graphs.enabled = False
        expected = rank.step()
        pauses = Pauses()
        world.barrier()
        if world.rank == 1:
            pauses.hold_up(rank.layer)
            late = [0] * 11  # of the forward, then of the backward
            late[5 + before] = 20_000
            pauses.next = iter(late)
        assert bits(rank.step()) == bits(expected)
        return expected

    check_case(case, inputs, cometrt.spawn(fn, case.size, "cuda", timeout_sec=10))


@pytest.mark.parametrize("save", ["rows", "z", "nothing"])
def test_a_lost_push_ends_all_waits_and_reset_helps(save):
    case = Case((4, 1), save=save, mode="fused", gemm="engine")
    inputs = make_inputs(case)

    def fn(world):
        rank = Rank(world, inputs, case.spec, case.config, "fused")
        _, saved = rank.forward()
        rank.layer.synchronize()
        if world.rank == 1:
            rank.layer.executor.kernels["up_dgrad_combine_wgrad"] = lambda *_: None
        world.timeout_sec = 1.0
        grads = rank.layer.backward(rank.dy, saved)
        error = caught(rank.layer.synchronize)
        if world.rank != 1:  # rank 1 waits for no peer and may have ended before
            assert isinstance(error, cometrt.PeerTimeout)
            assert (error.flag, error.peer, error.epoch) == ("partials_ready", 1, 2)
            for grad in grads:
                assert np.isnan(on_host(grad).astype(np.float32)).all()
        world.timeout_sec = 10.0
        world.reset()
        return Rank(world, inputs, case.spec, case.config, "fused").step()

    check_case(case, inputs, cometrt.spawn(fn, case.size, "cuda", timeout_sec=10))


@pytest.mark.parametrize("name", ["prepare_backward", "dispatch_gemm", "dispatch_down_dgrad"])
def test_a_rank_that_raises_in_the_middle_ends_the_others(name):
    case = Case((4, 1), save="nothing", mode="fused", gemm="engine")
    inputs = make_inputs(case)

    def fail(*_):
        raise LookupError("mine")

    def fn(world):
        rank = Rank(world, inputs, case.spec, case.config, "fused")
        _, saved = rank.forward()
        rank.layer.synchronize()
        rank.layer.executor.graphs.enabled = False
        if world.rank == 1:
            rank.layer.executor.kernels[name] = fail
        error = caught(rank.layer.backward, rank.dy, saved) or caught(rank.layer.synchronize)
        assert isinstance(error, LookupError if world.rank == 1 else cometrt.PeerTimeout)
        world.reset()
        return Rank(world, inputs, case.spec, case.config, "fused").step()

    check_case(case, inputs, cometrt.spawn(fn, case.size, "cuda", timeout_sec=10))


@pytest.mark.parametrize("save", ["rows", "nothing"])
def test_a_trace_has_every_tile(save):
    case = Wide((2, 1), shard_columns=272, save=save, mode="fused", gemm="engine")
    inputs = wide_inputs(case)

    def fn(world):
        rank = Rank(world, inputs, case.spec, case.config, "fused")
        expected = bits(rank.step())
        _, saved = rank.forward()
        rank.layer.synchronize()
        with cometrt.trace.record(rank.layer) as recording:
            grads = rank.layer.backward(rank.dy, saved)
        rank.layer.synchronize()
        grads = cometrt.Gradients(*map(on_host, grads))
        assert bits(Output(expected, grads)) == expected
        return recording.gather(), rank.layer.geometry

    timeline, geometry = cometrt.spawn(fn, case.size, "cuda", timeout_sec=10)[0]
    names = {event.name for event in timeline.events}
    wanted = {"down dgrad", "up dgrad", "wgrad", "pull", "reduce and push", "reduce at home"}
    assert wanted <= names
    assert ("up" in names) == (save == "nothing")
    # Both gradients of each expert: [2 * 272, 1552] in 5 x 7 tiles, [1552, 272] in 13 x 2.
    found = [event for event in timeline.events if (event.rank, event.name) == (0, "wgrad")]
    assert len(found) == geometry.local_experts * (5 * 7 + 13 * 2)
