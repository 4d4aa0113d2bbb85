"""Routing that is wrong, or too much for the buffers: every rank raises the same and goes on."""

import numpy as np
import pytest

import cometrt
from tests.cases import Case, Output, check_case, make_inputs
from tests.host.test_failures import caught


def routing_failure(change, kind, capacity_factor=16.0):
    """Changes rank 1's routing; every rank must raise `kind` with one text and go on living."""
    case, inputs = Case((3, 1)), make_inputs(Case((3, 1)))
    spec = cometrt.MoESpec(
        **{
            name: getattr(case.spec, name)
            for name in ("hidden", "intermediate", "num_experts", "topk", "max_tokens", "dtype")
        },
        capacity_factor=capacity_factor,
    )
    ids, weights = inputs.ids[1].copy(), inputs.weights[1].copy()
    change(ids, weights)

    def fn(world):
        r = world.rank
        w_up, w_down = cometrt.shard_weights(inputs.w_up, inputs.w_down, r, 3, spec)
        layer = cometrt.MoELayer(world, spec, config=case.config)
        y = np.zeros_like(inputs.x[r])
        tables = (ids, weights) if r == 1 else (inputs.ids[r], inputs.weights[r])
        error = caught(layer.forward, inputs.x[r], *tables, w_up, w_down, out=y)
        assert np.isnan(y.astype(np.float32)).all()
        layer.synchronize()  # the world has not stopped
        good, saved = layer.forward(
            inputs.x[r][:5], inputs.ids[r][:5], inputs.weights[r][:5], w_up, w_down
        )
        return error, Output(good, layer.backward(inputs.dy[r][:5], saved))

    results = cometrt.spawn(fn, 3, timeout_sec=20)
    errors = [error for error, _ in results]
    assert {type(error) for error in errors} == {kind}, errors
    assert len({str(error) for error in errors}) == 1
    assert len({str(vars(error)) for error in errors}) == 1
    for part in (inputs.x, inputs.dy, inputs.ids, inputs.weights):
        part[:] = [array[:5] for array in part]
    check_case(case, inputs, [output for _, output in results])
    return errors[0]


def put(table, token, k, value):
    def change(ids, weights):
        (ids if table == "ids" else weights)[token, k] = value

    return change


@pytest.mark.parametrize("value", [12, -2, 2**31 - 1, 2**40, -(2**40)])
def test_an_id_out_of_range(value):
    error = routing_failure(put("ids", 4, 2, value), cometrt.RoutingError)
    assert "topk_ids of rank 1, token 4, k 2 must be in [-1, 12)" in str(error)
    # Ranks see each other's ids as int32.
    shown = {2**31 - 1: "2147483647 or more", 2**40: "2147483647 or more"}
    shown[-(2**40)] = "-2147483648 or less"
    assert f"(got {shown.get(value, value)})" in str(error)
    assert (error.rank, error.token, error.k) == (1, 4, 2)


def test_a_repeated_id():
    def change(ids, weights):
        ids[6, 2] = ids[6, 0]

    error = routing_failure(change, cometrt.RoutingError)
    assert "rank 1, token 6, k 2 must be distinct within the token" in str(error)
    assert (error.rank, error.token, error.k) == (1, 6, 2)


def test_a_repeated_id_beside_one_beyond_32_bits():
    def change(ids, weights):
        ids[6] = [3, 3, 2**40]

    error = routing_failure(change, cometrt.RoutingError)
    assert "token 6, k 1 must be distinct" in str(error)
    assert "(got 3 again in [3, 3, 2147483647 or more])" in str(error)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_weight_that_is_not_finite(value):
    error = routing_failure(put("weights", 3, 1, value), cometrt.RoutingError)
    assert "topk_weights of rank 1, token 3, k 1 must be finite" in str(error)
    assert (error.rank, error.token, error.k) == (1, 3, 1)
    assert str(value) in str(error)


def test_too_many_rows():
    def change(ids, weights):
        ids[:] = [0, 1, 2]  # rank 1's tokens all go to rank 0

    # Balanced: 3 ranks * 40 tokens * 3 pairs / 3 groups = 120 rows.
    error = routing_failure(change, cometrt.CapacityError, capacity_factor=0.5)
    assert error.capacity == (60 + 4 * 15) // 16 * 16
    assert error.need > error.capacity
    assert error.rank == 0
    assert f"needs {error.need} rows" in str(error)
    assert f"capacity is {error.capacity}" in str(error)
    # Padding rows have room of their own: 15 for each of a rank's four experts.
    assert f"({np.ceil((error.need - 60) / 1.2) / 100:.2f} is enough)" in str(error)
