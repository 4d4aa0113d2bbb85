"""Available and total memory of the host, within the limits of its container, and of a GPU."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

# Files of cgroups, version 2 and 1: the limit, the usage, and statistics of the usage. The usage
# includes file pages, which the kernel drops when memory is short.
_CGROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory.stat"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        "/sys/fs/cgroup/memory/memory.stat",
    ),
)


class Room(NamedTuple):
    """Bytes of memory. `owner` names the host or the GPU, alike on all ranks that share it."""

    owner: str
    available: int
    total: int


def host_room() -> Room:
    """The memory of this host and its container; sys.maxsize if it is unknown."""
    rooms = [_machine(), *(_container(*files) for files in _CGROUPS)]
    available, total = (min(sizes) for sizes in zip(*rooms, strict=True))
    return Room("this host", max(0, available), total)


def gpu_room() -> Room:
    """The memory of this thread's GPU. Free memory of CuPy's pool counts as available."""
    import cupy

    runtime = cupy.cuda.runtime
    device = runtime.getDevice()
    free, total = runtime.memGetInfo()
    pooled = cupy.get_default_memory_pool().free_bytes()
    return Room(f"GPU {runtime.deviceGetPCIBusId(device)}", int(free) + int(pooled), int(total))


def _machine() -> tuple[int, int]:
    sizes = {"MemAvailable": sys.maxsize, "MemTotal": sys.maxsize}
    for line in _read("/proc/meminfo").splitlines():  # MemTotal:  24684084 kB
        name, _, size = line.partition(":")
        if name in sizes:
            sizes[name] = int(size.split()[0]) << 10
    return sizes["MemAvailable"], sizes["MemTotal"]


def _container(limit_file: str, usage_file: str, stat_file: str) -> tuple[int, int]:
    limit, usage = _read(limit_file).strip(), _read(usage_file).strip()
    if not limit.isdigit() or not usage.isdigit():  # "max", or no such file
        return sys.maxsize, sys.maxsize
    stat = dict(line.split() for line in _read(stat_file).splitlines())
    files = sum(int(stat.get(f"{kind}active_file", 0)) for kind in ("", "in"))
    return int(limit) - int(usage) + files, int(limit)


def _read(file: str) -> str:
    try:
        return Path(file).read_text(encoding="utf-8")
    except OSError:
        return ""
