"""The rank side of tests/device/test_nodes.py: layers over several nodes on GPUs, under mpirun.

COMETRT_RANKS_PER_NODE=2 mpirun -n 4 python -m tests.multi.run_cuda_nodes [parts] [options]

    parts          their names, or "calls", or "deadlines": those that wait for a deadline.
                   None: all, or none with --soak or --tune
    --slices 4     rail_slices of all layers; more than one need NCCL_MAX_CTAS
    --late 2       rail_parts of all layers; they need NCCL_MAX_CTAS and NCCL_CGA_CLUSTER_SIZE=1
    --soak 2000    then so many steps
    --tune         then tunes small layers, from that many slices on, for a few seconds each

Two GPUs are two nodes of one rank: COMETRT_RANKS_PER_NODE=1 mpirun -n 2 ...
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import itertools
import tempfile
import time
from pathlib import Path
from unittest import mock

import cupy
import numpy as np
from mpi4py import MPI

import cometrt
from cometrt.cuda.trials import Trials
from cometrt.tuner import cache, tune
from cometrt.tuner.search import describe
from tests.cases import (
    Case,
    Output,
    make_inputs,
    on_device,
    on_host,
    relative_error,
    run_case,
)
from tests.device.test_failures import Rank
from tests.device.test_orders import Rank as OrdersRank
from tests.host.test_failures import caught
from tests.host.test_orders import batches_of
from tests.multi.aborting import aborting
from tests.multi.run_cases import checked
from tests.multi.run_nodes import cases, limited_cases, limited_inputs, refused, together

SLICES, LATE = 1, 0
MODES = (("fused", "engine"), ("sequential", "engine"), ("fused", "engine"), ("chunked", "engine"))


def rank_of(world, case, inputs):
    return Rank(world, inputs, case.spec, case.config, case.mode)


def case_of(world, tp=1, **more) -> Case:
    given = {"mode": "fused", "gemm": "engine", "slices": SLICES, "late": LATE} | more
    return Case((world.size, min(tp, world.ranks_per_node)), **given)


def recovers(world, rank, case, inputs):
    world.reset()
    checked(world, case, inputs, rank.step())


def every_case(world):
    """Every routing with every `save`; bits repeat."""
    found = cases(world.size, SLICES, world.ranks_per_node, LATE)
    for case, (mode, gemm) in zip(
        found, itertools.cycle(MODES[:1] if LATE else MODES), strict=False
    ):
        case, begin = (
            dataclasses.replace(case, dtype="bfloat16", mode=mode, gemm=gemm),
            time.monotonic(),
        )
        inputs = make_inputs(case)
        checked(world, case, inputs, run_case(world, case, inputs))
        if world.rank == 0:
            print(f"{case}: {time.monotonic() - begin:.1f} s", flush=True)
    case = case_of(world, mode="sequential", gemm="cublas", late=0)
    inputs = make_inputs(case)
    checked(world, case, inputs, run_case(world, case, inputs))


def orders(world):
    """Calls in a row, with different numbers of tokens, that a rank comes to late."""
    for save, wanted_only in (("rows", False), ("nothing", True)):
        case = case_of(world, save=save, wanted_only=wanted_only)
        batches = batches_of(case, 4, ("uniform", "at_home", "one_token", "empty_rank"))
        rank = OrdersRank(world, case, batches, 0.02 if world.rank == 1 else 0.0)
        for batch in range(4):
            rank.forward(batch)
        for batch in (1, 0, 2, 3):
            grads = rank.backward(batch)
            rank.layer.synchronize()
            arrays = map(on_host, (rank.y[batch], *grads))
            output = Output(next(arrays), cometrt.Gradients(*arrays))
            checked(world, case, batches[batch], output)
        rank.layer.close()


def planned(world):
    """A plan made ahead, the buffer as x, the result over x, gradients that are accumulated."""
    for wanted_only in (False, True):
        planned_case(world, case_of(world, save="z", wanted_only=wanted_only))


def planned_case(world, case):
    inputs = make_inputs(case)
    rank = rank_of(world, case, inputs)
    expected = rank.step()
    plan = rank.layer.plan(rank.ids, rank.topk_weights)
    x = rank.layer.buffer()[: len(rank.x)]
    x[...] = rank.x
    w_up, w_down = rank.weights
    y, saved = rank.layer.forward(x, plan=plan, w_up=w_up, w_down=w_down, out=x)
    ones = [cupy.full(w.shape, 1, np.float32) for w in rank.weights]
    out = cometrt.Gradients(None, None, *ones)
    rank.layer.synchronize()
    assert on_host(y).tobytes() == expected.y.tobytes()  # in the buffer, until the next call
    grads = rank.layer.backward(rank.dy, saved, out=out, accumulate=True)
    rank.layer.synchronize()
    assert on_host(grads.x).tobytes() == expected.grads.x.tobytes()
    for found, alone in zip(ones, (expected.grads.w_up, expected.grads.w_down), strict=True):
        assert relative_error(on_host(found) - 1, alone.astype(np.float64)) < 0.01
    few = len(rank.x) - 1
    x = rank.layer.buffer()[1 : 1 + few]  # another place of the buffer
    x[...] = rank.x[:few]
    tables = rank.ids[:few], rank.topk_weights[:few]
    y, _ = rank.layer.forward(x, *tables, w_up, w_down)
    rank.layer.synchronize()
    assert on_host(y).tobytes() == expected.y[:few].tobytes()
    rank.layer.close()


def same_bits(world):
    """A token's results depend neither on its slice nor on what else crosses; a rank that brings
    max_tokens tokens sends them from where they are."""
    inputs = make_inputs(case_of(world))
    for count in (None, min(map(len, inputs.x))):
        outputs = []
        rails = [(1, 0), (1, 1), (1, 2), (1, 3)] if LATE else [(1, 0)] * 2
        rails = [(1, 0), (3, 0), (4, 0)] if SLICES > 1 else rails
        for (slices, late), wanted_only in itertools.product(rails, (False, True)):
            case = case_of(world, slices=slices, late=late)
            tokens = count or case.spec.max_tokens
            spec = dataclasses.replace(case.spec, max_tokens=tokens)
            if wanted_only:
                spec = dataclasses.replace(spec, max_tokens=tokens + 1, rail_tokens=tokens)
            rank = Rank(world, inputs, spec, case.config, case.mode)
            outputs.append(rank.step(count))
            rank.layer.close()
        for output in outputs[1:]:
            assert output.y.tobytes() == outputs[0].y.tobytes()
            assert output.grads.x.tobytes() == outputs[0].grads.x.tobytes()
            gates = (of.grads.topk_weights.tobytes() for of in (output, outputs[0]))
            assert next(gates) == next(gates)
            for name in ("w_up", "w_down"):
                found, one = (getattr(of.grads, name) for of in (output, outputs[0]))
                assert relative_error(found, one.astype(np.float64)) < 0.01


def counted(world):
    """Rows of all slices are in the stats of a call."""
    case = case_of(world)
    inputs = make_inputs(case)
    rank = rank_of(world, case, inputs)
    for _ in range(3):
        rank.step()
    rows = world.allgather(rank.layer.stats().rows)
    assert sum(map(np.sum, rows)) == sum(int((ids >= 0).sum()) for ids in inputs.ids)
    rank.layer.close()


def captured(world):
    """A step in a CUDA graph of the caller's, replayed with other tokens."""
    for wanted_only in (False, True):
        captured_case(world, case_of(world, wanted_only=wanted_only))


