"""Which launches before a forward's GEMMs zero padding rows. tests/device/test_layer.py has what
happens where none does."""

import collections

import pytest

from cometrt.cuda import queue
from cometrt.cuda.exchange_params import Call
from cometrt.cuda.planner import DevicePlanner
from cometrt.kernels.params import planned_tiles_dtype

ORDERS, STREAM, PARAMS, LINK = ("up", "down"), 7, "params", "link"


class Launches(dict):
    """Kernels by name, and what they have been launched with."""

    def __init__(self):
        self.made = []

    def __missing__(self, name):
        return lambda stream, grid, *arguments: self.made.append((name, arguments[-1]))


@pytest.fixture
def launches(monkeypatch):
    found = Launches()
    monkeypatch.setattr(queue, "num_sms", lambda: 4)
    monkeypatch.setattr(
        queue, "load_kernels", lambda source, *names, macros=(): [found[name] for name in names]
    )
    return found


def planner(launches, small):
    made = object.__new__(DevicePlanner)
    made._small, made._grid, made._kernels, made._params = small, 4, launches, "plan params"
    made._point_to = lambda tables: None
    made.table_offsets = dict.fromkeys(planned_tiles_dtype.names, 0)
    return made


def zeroing(launches):
    """Names of the launches that zero padding rows."""
    found = []
    for name, last in launches.made:
        pads = name == "pad" or (name in ("prepare", "prepare_planned") and last.value[0])
        found += [name] if pads else []
    launches.made.clear()
    return found


@pytest.mark.parametrize("small", [True, False], ids=["cluster", "grid"])
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
    kernels, links = {}, collections.namedtuple("Links", "dispatch")(LINK)
    pads = queue.forwards_pad(mode, save == "nothing")
    queue.ProtocolKernels(planner(launches, small), ORDERS, links, kernels, pads=pads)
    for training in (True, False):
        at = {"tables": 64} | ({"epoch": 128} if training else {})
        kernels["prepare"](STREAM, PARAMS, Call("forward", 3, at))
        wanted = ["pad" if small else "prepare"] if padded and training else []
        assert zeroing(launches) == wanted
        kernels["prepare_planned"](STREAM, PARAMS, Call("planned forward", 3, at))
        assert zeroing(launches) == (["prepare_planned"] if padded and training else [])
    kernels["plan"](STREAM, PARAMS, Call("plan", 3, {"tables": 64, "epoch": 128}))
    assert zeroing(launches) == []
