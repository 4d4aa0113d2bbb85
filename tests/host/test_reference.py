"""The reference against a naive loop over tokens and against finite differences."""

import math

import numpy as np
import pytest

from cometrt import reference
from cometrt.activations import activate, activate_backward
from cometrt.reference import moe_backward, moe_forward
from tests.cases import Case, make_inputs, reference_of

NAMES = ["swiglu", "geglu", "silu", "gelu", "relu", "relu2"]


def scalar_activation(name: str, gate: float, up: float) -> float:
    """Written again, one number at a time, to share nothing with what it checks."""
    silu = gate / (1.0 + math.exp(-gate))
    gelu = 0.5 * gate * (1.0 + math.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)))
    return {
        "swiglu": silu * up,
        "geglu": gelu * up,
        "silu": silu,
        "gelu": gelu,
        "relu": max(gate, 0.0),
        "relu2": max(gate, 0.0) ** 2,
    }[name]


def naive_forward(x, ids, weights, w_up, w_down, name):
    y = np.zeros_like(x)
    intermediate = w_down.shape[2]
    for t in range(len(x)):
        for k in range(ids.shape[1]):
            expert = ids[t, k]
            if expert < 0:
                continue
            a = np.zeros(intermediate)
            for i in range(intermediate):
                gate = float(w_up[expert, i] @ x[t])
                gated = name in ("swiglu", "geglu")
                up = float(w_up[expert, intermediate + i] @ x[t]) if gated else 0.0
                a[i] = scalar_activation(name, gate, up)
            y[t] += weights[t, k] * (w_down[expert] @ a)
    return y


def problem(name, seed=0, tokens=5, hidden=6, intermediate=4, experts=5, topk=3):
    rng = np.random.default_rng(seed)
    parts = 2 if name in ("swiglu", "geglu") else 1
    ids = np.stack([rng.permutation(experts)[:topk] for _ in range(tokens)])
    ids[1, 2] = ids[3, 0] = -1
    return (
        rng.standard_normal((tokens, hidden)),
        ids,
        rng.uniform(0.2, 1.5, (tokens, topk)),
        rng.standard_normal((experts, parts * intermediate, hidden)),
        rng.standard_normal((experts, hidden, intermediate)),
    )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("seed", range(3))