def captured_case(world, case):
    batches = batches_of(case, 2)
    rank = rank_of(world, case, batches[0])
    count = min(len(of[world.rank]) for of in (batches[0].x, batches[1].x))
    first = rank.step(count)
    move, r = on_device(world), world.rank
    other = move(batches[1].x[r][:count])
    stream = cupy.cuda.Stream(non_blocking=True)
    world.barrier()
    with stream:
        stream.begin_capture()
        y, saved = rank.forward(count)
        grads = rank.layer.backward(rank.dy[:count], saved)
        graph = stream.end_capture()
    for _ in range(3):
        world.barrier()
        graph.launch(stream)
        stream.synchronize()
        assert on_host(y).tobytes() == first.y.tobytes()
        assert on_host(grads.x).tobytes() == first.grads.x.tobytes()
    rank.x[:count] = other
    cupy.cuda.get_current_stream().synchronize()
    world.barrier()
    graph.launch(stream)
    stream.synchronize()
    again, _ = rank.forward(count)
    rank.layer.synchronize()
    assert on_host(y).tobytes() == on_host(again).tobytes() != first.y.tobytes()
    rank.layer.close()


def wrong_tables(world):
    """All ranks raise, and the layer goes on."""
    for wanted_only in (False, True):
        wrong_tables_of(world, case_of(world, wanted_only=wanted_only))


