"""Where a small plan lies in shared memory, and which plans are small."""

import dataclasses
import math

import pytest

from cometrt.cuda import planner
from cometrt.kernels.constants import PLAN_TEAMS, TOKEN_TILE
from cometrt.kernels.params import PLAN_KEPT, PLAN_OUTPUTS, PLAN_SHARED
from cometrt.plan import PlanShape, TileConfig
from cometrt.plan.tables import plan_table_shapes
from cometrt.specs import Geometry, MoESpec

QWEN3 = MoESpec(2048, 768, num_experts=128, topk=8, max_tokens=64)
SHAPES = [
    PlanShape(Geometry(dataclasses.replace(QWEN3, max_tokens=tokens), 0, size), TileConfig())
    for size, tokens in [(1, 1), (1, 256), (4, 1), (4, 64), (4, 256), (8, 16)]
] + [PlanShape(Geometry(MoESpec(16, 48, 6, 3, 24, tp=3), 4, 6), TileConfig(block_m=1))]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: str(shape.geometry))
def test_tables_in_shared_memory_overlap_nowhere(shape):
    record, num_bytes = planner.shared_tables(shape)
    at = {name: int(record.fields[name][0]) for name in record.fields.dtype.names}
    geometry = shape.geometry
    words = planner.planner_scratch(shape, small=False)
    words["counts"] = geometry.size * geometry.spec.num_experts
    words["token_counts"] = geometry.size * geometry.ep
    words |= {name: math.prod(size) for name, size in planner.planner_routing(shape).items()}
    tables, fields = plan_table_shapes(shape), dict(PLAN_OUTPUTS)
    ranges = [(at[name], 4 * words[name]) for name in PLAN_SHARED]
    ranges += [(at[fields[name]], 4 * math.prod(tables[name])) for name in PLAN_KEPT]
    ranges.append((at["team"], PLAN_TEAMS * at["team_bytes"]))
    place_rows = (5 + geometry.spec.tp) * geometry.spec.num_experts + TOKEN_TILE * geometry.size
    assert at["team_bytes"] >= 4 * place_rows
    ranges.sort()
    for (begin, size), (after, _) in zip(ranges, [*ranges[1:], (num_bytes, 0)], strict=True):
        assert begin % 16 == 0
        assert begin + size <= after


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: str(shape.geometry))
def test_what_begins_as_zero_and_what_is_copied_out(shape):
    record, _ = planner.shared_tables(shape)
    at = {name: int(record.fields[name][0]) for name in record.fields.dtype.names}
    zero = {name for name in PLAN_SHARED if at[name] < at["zero_bytes"]}
    assert zero == {"counts", "token_counts", "run_counts"}
    offsets, _ = planner.table_layout(plan_table_shapes(shape))
    fields = dict(PLAN_OUTPUTS)
    for name in PLAN_KEPT:  # as in the plan's memory
        assert at[fields[name]] == at["zero_bytes"] + 4 * offsets[name]
    first_other = min(offsets[name] for name in offsets if name not in PLAN_KEPT)
    assert at["kept_bytes"] == 4 * first_other


def test_which_plans_are_small():
    def small(size, **changes):
        spec = dataclasses.replace(QWEN3, **changes)
        return planner.is_small(PlanShape(Geometry(spec, 0, size), TileConfig()))

    assert small(1, max_tokens=512)
    assert small(4, max_tokens=256)
    assert not small(4, max_tokens=257)  # pairs
    assert not small(32, max_tokens=1, topk=1)  # token tiles
    assert not small(1, max_tokens=1024)  # shared memory
