"""Memory that processes of one host map together. The kernel frees it with the last mapping.

It has no name in the file system that could be left behind. Freeing it is not collective: a rank
that drops its mapping, or ends, does not affect the others.
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
    """Collective: allocate zeroed memory on every rank and map that of all ranks.

    Args:
        nbytes: of each rank's memory; at least 1, equal on all ranks.
        allgather: a collective that returns the values of all ranks in rank order.

    Returns:
        byte arrays of all ranks, in rank order.

    Raises:
        CometError: the same on all ranks, if any of them cannot allocate or map.
    """
    with contextlib.ExitStack() as until_all_have_mapped:
        path, problem = "", ""
        try:
            path = _create(nbytes, until_all_have_mapped)
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
    """Allocate memory, and return a path by which peers can open it until `stack` is closed.

    All pages are allocated here. So a lack of memory is an OSError now, and not a SIGBUS at the
    first write.
    """
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
    """Map the file. The returned array and its views keep the mapping."""
    file = os.open(path, os.O_RDWR)
    try:
        return np.frombuffer(mmap.mmap(file, nbytes), np.uint8)
    finally:
        os.close(file)