def wrong_tables_of(world, case):
    inputs = make_inputs(case)
    rank = rank_of(world, case, inputs)
    expected = rank.step()
    good, last = rank.ids.copy(), world.size - 1
    for value in (case.spec.num_experts, -7, None):
        gates = rank.topk_weights.copy()
        if world.rank == last and value is None:
            rank.topk_weights[2, 1] = np.nan
        elif world.rank == last:
            rank.ids[2, 1] = value
        y, _ = rank.forward()
        error = caught(rank.layer.synchronize)
        assert isinstance(error, cometrt.RoutingError), error
        assert f"of rank {last}, token 2, k 1 break a rule" in str(error), error
        assert (error.rank, error.token, error.k) == (last, 2, 1), vars(error)
        assert np.isnan(on_host(y).astype(np.float32)).all()
        rank.ids[...], rank.topk_weights[...] = good, gates
        together(world)
        assert rank.step().digest() == expected.digest()
    rank.layer.close()


def limited(world):
    """Exactly as many tokens cross as may; then one more does."""
    case = case_of(world, seed=3)
    (tight, less), inputs = limited_cases(world, case), limited_inputs(world, case)
    checked(world, tight, inputs, run_case(world, tight, inputs))
    rank = rank_of(world, less, inputs)
    for call in (rank.forward, lambda: rank.layer.plan(rank.ids, rank.topk_weights)):
        call()
        refused(caught(rank.layer.synchronize), world, tight.rail_tokens)
        together(world)
    at_home = limited_inputs(world, case, at_home=True)
    good = on_device(world)(at_home.ids[world.rank])
    rank.ids[...] = good
    if world.rank == 1:
        rank.ids[3:] += case.spec.num_experts  # wrong, and wanted by all nodes
    rank.layer.plan(rank.ids, rank.topk_weights)
    error = caught(rank.layer.synchronize)
    assert isinstance(error, cometrt.RoutingError), error
    assert (error.rank, error.token, error.k) == (1, 3, 0), vars(error)
    together(world)
    rank.ids[...] = good
    checked(world, less, at_home, rank.step())
    rank.layer.close()


def too_many_rows(world):
    """One node has too few rows; the ranks of all nodes raise, and say which rank."""
    case = case_of(world)
    spec = dataclasses.replace(case.spec, capacity_factor=0.25, max_tokens=512)
    inputs, r = make_inputs(case), world.rank
    tokens, topk = spec.max_tokens, spec.topk
    ids = np.tile(np.arange(topk, dtype=np.int32), (tokens, 1))  # all on rank 0
    spread = (ids + 4 * np.arange(tokens)[:, None]) % spec.num_experts
    move = on_device(world)
    x, gates = move(np.ones((tokens, spec.hidden), spec.numpy_dtype)), move(np.ones(ids.shape, "f"))
    shards = cometrt.shard_weights(inputs.w_up, inputs.w_down, r, world.size, spec)
    weights = [move(w) for w in shards]
    with cometrt.MoELayer(world, spec, config=case.config) as layer:
        for call in ("forward", "plan"):
            if call == "forward":
                y, _ = layer.forward(x, move(ids), gates, *weights)
            else:
                layer.plan(move(ids), gates)
            error = caught(layer.synchronize)
            assert isinstance(error, cometrt.CapacityError), error
            assert error.rank == 0, error
            assert len(set(world.allgather(str(error)))) == 1, error
        assert np.isnan(on_host(y).astype(np.float32)).all()
        together(world)
        y, _ = layer.forward(x, move(spread.astype(np.int32)), gates, *weights)
        error = caught(layer.synchronize)
        assert error is None or isinstance(error, cometrt.CapacityError)


