"""How much memory a layer takes, and whether it is there: asked before anything is allocated."""

from __future__ import annotations

import dataclasses
from types import ModuleType
from typing import Any

from cometrt.agreement import check_layer
from cometrt.arguments import check_bool
from cometrt.buffers import Buffers, total_bytes
from cometrt.errors import CometError
from cometrt.heap import heap_table, region_bytes
from cometrt.host import buffers as host_buffers
from cometrt.plan import PlanShape
from cometrt.specs import MoESpec, check_choice, check_int
from cometrt.world import World
from cometrt.world.control_block import control_block_dtype
from cometrt.world.layout import MAX_RANKS, device_control_block_dtype
from cometrt.world.room import gpu_room, host_room


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes that one layer takes on each rank: of the GPU's memory on "cuda", else of the host's.

    Attributes:
        heap: what peers reach. The layers of a world share it: it is that of the largest.
        residuals: what a forward keeps for its backward, without the weights: `saved`.
        scratch: what the layer holds between calls, and the most that a call takes besides: the
            rows of a plan; on the host also weights and their gradients in float32. Not counted:
            arguments, results, and what is small beside these (a tile, the planning on the host).
        weights: w_up and w_down, which are the caller's; their gradients take as much again.
    """

    heap: int
    residuals: int
    scratch: int
    weights: int

    @property
    def total(self) -> int:
        """Of a call while one forward waits for its backward."""
        return self.heap + self.residuals + self.scratch + self.weights


def memory_of_layer(
    spec: MoESpec,
    size: Any,
    *,
    device: Any,
    mode: Any,
    config: Any,
    training: Any,
    ranks_per_node: Any,
) -> Memory:
    """As `MoESpec.memory`."""
    check_choice("device", device, ("host", "cuda"))
    size = check_int("size", size, minimum=1, maximum=MAX_RANKS if device == "cuda" else _MOST)
    check_bool("training", training)
    if (
        ranks_per_node is not None
        and check_int("ranks_per_node", ranks_per_node, minimum=1) != size
    ):
        raise ValueError(
            f"ranks_per_node must be None or all ranks, {size}: they are on one host "
            f"(got {ranks_per_node})"
        )
    shape, mode = check_layer(spec, 0, size, device, mode, config)
    return memory_of(shape, device, mode, training)


def memory_of(shape: PlanShape, device: str, mode: str, training: bool) -> Memory:
    buffers = buffers_of(device)
    geometry = shape.geometry
    shared = device_control_block_dtype if device == "cuda" else control_block_dtype(geometry.size)
    weights: Buffers = {
        name: (array, geometry.spec.numpy_dtype)
        for name, array in (("w_up", geometry.w_up_shape), ("w_down", geometry.w_down_shape))
    }
    return Memory(
        heap=sum(region_bytes(heap_table(shape)).values()) + shared.itemsize,
        residuals=total_bytes(buffers.residuals(shape)) if training else 0,
        scratch=buffers.scratch_bytes(shape, mode, training),
        weights=total_bytes(weights),
    )


def buffers_of(device: str) -> ModuleType:
    """The module that says which arrays an executor of that device has."""
    if device == "host":
        return host_buffers
    from cometrt.cuda import buffers

    return buffers


_MOST = 1 << 16  # ranks on the host: more than a host has use for

# What makes each part large.
_DRIVERS = {
    "heap": "max_tokens hidden topk",
    "scratch": "max_tokens topk capacity_factor hidden intermediate num_experts",
    "weights": "num_experts hidden intermediate",
}


def check_room(world: World, shape: PlanShape, mode: str) -> None:
    """Collective: compare what a layer takes at least, without training, with what is there.

    Raises:
        CometError: on all ranks alike, if it is too little on any of them.
    """
    memory = memory_of(shape, world.device, mode, training=False)
    needed = world.regions.to_allocate(region_bytes(heap_table(shape)))
    if world.device == "cuda":  # the host's scratch takes pages only as rows come
        needed += memory.scratch
        room = gpu_room()
    else:
        room = host_room()
    ranks = world.allgather((needed, room), purpose="MoELayer")
    spec = shape.geometry.spec
    for place in dict.fromkeys(room.place for _, room in ranks):  # in one order on all ranks
        there = [(needed, room) for needed, room in ranks if room.place == place]
        needed, available = sum(n for n, _ in there), min(room.available for _, room in there)
        total = min(room.total for _, room in there)
        if memory.total > total:
            parts = {name: getattr(memory, name) for name in _DRIVERS}
            part = max(parts, key=lambda name: parts[name])
            sizes = ", ".join(f"{name} {size:,}" for name, size in parts.items())
            raise CometError(
                f"a layer of this spec takes {memory.total:,} bytes on each rank ({sizes}), "
                f"{place} has {total:,}: mostly {part}, by {_values(spec, part)}"
            )
        if needed > available:
            part = "heap and scratch" if world.device == "cuda" else "heap"
            raise CometError(
                f"the {part} of a layer of this spec takes {needed:,} bytes on the {len(there)} "
                f"ranks of {place} together, where {available:,} are available: by "
                f"{_values(spec, 'scratch' if world.device == 'cuda' else 'heap')}"
            )


def _values(spec: MoESpec, part: str) -> str:
    return ", ".join(f"{name}={getattr(spec, name)}" for name in _DRIVERS[part].split())
