"""Host arrays of other libraries, by DLPack; where NumPy cannot import one, the way out is told."""

import re

import ml_dtypes
import numpy as np
import pytest

import cometrt

SPEC = cometrt.MoESpec(32, 16, num_experts=4, topk=2, max_tokens=8, dtype="float32")


class Foreign:
    """Another library's array: nothing but DLPack 1."""

    def __init__(self, array):
        self.array = array

    def __dlpack__(self, **how):
        return self.array.__dlpack__(**how)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


class Old(Foreign):
    """Of a library before DLPack 1, which does not say whether it may be written to."""

    def __dlpack__(self):
        return self.array.__dlpack__()


class Bfloat16(Foreign):
    """As JAX's and torch's: their capsules are fine, NumPy does not know the dtype."""

    def __dlpack__(self, **_):
        raise RuntimeError("Unsupported dtype in DLTensor.")


def arguments():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((8, 32), np.float32)
    routing = cometrt.router.softmax_topk(rng.standard_normal((8, 4), np.float32), 2)
    weights = (rng.standard_normal(s, np.float32) for s in ((4, 32, 32), (4, 32, 16)))
    return [x, *routing, *weights]


def frozen(array):
    copy = array.copy()
    copy.flags.writeable = False
    return copy


@pytest.mark.parametrize("wrap", [Foreign, Old, lambda array: Foreign(frozen(array))])
def test_arguments_of_another_library(wrap):
    def fn(world):
        given = arguments()
        layer = cometrt.MoELayer(world, SPEC)
        y, saved = layer.forward(*given)
        expected = layer.backward(y, saved)
        again, saved = layer.forward(*map(wrap, given))
        assert again.tobytes() == y.tobytes()
        for found, right in zip(layer.backward(wrap(y), saved), expected, strict=True):
            assert found.tobytes() == right.tobytes()

    cometrt.spawn(fn, 1)


def test_results_of_another_library_are_written_in_place():
    def fn(world):
        given, layer = arguments(), cometrt.MoELayer(world, SPEC)
        right, saved = layer.forward(*given)
        grads = layer.backward(right, saved)
        out = np.zeros_like(given[0])
        y, saved = layer.forward(*given, out=Foreign(out))
        assert np.shares_memory(y, out)
        assert out.tobytes() == right.tobytes()
        places = cometrt.Gradients(*(np.zeros_like(grad) for grad in grads))
        layer.backward(right, saved, out=cometrt.Gradients(*map(Foreign, places)))
        for place, grad in zip(places, grads, strict=True):
            assert place.tobytes() == grad.tobytes()
        for refused in (Foreign(frozen(out)), Old(out)):
            with pytest.raises(ValueError, match=r"^out must be writable \(got a read-only"):
                layer.forward(*given, out=refused)

    cometrt.spawn(fn, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: Bfloat16(x), "x must be an array that NumPy can import by DLPack (got <class"),
        (lambda x: Bfloat16(x), "Unsupported dtype in DLTensor.). NumPy imports neither bfloat16"),
        (
            lambda x: Bfloat16(x),
            "pass np.asarray(x) for a JAX array x, x.view(torch.int16).numpy()",
        ),
        (lambda x: Foreign(x.astype(ml_dtypes.bfloat16)), "NumPy can import by DLPack"),
        (lambda x: Foreign(x[:, ::2]), "x must have shape (T, 32) (got (8, 16))"),
        (lambda x: Foreign(np.asfortranarray(x)), "x must be C-contiguous (got strides (4, 32))"),
        (lambda x: Foreign(x.astype(np.float64)), "x must have dtype float32 (got float64)"),
        (lambda x: x.tolist(), "x must be a numpy.ndarray on device='host' (got <class 'list'>)"),
        (lambda x: x.tolist(), "or any DLPack array in the host's memory"),
        (lambda x: None, "x must be a numpy.ndarray on device='host' (got <class 'NoneType'>)"),
    ],
)
def test_what_numpy_cannot_import(change, message):
    def fn(world):
        x, *others = arguments()
        layer = cometrt.MoELayer(world, SPEC)
        with pytest.raises(ValueError, match=re.escape(message)):
            layer.forward(change(x), *others)

    cometrt.spawn(fn, 1)
