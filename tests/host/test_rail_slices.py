"""How calls over several nodes are cut into slices: rows, sizes, memory, rules."""

import dataclasses

import numpy as np
import pytest

import cometrt
from cometrt.cuda.trials import balanced_ids
from cometrt.legality import check_layer
from cometrt.node_specs import geometry_of_node
from cometrt.nodes.crossing import slots_of
from cometrt.nodes.slices import RailSlices
from cometrt.specs import Geometry
from cometrt.world import partitions
from cometrt.world.nccl import max_ctas

SPEC = cometrt.MoESpec(hidden=64, intermediate=64, num_experts=24, topk=2, max_tokens=48)


@pytest.mark.parametrize("nodes", [2, 3, 4])
@pytest.mark.parametrize("max_tokens", [1, 2, 7, 40, 41])
@pytest.mark.parametrize("count", [1, 3, 4, 5, 8])
@pytest.mark.parametrize("crossing", ["all", "some", "one"])
def test_every_token_has_a_row_of_its_own_in_one_slice(nodes, max_tokens, count, crossing):
    most = {"all": max_tokens, "some": -(-max_tokens // 3), "one": 1}[crossing]
    for node in range(nodes):
        slices = RailSlices(nodes, node, max_tokens, count, most)
        calls = slices.calls()
        assert len(calls) == count
        assert max(call.end - call.begin for call in calls) <= slices.slice_tokens
        of_row = {}
        for index, call in enumerate(calls):
            for row in range(call.begin, call.end):
                assert row not in of_row
                of_row[row] = index
        assert sorted(of_row) == list(range(slices.rows))
        rows = {
            (of, token): slices.row_of(of, token)
            for of in range(nodes)
            for token in range(max_tokens if of == node else most)
        }
        assert len(set(rows.values())) == max_tokens + (nodes - 1) * most
        for (of, token), row in rows.items():
            assert slices.slot_of(row) == (of, token)
            call = calls[of_row[row]]
            if count > 1:
                assert (call.part is None) == (of == node)
            if call.part is not None and (of != node):
                assert token in slices.slots_of(call.part)
                first = slices.slots_of(call.part)[0]
                assert row == slices.row_of(of, first) + token - first  # one transfer
        parts = [token for part in range(slices.parts) for token in slices.slots_of(part)]
        assert parts == list(range(most))


@pytest.mark.parametrize("nodes", [2, 3, 4])
@pytest.mark.parametrize("max_tokens", [1, 2, 7, 40, 41])
@pytest.mark.parametrize("parts", [1, 2, 3, 4])
@pytest.mark.parametrize("crossing", ["all", "some", "one"])
def test_late_parts_lie_in_front_of_own_rows(nodes, max_tokens, parts, crossing):
    most = {"all": max_tokens, "some": -(-max_tokens // 3), "one": 1}[crossing]
    spec = dataclasses.replace(SPEC, max_tokens=max_tokens, rail_tokens=most)
    geometry = geometry_of_node(spec, 0, 2 * nodes, nodes, 1, parts)
    for node in range(nodes):
        slices = RailSlices(nodes, node, max_tokens, 1, most, parts)
        (call,) = slices.calls()
        assert (call.begin, call.end) == (0, slices.rows) == (0, geometry.spec.max_tokens)
        assert slices.part_rows == geometry.part_rows
        assert slices.first_own_row == geometry.late_rows == slices.rows - max_tokens
        seen = set()
        for part in range(parts):
            of_part = range(part * slices.part_rows, min((part + 1) * slices.part_rows, call.end))
            for other in range(nodes):
                if other == node:
                    continue
                rows = [slices.row_of(other, slot) for slot in slices.slots_of(part)]
                assert rows == list(range(rows[0], rows[0] + len(rows))) if rows else True
                assert set(rows) <= set(of_part)
                assert not seen & set(rows)
                seen |= set(rows)
                for slot, row in zip(slices.slots_of(part), rows, strict=True):
                    assert slices.slot_of(row) == (other, slot)
        assert len(seen) == (nodes - 1) * most
        assert max(seen) < geometry.late_rows
        for token in range(max_tokens):
            assert slices.row_of(node, token) == geometry.late_rows + token
            assert slices.slot_of(geometry.late_rows + token) == (node, token)
        slots = [slot for part in range(parts) for slot in slices.slots_of(part)]
        assert slots == list(range(most))


def test_slices_of_equal_size():
    """2 * nodes of them: no slice, and so no buffer, is larger than half of a rank's tokens."""
    for nodes in (2, 3, 4):
        slices = RailSlices.of(SPEC, nodes, 0, 2 * nodes)
        assert {call.end - call.begin for call in slices.calls()} == {24}
        assert slices.slice_tokens == 24


@pytest.mark.parametrize("device", ["host", "cuda"])
@pytest.mark.parametrize("save", ["rows", "nothing"])
def test_memory_of_slices(device, save):
    """The heap and row arrays hold one slice. Residuals of equal slices take what one of all takes,
    but for padding rows and tables."""
    spec = dataclasses.replace(SPEC, save=save, hidden=256, max_tokens=4096)

    def memory(slices):
        config = cometrt.TileConfig(rail_slices=slices)
        return spec.memory(4, device=device, config=config, ranks_per_node=2)

    whole, four, three = memory(1), memory(4), memory(3)
    assert four.heap < 0.3 * whole.heap
    assert four.scratch < 0.8 * whole.scratch
    assert four.weights == whole.weights
    assert whole.residuals < four.residuals < 1.6 * whole.residuals
    assert four.residuals < three.residuals


@pytest.mark.parametrize("rail_tokens", [24, 12, 1])
def test_wanted_tokens_have_the_capacity_that_all_would_have(rail_tokens):
    """In slices too, where a row of a wanted token has more pairs than an own one."""
    few = dataclasses.replace(SPEC, rail_tokens=rail_tokens)
    for slices in (1, 3, 4):
        whole, wanted = (geometry_of_node(spec, 0, 4, 2, slices) for spec in (SPEC, few))
        rows = [of.spec.capacity_factor * of.spec.max_tokens for of in (whole, wanted)]
        assert rows[1] >= rows[0] - 1e-9
        config = cometrt.TileConfig(rail_slices=slices)
        all_cross, few_cross = (
            dataclasses.replace(spec, hidden=256, max_tokens=64 * spec.max_tokens, **more).memory(
                4, config=config, ranks_per_node=2
            )
            for spec, more in ((SPEC, {}), (few, {"rail_tokens": 64 * rail_tokens}))
        )
        assert few_cross.residuals <= 2 * all_cross.residuals
        assert few_cross.heap < all_cross.heap or slices == 4  # where the own halves are largest


def test_slots_of_wanted_tokens():
    """In the order of tokens, at most rail_tokens; all nodes want a token that breaks a rule."""
    spec = dataclasses.replace(SPEC, max_tokens=8, rail_tokens=3)  # 8 experts on each of 3 nodes
    ids = np.array([[0, 8], [8, 16], [9, -1], [-1, -1], [15, 1], [10, 10], [24, 0]])
    weights = np.ones(ids.shape, np.float32)
    weights[0, 0] = np.nan
    slots, most = slots_of(ids, weights, spec, 3, 0)
    assert slots.tolist() == [
        [-1] * 8,
        [0, 1, 2, -1, -1, -1, -1, -1],  # wanted too: 4, 5 and 6
        [0, 1, -1, -1, -1, 2, -1, -1],  # and 6
    ]
    assert most == 6


@pytest.mark.parametrize("nodes", [2, 3, 4])
@pytest.mark.parametrize("rail_tokens", [None, 48, 47, 24, 17, 16, 5, 1])
def test_random_tables_of_the_tuner_have_room(nodes, rail_tokens):
    spec = dataclasses.replace(SPEC, rail_tokens=rail_tokens)
    counts = np.zeros(spec.num_experts, int)
    for rank in range(2 * nodes):
        ids = balanced_ids(Geometry(spec, rank, 2 * nodes), nodes)
        assert all(len(set(of_token)) == spec.topk for of_token in ids.tolist())
        weights = np.ones(ids.shape, np.float32)
        _, most = slots_of(ids, weights, spec, nodes, rank // 2)
        assert most <= spec.crossing_tokens
        counts += np.bincount(ids.ravel(), minlength=spec.num_experts)
    mean = counts.sum() / spec.num_experts
    assert np.abs(counts - mean).max() <= 0.5 * mean


def test_rules():
    with pytest.raises(ValueError, match=r"rail_slices must be 1, or at least 3 \(got 2\)"):
        cometrt.TileConfig(rail_slices=2)
    with pytest.raises(ValueError, match=r"rail_slices must be an integer in \[1, 16\] \(got 17\)"):
        cometrt.TileConfig(rail_slices=17)
    with pytest.raises(ValueError, match=r"rail_tokens must be at most max_tokens=48 \(got 49\)"):
        dataclasses.replace(SPEC, rail_tokens=49)
    with pytest.raises(ValueError, match=r"rail_tokens must be an integer >= 1 \(got 0\)"):
        dataclasses.replace(SPEC, rail_tokens=0)
    with pytest.raises(ValueError, match=r"nccl_sms must be even \(got 3\)"):
        cometrt.TileConfig(rail_slices=3, nccl_sms=3)
    three, few = cometrt.TileConfig(rail_slices=3), cometrt.TileConfig(nccl_sms=8)
    with pytest.raises(ValueError, match=r"rail_slices must be 1 on one node \(got 3\)"):
        check_layer(SPEC, 4, "host", None, three)
    with pytest.raises(ValueError, match="nccl_sms must be None with rail_slices=1"):
        check_layer(SPEC, 4, "cuda", None, few, 2)
    assert check_layer(SPEC, 4, "cuda", None, three, 2) == "fused"
    with pytest.raises(ValueError, match=r"rail_parts must be an integer in \[0, 4\] \(got 5\)"):
        cometrt.TileConfig(rail_parts=5)
    with pytest.raises(ValueError, match=r"rail_parts must be 0 with rail_slices=3 \(got 2\)"):
        cometrt.TileConfig(rail_slices=3, rail_parts=2)
    late = cometrt.TileConfig(rail_parts=2, nccl_sms=8)
    with pytest.raises(ValueError, match=r"rail_parts must be 0 on one node \(got 2\)"):
        check_layer(SPEC, 4, "host", None, late)
    with pytest.raises(ValueError, match=r"rail_parts must be 0 in mode 'sequential' \(got 2\)"):
        check_layer(SPEC, 4, "cuda", "sequential", late, 2)
    assert check_layer(SPEC, 4, "cuda", None, late, 2) == "fused"


def test_late_parts_have_an_order_of_their_own():
    config = cometrt.TileConfig(
        rail_parts=2, order="columns", num_phases=3, backward_order="columns"
    )
    of_node = config.of_node()
    for of in (of_node, of_node.of_backward()):
        assert (of.order, of.num_phases, of.min_token_blocks) == ("phases", 1, 1024)
    assert of_node.of_node() == of_node
    assert cometrt.TileConfig(order="columns").of_node() == cometrt.TileConfig(order="columns")
    many = dataclasses.replace(config, min_token_blocks=4096)
    assert many.of_node().min_token_blocks == 4096


def test_grids_leave_sms_to_nccl(monkeypatch):
    monkeypatch.setattr(partitions, "gpu_sms", lambda: 132)
    from cometrt.cuda.engine import gemm_ctas

    def call():
        with partitions.leave_sms(8):
            assert partitions.num_sms() == gemm_ctas() == 124
            with partitions.leave_sms(0):  # a layer with one slice
                assert partitions.num_sms() == 132
            assert partitions.num_sms() == 124
            raise KeyError

    with pytest.raises(KeyError):
        call()
    assert partitions.num_sms() == gemm_ctas() == 132


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, None),
        ({"NCCL_MAX_CTAS": "4"}, 4),
        ({"NCCL_MAX_NCHANNELS": "6"}, 8),
        ({"NCCL_MAX_CTAS": "16", "NCCL_MAX_NCHANNELS": "1"}, 1),
        ({"NCCL_MAX_CTAS": "-2147483648"}, None),
        ({"NCCL_MAX_CTAS": "0"}, None),
    ],
)
def test_the_bound_on_the_ctas_of_nccl(variables, expected):
    assert max_ctas(variables) == expected
