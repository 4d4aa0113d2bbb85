"""Both executors have what the layer calls."""

import inspect

import pytest

from cometrt.cuda.executor import CudaExecutor
from cometrt.executor import Executor
from cometrt.host import HostExecutor

METHODS = [name for name, member in vars(Executor).items() if inspect.isfunction(member)
           and not name.startswith("_")]  # fmt: skip


@pytest.mark.parametrize("executor", [HostExecutor, CudaExecutor])
@pytest.mark.parametrize("method", METHODS)
def test_executors_take_the_same_arguments(executor, method):
    wanted = inspect.signature(getattr(Executor, method)).parameters
    found = inspect.signature(getattr(executor, method)).parameters
    assert [(p.name, p.kind) for p in found.values()] == [(p.name, p.kind) for p in wanted.values()]


def test_the_protocol_has_the_calls_of_a_layer():
    assert {"forward", "backward", "synchronize", "close", "buffer"} <= set(METHODS)