def behind_a_failure(world):
    """A call fails on one node alone, and one queued behind it does nothing there. So nodes count
    other epochs. A forward before them still has its backward."""
    case = case_of(world)
    spec = dataclasses.replace(case.spec, capacity_factor=1.1, max_tokens=2048)
    inputs, move = make_inputs(case), on_device(world)
    shape = (spec.max_tokens, spec.hidden)
    x, gates = move(np.ones(shape, spec.numpy_dtype)), move(np.ones((shape[0], spec.topk), "f"))
    on_rank_0 = np.tile(np.arange(spec.topk, dtype=np.int32), (shape[0], 1))
    spread = (on_rank_0 + 4 * np.arange(shape[0], dtype=np.int32)[:, None]) % spec.num_experts
    shards = cometrt.shard_weights(inputs.w_up, inputs.w_down, world.rank, world.size, spec)
    weights = [move(w) for w in shards]
    good, bad = move(spread.astype(np.int32)), move(on_rank_0)
    with cometrt.MoELayer(world, spec, config=case.config) as layer:
        _, saved = layer.forward(x, good, gates, *weights)
        layer.synchronize()
        together(world)
        # Both are queued before the first begins: else the second might raise on some ranks.
        cupy.cuda.get_current_stream().launch_host_func(time.sleep, 0.5)
        for ids in (bad, good):
            layer.forward(x, ids, gates, *weights)
        error = caught(layer.synchronize)
        assert isinstance(error, cometrt.CapacityError), error
        assert error.rank == 0, error
        assert len(set(world.allgather(str(error)))) == 1, error
        together(world)
        grads = layer.backward(x, saved)
        layer.synchronize()
        assert all(np.isfinite(on_host(grad).astype(np.float32)).all() for grad in grads)


def mismatched(world):
    case = case_of(world)
    inputs = make_inputs(case)
    rank = rank_of(world, case, inputs)
    _, saved = rank.forward()
    rank.layer.synchronize()
    together(world)
    last, begin = world.ranks_per_node * (world.nodes - 1), time.monotonic()
    if world.rank >= last:  # all of the last node
        error = caught(rank.layer.backward, rank.dy, saved)
    else:
        error = caught(rank.forward)
    error = error or caught(rank.layer.synchronize)
    assert isinstance(error, cometrt.MismatchError), error
    assert "ranks made different calls in epoch" in str(error), error
    assert time.monotonic() - begin < 10  # though transfers of different calls may never end
    recovers(world, rank, case, inputs)


def stalled(world):
    """All ranks of a node sleep through the deadline: before a call, and in the middle of one."""
    case = case_of(world)
    inputs = make_inputs(case)
    rank = rank_of(world, case, inputs)
    rank.step()
    for node, in_call in ((world.nodes - 1, False), (0, False), (world.nodes - 1, True)):
        world.timeout_sec = 1.0
        sleeps = world.node_index == node
        together(world)
        begin = time.monotonic()
        if sleeps and not in_call:
            time.sleep(3.0)
        if sleeps and in_call:
            inner = rank.layer.executor.inner
            launch, sleeps_for = inner.kernels["finish"], [3.0]

            def late(*arguments, launch=launch, sleeps_for=sleeps_for):
                time.sleep(sleeps_for.pop() if sleeps_for else 0.0)  # in the first slice
                launch(*arguments)

            inner.kernels["finish"], inner.graphs.enabled = late, False
        error = caught(lambda: rank.forward()) or caught(rank.layer.synchronize)
        assert isinstance(error, cometrt.PeerTimeout), error
        if not sleeps:
            assert 0.5 < time.monotonic() - begin < 2.5 + 1.0, time.monotonic() - begin
            assert error.peer // world.ranks_per_node == node, error
        if sleeps and in_call:
            inner.kernels["finish"], inner.graphs.enabled = launch, True
        world.timeout_sec = 30.0
        recovers(world, rank, case, inputs)
    rank.layer.close()


def hidden_by_the_caller(world):
    """A caller that waits for its stream alone, and not by `synchronize`, waits no longer either;
    what it finds is NaN."""
    case = case_of(world)
    inputs = make_inputs(case)
    rank = rank_of(world, case, inputs)
    rank.step()
    world.timeout_sec = 1.0
    together(world)
    if world.node_index == 0:
        time.sleep(3.0)
    else:
        y, _ = rank.forward()
        begin = time.monotonic()
        cupy.cuda.get_current_stream().synchronize()
        assert time.monotonic() - begin < 3.0
        assert np.isnan(on_host(y).astype(np.float32)).all()
    world.timeout_sec = 30.0
    recovers(world, rank, case, inputs)


