"""Functions of the driver, without one."""

import ctypes
import types

import pytest

import cometrt
from cometrt.kernels.driver import driver_function


@pytest.fixture(autouse=True)
def forget():
    driver_function.cache_clear()
    yield
    driver_function.cache_clear()


def test_a_function_checks_its_arguments(monkeypatch):
    library = types.SimpleNamespace(cuOne=types.SimpleNamespace(argtypes=None))
    monkeypatch.setattr(ctypes, "CDLL", lambda name: {"libcuda.so.1": library}[name])
    found = driver_function("cuOne", ctypes.c_int, ctypes.c_void_p)
    assert found is library.cuOne
    assert found.argtypes == (ctypes.c_int, ctypes.c_void_p)


def test_without_a_driver_the_error_says_so(monkeypatch):
    def missing(name):
        raise OSError(f"{name}: not found")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    with pytest.raises(cometrt.CometError, match=r"cuOne needs an NVIDIA driver .*not found"):
        driver_function("cuOne")
