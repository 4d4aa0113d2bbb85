"""`connect`: the worlds of a JAX program, and which of their ranks this process runs."""

from __future__ import annotations

import collections
import socket
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np

from cometrt.closing import Closing
from cometrt.errors import first_original
from cometrt.interop.jax.bootstrap import DistributedStore, LocalStore, Store, StoreComm
from cometrt.interop.jax.placement import Placement
from cometrt.specs import check_timeout
from cometrt.world import World
from cometrt.world import connect as connect_by_mpi
from cometrt.world.connection import launched, use_gpu
from cometrt.world.mpi import MPIWorld
from cometrt.world.threads import check_device

Key = TypeVar("Key")
Result = TypeVar("Result")

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_num_groups: collections.Counter[str] = collections.Counter()  # worlds made of each group


class Place(NamedTuple):
    """Where one rank of this process stands.

    Attributes:
        rank, size: in its world.
        device: of JAX.
        mesh_index: place of the device in the flattened mesh.
        group: names the world's devices, alike on all its ranks.
        row: number of the world's row of the mesh.
    """

    rank: int
    size: int
    device: Any
    mesh_index: int = 0
    group: str = "processes"
    row: int = 0


class JaxWorld(Closing):
    """This process's ranks in the worlds of a JAX program; made by `connect`. Making it is
    collective.

    Attributes:
        ranks: worlds by the place of their device in the flattened mesh; without a mesh, by 0.
        mesh: of `connect`, or None.
        axis: of `connect`; None without a mesh.
        size: number of ranks of a world.
        device: "host" or "cuda".
        placement: of the ranks; programs must have it.
    """

    def __init__(self, ranks: Mapping[int, World], mesh: Any = None, axis: str | None = None):
        self.ranks, self.mesh, self.axis = dict(ranks), mesh, axis
        world = next(iter(self.ranks.values()))
        self.size, self.device = world.size, world.device
        processes: tuple[int, ...] = ()
        if mesh is None:
            processes = tuple(world.allgather(jax.process_index(), purpose="processes of JAX"))
        self.placement = Placement(mesh, processes)
        self.locks = {index: threading.Lock() for index in self.ranks}

    @property
    def rank(self) -> int:
        """This process's rank.

        Raises:
            ValueError: if this process runs several ranks.
        """
        if len(self.ranks) > 1:
            raise ValueError(f"rank must be one, but this process runs {len(self.ranks)} of them")
        return next(iter(self.ranks.values())).rank

    def reset(self) -> None:
        """As `World.reset`, on all ranks of this process, once the programs that have been started
        have ended."""
        jax.effects_barrier()
        on_ranks({index: world.reset for index, world in self.ranks.items()})

    def close(self) -> None:
        """As `World.close`, on all ranks of this process, once the programs that have been started
        have ended."""
        jax.effects_barrier()
        on_ranks({index: world.close for index, world in self.ranks.items()})

    def abandon(self, error: BaseException) -> None:
        """As `World.abandon`, on all ranks of this process."""
        for world in self.ranks.values():
            world.abandon(error)

    def __repr__(self) -> str:
        ranks = [world.rank for world in self.ranks.values()]
        return f"<JaxWorld of {self.size} ranks, {self.device}; ranks {ranks} are here>"


def connect(
    mesh: Any = None, axis: str = "expert", *, comm: Any = None, timeout_sec: float = 30.0
) -> JaxWorld:
    """Collective: make the world whose ranks are JAX devices, on one host.

    Args:
        mesh: a jax.sharding.Mesh; ranks are its devices along `axis`, in their order. Devices that
            differ in another axis are in worlds of their own. None: every process is a rank, with
            its one device.
        axis: of the mesh.
        comm: an mpi4py communicator of the processes, one rank each. None: the processes of
            `jax.distributed` meet in its key-value store; without it this process is alone.
        timeout_sec: the longest time that a single wait may last, in seconds.

    The world is of CPUs or of GPUs, as the mesh, or else JAX's default backend, is. On CPUs a
    process may have several devices of the mesh. On GPUs a process has one: start a process for
    each GPU.

    Raises:
        ValueError: for a wrong argument; for several GPUs of one process; for ranks on several
            hosts; for a process that a launcher started beside others, but that neither
            `jax.distributed` nor comm brings together with them; and as `cometrt.connect`.
        PeerTimeout: if a rank does not call it within timeout_sec.
    """
    timeout_sec = check_timeout(timeout_sec)
    places = [_place_alone(comm)] if mesh is None else _places(mesh, axis)
    device = _kind(places[0].device)
    if len(places) > 1 and device == "cuda":
        raise ValueError(
            f"connect needs one process for each GPU (this process has {len(places)} GPUs of the "
            "mesh): ranks of one process would wait for each other's launches"
        )
    if len(places) > 1 and comm is not None:
        raise ValueError(
            f"comm must be None if a process has several ranks (this one has {len(places)})"
        )
    check_device(device)
    if comm is not None:
        place = places[0]
        gpu = _gpu(place) if device == "cuda" else None
        # One communicator for each row of the mesh, in the order of its ranks.
        row = comm if mesh is None else comm.Split(place.row, place.rank)
        try:
            world = connect_by_mpi(row, device, timeout_sec=timeout_sec, gpu=gpu)
        finally:
            if row is not comm:
                row.Free()
        if world.nodes > 1:
            world.close()
            raise ValueError(f"connect needs all ranks on one host (got {world.nodes} nodes)")
        worlds: dict[int, World] = {place.mesh_index: world}
    else:
        store, names = _store(), _new_names({place.group for place in places})
        worlds = on_ranks(
            {
                place.mesh_index: _maker(place, store, names[place.group], device, timeout_sec)
                for place in places
            }
        )
    return JaxWorld(worlds, mesh, None if mesh is None else axis)


