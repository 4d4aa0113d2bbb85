"""Routers and losses over CuPy arrays: launches of kernels_cu/router on CuPy's current stream.

Nothing waits for the GPU, so a call can be captured in a CUDA graph. The first call with a new
number of experts loads a kernel: make it before the capture.
"""

from __future__ import annotations

import functools
import threading
from typing import Any

import ml_dtypes
import numpy as np

from cometrt.kernels.constants import LOSS_CHUNK_TOKENS
from cometrt.kernels.launch import Kernel, load_kernels
from cometrt.kernels.params import ParamStruct, router_loss_params_dtype, router_params_dtype
from cometrt.router.options import KINDS, Options

DTYPES = tuple(  # ElementType of kernels_cu/router/params.cuh
    np.dtype(name) for name in (np.float32, np.float64, ml_dtypes.bfloat16, np.float16)
)
ID_DTYPES = (np.dtype(np.int32), np.dtype(np.int64))
EXPERTS_PER_LANE = (1, 2, 4, 8, 16, 32)  # builds of the kernels; a warp handles one token
MAX_EXPERTS = 32 * EXPERTS_PER_LANE[-1]
MAX_TOPK = MAX_GROUPS = 32  # one per lane of a warp
KERNELS = {  # names of kernels by source file
    "router/router.cu": ("router_topk", "router_weights", "router_backward"),
    "router/losses.cu": ("router_loss_sums", "router_loss_backward"),
}
_loading = threading.Lock()


def topk(logits: Any, count: int, options: Options) -> tuple[Any, Any]:
    """ids [T, K] int32 and weights [T, K] float32."""
    import cupy

    launch = Launch(*_checked(logits, count, options))
    ids = cupy.empty((len(logits), count), np.int32)
    weights = cupy.empty(ids.shape, np.float32)
    launch("router_topk", out_ids=ids, out_weights=weights)
    return ids, weights


def weights(logits: Any, ids: Any, options: Options) -> Any:
    """Weights [T, K] float32 of given ids."""
    import cupy

    launch = Launch(*_checked(logits, ids.shape[1], options))
    found = cupy.empty(ids.shape, np.float32)
    launch("router_weights", ids=launch.ids(ids), out_weights=found)
    return found


def backward(dweights: Any, logits: Any, ids: Any, options: Options) -> Any:
    """dlogits [T, E] float32."""
    import cupy

    launch = Launch(*_checked(logits, ids.shape[1], options))
    dlogits = cupy.empty(logits.shape, np.float32)
    dweights = launch.floats("dweights", dweights)
    launch("router_backward", ids=launch.ids(ids), dweights=dweights, dlogits=dlogits)
    return dlogits


