"""The arrays of a layer on CUDA, by name: what it allocates, and what `MoESpec.memory` counts."""

from __future__ import annotations

import numpy as np

from cometrt.buffers import Buffers, plan_rows, total_bytes
from cometrt.cuda.backward import dgrad_tiles, wgrad_shapes
from cometrt.cuda.engine import layer_n_tiles, tile_order_size
from cometrt.cuda.exchange_params import num_dweight_partials
from cometrt.cuda.fused import forward_block_n, fused_counter_words, n_chunk_tiles
from cometrt.cuda.planner import planner_counters, planner_routing, planner_scratch, table_words
from cometrt.cuda.wgrad import max_wgrad_steps, wgrad_order_size
from cometrt.heap import heap_table, region_bytes
from cometrt.kernels.constants import BLOCK_N
from cometrt.kernels.params import traced_exchange_state_dtype
from cometrt.plan import PlanShape
from cometrt.residuals import META_SHAPE

_ALIGNMENT = 512  # bytes: of an array within "scratch"
_POOL_BYTES = 512  # CuPy's pool gives multiples of it
_UINT8, _INT32, _INT64 = np.dtype(np.uint8), np.dtype(np.int32), np.dtype(np.int64)
_FLOAT32 = np.dtype(np.float32)


def num_counters(shape: PlanShape, mode: str) -> tuple[int, int]:
    """32-bit words that a call counts up: in the planner, and in the fused kernels."""
    of_fused = fused_counter_words(shape).values() if mode == "fused" else ()
    return planner_counters(shape), sum(sum(fields.values()) for fields in of_fused)


def held(shape: PlanShape, mode: str) -> Buffers:
    """Arrays that a layer holds as long as it is open, besides its heap."""
    words = {"counters": sum(num_counters(shape, mode))} | planner_scratch(shape)
    buffers: Buffers = {name: ((count,), _INT32) for name, count in words.items()}
    buffers |= {name: (routing, _INT32) for name, routing in planner_routing(shape).items()}
    buffers["state"] = ((traced_exchange_state_dtype.itemsize,), _UINT8)
    block_n = forward_block_n(shape) if mode == "fused" else (BLOCK_N, BLOCK_N)
    up, down = layer_n_tiles(shape, block_n)
    if shape.config.gemm == "cublas":
        return buffers
    n_chunk = n_chunk_tiles(shape, block_n[1]) if mode == "fused" else None
    chunks = num_pipeline_chunks(shape, mode)
    for name, n_tiles, size in (("up", up, None), ("down", down, n_chunk)):
        tile_bytes, counts = tile_order_size(shape.max_tiles, n_tiles, size, chunks)
        buffers[f"{name}_work_tiles"] = ((tile_bytes,), _UINT8)
        buffers[f"{name}_counts"] = ((counts,), _INT32)
    geometry, dgrads = shape.geometry, dgrad_tiles(shape.geometry)
    if mode == "fused":
        n_chunk = n_chunk_tiles(shape.of_backward())
        steps = max_wgrad_steps(geometry.num_weights, wgrad_shapes(geometry))
        sizes = {"down_dgrad": (None, 0), "up_dgrad": (n_chunk, steps)}
    else:
        sizes = dict.fromkeys(dgrads, (None, 0))
    for name, n_tiles in dgrads.items():
        size, more_steps = sizes[name]
        tile_bytes, counts = tile_order_size(shape.max_tiles, n_tiles, size, 1, more_steps)
        buffers[f"{name}_work_tiles"] = ((tile_bytes,), _UINT8)
        buffers[f"{name}_counts"] = ((counts,), _INT32)
    if mode == "fused":  # the weight gradients' tiles are in the list of the up dgrad
        return buffers
    tile_bytes, counts = wgrad_order_size(geometry.num_weights, wgrad_shapes(geometry))
    buffers["wgrad_work_tiles"] = ((tile_bytes,), _UINT8)
    buffers["wgrad_counts"] = ((counts,), _INT32)
    return buffers


def has_room_for(shape: PlanShape, other: PlanShape) -> bool:
    """Whether memory of a fused layer of the first shape serves the other's calls too, and their
    plans are the same."""
    if shape.digest != other.digest:
        return False
    room, wanted = _sizes(shape), _sizes(other)
    return all(room[name] >= wanted[name] for name in room)


def _sizes(shape: PlanShape) -> dict[str, int]:
    """Bytes of what a fused layer holds, its heap included."""
    sizes = {name: total_bytes({name: of}) for name, of in held(shape, "fused").items()}
    return sizes | region_bytes(heap_table(shape))


