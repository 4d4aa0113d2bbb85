"""Which layers can run: the one place that checks a config against shape, device and mode.

`MoESpec` and `TileConfig` check their own fields. The layer's construction, `MoESpec.memory` and
the tuner's search call `check_layer` for everything that depends on more than that.
"""

from __future__ import annotations

from cometrt.kernels.constants import BLOCK_M, BLOCK_N, MAX_ADDENDS, MAX_TOPK
from cometrt.node_specs import geometry_of_node
from cometrt.plan import PlanShape, TileConfig
from cometrt.specs import Geometry, MoESpec, check_choice

MODES = ("fused", "sequential", "chunked")  # in order of preference
MAX_HIDDEN = 28672  # on "cuda": each warp of `dispatch` holds a row in shared memory
_MAX_INT32 = 2**31 - 1  # plan tables store pair and row indices as int32


def check_layer(
    spec: object, size: int, device: str, mode: object, config: object, nodes: int = 1
) -> str:
    """Check that a layer can run, and select its mode.

    Args:
        spec: a MoESpec.
        size: W, the number of ranks.
        nodes: N, among which they are spread.
        device: "host" or "cuda".
        mode: one of MODES. None: the first of MODES that can run.
        config: a TileConfig. None: TileConfig().

    Returns:
        the mode.

    Raises:
        ValueError: naming the argument, its value and the rule. With mode=None and no mode that
            can run, the rule that "fused" breaks.
    """
    if not isinstance(spec, MoESpec):
        raise ValueError(f"spec must be a cometrt.MoESpec (got {type(spec)!r})")
    config = TileConfig() if config is None else config
    if not isinstance(config, TileConfig):
        raise ValueError(f"config must be a TileConfig (got {type(config)!r})")
    modes = MODES if mode is None else (check_choice("mode", mode, MODES),)
    _check_rail(config, nodes)
    if nodes > 1:
        _check_nodes(Geometry(spec, 0, size), nodes)
    of_node = geometry_of_node(spec, 0, size, nodes, config.rail_slices, config.rail_parts)
    shape = PlanShape(of_node, config.of_node())
    broken = _broken_table_rule(shape) or _broken_device_rule(shape, device)
    if broken:
        raise ValueError(broken)
    problems = [_broken_mode_rule(shape, device, candidate) for candidate in modes]
    for candidate, problem in zip(modes, problems, strict=True):
        if not problem:
            return candidate
    raise ValueError(problems[0])


def _check_rail(config: TileConfig, nodes: int) -> None:
    for name, none in (("rail_slices", 1), ("rail_parts", 0)):
        if nodes == 1 and (value := getattr(config, name)) > none:
            raise ValueError(f"{name} must be {none} on one node (got {value})")
    if config.nccl_sms is not None and config.rail_slices == 1 and not config.rail_parts:
        raise ValueError(
            f"nccl_sms must be None with rail_slices=1 and rail_parts=0, where NCCL runs alone "
            f"(got {config.nccl_sms})"
        )


def _check_nodes(geometry: Geometry, nodes: int) -> None:
    tp, ranks = geometry.spec.tp, geometry.size // nodes
    if ranks % tp:
        raise ValueError(
            f"tp must divide the {ranks} ranks of a node, since all shards of an expert are on one "
            f"node (got tp={tp})"
        )


def _broken_table_rule(shape: PlanShape) -> str:
    """The rule of the plan's tables that a layer breaks, or ""."""
    spec, size, block_m = shape.geometry.spec, shape.geometry.size, shape.config.block_m
    experts, pairs = shape.geometry.local_experts, size * spec.max_tokens * spec.topk
    if experts * block_m > _MAX_INT32:
        return (
            f"num_experts must keep the padding rows of a rank below 2**31 "
            f"(got {experts} experts per rank, each with up to {block_m - 1} padding rows)"
        )
    if pairs > _MAX_INT32 or shape.capacity > _MAX_INT32:
        return (
            f"max_tokens must keep the pairs of all ranks, and the rows of each, below 2**31 "
            f"(got {size} * {spec.max_tokens} * topk {spec.topk} = {pairs} pairs)"
        )
    return ""


def _broken_device_rule(shape: PlanShape, device: str) -> str:
    """The rule of the device that a layer breaks in every mode, or ""."""
    spec, config = shape.geometry.spec, shape.config
    if device != "cuda":
        return ""
    if spec.dtype != "bfloat16":
        return f"dtype must be 'bfloat16' on device='cuda' (got {spec.dtype!r})"
    for name, maximum in (("hidden", MAX_HIDDEN), ("topk", MAX_TOPK)):
        if (value := getattr(spec, name)) > maximum:
            return f"{name} must be at most {maximum} on device='cuda' (got {value})"
    if config.gemm == "engine" and config.block_m != BLOCK_M:
        return (
            f"block_m must be {BLOCK_M} on device='cuda' with gemm='engine' (got {config.block_m})"
        )
    return ""


def _broken_mode_rule(shape: PlanShape, device: str, mode: str) -> str:
    """The rule of the mode that a layer breaks on the device, or ""."""
    config = shape.config
    if device != "cuda":
        if mode == "chunked":
            return f"mode must be 'fused' or 'sequential' on device={device!r} (got {mode!r})"
        return ""
    if mode != "sequential" and config.gemm != "engine":
        return f"gemm must be 'engine' on device='cuda' in mode {mode!r} (got {config.gemm!r})"
    if mode != "fused":
        if config.rail_parts:
            return f"rail_parts must be 0 in mode {mode!r} (got {config.rail_parts})"
        return ""
    addends = shape.geometry.spec.topk + shape.geometry.size  # rows and partial rows of a token
    if addends > MAX_ADDENDS:
        return (
            f"topk + ranks must be at most {MAX_ADDENDS} on device='cuda' in mode 'fused' "
            f"(got {addends})"
        )
    for of, name in ((config, "n_chunk"), (config.of_backward(), "backward_n_chunk")):
        if of.order == "columns" and of.n_chunk % BLOCK_N:
            order = "order" if of is config else "backward_order"
            return (
                f"{name} must be a multiple of {BLOCK_N} on device='cuda' in mode 'fused' "
                f"with {order}='columns' (got {of.n_chunk})"
            )
    return ""