def test_forward_equals_the_naive_loop(name, seed):
    model = problem(name, seed)
    np.testing.assert_allclose(
        moe_forward(*model, name), naive_forward(*model, name), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("name", NAMES)
def test_backward_equals_finite_differences(name):
    x, ids, weights, w_up, w_down = problem(name, seed=7)
    dy = np.random.default_rng(1).standard_normal(x.shape)
    grads = moe_backward(dy, x, ids, weights, w_up, w_down, name)
    step = 1e-6
    arrays = {"x": x, "topk_weights": weights, "w_up": w_up, "w_down": w_down}
    for field, array in arrays.items():
        numeric = np.zeros_like(array)
        for index in np.ndindex(array.shape):
            kept, losses = array[index], []
            for value in (kept + step, kept - step):
                array[index] = value
                losses.append((dy * moe_forward(x, ids, weights, w_up, w_down, name)).sum())
            array[index] = kept
            numeric[index] = (losses[0] - losses[1]) / (2 * step)
        np.testing.assert_allclose(getattr(grads, field), numeric, rtol=1e-6, atol=1e-7)
    assert (grads.topk_weights[ids < 0] == 0).all()


def test_silu_keeps_its_digits_far_below_zero():
    z = np.array([-30.0, -18.0, -1.0, 0.0, 1.0, 30.0], np.float32)
    expected = [v / (1 + math.exp(-v)) for v in z.tolist()]
    np.testing.assert_allclose(activate("silu", z), expected, rtol=1e-6)
    assert activate("silu", z).dtype == np.float32
    assert activate_backward("silu", z, z).dtype == np.float32


def value_and_slope(name: str, z: float) -> tuple[float, float]:
    """In float64; the limits from where on float64 does not tell them from the functions."""
    kind = name.replace("swiglu", "silu").replace("geglu", "gelu")
    if kind == "relu2":
        positive = np.maximum(np.float64(z), 0.0)
        return positive * positive, 2 * positive
    if abs(z) >= {"relu": 0, "silu": 50, "gelu": 20}[kind]:
        return max(z, 0.0), float(z > 0)
    u, du = z, 1.0
    if kind == "gelu":
        c, cube = 2 * math.sqrt(2 / math.pi), 0.044715
        u, du = c * (z + cube * z**3), c * (1 + 3 * cube * z**2)
    s, rest = 1 / (1 + math.exp(-u)), 1 / (1 + math.exp(u))
    return z * s, s + z * s * rest * du


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", NAMES)
@np.errstate(over="ignore")  # relu2 of large numbers is infinite
def test_activations_of_all_magnitudes_and_at_infinity(name, dtype):
    largest = np.finfo(dtype).max
    sizes = np.concatenate(
        [[0.0, largest, np.inf], np.geomspace(1e-30, largest / 2, 400), np.linspace(1, 110, 219)]
    )
    z = np.concatenate([-sizes, sizes]).astype(dtype)
    expected = np.array([value_and_slope(name, float(v)) for v in z]).astype(dtype)
    gated = name in ("swiglu", "geglu")
    columns = np.stack([z, np.ones_like(z)], axis=1) if gated else z[:, None]
    value = activate(name, columns)
    gradients = activate_backward(name, columns, np.ones_like(value))
    assert value.dtype == gradients.dtype == dtype
    if gated:
        np.testing.assert_array_equal(gradients[:, 1:], value)  # of up
    # gelu's 1 - tanh(u)^2 has lost some digits before it is multiplied by z * du/dz.
    rounding = 40 * np.finfo(dtype).eps
    small = np.minimum(np.abs(z), 1)
    np.testing.assert_array_less(distance(value[:, 0], expected[:, 0]), rounding * small + 1e-44)
    np.testing.assert_array_less(distance(gradients[:, 0], expected[:, 1]), rounding)


def distance(found: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Absolute up to 1, relative beyond; 0 where both are the same infinity."""
    same = found == expected
    far = np.abs(np.where(same, 0, found) - np.where(same, 0, expected))
    return far / np.maximum(np.abs(np.where(same, 0, expected)), 1)


@pytest.mark.parametrize("name", NAMES)
def test_activations_of_nan_are_nan(name):
    z = np.full((1, 2), np.nan, np.float32)
    value = activate(name, z)
    assert np.isnan(value).all()
    assert np.isnan(activate_backward(name, z, np.ones_like(value))).all()


def test_no_tokens():
    x, ids, weights, w_up, w_down = problem("swiglu")
    empty = (x[:0], ids[:0], weights[:0], w_up, w_down, "swiglu")
    assert moe_forward(*empty).shape == (0, 6)
    grads = moe_backward(x[:0], *empty)
    assert grads.x.shape == (0, 6)
    assert not grads.w_up.any()
    assert grads.w_down.shape == w_down.shape


@pytest.mark.parametrize(
    ("index", "change", "message"),
    [
        (0, lambda a: a[:, :4], "x must have 6 columns"),
        (0, lambda a: a[0], "x must have 2 dimensions"),
        (1, lambda a: a.astype(float), "topk_ids must be integers"),
        (1, lambda a: a[:2], r"topk_ids must be integers of shape \(5, K\)"),
        (1, lambda a: a + 4, r"topk_ids must lie in \[-1, 5\)"),
        (2, lambda a: a[:, :2], "topk_weights must have topk_ids's shape"),
        (3, lambda a: a[:, :6], "w_up must have shape"),
        (4, lambda a: a[0], "w_down must have 3 dimensions"),
        (5, lambda a: "tanh", "activation must be one of"),
    ],
)
def test_wrong_arguments(index, change, message):
    model = [*problem("swiglu"), "swiglu"]
    dy = model[0].copy()
    model[index] = change(model[index])
    with pytest.raises(ValueError, match=message):
        moe_forward(*model)
    with pytest.raises(ValueError, match=message):
        moe_backward(dy, *model)


def test_wrong_dy():
    model = [*problem("swiglu"), "swiglu"]
    with pytest.raises(ValueError, match=r"dy must have x's shape \(5, 6\)"):
        moe_backward(model[0][:3], *model)


def test_tests_compute_a_reference_once_and_a_new_one_for_other_inputs(monkeypatch):
    made, real = [], reference.moe_forward

    def counted(*args):
        made.append(args)
        return real(*args)

    monkeypatch.setattr(reference, "moe_forward", counted)
    inputs = make_inputs(Case((2, 1)))
    y, _ = reference_of(inputs, "swiglu")
    assert reference_of(inputs, "swiglu")[0] is y
    assert len(made) == 1
    reference_of(inputs, "geglu")
    assert len(made) == 2
    inputs.x[1][0] = 0
    assert not np.array_equal(reference_of(inputs, "swiglu")[0], y)
    inputs.w_down = inputs.w_down.copy()
    reference_of(inputs, "swiglu")
    assert len(made) == 4
