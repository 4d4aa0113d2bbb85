"""`NodesWorld`: ranks on several nodes. Rank = node * G + place, with G ranks on each of N nodes.

Inside a node ranks share memory, in a world of their own (`NodeWorld`). Between nodes MPI carries
the control blocks (`cometrt.world.mirror`), so collectives, failures and `reset` are those of one
node. A world that stops also stops the other one. Unlike a world on one host it needs MPI until it
is closed.
"""

from __future__ import annotations

import functools
import os
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, SupportsInt, TypeVar

import numpy as np

from cometrt.errors import CometError
from cometrt.specs import check_timeout
from cometrt.world.failure import Failure, WaitTarget
from cometrt.world.mirror import Mirror
from cometrt.world.mpi import MPIWorld
from cometrt.world.one_call import OneCall
from cometrt.world.reset import reset

if TYPE_CHECKING:
    from cometrt.world.nccl import NcclRail

Value = TypeVar("Value")

RANKS_PER_NODE = "COMETRT_RANKS_PER_NODE"


class NodeWorld(MPIWorld):
    """The world of one node's ranks, within a `NodesWorld`. Its messages have the numbers of all
    ranks."""

    def __init__(self, comm: Any, device: str, outer: NodesWorld) -> None:
        """Collective on the node."""
        self._outer: NodesWorld = weakref.proxy(outer)
        self.first_rank = outer.rank // outer.ranks_per_node * outer.ranks_per_node
        self._complete = False  # the outer world has not had its first collective yet
        super().__init__(comm, device, outer.timeout_sec)
        self.one_call, self._complete = outer.one_call, True

    @property
    def stopped(self) -> bool:
        """As `World.stopped`. It also looks for failures on other nodes."""
        if self._complete and not self._outer.is_watched:
            self._outer.update()
        return self.is_stopped

    @property
    def is_stopped(self) -> bool:
        """As `stopped`, without looking elsewhere."""
        return super().stopped

    def stop(self, failure: Failure) -> None:
        if not self._is_forked():
            super().stop(failure)
            if self._complete and not self._outer.is_stopped:
                self._outer.stop(failure)


class NodesWorld(MPIWorld):
    """The world of all ranks.

    Attributes:
        comm: the MPI communicator of all ranks.
        rail: ranks of the same place in their nodes, by node: those between which tokens cross.
        nccl: on "cuda" the rail's NCCL communicator.
        layers: on "cuda", (slices, shape within the node, spec) of each layer, by its number.
        retired_receives: (MPI request, memory) of failed calls, until `reset`.
        retired_sends: what keeps the memory of messages that nobody receives any more.
    """

    def __init__(
        self, comm: Any, node_comm: Any, device: str, timeout_sec: float, ranks_per_node: int
    ) -> None:
        """Collective.

        Args:
            comm: of all ranks. It is kept.
            node_comm: of this node's ranks. Used only during construction.
        """
        self._node: NodeWorld | None = None
        self.nccl: NcclRail | None = None
        self.comm, self.nodes = comm, comm.Get_size() // ranks_per_node
        self.node_index = comm.Get_rank() // ranks_per_node
        self.layers: dict[int, tuple[Any, Any, Any]] = {}
        self.retired_receives: list[tuple[Any, Any]] = []
        self.retired_sends: list[Any] = []
        super().__init__(comm, device, timeout_sec)
        place = self.rank % ranks_per_node
        self.rail = range(place, self.size, ranks_per_node)
        self._left.detach()
        signal = functools.partial(_signal_left, self.control_block, self._mirror, os.getpid())
        self._left = weakref.finalize(self, signal)
        try:
            self._node = NodeWorld(node_comm, device, self)
            self.barrier()
            if device == "cuda":
                from cometrt.world.nccl import NcclRail

                self.nccl = NcclRail(self)
        except BaseException as error:
            self.abandon(error)
            raise

    def allocate_host(self, nbytes: int) -> list[np.ndarray]:
        """This rank's copies of all ranks' control blocks; other memory is the node's."""
        return [np.zeros(nbytes, np.uint8) for _ in range(self.comm.Get_size())]

    def allocate(self, nbytes: int) -> list[Any]:
        raise CometError(f"ranks of {self.nodes} nodes share no memory: this needs one node")

    @functools.cached_property
    def _mirror(self) -> Mirror:
        return Mirror(self.comm, self.control_blocks)

    @property
    def node(self) -> NodeWorld:
        assert self._node is not None
        return self._node

    @property
    def timeout_sec(self) -> float:
        return self._timeout_sec

    @timeout_sec.setter
    def timeout_sec(self, seconds: float) -> None:
        self._timeout_sec = check_timeout(seconds)
        if self._node is not None:
            self._node.timeout_sec = self._timeout_sec

    # ---- waiting and stopping ---------------------------------------------------------------

    def update(self) -> None:
        """Exchange what has changed in control blocks. A failure elsewhere stops the node too."""
        self._mirror.update()
        if self._node is not None and self.is_stopped and not self._node.is_stopped:
            self._node.stop(self._failure())

    def wait(
        self,
        read: Callable[[], SupportsInt],
        target: WaitTarget,
        *,
        even_if_stopped: bool = False,
        mismatch: Callable[[], str] = str,
        gone: Callable[[], str] | None = None,
    ) -> None:
        if self.is_watched:
            self._mirror.push()  # `update` may leave it to the other thread, which may be too early

        def read_news() -> SupportsInt:
            self.update()
            return read()

        super().wait(
            read_news, target, even_if_stopped=even_if_stopped, mismatch=mismatch, gone=gone
        )

    @property
    def stopped(self) -> bool:
        if not self._closed and not self.is_watched:
            self.update()
        return self.is_stopped

    @property
    def is_watched(self) -> bool:
        """Whether a thread of its own looks for news."""
        return self.nccl is not None

    @property
    def is_stopped(self) -> bool:
        """As `stopped`, without looking for news."""
        return super().stopped

    def stop(self, failure: Failure) -> None:
        if self._is_forked():
            return
        super().stop(failure)
        self._mirror.push()
        if self._node is not None and not self._node.is_stopped:
            self._node.stop(failure)

    def follow(self) -> None:
        """Stop this world too if the node's world has stopped."""
        if self.node.is_stopped and not self.is_stopped:
            self.stop(self.node._failure())

    def allgather(self, value: Value, *, purpose: str = "allgather") -> list[Value]:
        gathered = super().allgather(value, purpose=purpose)
        # A long message may need this rank until it has arrived.
        target = WaitTarget("rendezvous", self.rank, 1)
        self.wait(lambda: self._mirror.sent or self.is_stopped, target, even_if_stopped=True)
        return gathered

    def reset(self) -> None:
        self.check_open()
        with self.one_call.hold("world.reset"):
            if self.node.gpu:
                self.node.gpu.drain()
            if self.nccl is not None:  # kernels of failed calls have ended, or never came
                self.nccl.steps[:] = 0
            reset(self)
            reset(self.node)
            self._end_receives()
            self._agree_on_epoch()
            if self.nccl:
                self.nccl.renew()

    def _end_receives(self) -> None:
        """Wait until nothing arrives in the memory of a failed call any more."""
        for request, _ in self.retired_receives:
            target = WaitTarget("reset", self.rank, 1)
            self.wait(request.Test, target)
        self.retired_receives.clear()

    def _agree_on_epoch(self) -> None:
        """Nodes that failed at different times have counted different numbers of exchanges."""
        node = self.node
        node.epoch = max(self.allgather(node.epoch, purpose="reset"))
        node.control_block["epoch"][0] = node.epoch
        if node.gpu:
            node.gpu.begin_generation(node.generation, node.epoch)

    # ---- the end ----------------------------------------------------------------------------

    def _leave(self) -> None:
        self._left.detach()
        self._close_together(1)
        if self.nccl:
            if self.node.gpu:
                self.node.gpu.drain()
            self.nccl.close()
        self.node.one_call = OneCall()  # the common one is held by this call
        self.node.close()
        self.comm.Free()

    def _signal_left(self, error: BaseException) -> None:
        super()._signal_left(error)
        self._mirror.push()
        if self._node is not None:
            self._node.abandon(error)
        if self.nccl:
            self.nccl.close()


