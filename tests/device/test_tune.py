"""num_comm and tune() on CUDA: what is chosen changes times, never results."""

import dataclasses
import json
import re

import numpy as np
import pytest

import cometrt
import tests.cases as cases
from cometrt.cuda.executor import CudaExecutor
from cometrt.cuda.trials import Trials
from cometrt.tuner import cache
from cometrt.tuner.search import Found
from tests.cases import Case, check_case, make_inputs, on_device, on_host
from tests.device.test_failures import Rank

pytestmark = pytest.mark.gpu
COLUMNS = cometrt.TileConfig(
    order="columns", n_chunk=256, num_phases=3, raster_group=4, dispatch_ctas=1, combine_ctas=2
)


@pytest.fixture(autouse=True)
def cache_file(monkeypatch, tmp_path):
    """Of tuned configs; kernels stay in the user's."""
    monkeypatch.setattr(cache, "cache_folder", lambda: tmp_path)
    return tmp_path / "tuned.json"


def bits(rank):
    y, _ = rank.forward(training=False)
    rank.layer.synchronize()
    return on_host(y).tobytes()


@pytest.mark.parametrize("order", ["phases", "columns"])
@pytest.mark.parametrize("ranks", [(1, 1), (4, 1), (4, 2)], ids=str)
def test_num_comm_changes_no_bits(ranks, order, monkeypatch):
    monkeypatch.setattr(cases, "HIDDEN", 2560)  # ten N-chunks; two copy chunks of a row
    case = Case(ranks, "skewed", mode="fused", gemm="engine", order=order)
    inputs = make_inputs(case)

    def fn(world):
        counts = [(None, None), (1, 1), (2, 2), (10**6, 10**6), (1, None), (None, 1)]
        configs = [
            dataclasses.replace(case.config, dispatch_ctas=a, combine_ctas=b) for a, b in counts
        ]
        rank = Rank(world, inputs, case.spec, configs[0], case.mode)
        layers = [rank.layer]
        layers += [cometrt.MoELayer(world, case.spec, config=config) for config in configs[1:]]
        found = set()
        for layer in layers:
            rank.layer = layer
            found |= {bits(rank) for _ in range(3)}
        assert len(found) == 1
        assert not np.isnan(np.frombuffer(found.pop(), case.spec.numpy_dtype).astype(float)).any()

    cometrt.spawn(fn, case.size, "cuda", timeout_sec=10)


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("ranks", [(1, 1), (2, 1), (4, 1), (4, 2)], ids=str)
def test_tune_chooses_keeps_and_stays_right(ranks, given, cache_file):
    case = Case(ranks, mode="fused", gemm="engine")
    inputs = make_inputs(case)
    budget_sec = 45.0 if case.size < 4 else 3.0  # the whole sweep; and one that is cut off

    def fn(world):
        rank = Rank(world, inputs, case.spec, None, None)
        assert rank.layer.config == cometrt.TileConfig()
        before = bits(rank)
        arrays = (rank.x, rank.ids, rank.topk_weights, *rank.weights) if given else None
        config = rank.layer.tune(arrays, training=not given, budget_sec=budget_sec)
        assert rank.layer.config == config
        own = config.backward_order, config.backward_n_chunk, config.backward_combine_ctas
        assert all(value is not None for value in own) != given
        second = cometrt.MoELayer(world, case.spec)
        assert second.config == config
        output = rank.step()
        assert output.y.tobytes() == before == bits(rank)
        rank.layer = second
        assert bits(rank) == before
        return config, output

    results = cometrt.spawn(fn, case.size, "cuda", timeout_sec=30)
    assert len({config for config, _ in results}) == 1
    check_case(case, inputs, [output for _, output in results])
    (entry,) = json.loads(cache_file.read_text())["entries"].values()
    assert cometrt.TileConfig(**entry["config"]) == results[0][0]
    assert set(entry["ms"]) == ({"forward"} if given else {"forward", "backward"})
    assert all(ms > 0 for ms in entry["ms"].values())


SCHEDULES = [
    {},
    {"order": "columns", "n_chunk": 256},
    {"order": "columns", "n_chunk": 1024, "raster_group": 4, "dispatch_ctas": 1},
    {"backward_order": "columns", "backward_n_chunk": 256, "backward_combine_ctas": 1},
    {"backward_order": "columns", "backward_n_chunk": 512, "backward_dispatch_ctas": 2},
    {"order": "columns", "n_chunk": 512, "backward_order": "phases", "raster_group": 2},
]


