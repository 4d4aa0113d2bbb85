"""The rank side of tests/device/test_mpirun.py: cases on one GPU or several, under mpirun."""

from __future__ import annotations

import sys
import traceback

from mpi4py import MPI

import cometrt
from cometrt.plan.config import GEMMS
from tests.cases import Case, make_inputs, on_device, on_host, run_case
from tests.host.test_failures import caught
from tests.multi.run_cases import CASES, checked


def mismatched(world):
    case = Case((4, 1), mode="sequential", gemm="engine")
    inputs, move, r = make_inputs(case), on_device(world), world.rank
    weights = [move(w) for w in cometrt.shard_weights(inputs.w_up, inputs.w_down, r, 4, case.spec)]
    tables = move(inputs.x[r]), move(inputs.ids[r]), move(inputs.weights[r])
    dy = move(inputs.dy[r])
    layer = cometrt.MoELayer(world, case.spec, config=case.config)
    y, saved = layer.forward(*tables, *weights)
    layer.synchronize()
    if r == 3:
        layer.backward(dy, saved)
    else:
        layer.forward(*tables, *weights)
    error = caught(layer.synchronize)
    assert isinstance(error, cometrt.MismatchError), error
    world.reset()
    # One rank stays away: the others' kernels give up and say for whom they waited.
    world.timeout_sec = 1.0
    if r != 1:
        layer.forward(*tables, *weights)
        error = caught(layer.synchronize)
        assert isinstance(error, cometrt.PeerTimeout), error
        assert (error.flag, error.peer) == ("source_ready", 1), error
    world.timeout_sec = 30.0
    world.reset()
    again, _ = layer.forward(*tables, *weights)
    layer.synchronize()
    assert on_host(again).tobytes() == on_host(y).tobytes()


def main() -> None:
    try:
        with cometrt.connect(MPI.COMM_WORLD, device="cuda", timeout_sec=30) as world:
            for number, case in enumerate(CASES):
                if case.dtype == "float32":
                    continue
                case = Case(**{**case.__dict__, "mode": "sequential", "gemm": GEMMS[number % 2]})
                inputs = make_inputs(case)
                checked(world, case, inputs, run_case(world, case, inputs))
            mismatched(world)
            if world.rank == 0:
                print("all cases passed", flush=True)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        MPI.COMM_WORLD.Abort(1)


if __name__ == "__main__":
    main()
