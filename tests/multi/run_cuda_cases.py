"""The rank side of test_mpirun.py and test_peers.py of tests/device, under mpirun."""

from __future__ import annotations

import dataclasses
import itertools

import cupy
from mpi4py import MPI

import cometrt
from tests.cases import Case, Output, make_inputs, on_device, on_host, run_case
from tests.device.test_orders import Rank
from tests.host.test_failures import caught
from tests.host.test_orders import batches_of
from tests.multi.aborting import aborting
from tests.multi.run_cases import CASES, checked

MODES = (("fused", "engine"), ("sequential", "engine"), ("sequential", "cublas"))


def slow_rank(world):
    """Calls in a row that a rank comes to late, and then their backwards."""
    for mode, save in itertools.product(("fused", "sequential"), ("rows", "nothing")):
        case = Case((world.size, 1), save=save, mode=mode, gemm="engine")
        batches = batches_of(case, 4, ("uniform", "at_home", "skewed"))
        rank = Rank(world, case, batches, 0.02 if world.rank == 1 else 0.0)
        for batch in range(4):
            rank.forward(batch)
        for batch in (1, 0, 2, 3):
            grads = rank.backward(batch)
            rank.layer.synchronize()
            arrays = map(on_host, (rank.y[batch], *grads))
            output = Output(next(arrays), cometrt.Gradients(*arrays))
            checked(world, case, batches[batch], output)
        rank.layer.close()


def mismatched(world):
    size = world.size
    case = Case((size, 1), mode="sequential", gemm="engine")
    inputs, move, r = make_inputs(case), on_device(world), world.rank
    shard = cometrt.shard_weights(inputs.w_up, inputs.w_down, r, size, case.spec)
    weights = [move(w) for w in shard]
    tables = move(inputs.x[r]), move(inputs.ids[r]), move(inputs.weights[r])
    dy = move(inputs.dy[r])
    layer = cometrt.MoELayer(world, case.spec, config=case.config)
    y, saved = layer.forward(*tables, *weights)
    layer.synchronize()
    if r == size - 1:
        layer.backward(dy, saved)
    else:
        layer.forward(*tables, *weights)
    error = caught(layer.synchronize)
    assert isinstance(error, cometrt.MismatchError), error
    world.reset()
    # One rank stays away: the others' kernels give up and say for whom they waited.
    world.timeout_sec = 1.0
    if r != 1:
        # A late rank finds the world stopped before its call.
        error = caught(lambda: layer.forward(*tables, *weights)) or caught(layer.synchronize)
        assert isinstance(error, cometrt.PeerTimeout), error
        assert (error.flag, error.peer) == ("source_ready", 1), error
    world.timeout_sec = 30.0
    world.reset()
    again, _ = layer.forward(*tables, *weights)
    layer.synchronize()
    assert on_host(again).tobytes() == on_host(y).tobytes()


def held(world):
    """Wrong ids on one rank; some hosts come to know before their next call, some queue more."""
    case = Case((world.size, 1), mode="fused", gemm="engine")
    inputs, move, r = make_inputs(case), on_device(world), world.rank
    shard = cometrt.shard_weights(inputs.w_up, inputs.w_down, r, world.size, case.spec)
    weights = [move(w) for w in shard]
    x, ids, topk_weights = move(inputs.x[r]), move(inputs.ids[r]), move(inputs.weights[r])
    wrong = ids.copy()
    if r == world.size - 1:
        wrong[0, 0] = case.spec.num_experts
    with cometrt.MoELayer(world, case.spec, config=case.config) as layer:
        y, _ = layer.forward(x, ids, topk_weights, *weights)
        for queued in range(3):
            layer.synchronize()
            layer.forward(x, wrong, topk_weights, *weights)
            if r % 2:
                cupy.cuda.get_current_stream().synchronize()
            error = None
            for _ in range(1 if r % 2 else queued):
                error = error or caught(lambda: layer.forward(x, ids, topk_weights, *weights))
            error = error or caught(layer.synchronize)
            assert isinstance(error, cometrt.RoutingError), error
            again, _ = layer.forward(x, ids, topk_weights, *weights)
            layer.synchronize()
            assert on_host(again).tobytes() == on_host(y).tobytes()


def main() -> None:
    with aborting(), cometrt.connect(MPI.COMM_WORLD, device="cuda", timeout_sec=30) as world:
        size = world.size
        cases = (case for case in CASES if case.dtype == "bfloat16")
        for case, (mode, gemm) in zip(cases, itertools.cycle(MODES), strict=False):
            ranks = (size, min(case.ranks[1], size))
            case = dataclasses.replace(case, ranks=ranks, mode=mode, gemm=gemm)
            inputs = make_inputs(case)
            checked(world, case, inputs, run_case(world, case, inputs))
        slow_rank(world)
        held(world)
        mismatched(world)
        gpus = len(set(world.allgather(cupy.cuda.Device().id)))
        if world.rank == 0:
            print(f"all cases passed on {gpus} GPUs", flush=True)


if __name__ == "__main__":
    main()
