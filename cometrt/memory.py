"""Memory that a layer needs, computed from its shapes, and a check that it is available."""

from __future__ import annotations

import dataclasses
import math
from types import ModuleType

from cometrt.arguments import check_bool
from cometrt.buffers import Buffers, total_bytes
from cometrt.errors import CometError
from cometrt.heap import heap_table, region_bytes
from cometrt.host import buffers as host_buffers
from cometrt.kernels.constants import MAX_RANKS
from cometrt.legality import check_layer
from cometrt.node_specs import geometry_of_node
from cometrt.nodes.buffers import rail_bytes
from cometrt.nodes.slices import RailSlices
from cometrt.plan import PlanShape, TileConfig
from cometrt.specs import MoESpec, check_choice, check_int
from cometrt.world import World
from cometrt.world.control_block import control_block_dtype
from cometrt.world.layout import device_control_block_dtype
from cometrt.world.room import gpu_room, host_room


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes that one layer needs on each rank: GPU memory on "cuda", host memory on "host".

    Attributes:
        heap: memory that peers read and write. All layers of a world share one heap, whose size
            is that of the largest layer.
        residuals: `saved` of one forward, without the weights; 0 without training.
        scratch: arrays that the layer keeps between calls, and the most that any call allocates
            besides: row arrays, and on the host the weights and their gradients in float32.
            Arguments, results and small temporaries are not counted.
        weights: w_up and w_down, which the caller owns. Their gradients need the same again.
    """

    heap: int
    residuals: int
    scratch: int
    weights: int

    @property
    def total(self) -> int:
        """Sum of the four: what a call needs while one forward waits for its backward."""
        return self.heap + self.residuals + self.scratch + self.weights


def memory_of_layer(
    spec: MoESpec,
    size: object,
    *,
    device: object,
    mode: object,
    config: TileConfig | None,
    training: object,
    ranks_per_node: object,
) -> Memory:
    """As `MoESpec.memory`."""
    device = check_choice("device", device, ("host", "cuda"))
    maximum = MAX_RANKS if device == "cuda" else _MAX_HOST_RANKS
    most = maximum if ranks_per_node is None else _MAX_HOST_RANKS
    size = check_int("size", size, minimum=1, maximum=most)
    training = check_bool("training", training)
    here = size if ranks_per_node is None else ranks_per_node
    here = check_int("ranks_per_node", here, minimum=1, maximum=maximum)
    if size % here:
        raise ValueError(f"ranks_per_node must divide all ranks, {size} (got {here})")
    nodes = size // here
    mode = check_layer(spec, size, device, mode, config, nodes)
    config = config or TileConfig()
    rail = config.rail_slices, config.rail_parts
    shape = PlanShape(geometry_of_node(spec, 0, size, nodes, *rail), config.of_node())
    return memory_of(shape, device, mode, training, RailSlices.of(spec, nodes, 0, *rail))


def memory_of(
    shape: PlanShape, device: str, mode: str, training: bool, slices: RailSlices | None = None
) -> Memory:
    """The memory of a legal layer.

    Args:
        shape: within a node.
        slices: of a layer over several nodes; None: all ranks are on one.
    """
    buffers = buffers_of(device)
    if slices is not None and slices.nodes == 1:
        slices = None
    residuals = total_bytes(buffers.residuals(shape)) * (slices.count if slices else 1)
    if slices and slices.slots_shape:
        residuals += 4 * math.prod(slices.slots_shape)
    geometry = shape.geometry
    shared = device_control_block_dtype if device == "cuda" else control_block_dtype(geometry.size)
    weights: Buffers = {
        name: (array, geometry.spec.numpy_dtype)
        for name, array in (("w_up", geometry.w_up_shape), ("w_down", geometry.w_down_shape))
    }
    return Memory(
        heap=sum(region_bytes(heap_table(shape)).values()) + shared.itemsize,
        residuals=residuals if training else 0,
        scratch=buffers.scratch_bytes(shape, mode, training)
        + (rail_bytes(slices, shape, device, training) if slices else 0),
        weights=total_bytes(weights),
    )


def buffers_of(device: str) -> ModuleType:
    """The module that says which arrays an executor of that device has."""
    if device == "host":
        return host_buffers
    from cometrt.cuda import buffers

    return buffers


def held_bytes(shape: PlanShape, mode: str) -> int:
    """On "cuda": bytes that a layer holds between calls, besides its heap."""
    from cometrt.cuda import buffers

    return buffers.held_bytes(shape, mode)


_MAX_HOST_RANKS = 1 << 16  # an upper bound that keeps sizes computable

# The fields of the spec that determine each part, for the error messages.
_FIELDS = {
    "heap": "max_tokens hidden topk",
    "scratch": "max_tokens topk capacity_factor hidden intermediate num_experts",
    "weights": "num_experts hidden intermediate",
}


def check_room(
    world: World,
    shape: PlanShape,
    mode: str,
    slices: RailSlices | None = None,
    caller_allocates: bool = False,
) -> None:
    """Collective: check that the memory a layer needs without training is available.

    Args:
        slices, caller_allocates: as for `room_problem`.

    Raises:
        CometError: the same on all ranks, if any host or GPU has too little.
    """
    if problem := room_problem(world, shape, mode, slices, caller_allocates):
        raise CometError(problem)


def room_problem(
    world: World,
    shape: PlanShape,
    mode: str,
    slices: RailSlices | None = None,
    caller_allocates: bool = False,
    training: bool = False,
) -> str:
    """Collective: which host or GPU has too little memory for a layer; "": all have enough.

    Args:
        slices: as for `memory_of`.
        caller_allocates: whether the arrays of calls are in memory that the caller has already.
        training: whether residuals of one forward count on "cuda".

    Returns:
        the text of an error, the same on all ranks.
    """
    memory = memory_of(shape, world.device, mode, training, slices)
    needed = world.node.regions.to_allocate(region_bytes(heap_table(shape)))
    if world.device == "cuda":  # on the host, scratch takes a page only when a row is written
        needed += held_bytes(shape, mode) if caller_allocates else memory.scratch
        needed += memory.residuals
        room = gpu_room()
    else:
        room = host_room()
    owner = room.owner if world.nodes == 1 else f"{room.owner} of node {world.node_index}"
    ranks = world.allgather((needed, room._replace(owner=owner)), purpose="MoELayer")
    spec = shape.geometry.spec
    for owner in dict.fromkeys(room.owner for _, room in ranks):  # the same order on all ranks
        there = [(needed, room) for needed, room in ranks if room.owner == owner]
        needed, available = sum(n for n, _ in there), min(room.available for _, room in there)
        total = min(room.total for _, room in there)
        if memory.total > total:
            parts = {name: getattr(memory, name) for name in _FIELDS}
            part = max(parts, key=lambda name: parts[name])
            sizes = ", ".join(f"{name} {size:,}" for name, size in parts.items())
            return (
                f"a layer of this spec takes {memory.total:,} bytes on each rank ({sizes}), "
                f"{owner} has {total:,}; the largest part is {part}, from {_values(spec, part)}"
            )
        if needed > available:
            part = "heap and scratch" if world.device == "cuda" else "heap"
            return (
                f"the {part} of a layer of this spec takes {needed:,} bytes on the {len(there)} "
                f"ranks of {owner} together, where {available:,} are available; the size follows "
                f"from {_values(spec, 'scratch' if world.device == 'cuda' else 'heap')}"
            )
    return ""


def _values(spec: MoESpec, part: str) -> str:
    return ", ".join(f"{name}={getattr(spec, name)}" for name in _FIELDS[part].split())