def _place_alone(comm: Any) -> Place:
    """The place of this process, whose one device is its rank's."""
    default, local = jax.config.jax_default_device, jax.local_devices()
    device = default if isinstance(default, jax.Device) else local[0]
    if _kind(device) == "cuda" and device is not default and len(local) > 1:
        raise ValueError(
            f"connect needs one process for each GPU (this process has {len(local)} GPUs): choose "
            "its GPU with jax.distributed.initialize(local_device_ids=[...]) or "
            "jax.config.update('jax_cuda_visible_devices', '...')"
        )
    return Place(jax.process_index(), jax.process_count(), device)


def _places(mesh: Any, axis: str) -> list[Place]:
    """The places of this process's devices in the mesh."""
    if not isinstance(mesh, jax.sharding.Mesh):
        raise ValueError(f"mesh must be a jax.sharding.Mesh or None (got {mesh!r})")
    if axis not in mesh.axis_names:
        raise ValueError(f"axis must be one of the mesh's {mesh.axis_names} (got {axis!r})")
    along = mesh.axis_names.index(axis)
    rows = np.moveaxis(mesh.devices, along, -1)
    indices = np.moveaxis(np.arange(mesh.devices.size).reshape(mesh.devices.shape), along, -1)
    size = rows.shape[-1]
    places = []
    for row, devices in enumerate(rows.reshape(-1, size)):
        group = ",".join(str(device.id) for device in devices)
        for rank, device in enumerate(devices):
            if device.process_index == jax.process_index():
                index = int(indices.reshape(-1, size)[row, rank])
                places.append(Place(rank, size, device, index, group, row))
    if not places:
        raise ValueError("mesh must have a device of this process (it has none)")
    return places


def _kind(device: Any) -> str:
    """The world's device, "host" or "cuda"."""
    if device.platform not in ("cpu", "gpu", "cuda"):
        raise ValueError(f"devices must be CPUs or NVIDIA GPUs (got {device.platform!r})")
    return "host" if device.platform == "cpu" else "cuda"


def _gpu(place: Place) -> int:
    """The number of the rank's GPU among those that CUDA shows to this process: of the one that an
    array of the JAX device lies on."""
    import cupy

    array = jax.device_put(np.zeros(1, np.float32), place.device)
    pointer = int(array.unsafe_buffer_pointer())
    return int(cupy.cuda.runtime.pointerGetAttributes(pointer).device)


def _store() -> Store:
    from jax._src import distributed  # JAX has no public name for its key-value store

    client = distributed.global_state.client
    if client is not None:
        return DistributedStore(client)
    found = launched()
    if found is not None:
        name, size = found
        raise ValueError(
            f"connect must find the ranks of the launcher: it started {size} ({name}), but without "
            "jax.distributed this process is alone. Call jax.distributed.initialize("
            "cluster_detection_method='mpi4py') before JAX is used, or pass comm=MPI.COMM_WORLD"
        )
    return LocalStore()


def _new_names(groups: set[str]) -> dict[str, str]:
    """A name for the world of each group, which no earlier world of the group has had."""
    _num_groups.update(groups)
    return {group: f"{group}/{_num_groups[group]}" for group in groups}


def _maker(
    place: Place, store: Store, name: str, device: str, timeout_sec: float
) -> Callable[[], World]:
    def make() -> World:
        comm = StoreComm(store, name, place.rank, place.size, timeout_sec)
        gpu = _gpu(place) if device == "cuda" else None
        problem = use_gpu(device, gpu, None)
        ranks = comm.allgather((problem, _host()))
        for rank, (text, _) in enumerate(ranks):
            if text:
                raise ValueError(f"{text} [rank {rank}]")
        hosts = {host for _, host in ranks}
        if len(hosts) > 1:
            raise ValueError(f"connect needs all ranks on one host (got {len(hosts)} hosts)")
        return MPIWorld(comm, device, timeout_sec)

    return make


def _host() -> str:
    """Names this host: its boot, or else its name."""
    try:
        return _BOOT_ID.read_text()
    except OSError:
        return socket.gethostname()


def on_ranks(functions: Mapping[Key, Callable[[], Result]]) -> dict[Key, Result]:
    """Call one function for each rank of this process, at the same time; their results.

    Raises:
        Exception: the first that a rank raised.
    """
    if len(functions) == 1:
        return {key: function() for key, function in functions.items()}
    results: dict[Key, Result] = {}
    errors: list[tuple[float, BaseException]] = []

    def run(key: Key, function: Callable[[], Result]) -> None:
        try:
            results[key] = function()
        except BaseException as error:
            errors.append((time.monotonic(), error))

    threads = [threading.Thread(target=run, args=item) for item in functions.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise first_original(errors)
    return {key: results[key] for key in functions}
