"""GPUs for the ranks of one process: one GPU per rank, or one partition of a GPU per rank.

A partition is a CUDA green context: a stream whose kernels run on a fixed subset of the SMs.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

from cometrt.errors import CometError


class Partition(NamedTuple):
    """A stream and the number of SMs that its kernels run on."""

    stream: Any  # cupy.cuda.Stream
    num_sms: int
    device_id: int
    context: Any = None  # CUgreenCtx; None: the whole GPU


class _StreamHandle:
    """A stream for `cupy.cuda.Stream.from_external`. It keeps the green context alive."""

    def __init__(self, handle: int, context: Any) -> None:
        self._handle, self.context = handle, context

    def __cuda_stream__(self) -> tuple[int, int]:
        return (0, self._handle)


@functools.cache
def split_gpu(count: int, device_id: int = 0) -> list[Partition]:
    """Split a GPU into `count` partitions of equally many SMs, a multiple of 8 each.

    Partitions live as long as the process. Further calls return the same ones.

    Raises:
        CometError: if the GPU has too few SMs, or the driver refuses the split.
    """
    import cupy
    from cuda.bindings import driver

    cupy.cuda.Device(device_id).use()
    cupy.cuda.runtime.free(0)  # creates the primary context

    def check(result: tuple[Any, ...]) -> Any:
        if int(result[0]) != 0:
            raise CometError(f"cannot split the GPU into {count} partitions: {result[0]}")
        return result[1] if len(result) == 2 else result[1:]

    device = check(driver.cuDeviceGet(device_id))
    kind = driver.CUdevResourceType.CU_DEV_RESOURCE_TYPE_SM
    whole = check(driver.cuDeviceGetDevResource(device, kind))
    num_sms = whole.sm.smCount // count // 8 * 8
    if num_sms < 8:
        raise CometError(f"{whole.sm.smCount} SMs are too few for {count} partitions of 8 or more")
    groups, found, _ = check(driver.cuDevSmResourceSplitByCount(count, whole, 0, num_sms))
    if found < count:
        raise CometError(f"the GPU gives {found} partitions of {num_sms} SMs (wanted {count})")
    partitions = []
    for group in groups[:count]:
        description = check(driver.cuDevResourceGenerateDesc([group], 1))
        flags = driver.CUgreenCtxCreate_flags.CU_GREEN_CTX_DEFAULT_STREAM
        context = check(driver.cuGreenCtxCreate(description, device, flags))
        stream = _new_stream(context)
        partitions.append(Partition(stream, int(group.sm.smCount), device_id, context))
    return partitions


def _new_stream(context: Any, priority: int = 0) -> Any:
    """A new stream of a green context; None: of the current device."""
    import cupy

    if context is None:
        return cupy.cuda.Stream(non_blocking=True, priority=priority)
    from cuda.bindings import driver

    non_blocking = driver.CUstream_flags.CU_STREAM_NON_BLOCKING
    result, handle = driver.cuGreenCtxStreamCreate(context, non_blocking, priority)
    if int(result) != 0:
        raise CometError(f"no stream for a partition of the GPU: {result}")
    return cupy.cuda.Stream.from_external(_StreamHandle(int(handle), context))


def auxiliary_stream(number: int = 0, priority: int = 0) -> Any:
    """An auxiliary stream on the SMs of this thread's partition; `number` selects one of several.
    The less `priority`, the sooner its kernels get SMs that come free.

    It is created on the first call, since each takes one of the few hardware queues, and lives as
    long as the process. Threads without a partition share theirs.
    """
    import cupy

    partition = getattr(_current, "partition", None)
    if partition is None:
        partition = _whole_gpu(cupy.cuda.Device().id)
    key = (partition.device_id, partition.stream.ptr, number)
    if key not in _auxiliary_streams:
        _auxiliary_streams[key] = _new_stream(partition.context, priority)
    return _auxiliary_streams[key]


_auxiliary_streams: dict[
    tuple[int, int, int], Any
] = {}  # by device, the partition's stream, number


@contextlib.contextmanager
def use_partition(partition: Partition) -> Iterator[None]:
    """Make the partition's device and stream current for this thread."""
    import cupy

    before = getattr(_current, "partition", None)
    with cupy.cuda.Device(partition.device_id), partition.stream:
        _current.partition = partition
        try:
            yield
        finally:
            _current.partition = before


