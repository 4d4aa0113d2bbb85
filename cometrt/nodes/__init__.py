"""Layers over several nodes: the layer of one node, between two steps on a rail.

A *rail* is the N ranks of the same place in their nodes. In a call each rank gathers the tokens,
ids and router weights of its rail. Ids of experts on other nodes become -1. With them it takes part
in its node's layer, as the home of N * max_tokens tokens. The results, partial sums of each token,
go back over the rail, and are added in the order of nodes. With `MoESpec.rail_tokens` only tokens
that a node wants cross to it (`nodes.crossing`).

With `TileConfig.rail_slices` > 1 the node's layer is called once for each slice of these tokens
(`nodes.slices`), so that what crosses overlaps with what is computed.
"""

from __future__ import annotations

from typing import Any

from cometrt.arrays import HostArrays
from cometrt.executor import Executor
from cometrt.host import HostExecutor
from cometrt.nodes.slices import RailSlices
from cometrt.plan import PlanShape
from cometrt.specs import MoESpec
from cometrt.types import Arrays
from cometrt.world import World


def make_executor(
    world: World, spec: MoESpec, shape: PlanShape, slices: RailSlices, layer: int, mode: str
) -> tuple[Arrays, Executor]:
    """Collective: the arrays and the executor of a layer, for its device and its number of nodes.

    Args:
        spec: of the layer.
        shape: of the layer within a node.
        slices: of the layer's calls.
    """
    several: Any = world if world.nodes > 1 else None
    if world.device == "cuda":
        from cometrt.cuda.arrays import CudaArrays
        from cometrt.cuda.executor import CudaExecutor

        if several:
            from cometrt.nodes.cuda import CudaNodesExecutor

            return CudaArrays(), CudaNodesExecutor(several, spec, shape, slices, layer, mode)
        return CudaArrays(), CudaExecutor(world, shape, layer, mode)
    if several:
        from cometrt.nodes.host import HostNodesExecutor

        return HostArrays(), HostNodesExecutor(several, spec, shape, slices, layer, mode)
    return HostArrays(), HostExecutor(world, shape, layer, mode)
