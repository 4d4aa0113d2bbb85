"""Which GPU a process takes, which GPUs do, which arrays may be written to; CUDA is a stand-in."""

import math
import sys
import types

import ml_dtypes
import numpy as np
import pytest

import cometrt
from cometrt.cuda.arrays import CudaArrays, is_writable
from cometrt.layer import MoELayer
from cometrt.world.connection import rank_on_host
from cometrt.world.partitions import check_gpu
from tests.launch import mpirun


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, 5),
        ({"OMPI_COMM_WORLD_RANK": "5", "OMPI_COMM_WORLD_SIZE": "8",
          "OMPI_COMM_WORLD_LOCAL_RANK": "1"}, 1),
        ({"PMI_RANK": "5", "PMI_SIZE": "8", "MPI_LOCALRANKID": "2"}, 2),
        ({"PMI_RANK": "5", "PMI_SIZE": "8"}, 5),
        ({"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "3"}, 3),
        # Of a job around this launcher's.
        ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "0"}, 5),
        ({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_LOCALID": "0",
          "PMI_RANK": "5", "PMI_SIZE": "8", "MPI_LOCALRANKID": "1"}, 1),
    ],
)  # fmt: skip
def test_the_rank_on_the_host_is_the_launchers(monkeypatch, environment, expected):
    for name in ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID", "MV2_COMM_WORLD_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert rank_on_host(5, 8) == expected


STAND_IN = """
import sys, types
class Device:
    def __init__(self, number=0): self.id = number
    def use(self): Device.used = self.id
def properties(number):
    return {"name": NAMES[number], "major": 9 if b"H" in NAMES[number] else 8, "minor": 0}
NAMES = [b"NVIDIA H100", b"NVIDIA H200", b"NVIDIA A100"]
runtime = types.SimpleNamespace(getDeviceCount=lambda: len(NAMES), driverGetVersion=lambda: 13000,
                                getDeviceProperties=properties)
cupy = types.ModuleType("cupy")
cupy.cuda = types.SimpleNamespace(Device=Device, runtime=runtime)
sys.modules["cupy"] = cupy
"""

GROUPS = (
    STAND_IN
    + """
from mpi4py import MPI
import cometrt
from cometrt.world import connection
comm = MPI.COMM_WORLD
class Stop(Exception): pass
def stop(*_): raise Stop
connection.MPIWorld = stop  # which GPU a rank takes is all that is looked at
def used(comm, **more):
    Device.used = -1
    try: cometrt.connect(comm, "cuda", timeout_sec=20, **more)
    except Stop: return Device.used
    except ValueError as error: return str(error)
group = comm.Split(comm.rank // 2, comm.rank)
NAMES[:] = [b"NVIDIA H100"] * 3
found = [used(group), used(group, gpu=2 - comm.rank % 2),
         used(comm, gpu=7 if comm.rank == 1 else 0),
         used(comm, gpu="1" if comm.rank == 2 else None)]
NAMES[1] = b"NVIDIA A100-SXM4-80GB"
found.append(used(comm))
found = comm.gather(found)
if comm.rank == 0: print(*zip(*found), sep="\\n", flush=True)
"""
)


def test_connect_takes_the_rank_on_the_host_or_the_gpu_that_is_named(tmp_path):
    script = tmp_path / "groups.py"
    script.write_text(GROUPS)
    result = mpirun(4, str(script), timeout_sec=60)
    assert result.returncode == 0, result.stdout + result.stderr
    by_host, named, too_large, no_int, no_hopper = result.stdout.splitlines()
    assert by_host == "(0, 1, 2, 0)"  # also in a group of two
    assert named == "(2, 1, 2, 1)"
    assert too_large.count("gpu must be an integer in [0, 2] (got 7) [rank 1]") == 4
    assert no_int.count("gpu must be an integer in [0, 2] (got '1') [rank 2]") == 4
    assert no_hopper.count("compute capability 9.0 (got NVIDIA A100-SXM4-80GB, 8.0) [rank 1]") == 4


HOST = """
from mpi4py import MPI
import cometrt
try: cometrt.connect(MPI.COMM_WORLD, "host", gpu=0)
except ValueError as error: print(error)
"""


def test_the_host_has_no_gpu(tmp_path):
    script = tmp_path / "host.py"
    script.write_text(HOST)
    result = mpirun(2, str(script), timeout_sec=60)
    assert result.stdout.count("gpu must be None on device='host' (got 0) [rank 0]") == 2


@pytest.mark.parametrize(
    ("driver", "name", "capability", "message"),
    [
        (13000, b"NVIDIA H100 80GB HBM3", (9, 0), None),
        (13020, b"NVIDIA GH200", (9, 0), None),
        (12080, b"NVIDIA H100", (9, 0), "driver for CUDA 13.0 or newer (got one for CUDA 12.8)"),
        (13000, b"NVIDIA A100", (8, 0), "compute capability 9.0 (got NVIDIA A100, 8.0)"),
        (13000, b"NVIDIA B200", (10, 0), "compute capability 9.0 (got NVIDIA B200, 10.0)"),
    ],
)
def test_only_hopper_and_a_new_driver_do(monkeypatch, driver, name, capability, message):
    properties = {"name": name, "major": capability[0], "minor": capability[1]}
    runtime = types.SimpleNamespace(
        driverGetVersion=lambda: driver, getDeviceProperties=lambda _: properties
    )
    cupy = types.ModuleType("cupy")
    cupy.cuda = types.SimpleNamespace(runtime=runtime)
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    if message is None:
        check_gpu(0)
        return
    with pytest.raises(ValueError, match=r"device='cuda' needs") as error:
        check_gpu(0)
    assert message in str(error.value)


