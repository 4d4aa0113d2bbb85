"""Plans with several row sets: shapes, specs within a node, and the host's GEMMs."""

import contextlib
import dataclasses
import types

import numpy as np
import pytest

import cometrt
from cometrt.cuda.buffers import held
from cometrt.host import compute
from cometrt.node_specs import geometry_of_node, slice_tokens, spec_of_node
from cometrt.plan import PlanShape, TileConfig
from cometrt.specs import Geometry

SPEC = cometrt.MoESpec(hidden=64, intermediate=48, num_experts=24, topk=2, max_tokens=48)


def test_a_rank_has_the_weights_of_one_set():
    geometry = Geometry(SPEC, 1, 4, row_sets=3)
    assert (geometry.local_experts, geometry.num_weights) == (6, 2)
    assert geometry.w_up_shape == (2, 96, 64)
    assert geometry.w_down_shape == (2, 64, 48)
    alone = Geometry(SPEC, 1, 4)
    assert alone.row_sets == 1
    assert alone.num_weights == alone.local_experts == 6
    for row_sets in (0, 4):
        rule = rf"row_sets must divide the experts of a rank, 6 \(got {row_sets}\)"
        with pytest.raises(ValueError, match=rule):
            Geometry(SPEC, 1, 4, row_sets=row_sets)


def test_plans_of_other_row_sets_have_another_digest():
    shapes = [PlanShape(Geometry(SPEC, 0, 4, row_sets), TileConfig()) for row_sets in (1, 2, 3)]
    assert len({shape.digest for shape in shapes}) == 3


def test_a_token_has_its_rows_in_one_set():
    """So a rank has at most as many rows of it as it has weights."""
    spec = dataclasses.replace(SPEC, topk=6, capacity_factor=100.0)
    shape = PlanShape(Geometry(spec, 0, 4, row_sets=3), TileConfig())
    assert shape.capacity == (4 * 48 * 2 + 6 * 127) // 128 * 128


def test_weight_gradients_have_as_many_steps_as_with_one_set():
    sizes = [
        held(PlanShape(Geometry(spec, 0, 4, row_sets), TileConfig()), "sequential")
        for spec, row_sets in (
            (SPEC, 1),
            (dataclasses.replace(SPEC, num_experts=72), 3),
        )
    ]
    assert sizes[0]["wgrad_work_tiles"] == sizes[1]["wgrad_work_tiles"]
    assert sizes[0]["up_work_tiles"] != sizes[1]["up_work_tiles"]  # more padding rows


# ---- parts of the tokens of other nodes --------------------------------------------------------


@pytest.mark.parametrize("rail_tokens", [None, 17, 1])
@pytest.mark.parametrize("nodes", [2, 3])
@pytest.mark.parametrize("parts", [1, 2, 4])
def test_each_part_is_a_row_set(nodes, parts, rail_tokens):
    spec = dataclasses.replace(SPEC, rail_tokens=rail_tokens)
    crossing = spec.crossing_tokens
    last = -(-crossing // (3 * parts - 2))  # the others have three times as many tokens
    late = (nodes - 1) * (3 * parts - 2) * last
    whole, of_node = spec_of_node(spec, nodes), spec_of_node(spec, nodes, parts=parts)
    assert of_node.max_tokens == 48 + late
    assert of_node.max_tokens == slice_tokens(48, crossing, nodes, 1, parts)
    assert of_node.max_tokens >= whole.max_tokens
    assert of_node.num_experts == (1 + parts) * 24 // nodes
    assert of_node.capacity_factor == whole.capacity_factor
    for rank in range(2 * nodes):
        geometry = geometry_of_node(spec, rank, 2 * nodes, nodes, parts=parts)
        assert (geometry.rank, geometry.size, geometry.row_sets) == (rank % 2, 2, 1 + parts)
        assert geometry.spec == of_node
        assert (geometry.part_rows, geometry.late_rows) == ((nodes - 1) * 3 * last, late)
        assert geometry.num_weights == Geometry(spec, rank, 2 * nodes).num_weights
        assert geometry.local_experts == (1 + parts) * geometry.num_weights
        assert geometry.w_up_shape == Geometry(spec, rank, 2 * nodes).w_up_shape


def test_no_parts_change_nothing():
    for slices in (1, 3, 4):
        assert spec_of_node(SPEC, 2, slices) == spec_of_node(SPEC, 2, slices, 0)
        assert geometry_of_node(SPEC, 1, 4, 2, slices).row_sets == 1
    assert geometry_of_node(SPEC, 1, 4, 1, parts=2) == Geometry(SPEC, 1, 4)


def test_a_token_chooses_among_the_experts_of_a_node():
    spec = dataclasses.replace(SPEC, topk=9)
    rule = r"topk must be at most the number of experts of a node, 24 / 3 = 8 \(got 9\)"
    with pytest.raises(ValueError, match=rule):
        spec_of_node(spec, 3, parts=2)


# ---- the host's GEMMs --------------------------------------------------------------------------


def test_plan_experts_of_all_sets_share_their_weights():
    weights = np.arange(2.0)[:, None, None] * np.ones((2, 3, 4))
    by_plan_expert = compute.ExpertWeights(weights)
    assert [by_plan_expert[expert][0, 0] for expert in range(6)] == [0, 1, 0, 1, 0, 1]


def test_weight_gradients_on_the_host_are_sums_over_the_sets():
    rows, block_m, rng = [5, 0, 8, 3, 0, 1], 8, np.random.default_rng(0)
    offsets = np.concatenate([[0], np.cumsum([-(-n // block_m) for n in rows])]) * block_m
    ex = types.SimpleNamespace(
        plan=types.SimpleNamespace(expert_rows=np.array(rows), expert_offsets=offsets),
        shape=types.SimpleNamespace(
            config=types.SimpleNamespace(block_m=block_m),
            geometry=types.SimpleNamespace(spec=types.SimpleNamespace(save="rows")),
        ),
        step=lambda *_: contextlib.nullcontext(),
    )
    operands = [rng.standard_normal((int(offsets[-1]), n)).astype(np.float32) for n in (4, 3, 3, 2)]
    dz, x_rows, dy_rows, weighted_a = operands
    dw_up, dw_down = np.full((2, 4, 3), np.nan), np.full((2, 3, 2), np.nan)
    compute.wgrad_tiles(ex, *operands, dw_up, dw_down)
    for out, a, b in ((dw_up, dz, x_rows), (dw_down, dy_rows, weighted_a)):
        for expert in range(2):
            of = [slice(offsets[p], offsets[p + 1]) for p in range(expert, 6, 2)]
            expected = sum(a[part].T @ b[part] for part in of)
            np.testing.assert_allclose(out[expert], expected, rtol=1e-5, atol=1e-6)