def _signal_left(control_block: np.void, mirror: Mirror, process_id: int) -> None:
    from mpi4py import MPI

    if os.getpid() == process_id and not MPI.Is_finalized():
        control_block["closing"][0] = -1
        mirror.push()


def first_on_host(comm: Any) -> int:
    """Collective: the lowest rank of those that share memory with this one."""
    from mpi4py import MPI

    host_comm = comm.Split_type(MPI.COMM_TYPE_SHARED)
    first: int = host_comm.allgather(comm.Get_rank())[0]
    host_comm.Free()
    return first


def ranks_per_node(firsts: list[int], cuts: list[str]) -> int:
    """G.

    Args:
        firsts: by rank, the lowest rank on its host.
        cuts: by rank, COMETRT_RANKS_PER_NODE, which cuts each host into nodes of that many ranks.

    Raises:
        ValueError: unless all nodes have G ranks that follow each other.
    """
    if len(set(cuts)) > 1:
        raise ValueError(f"{RANKS_PER_NODE} must be equal on all ranks (got {sorted(set(cuts))})")
    hosts: dict[int, list[int]] = {}
    for rank, first in enumerate(firsts):
        hosts.setdefault(first, []).append(rank)
    numbers = [len(there) for there in hosts.values()]
    if len(set(numbers)) > 1:
        raise ValueError(f"comm must have equally many ranks on each host (got {numbers})")
    for there in hosts.values():
        if there != list(range(there[0], there[0] + len(there))):
            raise ValueError(
                f"comm must number the ranks of a host one after the other (got {there} on one "
                f"host): start them with --map-by slot, or srun --distribution=block"
            )
    cut, here = cuts[0], numbers[0]
    if not cut:
        return here
    if not cut.isdecimal() or not int(cut) or here % int(cut):
        raise ValueError(f"{RANKS_PER_NODE} must divide the {here} ranks of a host (got {cut!r})")
    return int(cut)


def nccl_problem() -> str:
    """Why NCCL cannot be used, or ""."""
    try:
        from cupy.cuda import nccl

        if not nccl.available:
            raise CometError("CuPy does not find it")
    except Exception as error:  # CuPy has error types of its own
        return f"several nodes need NCCL on device='cuda': install cometrt[nccl] ({error})"
    return ""
