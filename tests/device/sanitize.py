"""Small cases to be run under compute-sanitizer. The argument: a number of virtual ranks, which
run a layer; or "engine", GEMMs alone."""

import sys

from cometrt.activations import ACTIVATIONS
from tests.cases import RANKS, Case, spawn_case
from tests.device.test_engine import EDGES, Problem

if sys.argv[1] == "engine":
    for columns, inner in ((48, 80), (272, 576), (640, 1040)):
        Problem(EDGES, columns, inner, None).check(False)
    for activation in ACTIVATIONS:
        Problem(EDGES, 208, 848, activation).check(True)
    Problem((300, 20, 700), 208, 848, "swiglu").check(False)
else:
    for ranks in RANKS:
        if ranks[0] == int(sys.argv[1]):
            for mode, save, order, gemm in (
                ("fused", "rows", "waves", "engine"),
                ("fused", "z", "columns", "engine"),
                ("sequential", "rows", "waves", "engine"),
                ("sequential", "z", "columns", "cublas"),
                ("chunked", "rows", "waves", "engine"),
            ):
                case = Case(ranks, "skewed", save=save, order=order, mode=mode, gemm=gemm)
                spawn_case(case, 1, "cuda")
print("cases passed")