def held_bytes(shape: PlanShape, mode: str) -> int:
    """Bytes of `held`."""
    return total_bytes(held(shape, mode), _POOL_BYTES)


def num_pipeline_chunks(shape: PlanShape, mode: str) -> int:
    """Number of pipeline chunks, whose kernels are launched one after the other."""
    return shape.config.pipeline_chunks if mode == "chunked" else 1


def forward_buffers(shape: PlanShape, mode: str, training: bool) -> Buffers:
    """Arrays that a forward allocates: residuals, and "scratch" with all others."""
    rows, spec = plan_rows(shape), shape.geometry.spec
    buffers: Buffers = {}
    if training and spec.save != "rows":
        buffers["saved_x"] = ((spec.max_tokens, spec.hidden), spec.numpy_dtype)
    of_plan = plan_buffers(shape)
    if training:
        buffers["epoch"] = of_plan["epoch"]
    buffers["tables"] = of_plan["tables"]
    buffers["x_rows"] = rows["x"]
    saves_z = training and spec.save != "nothing"
    if saves_z or (mode != "fused" and shape.config.gemm == "cublas"):
        buffers["z"] = rows["z"]
    return buffers | _scratch(forward_scratch(shape))


def plan_buffers(shape: PlanShape) -> Buffers:
    """Arrays that a plan allocates."""
    return {"epoch": ((1,), _INT64), "tables": ((table_words(shape),), _INT32)}


def backward_buffers(shape: PlanShape) -> Buffers:
    """What a backward allocates: "scratch"."""
    return _scratch(backward_scratch(shape))


def _scratch(arrays: Buffers) -> Buffers:
    """One allocation for all of them: each allocation costs the host microseconds."""
    return {"scratch": ((total_bytes(arrays, _ALIGNMENT),), _UINT8)}


def call_scratch_bytes(shape: PlanShape) -> dict[str, int]:
    """Bytes of "scratch" of a forward and of a backward."""
    arrays = {"forward": forward_scratch(shape), "backward": backward_scratch(shape)}
    return {name: total_bytes(of, _ALIGNMENT) for name, of in arrays.items()}


def offsets(arrays: Buffers) -> dict[str, int]:
    """First byte of each array within "scratch"."""
    found, end = {}, 0
    for name, of in arrays.items():
        found[name] = end
        end += total_bytes({name: of}, _ALIGNMENT)
    return found


def forward_scratch(shape: PlanShape) -> Buffers:
    """Arrays of a forward within "scratch"."""
    rows = plan_rows(shape)
    return {"a": rows["a"], "o": rows["o"]}


def backward_scratch(shape: PlanShape) -> Buffers:
    """Arrays of a backward within "scratch". With save="nothing" z and a are computed again in dz
    and weighted_a."""
    rows = plan_rows(shape)
    buffers = {"dy_rows": rows["x"], "dx_rows": rows["x"], "dz": rows["z"], "weighted_a": rows["a"]}
    if shape.config.gemm == "cublas":
        buffers["da"] = (rows["a"][0], _FLOAT32)
    buffers["dweight_rows"] = ((shape.capacity, num_dweight_partials(shape)), _FLOAT32)
    if shape.geometry.spec.save != "rows":
        buffers["x_rows"] = rows["x"]
    return buffers


def residuals(shape: PlanShape) -> Buffers:
    """The arrays of `saved` but for the weights, by name; meta is in the host's memory."""
    made = forward_buffers(shape, "fused", training=True)
    kept = {"meta": (META_SHAPE, _INT64), "epoch": made["epoch"]}
    kept["x"] = made["x_rows" if shape.geometry.spec.save == "rows" else "saved_x"]
    return kept | {name: made[name] for name in ("z", "tables") if name in made}


def scratch_bytes(shape: PlanShape, mode: str, training: bool) -> int:
    """Bytes that the layer holds, and that its larger call allocates besides its arguments, its
    results and `saved`."""
    layer = held_bytes(shape, mode)
    forward = forward_buffers(shape, mode, training)
    if not training:
        return layer + total_bytes(forward, _POOL_BYTES)
    of_save = {"rows": ("x_rows", "z"), "z": ("saved_x", "z"), "nothing": ("saved_x",)}
    kept = {"epoch", "tables", *of_save[shape.geometry.spec.save]}
    scratch = {name: buffer for name, buffer in forward.items() if name not in kept}
    calls = scratch, backward_buffers(shape)
    return layer + max(total_bytes(call, _POOL_BYTES) for call in calls)