@pytest.mark.parametrize("save", ["rows", "z"])
@pytest.mark.parametrize("ranks", [(1, 1), (4, 1), (4, 2)], ids=str)
def test_a_rescheduled_layer_has_the_same_bits(ranks, save, monkeypatch):
    """In both passes; also with `saved` of a forward that had another schedule."""
    monkeypatch.setattr(cases, "HIDDEN", 2560)
    case = Case(ranks, "skewed", save=save, mode="fused", gemm="engine")
    inputs, room = make_inputs(case), cometrt.TileConfig(order="columns", n_chunk=256)

    def fn(world):
        rank = Rank(world, inputs, case.spec, room, "fused")
        executor = rank.layer.executor
        _, saved = rank.forward()
        found = []
        for changes in (*SCHEDULES, {}):
            assert executor.reschedule(cometrt.TileConfig(**changes))
            found += [rank.step() for _ in range(3)]  # launched, captured, replayed
        grads = rank.layer.backward(rank.dy, saved)
        rank.layer.synchronize()
        assert not executor.reschedule(dataclasses.replace(room, num_phases=1)) or world.size == 1
        small = cometrt.MoELayer(world, case.spec, "fused", config=cometrt.TileConfig())
        assert not small.executor.reschedule(room)
        for name, expected in found[0].grads._asdict().items():
            assert on_host(getattr(grads, name)).tobytes() == expected.tobytes(), name
        assert len({output.digest() for output in found}) == 1
        return found[0]

    check_case(case, inputs, cometrt.spawn(fn, case.size, "cuda", timeout_sec=10))


@pytest.mark.parametrize("training", [False, True])
def test_backwards_are_made_only_in_training(training, monkeypatch):
    case = Case((2, 1), mode="fused", gemm="engine")
    inputs, operations = make_inputs(case), []

    def watch(name):
        real = getattr(CudaExecutor, name)

        def call(self, *args, **more):
            operations.append(name)
            return real(self, *args, **more)

        monkeypatch.setattr(CudaExecutor, name, call)

    watch("forward")
    watch("backward")

    def fn(world):
        rank = Rank(world, inputs, case.spec, None, None)
        return rank.layer.tune(training=training, budget_sec=3)

    cometrt.spawn(fn, 2, "cuda", timeout_sec=30)
    assert ("backward" in operations) == training
    assert "forward" in operations


@pytest.mark.parametrize("save", ["rows", "z"])
def test_backward_fields_are_tried_on_few_executors(save, monkeypatch):
    case = Case((4, 1), save=save, mode="fused", gemm="engine")
    monkeypatch.setattr(cases, "HIDDEN", 2560)
    inputs, timed, made = make_inputs(case), [], []
    time, executor = Trials.time, Trials.executor

    def watched_time(self, config, which, *counts):
        ms = time(self, config, which, *counts)
        if self._world.rank == 0:
            timed.append((which, config, ms))
        return ms

    def watched_executor(self, config):
        if self._world.rank == 0:
            made.append(config)
        return executor(self, config)

    monkeypatch.setattr(Trials, "time", watched_time)
    monkeypatch.setattr(Trials, "executor", watched_executor)

    def fn(world):
        rank = Rank(world, inputs, case.spec, None, None)
        rank.layer.tune(budget_sec=8)  # most of it for a sweep over all
        return rank.step()

    check_case(case, inputs, cometrt.spawn(fn, 4, "cuda", timeout_sec=30))
    backwards = [config for which, config, _ in timed if which == "backward"]
    assert len({config.backward_order for config in backwards}) == 2
    assert len({config.backward_n_chunk for config in backwards}) >= 3
    assert len({config.backward_dispatch_ctas for config in backwards}) >= 3
    assert len({config.backward_combine_ctas for config in backwards}) >= 3
    assert all(ms > 0 for *_, ms in timed)
    phases = {tuple(config.last_distances(4)) for _, config, _ in timed}
    assert len(made) == len(phases) < len(timed)


def test_a_budget_that_is_over_leaves_the_schedules_as_they_are():
    case = Case((2, 1), mode="fused", gemm="engine")
    inputs = make_inputs(case)

    def fn(world):
        rank = Rank(world, inputs, case.spec, COLUMNS, None)
        before = bits(rank)
        config = rank.layer.tune(budget_sec=1e-3)
        assert (
            dataclasses.replace(
                config,
                backward_order=None,
                backward_n_chunk=None,
                backward_dispatch_ctas=None,
                backward_combine_ctas=None,
            )
            == COLUMNS
        )
        assert config.of_backward() == COLUMNS.of_backward()
        assert bits(rank) == before
        with pytest.raises(ValueError, match="budget_sec must be a finite number > 0"):
            rank.layer.tune(budget_sec=0)

    cometrt.spawn(fn, 2, "cuda", timeout_sec=30)


