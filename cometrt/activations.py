"""Activations and their derivatives in NumPy. Results have the float type of the arguments.

A gated activation maps (gate, up) to act(gate) * up. The others map z to act(z). The columns of z
are ordered like the rows of w_up: gate first, then up. At infinity, and where powers of z would
overflow, the result is the limit. NaN gives NaN.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

_GELU_C = 0.7978845608028654  # sqrt(2 / pi)
_GELU_CUBE = 0.044715
_BOUND = 1000  # sigmoid and tanh have reached their limits here, also in float64


def _clip_below(z: np.ndarray) -> np.ndarray:
    """max(z, -_BOUND). Then z * sigmoid(z) is 0 at -inf, and not NaN."""
    return np.maximum(z, -_BOUND)


def _clip(z: np.ndarray) -> np.ndarray:
    """z clipped to [-_BOUND, _BOUND], so that its powers do not overflow."""
    return np.minimum(_clip_below(z), _BOUND)


def _sigmoid(z: np.ndarray) -> np.ndarray:
    small = np.exp(-np.abs(z))  # does not overflow, and stays exact for very negative z
    return np.where(z >= 0, z.dtype.type(1), small) / (1 + small)


def _silu(z: np.ndarray) -> np.ndarray:
    return _clip_below(z) * _sigmoid(z)


def _dsilu(z: np.ndarray) -> np.ndarray:
    z = _clip(z)
    s = _sigmoid(z)
    return s * (1.0 + z * (1.0 - s))


def _gelu(z: np.ndarray) -> np.ndarray:
    near = _clip(z)
    tanh = np.tanh(_GELU_C * (near + _GELU_CUBE * near * near * near))
    return 0.5 * _clip_below(z) * (1.0 + tanh)


def _dgelu(z: np.ndarray) -> np.ndarray:
    z = _clip(z)
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
    """a = act(z): [..., I] from z [..., 2I] if gated, else from z [..., I]."""
    gated, act, _ = ACTIVATIONS[activation]
    if not gated:
        return act(z)
    gate, up = np.split(z, 2, axis=-1)
    return act(gate) * up


def activate_backward(activation: str, z: np.ndarray, da: np.ndarray) -> np.ndarray:
    """dz, in the shape of z, from da [..., I]."""
    gated, act, dact = ACTIVATIONS[activation]
    if not gated:
        return dact(z) * da
    gate, up = np.split(z, 2, axis=-1)
    return np.concatenate([dact(gate) * up * da, act(gate) * da], axis=-1)
