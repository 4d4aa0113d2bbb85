"""A few small cases on virtual ranks, to be run under compute-sanitizer; the argument is W."""

import sys

from tests.cases import RANKS, Case, spawn_case

for ranks in RANKS:
    if ranks[0] == int(sys.argv[1]):
        for save, order in (("rows", "waves"), ("z", "columns")):
            spawn_case(Case(ranks, "skewed", save=save, order=order, mode="sequential"), 1, "cuda")
print("cases passed")