@contextlib.contextmanager
def _rank_partition(partition: Partition) -> Iterator[None]:
    """As `use_partition`, and synchronize the stream when leaving."""
    with use_partition(partition):
        try:
            yield
        finally:
            partition.stream.synchronize()


_current = threading.local()
_MULTIPROCESSORS = 16  # cudaDevAttrMultiProcessorCount
_ALREADY_ENABLED = 704  # cudaErrorPeerAccessAlreadyEnabled


def ranks_share_gpu(ranks: int, link: str | None) -> bool:
    """Whether ranks get partitions of one GPU: if a link is emulated, or GPUs are too few."""
    import cupy

    enough = cupy.cuda.runtime.getDeviceCount() >= ranks
    return ranks > 1 and (link is not None or not enough)


def rank_partitions(ranks: int, *, share: bool) -> list[contextlib.AbstractContextManager[None]]:
    """A context for each rank's thread that makes its partition or its GPU current.

    Args:
        share: True: partitions of GPU 0. False: one GPU per rank.

    Raises:
        CometError: if the GPU cannot be split, or GPUs cannot access each other's memory.
    """
    if share:
        partitions = split_gpu(ranks)
    else:
        partitions = [_whole_gpu(device_id) for device_id in range(ranks)]
        for device_id in range(ranks):
            _enable_peer_access(device_id, ranks)
    return [_rank_partition(partition) for partition in partitions]


def _enable_peer_access(device_id: int, ranks: int) -> None:
    """Let kernels of this GPU access the memory of the other ranks' GPUs."""
    import cupy

    runtime = cupy.cuda.runtime
    with cupy.cuda.Device(device_id):
        for peer in set(range(ranks)) - {device_id}:
            if not runtime.deviceCanAccessPeer(device_id, peer):
                raise CometError(f"GPU {device_id} cannot reach the memory of GPU {peer}")
            try:
                runtime.deviceEnablePeerAccess(peer)
            except runtime.CUDARuntimeError as error:
                if error.status != _ALREADY_ENABLED:
                    raise


_OLDEST_DRIVER = 13000  # CUDA 13.0
_HOPPER = (9, 0)


def check_driver() -> None:
    """Raise a ValueError if the driver is too old; return if it is not, or if there is none."""
    import cupy

    driver = int(cupy.cuda.runtime.driverGetVersion())
    if 0 < driver < _OLDEST_DRIVER:
        raise ValueError(
            f"device='cuda' needs an NVIDIA driver for CUDA 13.0 or newer "
            f"(got one for CUDA {driver // 1000}.{driver % 1000 // 10})"
        )


def check_gpu(device_id: int) -> None:
    """Raise a ValueError if the kernels cannot run: no Hopper GPU, or a driver that is too old."""
    import cupy

    runtime = cupy.cuda.runtime
    check_driver()
    found = runtime.getDeviceProperties(device_id)
    capability = found["major"], found["minor"]
    if capability != _HOPPER:
        raise ValueError(
            f"device='cuda' needs a Hopper GPU, such as H100 or H200: compute capability 9.0 "
            f"(got {found['name'].decode()}, {capability[0]}.{capability[1]})"
        )


def num_sms() -> int:
    """Number of SMs that this thread's kernels run on."""
    partition = getattr(_current, "partition", None)
    sms = partition.num_sms if partition is not None else gpu_sms()
    return sms - int(getattr(_current, "left_sms", 0))


@contextlib.contextmanager
def leave_sms(count: int) -> Iterator[None]:
    """Within it `num_sms` counts so many SMs less: grids leave them to kernels of other streams."""
    before = getattr(_current, "left_sms", 0)
    _current.left_sms = count
    try:
        yield
    finally:
        _current.left_sms = before


def gpu_sms() -> int:
    """Number of SMs of this thread's GPU."""
    import cupy

    runtime = cupy.cuda.runtime  # called at each launch; `Device.attributes` would be slow
    return int(runtime.deviceGetAttribute(_MULTIPROCESSORS, runtime.getDevice()))


def gpu_name() -> str:
    """The driver's name of this thread's GPU."""
    import cupy

    properties = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)
    return str(properties["name"].decode())


@functools.cache
def _whole_gpu(device_id: int) -> Partition:
    import cupy

    with cupy.cuda.Device(device_id) as device:
        return Partition(
            _new_stream(None), int(device.attributes["MultiProcessorCount"]), device_id
        )
