"""Which launches before a forward's GEMMs zero padding rows. tests/device/test_layer.py has what
happens where none does."""

import collections
import sys
import types

import numpy as np
import pytest

from cometrt.cuda import planner, queue
from cometrt.cuda.exchange_params import Call
from cometrt.kernels.params import ParamStruct, exchange_params_dtype, tile_order_params_dtype
from cometrt.plan import PlanShape, TileConfig
from cometrt.specs import Geometry, MoESpec

STREAM, PARAMS, LINK = 7, ParamStruct(exchange_params_dtype), "link"
SHAPE = PlanShape(
    Geometry(MoESpec(64, 64, num_experts=4, topk=2, max_tokens=8), 0, 2), TileConfig()
)


class DeviceArray(np.ndarray):
    """Stands for cupy.ndarray."""

    @property
    def data(self):
        return types.SimpleNamespace(ptr=64)


def empty(shape, dtype):
    return np.zeros(shape, dtype).view(DeviceArray)


class Launches:
    """Names of the kernels that have been launched, and their last arguments."""

    def __init__(self):
        self.made = []

    def load(self, source, *names, macros=()):
        return [Kernel(name, self.made) for name in names]


class Kernel:
    def __init__(self, name, made):
        self.name, self.made = name, made

    def with_shared(self, shared_bytes):
        return self

    def __call__(self, stream, grid, *arguments):
        self.made.append((self.name, arguments[-1]))


@pytest.fixture
def launches(monkeypatch):
    found = Launches()
    cupy = types.ModuleType("cupy")
    cupy.empty = cupy.zeros = empty
    cupy.int32, cupy.uint8, cupy.float32 = np.int32, np.uint8, np.float32
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    for module in (planner, queue):
        monkeypatch.setattr(module, "num_sms", lambda: 4)
        monkeypatch.setattr(module, "load_kernels", found.load)
    return found


def zeroing(launches):
    """Names of the launches that zero padding rows."""
    found = []
    for name, last in launches.made:
        pads = name == "pad" or (name in ("prepare", "prepare_planned") and last.value[0])
        found += [name] if pads else []
    launches.made.clear()
    return found


@pytest.mark.parametrize("small", [True, False], ids=["block", "grid"])
@pytest.mark.parametrize(
    ("mode", "save", "padded"),
    [
        ("fused", "rows", True),
        ("fused", "z", True),
        ("fused", "nothing", False),
        ("sequential", "rows", False),
    ],
)
def test_padding_rows_are_zeroed_where_a_backward_reads_them(launches, small, mode, save, padded):
    counters = empty(planner.planner_counters(SHAPE), np.uint32)
    made = planner.DevicePlanner(SHAPE, counters, small=small)
    orders = (ParamStruct(tile_order_params_dtype),) * 2
    kernels, links = {}, collections.namedtuple("Links", "dispatch")(LINK)
    pads = queue.forwards_pad(mode, save == "nothing")
    queue.ProtocolKernels(made, orders, links, kernels, pads=pads)
    for training in (True, False):
        at = {"tables": 64} | ({"epoch": 128} if training else {})
        kernels["prepare"](STREAM, PARAMS, Call("forward", 3, at))
        wanted = ["pad" if small else "prepare"] if padded and training else []
        assert zeroing(launches) == wanted
        kernels["prepare_planned"](STREAM, PARAMS, Call("planned forward", 3, at))
        assert zeroing(launches) == (["prepare_planned"] if padded and training else [])
    kernels["plan"](STREAM, PARAMS, Call("plan", 3, {"tables": 64, "epoch": 128}))
    assert zeroing(launches) == []
