"""Memory of a GPU between processes: CUDA IPC, by cuda-python."""

from __future__ import annotations

from typing import Any

from cometrt.errors import CometError


def handle_of(pointer: int) -> bytes:
    """What another process opens: of the allocation that begins at `pointer`.

    Raises:
        CometError: where the driver has none.
    """
    from cuda.bindings import driver

    (handle,) = _check("cuIpcGetMemHandle", driver.cuIpcGetMemHandle(pointer))
    return bytes(handle.reserved)


def open_handle(handle: bytes) -> int:
    """The address here of another process's allocation; not of this process's own.

    Raises:
        CometError: where this process's GPU does not reach it.
    """
    from cuda.bindings import driver

    memory = driver.CUipcMemHandle()
    memory.reserved = handle
    flags = driver.CUipcMem_flags.CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS
    (pointer,) = _check("cuIpcOpenMemHandle", driver.cuIpcOpenMemHandle(memory, int(flags)))
    return int(pointer)


def close_handle(pointer: int) -> None:
    """What `open_handle` returned is not used any more."""
    from cuda.bindings import driver

    _check("cuIpcCloseMemHandle", driver.cuIpcCloseMemHandle(pointer))


def _check(name: str, result: tuple[Any, ...]) -> tuple[Any, ...]:
    if int(result[0]) != 0:
        raise CometError(f"{name} failed: {result[0]!s}")
    return result[1:]