def loss_sums(logits: Any, ids: Any, sequence_tokens: int) -> Any:
    """`cometrt.router.host.loss_sums` on the device."""
    import cupy

    num_tokens, num_experts = logits.shape
    num_sequences = num_tokens // sequence_tokens
    chunks = -(-sequence_tokens // LOSS_CHUNK_TOKENS)
    launch = Launch(logits, 0 if ids is None else ids.shape[1], Options("softmax"))
    given = {} if ids is None else {"ids": launch.ids(ids, "topk_ids")}
    sums = cupy.empty((num_sequences, chunks, 2 * num_experts + 3), np.float64)
    more = ParamStruct(router_loss_params_dtype)
    more.fields["sums"] = sums.data.ptr
    more.fields["sequence_tokens"], more.fields["chunks_per_sequence"] = sequence_tokens, chunks
    launch("router_loss_sums", more, num_blocks=num_sequences * chunks, **given)
    return sums[:, 0] if chunks == 1 else sums.sum(axis=1)


def loss_backward(
    logits: Any, ids: Any, sequence_tokens: int, balance: tuple[Any, Any] | None, z_factor: Any
) -> Any:
    """`cometrt.router.host.loss_backward` on the device."""
    import cupy

    launch = Launch(logits, 0 if ids is None else ids.shape[1], Options("softmax"))
    given = {} if ids is None else {"ids": launch.ids(ids, "topk_ids")}
    more = ParamStruct(router_loss_params_dtype)
    more.fields["sequence_tokens"] = sequence_tokens
    if balance is not None:
        fractions, factors = map(cupy.ascontiguousarray, balance)
        more.fields["fractions"] = fractions.data.ptr
        more.fields["balance_factors"] = factors.data.ptr
        more.fields["fractions_stride"] = logits.shape[1] if len(fractions) > 1 else 0
    if z_factor is not None:
        more.fields["z_factor"] = z_factor.data.ptr
    dlogits = cupy.empty(logits.shape, np.float32)
    launch("router_loss_backward", more, dlogits=dlogits, **given)
    return dlogits


def experts_per_lane(num_experts: int) -> int:
    """The smallest build that holds so many experts."""
    return next(n for n in EXPERTS_PER_LANE if 32 * n >= num_experts)


@functools.cache
def load_build(device_id: int, per_lane: int) -> dict[str, Kernel]:
    """All kernels of one build by name, on the current GPU, which is `device_id`.

    All are loaded at once, since loading may wait for the GPU, where a layer's kernel may wait for
    a peer. After the first router call with a build, none of its kernels has to be loaded.
    """
    return {
        name: kernel
        for source, names in KERNELS.items()
        for name, kernel in zip(
            names,
            load_kernels(source, *names, macros=(("EXPERTS_PER_LANE", per_lane),)),
            strict=True,
        )
    }


def check_array(name: str, array: Any, dtypes: tuple[np.dtype, ...]) -> Any:
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
    device = cupy.cuda.runtime.getDevice()
    if array.data.device_id != device:
        raise ValueError(
            f"{name} must be on the current GPU {device} (got GPU {array.data.device_id})"
        )
    return cupy.ascontiguousarray(array)


class Launch:
    """One launch: its parameter struct, and the arrays that it reads, kept alive.

    Raises:
        ValueError: for arrays or sizes that the kernels do not take.
    """

    def __init__(self, logits: Any, topk: int, options: Options) -> None:
        _check_size("logits' number of experts", logits.shape[1], MAX_EXPERTS)
        self._fields: dict[str, Any] = dict.fromkeys(router_params_dtype.names or (), 0)
        self._arrays: list[Any] = []  # alive until the launch is queued
        num_tokens, num_experts = logits.shape
        self._num_tokens, self._num_experts = num_tokens, num_experts
        self._set(
            logits=self.floats("logits", logits).data.ptr,
            scale=options.scale,
            num_tokens=num_tokens,
            num_experts=num_experts,
            topk=topk,
            kind=KINDS.index(options.kind),
            num_groups=options.num_groups,
            topk_groups=options.topk_groups,
            sum_of_two=options.group_score == "top2",
            renormalize=bool(options.renormalize),
        )
        if options.bias is not None:
            self._set(bias=self.floats("bias", options.bias).data.ptr)
        if options.mask is not None:
            mask = self._keep(check_array("mask", options.mask, (np.dtype(bool),)))
            self._set(mask=mask.data.ptr, mask_stride=num_experts if mask.ndim == 2 else 0)

    def floats(self, name: str, array: Any) -> Any:
        """Take a floating argument: "logits", "bias" or "dweights". Returns it as `check_array`."""
        array = self._keep(check_array(name, array, DTYPES))
        self._set(**{f"{name}_type": DTYPES.index(array.dtype)})
        return array

    def ids(self, ids: Any, name: str = "ids") -> Any:
        """Take ids [T, K]. Returns them as `check_array`."""
        array = self._keep(check_array(name, ids, ID_DTYPES))
        self._set(ids_are_64=array.dtype.itemsize == 8)
        return array

    def __call__(
        self, name: str, *more: ParamStruct, num_blocks: int | None = None, **arrays: Any
    ) -> None:
        """Queue a kernel.

        Args:
            name: name of the kernel.
            more: parameter structs after RouterParams.
            num_blocks: grid size. None: one warp per token.
            arrays: arrays of RouterParams, by field.
        """
        import cupy

        if not self._num_tokens:
            return
        self._set(**{field: array.data.ptr for field, array in arrays.items()})
        params = ParamStruct(router_params_dtype)
        params.fields[0] = tuple(self._fields.values())
        device_id = cupy.cuda.runtime.getDevice()
        with _loading:  # a second virtual rank finds what the first has loaded
            kernel = load_build(device_id, experts_per_lane(self._num_experts))[name]
        if num_blocks is None:
            num_blocks = -(-self._num_tokens // (kernel.block // 32))
        kernel(cupy.cuda.get_current_stream().ptr, num_blocks, params, *more)

    def _keep(self, array: Any) -> Any:
        self._arrays.append(array)
        return array

    def _set(self, **fields: Any) -> None:
        self._fields |= fields


def _checked(logits: Any, topk: int, options: Options) -> tuple[Any, int, Options]:
    """The arguments of `Launch`, after a check of the sizes that only routers have."""
    _check_size("topk", topk, MAX_TOPK)
    _check_size("num_groups", options.num_groups, MAX_GROUPS)
    return logits, topk, options


def _check_size(what: str, value: int, largest: int) -> None:
    if value > largest:
        raise ValueError(f"{what} must be <= {largest} on a GPU (got {value})")
