"""SMs that the kernels of a layer leave to NCCL, where tokens cross while its node computes."""

from __future__ import annotations

from cometrt.plan import TileConfig
from cometrt.world.nodes import NodesWorld
from cometrt.world.partitions import num_sms


def least_nccl_sms(world: NodesWorld) -> int | None:
    """The fewest SMs that a layer may leave to NCCL on this rank; None: nothing bounds NCCL's CTAs.

    Kernels that wait for peers must all be resident beside NCCL's CTAs. A cluster of theirs takes
    two SMs, so a CTA of NCCL may cost two.
    """
    assert world.nccl is not None
    ctas = world.nccl.max_ctas
    return None if ctas is None else 2 * ctas


def overlap_of(config: TileConfig) -> str:
    """The setting by which tokens cross between nodes while a node computes; "": none."""
    if config.rail_parts:
        return f"rail_parts={config.rail_parts}"
    return f"rail_slices={config.rail_slices}" if config.rail_slices > 1 else ""


def nccl_problem(world: NodesWorld, config: TileConfig) -> str:
    """Why this rank cannot run the config's slices or late parts beside NCCL, or ""."""
    if not overlap_of(config):
        return ""
    (name, value), late = overlap_of(config).split("="), config.rail_parts > 0
    least = least_nccl_sms(world)
    if least is None:
        return (
            f"{name} must be {0 if late else 1} unless NCCL's SMs are bounded: set NCCL_MAX_CTAS, "
            f"such as NCCL_MAX_CTAS=4, before cometrt.connect (got {value})"
        )
    assert world.nccl is not None
    if late and world.nccl.clusters:
        # Kernels wait for late parts. A cluster of NCCL's CTAs might not find room beside them,
        # since the SMs that are left to it need not be neighbours.
        return (
            f"rail_parts must be 0 unless NCCL's CTAs are no clusters: set NCCL_CGA_CLUSTER_SIZE=1 "
            f"before cometrt.connect (got {value})"
        )
    wanted = config.nccl_sms or least
    if wanted < least:
        return (
            f"nccl_sms must be at least {least}, two for each of NCCL's {least // 2} CTAs "
            f"(got {wanted})"
        )
    if num_sms() < wanted + 2:
        return f"nccl_sms must leave two of {num_sms()} SMs (got {wanted})"
    return ""


def sms_for_nccl(world: NodesWorld, config: TileConfig) -> int:
    """Collective: SMs that the layer's kernels leave to NCCL.

    Raises:
        ValueError: on all ranks, if NCCL may need more on any of them.
    """
    if not overlap_of(config):
        return 0
    problems = world.allgather(nccl_problem(world, config), purpose="MoELayer")
    for rank, text in enumerate(problems):
        if text:
            raise ValueError(f"{text} [rank {rank}]")
    return config.nccl_sms or least_nccl_sms(world) or 0