class Interface:
    """Of an older library, or one that has only the CUDA array interface."""

    def __init__(self, read_only):
        self.__cuda_array_interface__ = {"data": (0, read_only)}


class OldCapsule:
    def __dlpack__(self, **_):
        return np.zeros(1).__dlpack__()  # no version: it says nothing


class NoVersions:
    def __dlpack__(self, *, stream=None):
        return np.zeros(1).__dlpack__()


def test_an_array_says_itself_whether_it_may_be_written_to():
    frozen = np.zeros(3)
    frozen.flags.writeable = False
    assert is_writable(np.zeros(3))
    assert not is_writable(frozen)
    assert is_writable(Interface(False))
    assert not is_writable(Interface(True))
    assert not is_writable(OldCapsule())
    assert not is_writable(NoVersions())


class Array:
    """Stands for cupy.ndarray."""

    def __init__(self, shape, dtype, address, c_contiguous=True):
        self._c_contiguous = c_contiguous
        self.strides = "of the array"
        self.shape, self.dtype, self.size = shape, np.dtype(dtype), math.prod(shape)
        self.flags = types.SimpleNamespace(c_contiguous=c_contiguous)
        self.data = types.SimpleNamespace(device_id=0, ptr=address)


@pytest.fixture
def cuda_arrays(monkeypatch):
    cupy = types.ModuleType("cupy")
    cupy.ndarray = Array
    cupy.cuda = types.SimpleNamespace(Device=lambda: types.SimpleNamespace(id=0))
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    return CudaArrays()


@pytest.mark.parametrize(
    ("shape", "dtype", "address", "multiple"),
    [
        ((4, 64), ml_dtypes.bfloat16, 0x1002, 16),
        ((4, 64), ml_dtypes.bfloat16, 0x1010, None),
        ((0, 64), ml_dtypes.bfloat16, 0x1002, None),  # nothing is there
        ((2, 4, 64), np.float32, 0x1004, 16),  # a gradient of weights
        ((4, 2), np.float32, 0x1004, None),
        ((4, 2), np.float32, 0x1002, 4),
        ((4, 2), np.int32, 0x1004, None),
        ((4, 2), np.int64, 0x1004, 8),
    ],
)
def test_where_arrays_must_begin(cuda_arrays, shape, dtype, address, multiple):
    array = Array(shape, dtype, address)
    if multiple is None:
        assert cuda_arrays.check("it", array, shape, (array.dtype,)) is array
        return
    with pytest.raises(ValueError, match=f"^it must begin at a multiple of {multiple} bytes"):
        cuda_arrays.check("it", array, shape, (array.dtype,))


@pytest.mark.parametrize(
    ("given", "rule"),
    [
        (Array((4, 2), np.int32, 0x1000), r"have dtype float32 \(got int32\)"),
        (Array((4, 3), np.float32, 0x1000), r"have shape \(T, 2\) \(got \(4, 3\)\)"),
        (Array((2,), np.float32, 0x1000), r"have shape \(T, 2\) \(got \(2,\)\)"),
        (Array((4, 2), np.float32, 0x1000, c_contiguous=False), "be C-contiguous"),
    ],
)
def test_what_arrays_must_be(cuda_arrays, given, rule):
    with pytest.raises(ValueError, match=f"^it must {rule}"):
        cuda_arrays.check("it", given, (None, 2), (np.dtype(np.float32),))
    if given.shape == (4, 2):
        with pytest.raises(ValueError, match=f"^it must {rule}"):
            cuda_arrays.check("it", given, (4, 2), (np.dtype(np.float32),))


SPEC = cometrt.MoESpec(64, 96, num_experts=4, topk=2, max_tokens=32, dtype="float32")


def test_results_take_the_place_of_their_own_tokens_in_the_heap_or_none():
    def fn(world):
        rng = np.random.default_rng(world.rank)
        layer = MoELayer(world, SPEC)
        x, w = rng.standard_normal((20, 64), np.float32), rng.random((20, 2), np.float32)
        ids = np.argsort(rng.random((20, 4)), axis=1)[:, :2].astype(np.int32)
        weights = (
            rng.standard_normal((2, 192, 64), np.float32),
            rng.standard_normal((2, 64, 96), np.float32),
        )
        y, saved = layer.forward(x, ids, w, *weights)
        for shift in (1, 5):
            inside = layer.buffer()[shift : shift + 20]
            inside[...] = x
            again, _ = layer.forward(inside, ids, w, *weights)
            assert again.tobytes() == y.tobytes()
            with pytest.raises(ValueError, match=r"^out must begin where layer.buffer\(\) begins"):
                layer.forward(x, ids, w, *weights, out=layer.buffer()[shift : shift + 20])
            out = cometrt.Gradients(layer.buffer()[shift : shift + 20], None, None, None)
            with pytest.raises(ValueError, match=r"^out.x must begin where layer.buffer\(\) b"):
                layer.backward(y, saved, out=out)
        own = layer.buffer()[:20]
        own[...] = x
        again, _ = layer.forward(own, ids, w, *weights, out=own)
        assert again.tobytes() == y.tobytes()
        flat = layer.buffer().reshape(-1)[:40].reshape(20, 2)
        out = cometrt.Gradients(None, flat, None, None)
        with pytest.raises(ValueError, match=r"^out.topk_weights must not lie in layer.buffer\(\)"):
            layer.backward(y, saved, out=out)

    cometrt.spawn(fn, 2)


def test_numbers_of_pairs_and_rows_fit_in_32_bits():
    def fn(world):
        spec = cometrt.MoESpec(16, 16, num_experts=64, topk=32, max_tokens=1 << 25)
        with pytest.raises(ValueError, match=r"max_tokens must keep .* below 2\*\*31 \(got 2 \* "):
            MoELayer(world, spec)

    cometrt.spawn(fn, 2)