def tuned(world):
    """All ranks find one config, with which the layer is right, and a layer made later finds it.
    Routing that is wrong is raised on all ranks, and the layer keeps its config."""
    case = case_of(world, save="z")
    inputs, spec, last = make_inputs(case), case.spec, world.size - 1
    file = Path(world.allgather(tempfile.mkdtemp())[0]) / "tuned.json"  # rank 0's
    slices_timed = set()
    real = Trials.time

    def time_of(self, config, which, counts=None):
        slices_timed.add(config.rail_slices)
        return real(self, config, which, counts)

    with contextlib.ExitStack() as stack:
        for owner in (cache, tune):
            stack.enter_context(mock.patch.object(owner, "cache_file", return_value=file))
        stack.enter_context(mock.patch.object(Trials, "time", time_of))
        rank = rank_of(world, case, inputs)
        given = (rank.x, rank.ids, rank.topk_weights, *rank.weights)
        for arrays, training in ((None, True), (given, True), (given, False)):
            slices_timed.clear()
            begin = time.monotonic()
            config = rank.layer.tune(arrays, training=training, budget_sec=3)
            if world.rank == 0:
                seconds = time.monotonic() - begin
                print(f"{seconds:.1f} s, slices {slices_timed}: {describe(config)}", flush=True)
            assert len(set(world.allgather((config, *sorted(slices_timed))))) == 1
            bounded = world.nccl.max_ctas is not None
            assert (slices_timed > {1}) if bounded else (slices_timed == {1})
            checked(world, case, inputs, rank.step())
            with cometrt.MoELayer(world, spec) as later:
                assert later.config == config
        if world.rank == last:
            rank.ids[2, 1] = spec.num_experts
        error = caught(lambda: rank.layer.tune(given, budget_sec=3))
        assert isinstance(error, cometrt.RoutingError), error
        assert (error.rank, error.token, error.k) == (last, 2, 1), vars(error)
        assert rank.layer.config == config
        if world.rank == last:
            rank.ids[...] = on_device(world)(inputs.ids[last])
        checked(world, case, inputs, rank.step())
        rank.layer.close()


def soak(world, calls: int):
    """Steps of layers of every `save` by turns; bits must repeat."""
    ranks, expected = [], []
    for save, tp in (("rows", 1), ("z", 2), ("nothing", 1)):
        case = case_of(world, tp, save=save, wanted_only=save != "z")
        inputs = make_inputs(case)
        rank = rank_of(world, case, inputs)
        ranks.append(rank)
        expected.append(rank.step().digest())
    begin = time.monotonic()
    for call in range(calls):
        which = call % len(ranks)
        if call % 97 == 13 * world.rank % 97:
            time.sleep(0.01)
        if call % 10 == 9:
            assert ranks[which].step().digest() == expected[which], call
        else:
            _, saved = ranks[which].forward()
            ranks[which].layer.backward(ranks[which].dy, saved)
        if world.rank == 0 and call % 500 == 499:
            print(f"{call + 1} steps, {time.monotonic() - begin:.0f} s", flush=True)
    for rank in ranks:
        rank.layer.close()


CALLS = (
    every_case, orders, planned, same_bits, counted, captured, wrong_tables, limited,
    too_many_rows, behind_a_failure, mismatched,
)  # fmt: skip
DEADLINES = (stalled, hidden_by_the_caller)
PARTS = {part.__name__: (part,) for part in CALLS + DEADLINES}
PARTS |= {"calls": CALLS, "deadlines": DEADLINES}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("parts", nargs="*", choices=[[], *PARTS])
    parser.add_argument("--soak", type=int, default=0)
    parser.add_argument("--slices", type=int, default=1)
    parser.add_argument("--late", type=int, default=0)
    parser.add_argument("--tune", action="store_true")
    args = parser.parse_args()
    global SLICES, LATE
    SLICES, LATE = args.slices, args.late
    names = args.parts or ([] if args.soak or args.tune else ["calls", "deadlines"])
    with aborting():
        with cometrt.connect(MPI.COMM_WORLD, device="cuda", timeout_sec=30) as world:
            assert world.nodes > 1, "needs COMETRT_RANKS_PER_NODE"
            parts = {part.__name__: part for name in names for part in PARTS[name]}
            if args.tune:
                parts["tuned"] = tuned
            if args.soak:
                parts["soak"] = functools.partial(soak, calls=args.soak)
            for name, part in parts.items():
                begin = time.monotonic()
                part(world)
                if world.rank == 0:
                    print(f"{name}: {time.monotonic() - begin:.0f} s", flush=True)
        print("all parts passed", flush=True)


if __name__ == "__main__":
    main()
