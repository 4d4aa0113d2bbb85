"""Small cases to be run under compute-sanitizer. The argument: a number of virtual ranks, which
run a layer; "engine", GEMMs alone; or "router", routers and losses."""

import sys

import cometrt
from cometrt.activations import ACTIVATIONS
from tests.cases import RANKS, Case, make_inputs, spawn_case
from tests.device.pauses import Pauses
from tests.device.test_engine import EDGES, Problem
from tests.device.test_failures import Rank
from tests.device.test_grad_engine import Dgrad, DownDgrad, WgradProblems
from tests.device.test_router import check as check_routers
from tests.device.test_router import check_losses, deepseek_case
from tests.host.test_failures import caught
from tests.router_cases import KINDS


def queue_behind_a_failed_call(ranks):
    """What touches memory by a plan that was not finished would be seen."""
    case = Case((ranks, 1), mode="fused", gemm="engine")
    inputs = make_inputs(case)
    for ids in inputs.ids[:1]:
        ids[0, 0] = case.spec.num_experts

    def fn(world):
        for mode in ("fused", "sequential", "chunked"):
            rank = Rank(world, inputs, case.spec, case.config, mode)
            rank.layer.synchronize()
            Pauses().pause(20_000)
            _, saved = rank.forward()
            rank.layer.backward(rank.dy, saved)
            assert isinstance(caught(rank.layer.synchronize), cometrt.RoutingError)

    cometrt.spawn(fn, ranks, "cuda", timeout_sec=30)


if sys.argv[1] == "engine":
    for columns, inner in ((48, 80), (272, 576), (640, 1040)):
        Problem(EDGES, columns, inner, None).check(False)
    for activation in ACTIVATIONS:
        Problem(EDGES, 208, 848, activation).check(True)
    Problem((300, 20, 700), 208, 848, "swiglu").check(False)
    Dgrad(EDGES, 272, 576).check()
    for activation in ACTIVATIONS:
        DownDgrad(EDGES, 272, 528, activation).check()
    DownDgrad((300, 20, 700), 272, 1104, "swiglu").check()
    for float32 in ((), (0,), (0, 1)):
        problems = WgradProblems(EDGES, [(208, 272), (272, 144)], float32=float32)
        problems.check()
        problems.check_accumulated()
        problems = WgradProblems((460, 70, 520), [(208, 272), (144, 528)], float32=float32)
        problems.check(sms=2)  # tiles leave under the main loops of others
        problems.check_accumulated(sms=2)
elif sys.argv[1] == "router":
    for kind in KINDS:
        for experts in (20, 256, 1000):
            check_routers(deepseek_case(kind, 21, experts, 8))
            check_losses(50, experts)
else:
    ranks_wanted = int(sys.argv[1])
    for ranks in RANKS:
        if ranks[0] == ranks_wanted:
            for mode, save, order, gemm in (
                ("fused", "rows", "phases", "engine"),
                ("fused", "z", "columns", "engine"),
                ("fused", "nothing", "phases", "engine"),
                ("sequential", "rows", "phases", "engine"),
                ("sequential", "z", "columns", "cublas"),
                ("sequential", "nothing", "phases", "engine"),
                ("sequential", "nothing", "columns", "cublas"),
                ("chunked", "rows", "phases", "engine"),
            ):
                case = Case(ranks, "skewed", save=save, order=order, mode=mode, gemm=gemm)
                spawn_case(case, 1, "cuda", timeout_sec=60)  # a sanitizer is slow
    if ranks_wanted > 1:
        queue_behind_a_failed_call(ranks_wanted)
print("cases passed")
