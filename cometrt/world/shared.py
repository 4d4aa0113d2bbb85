"""Memory that processes of one host share: mapped by each, gone with the last mapping.

It has no name that could be left behind, and no call to free it in which ranks would have to meet:
a rank that drops its mapping, or ends, leaves the others theirs.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np

from cometrt.errors import CometError


def share(nbytes: int, allgather: Callable[[Any], list[Any]]) -> list[np.ndarray]:
    """Collective: zeroed memory of every rank, as bytes, in rank order.

    Args:
        nbytes: equal on all ranks, at least 1.
        allgather: every rank's value to every rank, in rank order.

    Raises:
        CometError: on all ranks alike, if one of them cannot have its memory or reach a peer's.
    """
    with contextlib.ExitStack() as until_all_have_it:
        path, problem = "", ""
        try:
            path = _create(nbytes, until_all_have_it)
        except OSError as error:
            problem = f"cannot allocate {nbytes} bytes of shared memory: {error}"
        ranks = allgather((path, problem))
        _raise_first([text for _, text in ranks])
        memories, problem = [], ""
        try:
            memories = [_map(path, nbytes) for path, _ in ranks]
        except OSError as error:
            problem = f"cannot map the shared memory of all ranks: {error}"
        _raise_first(allgather(problem))
        return memories


def _raise_first(problems: list[str]) -> None:
    for rank, problem in enumerate(problems):
        if problem:
            raise CometError(f"{problem} [rank {rank}]")


def _create(nbytes: int, stack: contextlib.ExitStack) -> str:
    """A path that peers can open until the stack is left. All pages are there already: where there
    is no room for them this is an error, and not a signal when they are first written to."""
    if hasattr(os, "memfd_create"):
        file = os.memfd_create("cometrt")
        path = f"/proc/{os.getpid()}/fd/{file}"
    else:
        file, path = tempfile.mkstemp(prefix="cometrt-")
        stack.callback(os.unlink, path)
    stack.callback(os.close, file)
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, 0, nbytes)
    else:
        os.truncate(file, nbytes)
    return path


def _map(path: str, nbytes: int) -> np.ndarray:
    """Views of it keep the mapping."""
    file = os.open(path, os.O_RDWR)
    try:
        return np.frombuffer(mmap.mmap(file, nbytes), np.uint8)
    finally:
        os.close(file)
