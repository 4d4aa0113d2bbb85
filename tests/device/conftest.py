"""What tests on GPUs share: the width of tiles, GPUs that JAX sees, the environment of JAX."""

import os
import subprocess
import sys
import zlib

import pytest

from tests.launch import python_path

# Columns of an N-tile of the up and the down GEMM; None: as `forward_block_n` says. By that, small
# cases have narrow ones alone.
WIDTHS = (None, (128, 128), (128, 256), (256, 256))


@pytest.fixture(autouse=True)
def tile_width(request, monkeypatch):
    """A test has one of WIDTHS, by its name, in this process."""
    if width := WIDTHS[zlib.crc32(request.node.nodeid.encode()) % len(WIDTHS)]:
        for module in ("fused", "buffers"):
            monkeypatch.setattr(f"cometrt.cuda.{module}.forward_block_n", lambda shape: width)


CODE = """
import jax
assert jax.default_backend() == "gpu", jax.default_backend()
"""
# Else XLA compiles and times many kernels for each GEMM.
NO_AUTOTUNING = "--xla_gpu_autotune_level=0"


def flags_with(more):
    return " ".join(filter(None, [os.environ.get("XLA_FLAGS"), more]))


@pytest.fixture(scope="session")
def xla_flags():
    """Flags with which JAX sees the GPU, in a process of its own, which takes the memory."""
    for flags in (flags_with(NO_AUTOTUNING), flags_with("")):  # XLA ends at a flag it does not know
        result = subprocess.run(
            [sys.executable, "-c", CODE], capture_output=True, text=True,
            env=os.environ | {"XLA_FLAGS": flags},
        )  # fmt: skip
        if result.returncode == 0:
            return flags
        if "Unknown flag" not in result.stderr:
            break
    pytest.skip(f"needs a JAX that sees the GPU: {result.stderr[-300:]}")


@pytest.fixture
def jax_gpus(monkeypatch, xla_flags):
    """Number of GPUs, in an environment in which ranks may share one: JAX must not take its memory
    at once."""
    cupy = pytest.importorskip("cupy")
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    monkeypatch.setenv("XLA_FLAGS", xla_flags)
    monkeypatch.setenv("OMPI_ALLOW_RUN_AS_ROOT", "1")
    monkeypatch.setenv("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1")
    monkeypatch.setenv("PYTHONPATH", python_path())
    monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS", raising=False)
    return cupy.cuda.runtime.getDeviceCount()


@pytest.fixture
def two_jax_gpus(jax_gpus):
    """As `jax_gpus`, where there are two or more."""
    if jax_gpus < 2:
        pytest.skip("needs two GPUs")
    return jax_gpus
