"""The rank side of test_mpirun.py: many cases in one launch; rank 0 writes what came out."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
import traceback

from mpi4py import MPI

import cometrt
from tests.cases import Case, check_case, make_inputs, run_case
from tests.faults import at, jitter, slow
from tests.host.test_failures import caught
from tests.host.test_orders import Rank, batches_of

SIZE = 4
CASES = [
    Case(ranks, routing, activation, dtype, columns, save, order, mode, seed)
    for seed, (ranks, routing, activation, dtype, columns, save, order, mode) in enumerate(
        [
            ((4, 1), "uniform", "swiglu", "bfloat16", 48, "rows", "phases", "fused"),
            ((4, 2), "uniform", "geglu", "bfloat16", 80, "z", "columns", "fused"),
            ((4, 4), "uniform", "silu", "float32", 16, "rows", "columns", "fused"),
            ((4, 1), "skewed", "gelu", "float32", 80, "z", "phases", "fused"),
            ((4, 2), "skewed", "relu", "bfloat16", 16, "rows", "phases", "sequential"),
            ((4, 1), "one_expert", "relu2", "bfloat16", 48, "rows", "columns", "fused"),
            ((4, 2), "one_expert", "swiglu", "float32", 48, "z", "phases", "fused"),
            ((4, 1), "empty_rank", "swiglu", "bfloat16", 48, "z", "columns", "sequential"),
            ((4, 2), "empty_rank", "gelu", "bfloat16", 80, "rows", "phases", "fused"),
            ((4, 1), "idle_experts", "geglu", "bfloat16", 48, "rows", "phases", "fused"),
            ((4, 1), "all_dropped", "swiglu", "bfloat16", 16, "z", "phases", "fused"),
            ((4, 4), "all_dropped", "relu", "float32", 48, "rows", "columns", "fused"),
            ((4, 1), "one_token", "swiglu", "bfloat16", 48, "rows", "phases", "fused"),
            ((4, 2), "one_token", "silu", "float32", 48, "z", "columns", "fused"),
            ((4, 1), "at_home", "swiglu", "bfloat16", 48, "rows", "phases", "fused"),
            ((4, 4), "at_home", "relu2", "float32", 80, "z", "phases", "fused"),
            ((4, 1), "skewed", "swiglu", "bfloat16", 80, "nothing", "columns", "fused"),
            ((4, 2), "empty_rank", "geglu", "bfloat16", 48, "nothing", "phases", "sequential"),
        ]
    )
]


def checked(world, case, inputs, output):
    """Every rank's output, checked on rank 0; digests of all."""
    arrays = world.allgather(output)
    if world.rank == 0:
        check_case(case, inputs, arrays)
    return [o.digest() for o in arrays]


def one_case(world, case: Case):
    inputs = make_inputs(case)
    return checked(world, case, inputs, run_case(world, case, inputs))


def orders(world):
    case = Case((SIZE, 1), save="z")
    batches = batches_of(case, 6, ("uniform", "at_home", "skewed"))
    for tracer in (slow(0.002) if world.rank == 1 else None, jitter(world.rank, 0.003)):
        rank = Rank(world, case, batches, tracer)
        for batch in range(6):
            rank.forward(batch)
        for batch in (0, 2, 1, 5, 4, 3):
            checked(world, case, batches[batch], rank.backward(batch))
        rank.forward(0)
        checked(world, case, batches[0], rank.backward(0))


def recovers(world, rank, case, inputs):
    world.reset()
    rank.layer.tracer = cometrt.trace.NullTracer()
    rank.forward(0)
    checked(world, case, inputs, rank.backward(0))


def stalled(world, where: str, call: str):
    """Rank 2 sleeps through the deadline in the middle of a call."""
    case, inputs = Case((SIZE, 1)), make_inputs(Case((SIZE, 1)))
    rank = Rank(world, case, [inputs])
    if call == "backward":
        rank.forward(0)
    if world.rank == 2:
        rank.layer.tracer = at(where, lambda: time.sleep(3 * world.timeout_sec))
    epoch = world.epoch + 1
    error = caught(getattr(rank, call), 0)
    assert isinstance(error, cometrt.PeerTimeout), error
    if world.rank != 2:
        assert (error.peer, error.epoch) == (2, epoch), error
        assert error.tile >= 0, error
    assert isinstance(caught(rank.forward, 0), cometrt.PeerTimeout)
    world.timeout_sec, kept = 60.0, world.timeout_sec  # reset waits for the stalled rank
    recovers(world, rank, case, inputs)
    world.timeout_sec = kept


def raising(world):
    """Rank 1 raises in the middle; nobody sits out the deadline of a minute."""
    case, inputs = Case((SIZE, 1)), make_inputs(Case((SIZE, 1)))
    rank = Rank(world, case, [inputs])

    def fail():
        raise KeyError("out of luck")

    if world.rank == 1:
        rank.layer.tracer = at("down", fail)
    world.timeout_sec, kept = 60.0, world.timeout_sec
    begin = time.monotonic()
    error = caught(rank.forward, 0)
    assert time.monotonic() - begin < 20
    world.timeout_sec = kept
    assert isinstance(error, KeyError if world.rank == 1 else cometrt.PeerTimeout), error
    if world.rank != 1:
        assert "rank 1 raised KeyError in down of tile" in str(error)
    recovers(world, rank, case, inputs)


def mismatched(world):
    case, inputs = Case((SIZE, 1)), make_inputs(Case((SIZE, 1)))
    rank = Rank(world, case, [inputs])
    rank.forward(0)
    error = caught(rank.backward if world.rank == 3 else rank.forward, 0)
    assert isinstance(error, cometrt.MismatchError), error
    assert "rank 3: backward of layer" in str(error)
    recovers(world, rank, case, inputs)


def main() -> None:
    results: dict[str, object] = {"digests": {}}
    failed = ""
    try:
        with cometrt.connect(MPI.COMM_WORLD, device="host", timeout_sec=60) as world:
            assert world.size == SIZE
            for case in CASES:
                digests = one_case(world, case)
                results["digests"][str(case)] = digests
            orders(world)
            mismatched(world)
            raising(world)
            world.timeout_sec = 0.5
            for where, call in (("up", "forward"), ("reduce and push", "forward")):
                stalled(world, where, call)
            stalled(world, "up dgrad", "backward")
        # A second world of the same processes, of another size of heap.
        with cometrt.connect(MPI.COMM_WORLD, device="host") as world:
            one_case(world, dataclasses.replace(CASES[0], shard_columns=80))
    except BaseException:
        failed = traceback.format_exc()
        print(failed, file=sys.stderr, flush=True)
    if MPI.COMM_WORLD.Get_rank() == 0:
        with open(sys.argv[1], "w", encoding="utf-8") as file:
            json.dump(results, file)
    if failed:
        MPI.COMM_WORLD.Abort(1)


if __name__ == "__main__":
    main()
