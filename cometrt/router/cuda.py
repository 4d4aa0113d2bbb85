"""Routers over CuPy arrays: launches of kernels_cu/router on CuPy's current stream.

Nothing waits for the GPU, so a call can be captured in a CUDA graph. The first call with a new
number of experts loads a kernel: make it before the capture.
"""

from __future__ import annotations

import functools
import threading
from typing import Any

import ml_dtypes
import numpy as np

from cometrt.kernels.launch import Kernel, load_kernels
from cometrt.kernels.params import (
    ParamStruct,
    router_bias_params_dtype,
    router_load_params_dtype,
    router_loss_params_dtype,
    router_params_dtype,
)
from cometrt.router.options import KINDS, Options

DTYPES = tuple(np.dtype(d) for d in (np.float32, np.float64, ml_dtypes.bfloat16, np.float16))
ID_DTYPES = (np.dtype(np.int32), np.dtype(np.int64))
NUMBER_DTYPES = DTYPES + ID_DTYPES  # ElementType of kernels_cu/router/params.cuh
BOOL = (np.dtype(bool),)
EXPERTS_PER_LANE = (1, 2, 4, 8, 16, 32)  # builds of the kernels, whose warps have a token each
MAX_EXPERTS = 32 * EXPERTS_PER_LANE[-1]
MAX_TOPK = MAX_GROUPS = 32  # a lane each
KERNELS = {  # by file, those that are compiled for a number of experts
    "router/router.cu": ("router_topk", "router_weights", "router_backward"),
    "router/losses.cu": ("router_loss_sums", "router_loss_totals", "router_loss_backward"),
}
LOAD_KERNELS = ("router_load", "router_update_bias")
SOFTMAX = Options("softmax")
_loading = threading.Lock()


def topk(logits: Any, count: int, options: Options) -> tuple[Any, Any]:
    """ids [T, K] int32 and weights [T, K] float32."""
    import cupy

    shape = (logits.shape[0], count)
    ids, weights = cupy.empty(shape, np.int32), cupy.empty(shape, np.float32)
    _launch("router_topk", logits, count, options, out_ids=ids, out_weights=weights)
    return ids, weights


def weights(logits: Any, ids: Any, options: Options) -> Any:
    """Weights [T, K] float32 of given ids."""
    import cupy

    found = cupy.empty(ids.shape, np.float32)
    _launch("router_weights", logits, ids.shape[1], options, ids=ids, out_weights=found)
    return found


def backward(dweights: Any, logits: Any, ids: Any, options: Options) -> Any:
    """dlogits [T, E] float32."""
    import cupy

    dlogits = cupy.empty(logits.shape, np.float32)
    _launch(
        "router_backward",
        logits,
        ids.shape[1],
        options,
        ids=ids,
        dweights=dweights,
        dlogits=dlogits,
    )
    return dlogits


# ---- launches, also of losses --------------------------------------------------------------------


class Structs(threading.local):
    """A thread's parameter structs. A launch copies them, so every call writes the same ones."""

    def __init__(self) -> None:
        self.router = ParamStruct(router_params_dtype)
        self.loss = ParamStruct(router_loss_params_dtype)
        self.load = ParamStruct(router_load_params_dtype)
        self.bias = ParamStruct(router_bias_params_dtype)


structs = Structs()


def router_fields(
    *,
    logits: Any,
    topk: int,
    options: Options = SOFTMAX,
    bias: Any = None,
    mask: Any = None,
    ids: Any = None,
    dweights: Any = None,
    out_ids: Any = None,
    out_weights: Any = None,
    dlogits: Any = None,
) -> tuple[Any, ...]:
    """RouterParams, of arrays that `check_array` returned; None: a null pointer."""
    num_tokens, num_experts = logits.shape
    return (
        logits.data.ptr,
        address(bias),
        address(mask),
        address(ids),
        address(dweights),
        address(out_ids),
        address(out_weights),
        address(dlogits),
        options.scale,
        num_tokens,
        num_experts,
        topk,
        KINDS.index(options.kind),
        options.num_groups,
        options.topk_groups,
        options.group_score == "top2",
        bool(options.renormalize),
        num_experts if mask is not None and mask.ndim == 2 else 0,
        DTYPES.index(logits.dtype),
        0 if bias is None else DTYPES.index(bias.dtype),
        0 if dweights is None else DTYPES.index(dweights.dtype),
        ids is not None and ids.dtype.itemsize == 8,
        0,
    )


