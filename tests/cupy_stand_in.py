"""A stand-in for CuPy in the host's memory, for code that must never wait for a GPU.

Its arrays are NumPy's, but to look at a value is an AssertionError: bool, float, int, item, tolist,
an index by a bool array. So is a look at the array's interface. It has only what `cometrt.router`
uses of CuPy, with CuPy's signatures.
"""

import types

import numpy as np


def _waits(*_args, **_kwargs):
    raise AssertionError("this waits for the GPU")


class ndarray(np.ndarray):
    __bool__ = __float__ = __int__ = __index__ = __complex__ = item = tolist = _waits

    @property
    def __cuda_array_interface__(self):
        raise AssertionError("CuPy makes a dictionary here, which costs the host microseconds")

    @property
    def data(self):
        return types.SimpleNamespace(device_id=0, ptr=self.ctypes.data)

    def __array_wrap__(self, array, context=None, return_scalar=False):
        return array.view(ndarray)  # an array of no dimension stays one

    def __getitem__(self, index):
        for part in index if isinstance(index, tuple) else (index,):
            if isinstance(part, np.ndarray) and part.dtype == bool:
                _waits()
        found = super().__getitem__(index)
        return np.asarray(found).view(ndarray)


def asarray(array):
    return np.asarray(array).view(ndarray)


def to_host(array):
    return np.array(array.view(np.ndarray))


def module():
    """To be put into sys.modules["cupy"]."""
    cupy = types.ModuleType("cupy")

    def empty(shape, dtype):
        return np.full(shape, 77, dtype).view(ndarray)

    cupy.ndarray, cupy.asarray, cupy.empty = ndarray, asarray, empty
    cupy.zeros = lambda shape, dtype: np.zeros(shape, dtype).view(ndarray)
    cupy.ascontiguousarray = lambda array: np.ascontiguousarray(array).view(ndarray)
    cupy.cuda = types.SimpleNamespace(
        runtime=types.SimpleNamespace(getDevice=lambda: 0),
        get_current_stream=lambda: types.SimpleNamespace(ptr=5),
    )
    return cupy