def choose(monkeypatch, config):
    """Only `config` is tried, and taken: there is no other search, and no sweep after it."""

    def search(base, settings, spec, size, time, *_):
        ms = {which: time(config, which) for which in ("forward", "backward")}
        return Found(config, ms, ms)

    monkeypatch.setattr("cometrt.tuner.tune.search", search)
    monkeypatch.setattr("cometrt.tuner.tune.sweep", lambda base, found, *_: found)


def test_what_forward_saved_before_is_refused(monkeypatch):
    choose(monkeypatch, COLUMNS)
    case = Case((4, 1), mode="fused", gemm="engine")
    inputs = make_inputs(case)

    def fn(world):
        rank = Rank(world, inputs, case.spec, cometrt.TileConfig(), None)
        y, saved = rank.forward()
        assert rank.layer.tune() == rank.layer.config == COLUMNS
        with pytest.raises(ValueError, match=re.escape("tune() may change it")):
            rank.layer.backward(rank.dy, saved)
        output = rank.step()
        assert output.y.tobytes() == on_host(y).tobytes()
        return output

    check_case(case, inputs, cometrt.spawn(fn, 4, "cuda", timeout_sec=10))


def test_a_rank_that_fails_ends_the_trials_of_all(monkeypatch, cache_file):
    choose(monkeypatch, COLUMNS)
    case = Case((4, 1), mode="fused", gemm="engine")
    inputs = make_inputs(case)
    real, failing = Trials.calls, [True]

    def calls(self, call, count):
        if failing[0] and self._world.rank == 1:
            raise MemoryError("no room")
        real(self, call, count)

    monkeypatch.setattr(Trials, "calls", calls)

    def fn(world):
        import cupy

        rank = Rank(world, inputs, case.spec, cometrt.TileConfig(), None)
        before = bits(rank)
        with pytest.raises(MemoryError if world.rank == 1 else cometrt.PeerTimeout, match="room"):
            rank.layer.tune()
        assert rank.layer.config == cometrt.TileConfig()
        cupy.cuda.get_current_stream().synchronize()
        world.reset()
        assert bits(rank) == before
        failing[0] = False
        world.barrier()
        assert rank.layer.tune() == COLUMNS
        assert bits(rank) == before

    cometrt.spawn(fn, 4, "cuda", timeout_sec=10)


def test_wrong_routing_in_the_inputs_is_raised_on_all_ranks():
    case = Case((2, 1), mode="fused", gemm="engine")
    inputs = make_inputs(case)

    def fn(world):
        rank = Rank(world, inputs, case.spec, cometrt.TileConfig(), None)
        before = bits(rank)
        ids = inputs.ids[world.rank].copy()
        ids[3, 0] = case.spec.num_experts
        wrong = (rank.x, on_device(world)(ids), rank.topk_weights, *rank.weights)
        with pytest.raises(cometrt.RoutingError, match="rank 0, token 3"):
            rank.layer.tune(wrong)
        assert rank.layer.config == cometrt.TileConfig()
        assert bits(rank) == before

    cometrt.spawn(fn, 2, "cuda", timeout_sec=10)


def test_wrong_arguments_are_raised_on_all_ranks():
    case = Case((2, 1), mode="fused", gemm="engine")
    inputs = make_inputs(case)

    def fn(world):
        rank = Rank(world, inputs, case.spec, cometrt.TileConfig(), None)
        good = (rank.x, rank.ids, rank.topk_weights, *rank.weights)
        bad = (rank.x[:, :16], *good[1:]) if world.rank == 1 else good
        with pytest.raises(ValueError, match=r"x must have shape .* \[rank 1\]"):
            rank.layer.tune(bad)
        with pytest.raises(ValueError, match="must be equal on all ranks"):
            rank.layer.tune(good if world.rank else None)
        rank.layer.executor.captured.append(())
        with pytest.raises(ValueError, match="CUDA graph"):
            rank.layer.tune()
        sequential = cometrt.MoELayer(world, case.spec, "sequential")
        with pytest.raises(ValueError, match=r"mode 'fused' \(got 'cuda', 'sequential'\)"):
            sequential.tune()

    cometrt.spawn(fn, 2, "cuda", timeout_sec=10)
