"""Activations and their derivatives, in whatever float type they are given.

A gated activation maps (gate, up) to act(gate) * up; the others map z to act(z). z holds the
gate columns first, then the up columns, as w_up holds its rows. At infinity, and where powers of z
overflow, values and derivatives are their limits; NaN gives NaN.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

_GELU_C = 0.7978845608028654  # sqrt(2 / pi)
_GELU_CUBE = 0.044715
_FAR = 1000  # beyond it sigmoid and tanh are at their limits, also in float64


def _above(z: np.ndarray) -> np.ndarray:
    """z, at least -_FAR: the product with a sigmoid of 0 is 0 then, also for z = -inf."""
    return np.maximum(z, -_FAR)


def _near(z: np.ndarray) -> np.ndarray:
    """z within [-_FAR, _FAR]: its powers do not overflow."""
    return np.minimum(_above(z), _FAR)


def _sigmoid(z: np.ndarray) -> np.ndarray:
    small = np.exp(-np.abs(z))  # neither overflows nor loses its digits far below zero
    return np.where(z >= 0, z.dtype.type(1), small) / (1 + small)


def _silu(z: np.ndarray) -> np.ndarray:
    return _above(z) * _sigmoid(z)


def _dsilu(z: np.ndarray) -> np.ndarray:
    z = _near(z)
    s = _sigmoid(z)
    return s * (1.0 + z * (1.0 - s))


def _gelu(z: np.ndarray) -> np.ndarray:
    near = _near(z)
    return 0.5 * _above(z) * (1.0 + np.tanh(_GELU_C * (near + _GELU_CUBE * near * near * near)))


def _dgelu(z: np.ndarray) -> np.ndarray:
    z = _near(z)
    t = np.tanh(_GELU_C * (z + _GELU_CUBE * z * z * z))
    return 0.5 * (1.0 + t) + 0.5 * z * (1.0 - t * t) * _GELU_C * (1.0 + 3.0 * _GELU_CUBE * z * z)


def _relu(z: np.ndarray) -> np.ndarray:
    return np.maximum(z, 0)


def _drelu(z: np.ndarray) -> np.ndarray:
    return np.heaviside(z, 0)


def _relu2(z: np.ndarray) -> np.ndarray:
    return np.square(np.maximum(z, 0))


def _drelu2(z: np.ndarray) -> np.ndarray:
    return 2.0 * np.maximum(z, 0)


_Function = Callable[[np.ndarray], np.ndarray]

# name -> (is gated, function, derivative)
ACTIVATIONS: dict[str, tuple[bool, _Function, _Function]] = {
    "swiglu": (True, _silu, _dsilu),
    "geglu": (True, _gelu, _dgelu),
    "silu": (False, _silu, _dsilu),
    "gelu": (False, _gelu, _dgelu),
    "relu": (False, _relu, _drelu),
    "relu2": (False, _relu2, _drelu2),
}


def is_gated(activation: str) -> bool:
    return ACTIVATIONS[activation][0]


def activate(activation: str, z: np.ndarray) -> np.ndarray:
    """a [..., I] from z [..., 2I] (gated) or [..., I]."""
    gated, act, _ = ACTIVATIONS[activation]
    if not gated:
        return act(z)
    gate, up = np.split(z, 2, axis=-1)
    return act(gate) * up


def activate_backward(activation: str, z: np.ndarray, da: np.ndarray) -> np.ndarray:
    """dz, of z's shape, from da [..., I]."""
    gated, act, dact = ACTIVATIONS[activation]
    if not gated:
        return dact(z) * da
    gate, up = np.split(z, 2, axis=-1)
    return np.concatenate([dact(gate) * up * da, act(gate) * da], axis=-1)
