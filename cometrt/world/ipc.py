"""GPU memory shared between processes: CUDA IPC through cuda-python."""

from __future__ import annotations

from typing import Any

from cometrt.errors import CometError


def handle_of(pointer: int) -> bytes:
    """The IPC handle of the allocation that begins at `pointer`, for `open_handle` elsewhere.

    Raises:
        CometError: if the driver refuses it.
    """
    from cuda.bindings import driver

    (handle,) = _check("cuIpcGetMemHandle", driver.cuIpcGetMemHandle(pointer))
    return bytes(handle.reserved)


def open_handle(handle: bytes) -> int:
    """Map another process's allocation and return its address in this process.

    Raises:
        CometError: if this process's GPU cannot access it.
    """
    from cuda.bindings import driver

    memory = driver.CUipcMemHandle()
    memory.reserved = handle
    flags = driver.CUipcMem_flags.CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS
    (pointer,) = _check("cuIpcOpenMemHandle", driver.cuIpcOpenMemHandle(memory, int(flags)))
    return int(pointer)


def close_handle(pointer: int) -> None:
    """Unmap an allocation that `open_handle` returned."""
    from cuda.bindings import driver

    _check("cuIpcCloseMemHandle", driver.cuIpcCloseMemHandle(pointer))


def _check(name: str, result: tuple[Any, ...]) -> tuple[Any, ...]:
    if int(result[0]) != 0:
        raise CometError(f"{name} failed: {result[0]!s}")
    return result[1:]
