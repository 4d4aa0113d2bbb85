"""The layer on CUDA against the float64 reference, on virtual ranks of one GPU."""

import itertools

import pytest

from tests.cases import ACTIVATIONS, RANKS, ROUTINGS, Case, spawn_case

pytestmark = pytest.mark.gpu

_TURNS = itertools.cycle(
    itertools.product(ACTIVATIONS, [16, 48, 80], ["rows", "z"], ["waves", "columns"], [0, 1])
)
CASES = [
    Case(ranks, routing, activation, "bfloat16", columns, save, order, "sequential", seed)
    for (ranks, routing), (activation, columns, save, order, seed) in zip(
        itertools.product(RANKS, ROUTINGS), _TURNS, strict=False
    )
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_reference(case):
    spawn_case(case, device="cuda")