def address(array: Any) -> int:
    return 0 if array is None else array.data.ptr


def check_array(name: str, array: Any, dtypes: tuple[np.dtype, ...], device_id: int) -> Any:
    """A C-contiguous CuPy array on the current GPU: `array` itself, or a copy of a strided one.

    Raises:
        ValueError: for an array of another library, dtype or GPU.
    """
    import cupy

    if not isinstance(array, cupy.ndarray):
        raise ValueError(
            f"{name} must be a NumPy or CuPy array (got {type(array)!r}); cupy.asarray(x) shares "
            f"the memory of an array on a GPU"
        )
    if array.dtype not in dtypes:
        rule = " or ".join(str(dtype) for dtype in dtypes)
        raise ValueError(f"{name} must have dtype {rule} on a GPU (got {array.dtype})")
    if array.data.device_id != device_id:
        raise ValueError(
            f"{name} must be on the current GPU {device_id} (got GPU {array.data.device_id})"
        )
    return array if array.flags.c_contiguous else cupy.ascontiguousarray(array)


def check_size(what: str, value: int, largest: int) -> None:
    if value > largest:
        raise ValueError(f"{what} must be <= {largest} on a GPU (got {value})")


def kernels_for(device_id: int, num_experts: int) -> dict[str, Kernel]:
    """All kernels for so many experts by name, on the current GPU, which is `device_id`.

    They are loaded together, since loading may wait for the GPU. So after a rank's first router
    call nothing waits for a layer's kernel that waits for a peer.
    """
    with _loading:  # a second virtual rank finds what the first has loaded
        return load_build(device_id, experts_per_lane(num_experts))


@functools.cache
def experts_per_lane(num_experts: int) -> int:
    """The smallest build that holds so many experts."""
    return next(n for n in EXPERTS_PER_LANE if 32 * n >= num_experts)


@functools.cache
def load_build(_device_id: int, per_lane: int) -> dict[str, Kernel]:
    macros = (("EXPERTS_PER_LANE", per_lane),)
    loaded = dict(zip(LOAD_KERNELS, load_kernels("router/load.cu", *LOAD_KERNELS), strict=True))
    for source, names in KERNELS.items():
        loaded |= zip(names, load_kernels(source, *names, macros=macros), strict=True)
    return loaded


def _launch(
    name: str,
    logits: Any,
    topk: int,
    options: Options,
    *,
    ids: Any = None,
    dweights: Any = None,
    **outputs: Any,
) -> None:
    """Check what the kernels read, and queue one of the routers' kernels, a warp a token."""
    import cupy

    device_id = cupy.cuda.runtime.getDevice()
    num_tokens, num_experts = logits.shape
    check_size("topk", topk, MAX_TOPK)
    check_size("num_groups", options.num_groups, MAX_GROUPS)
    check_size("logits' number of experts", num_experts, MAX_EXPERTS)
    logits = check_array("logits", logits, DTYPES, device_id)
    bias, mask = options.bias, options.mask
    if bias is not None:
        bias = check_array("bias", bias, DTYPES, device_id)
    if mask is not None:
        mask = check_array("mask", mask, BOOL, device_id)
    if ids is not None:
        ids = check_array("ids", ids, ID_DTYPES, device_id)
    if dweights is not None:
        dweights = check_array("dweights", dweights, DTYPES, device_id)
    if not num_tokens:
        return
    params = structs.router
    params.fields[0] = router_fields(
        logits=logits,
        topk=topk,
        options=options,
        bias=bias,
        mask=mask,
        ids=ids,
        dweights=dweights,
        **outputs,
    )
    kernel = kernels_for(device_id, num_experts)[name]
    num_blocks = -(-num_tokens // (kernel.block // 32))
    kernel(cupy.cuda.get_current_stream().ptr, num_blocks, params)
