"""The order of a GEMM's tiles: everything once, and neighbours share what they say they share."""

import sys
import types

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cometrt.cuda.engine import TileOrder
from cometrt.kernels.constants import BLOCK_M
from cometrt.plan.tile_order import (
    best_raster_group,
    make_tile_order,
    max_cluster_steps,
    num_n_tiles,
    pipeline_chunk_begin,
)
from tests import cupy_stand_in


@st.composite
def plans(draw):
    rows = draw(st.lists(st.integers(0, 900), min_size=1, max_size=12))
    num_tiles = [-(-n // BLOCK_M) for n in rows]
    expert = np.repeat(np.arange(len(rows)), num_tiles)
    key = draw(st.lists(st.integers(0, 3), min_size=len(expert), max_size=len(expert)))
    order = sorted(range(len(expert)), key=lambda tile: (key[tile], expert[tile], tile))
    return types.SimpleNamespace(
        tile_expert=expert,
        expert_offsets=np.concatenate([[0], np.cumsum(num_tiles)]) * BLOCK_M,
        expert_rows=np.array(rows),
        dispatch_order=lambda: order,
    )


@given(
    plans(),
    st.integers(1, 9),
    st.booleans(),
    st.sampled_from([None, 1, 2, 3]),
    st.sampled_from([None, 2, 4]),
)
def test_turns(plan, columns, backwards, chunk, group):
    how = {"backwards": backwards, "n_chunk": chunk, "raster_group": group}
    steps = make_tile_order(plan, columns, **how)
    assert len(steps) <= max_cluster_steps(len(plan.tile_expert), columns, chunk)
    walks = [item // (chunk or columns) for item in steps[:, 0]["n_tile"].tolist()]
    assert walks == sorted(walks)
    done = [(i["m_tile"], i["n_tile"]) for step in steps for i in step if i["m_tile"] >= 0]
    assert sorted(done) == [(t, c) for t in range(len(plan.tile_expert)) for c in range(columns)]
    for step in steps:
        assert step[0]["m_tile"] >= 0
        assert len({item["expert"] for item in step if item["m_tile"] >= 0}) == 1
        for cta, item in enumerate(step):
            halves = arriving(step, cta)
            if item["m_tile"] < 0:
                assert halves == {"m_tile": [], "n_tile": []}
                continue
            expert = plan.tile_expert[item["m_tile"]]
            end = plan.expert_offsets[expert] + plan.expert_rows[expert]
            assert item["expert"] == expert
            assert item["rows"] == min(BLOCK_M, end - item["m_tile"] * BLOCK_M) > 0
            of_a = [0, 1] if item["rows"] > BLOCK_M // 2 else [0]
            assert halves == {"m_tile": of_a, "n_tile": [0, 1]}
    # The plan's order is kept from expert to expert.
    order = plan.dispatch_order()[::-1] if backwards else plan.dispatch_order()
    first_walk = steps[:, 0][[walk == 0 for walk in walks]] if len(steps) else steps[:, 0]
    starts = list(dict.fromkeys(first_walk["expert"].tolist()))
    assert starts == list(dict.fromkeys(plan.tile_expert[order].tolist()))


def arriving(step, cta):
    """Halves of A ("m_tile") and B ("n_tile") that a CTA gets, from whoever loads them."""
    halves = {"m_tile": [], "n_tile": []}
    for number, item in enumerate(step):
        for name, shift in (("m_tile", 0), ("n_tile", 2)):
            load = int(item["packed"]) >> shift & 3
            if load == 3 and number == cta:
                halves[name] += [0, 1] if name == "n_tile" or item["rows"] > BLOCK_M // 2 else [0]
            elif load in (1, 2):
                assert item[name] == step[cta][name]  # what it loads for both, both read
                halves[name].append(load - 1)
    return {name: sorted(found) for name, found in halves.items()}


@given(
    plans(),
    st.integers(1, 4),
    st.integers(1, 5),
    st.booleans(),
    st.sampled_from([None, 2]),
)
def test_tiles_of_several_row_sets_take_the_weights_of_one(
    plan, weights, columns, backwards, group
):
    """Nothing else changes: tiles of two sets are in two runs, though their weights are equal."""
    how = {"backwards": backwards, "raster_group": group}
    alone = make_tile_order(plan, columns, **how)
    found = make_tile_order(plan, columns, **how, num_weights=weights)
    assert found["expert"].tolist() == (alone["expert"] % weights).tolist()
    for name in ("m_tile", "n_tile", "rows", "packed"):
        assert found[name].tolist() == alone[name].tolist()


def test_two_tiles_read_less_than_two():
    plan = types.SimpleNamespace(
        tile_expert=np.zeros(8, int),
        expert_offsets=np.array([0, 1024]),
        expert_rows=np.array([1024]),
        dispatch_order=lambda: list(range(8)),
    )
    steps = make_tile_order(plan, 6)
    assert (steps["m_tile"] >= 0).all()
    loads = steps["packed"].astype(int)
    halves_of = np.array([0, 1, 1, 2])
    read = halves_of[loads & 3] * 64 + halves_of[loads >> 2 & 3] * 128  # rows of A, of B
    assert read.sum() == steps.size * (128 + 256) * 2 / 3


@given(
    plans(),
    st.integers(1, 5),
    st.integers(1, 6),
    st.booleans(),
)
def test_pipeline_chunks_are_ranges_of_the_order(plan, columns, chunks, backwards):
    order = plan.dispatch_order()
    begins = [pipeline_chunk_begin(len(order), index, chunks) for index in range(chunks + 1)]
    assert (begins[0], begins[-1]) == (0, len(order))
    most = -(-len(order) // chunks)
    for index in range(chunks):
        tiles = order[begins[index] : begins[index + 1]]
        assert most - 1 <= len(tiles) <= most
        steps = make_tile_order(plan, columns, backwards=backwards, pipeline_chunk=(index, chunks))
        assert len(steps) <= max_cluster_steps(most, columns)
        done = [(i["m_tile"], i["n_tile"]) for step in steps for i in step if i["m_tile"] >= 0]
        assert sorted(done) == sorted((tile, c) for tile in tiles for c in range(columns))


def test_sizes():
    assert num_n_tiles(1408, gated=True) == 11
    assert num_n_tiles(1408, gated=False) == 6
    assert [best_raster_group(sms, 132, 2048) for sms in (1, 8, 16, 32, 132)] == [2, 2, 2, 4, 16]
    assert [best_raster_group(sms, 132, 14336) for sms in (16, 132)] == [2, 8]


@pytest.mark.parametrize(("group", "wanted"), [(None, 5), (2, 2), (6, 5), (2**31, 5), (10**30, 5)])
def test_a_raster_group_is_no_wider_than_the_gemm(monkeypatch, group, wanted):
    """A config may ask for any number; the kernels' parameters have 32 bits."""
    cupy = cupy_stand_in.module()
    cupy.uint8, cupy.int32 = np.uint8, np.int32
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    order = TileOrder(8, 5, raster_group=group)
    assert int(order.params.fields["raster_group"][0]) == wanted
    order.walk(2, group)
    assert int(order.params.fields["raster_group"][0]) == wanted
    assert int(order.params.fields["n_chunk"][0]) == 2
    assert int(order.params.fields["num_weights"][0]) > 10**9  # each plan expert has its own
    order = TileOrder(8, 5, num_weights=3)
    assert int(order.params.fields["num_weights"][0]) == 3
