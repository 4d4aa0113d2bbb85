"""Activation gradients (dgrad) by the grouped GEMM engine: all experts of a rank in one launch.

Only the device knows how many rows each expert has. Weights are not transposed: they are read as
[E, K, N], with N innermost.
"""

from __future__ import annotations

import functools

from cometrt.activations import ACTIVATIONS, is_gated
from cometrt.cuda.engine import TileOrder, current_stream, gemm_ctas
from cometrt.cuda.types import DeviceArray
from cometrt.kernels.constants import BLOCK_K, BLOCK_M
from cometrt.kernels.launch import Kernel, load_kernels
from cometrt.kernels.params import (
    KernelArgument,
    ParamStruct,
    down_dgrad_params_dtype,
    gemm_params_dtype,
)
from cometrt.kernels.tensor_map import encode
from cometrt.plan.tile_order import num_n_tiles

MN_MAJOR_BOX = (1, 1, BLOCK_K, 64)  # of operands whose K is not innermost
_HALF_M = BLOCK_M // 2


class DgradArguments:
    """Arguments of a launch of grouped_dgrad: out [rows, columns] = a [rows, inner] b[expert].

    Args:
        order: tile order for `dgrad_n_tiles(columns)` N-tiles.
        rows, inner, columns, experts: a is [rows, inner], b is [experts, inner, columns].
        ok: as for `cometrt.cuda.engine.GemmArguments`.
    """

    def __init__(
        self, order: TileOrder, rows: int, inner: int, columns: int, experts: int, *, ok: int = 0
    ) -> None:
        self._params = ParamStruct(gemm_params_dtype)
        fields = self._params.fields
        fields["ok"] = ok
        for name, address in order.addresses().items():
            fields[name] = address
        problem = fields["problems"][0, 0]
        problem["num_k_blocks"], problem["num_columns"] = -(-inner // BLOCK_K), columns
        self._a, self._b = (1, 1, rows, inner), (1, experts, inner, columns)

    def __call__(self, a: int, b: int, out: int) -> tuple[KernelArgument, ...]:
        """The parameter struct, and the tensor maps of `dgrad_maps`. All arrays by address."""
        self._params.fields["problems"]["out"] = out
        return self._params, *dgrad_maps(a, self._a, b, self._b)


class DownDgradArguments:
    """Arguments of a launch of grouped_down_dgrad.

    Args:
        order: tile order for `dgrad_n_tiles(columns)` N-tiles.
        rows, inner, columns, experts: dy is [rows, inner], w_down is [experts, inner, columns].
        ok: as for `cometrt.cuda.engine.GemmArguments`.
    """

    def __init__(
        self, order: TileOrder, rows: int, inner: int, columns: int, experts: int, *, ok: int = 0
    ) -> None:
        self._params = ParamStruct(down_dgrad_params_dtype)
        fields = self._params.fields
        fields["ok"] = ok
        for name, address in order.addresses().items():
            fields[name] = address
        fields["num_columns"], fields["num_inner_blocks"] = columns, -(-inner // BLOCK_K)
        self._dy, self._w = (1, 1, rows, inner), (1, experts, inner, columns)
        first = self._params.index_of("z")
        self._arrays = slice(first, self._params.index_of("dweight") + 1)

    def __call__(
        self,
        dy: int,
        w_down: int,
        *,
        z: int,
        row_weight: int,
        dz: int,
        weighted_a: int,
        dweight: int,
    ) -> tuple[KernelArgument, ...]:
        """The parameter struct, and the tensor maps of `dgrad_maps`. All arrays by address."""
        self._params.uint64s[self._arrays] = z, row_weight, dz, weighted_a, dweight
        return self._params, *dgrad_maps(dy, self._dy, w_down, self._w)


@functools.lru_cache(maxsize=4096)
def dgrad_maps(
    a: int, a_shape: tuple[int, ...], b: int, b_shape: tuple[int, ...]
) -> tuple[KernelArgument, KernelArgument, KernelArgument]:
    """Tensor maps, from addresses: of a by M-tiles, of a by half M-tiles, and of b by boxes."""
    return (
        encode(a, a_shape, (1, 1, BLOCK_M, BLOCK_K)),
        encode(a, a_shape, (1, 1, _HALF_M, BLOCK_K)),
        encode(b, b_shape, MN_MAJOR_BOX),
    )


def dgrad_n_tiles(columns: int) -> int:
    """Number of N-tiles of a result with so many columns."""
    return num_n_tiles(columns, gated=False)


def dgrad_kernel() -> Kernel:
    (kernel,) = load_kernels("gemm/grouped_dgrad.cu", "grouped_dgrad")
    return kernel


def down_dgrad_kernel(activation: str) -> Kernel:
    macros = (("ACTIVATION", list(ACTIVATIONS).index(activation)),)
    (kernel,) = load_kernels("gemm/grouped_down_dgrad.cu", "grouped_down_dgrad", macros=macros)
    return kernel


class GroupedDgrad:
    """out = a b[expert] for the rows of each expert. bf16 in and out, fp32 accumulation."""

    def __init__(self) -> None:
        self._kernel = dgrad_kernel()

    def __call__(
        self,
        a: DeviceArray,
        b: DeviceArray,
        out: DeviceArray,
        order: TileOrder,
        *,
        sms: int | None = None,
    ) -> None:
        """Queue it on the current stream.

        Args:
            a: [rows, K]; padding rows zero.
            b: [E, K, N].
            out: [rows, N]; padding rows become zero.
            order: tile order for `dgrad_n_tiles(N)` N-tiles.
            sms: number of SMs to use; None: all.
        """
        arguments = DgradArguments(order, a.shape[0], a.shape[1], out.shape[1], len(b))
        addresses = a.data.ptr, b.data.ptr, out.data.ptr
        self._kernel(current_stream(), gemm_ctas(sms), *arguments(*addresses))


class GroupedDownDgrad:
    """The down dgrad, da' = dy w_down[expert], and what follows from da' and z in its epilogue.

    With a = act(z), rounded to bf16: dz = dact(z, weight * da'), weighted_a = weight * a, and
    <da', a> for each row and N-tile. da' is accumulated in fp32 and never stored.
    """

    def __init__(self, activation: str) -> None:
        self._kernel, self.gated = down_dgrad_kernel(activation), is_gated(activation)

    def __call__(
        self,
        dy: DeviceArray,
        w_down: DeviceArray,
        z: DeviceArray,
        row_weight: DeviceArray,
        dz: DeviceArray,
        weighted_a: DeviceArray,
        dweight: DeviceArray,
        order: TileOrder,
        *,
        sms: int | None = None,
    ) -> None:
        """Queue it on the current stream. Padding rows of all results become zero.

        Args:
            dy: [rows, H].
            w_down: [E, H, I].
            z, dz: [rows, 2 * I], the gate columns first; [rows, I] where it is not gated. They may
                be the same array.
            row_weight: [rows] float32.
            weighted_a: [rows, I].
            dweight: [rows, dgrad_n_tiles(I)] float32.
            order: tile order for `dgrad_n_tiles(I)` N-tiles.
            sms: number of SMs to use; None: all.
        """
        (rows, inner), columns = dy.shape, w_down.shape[2]
        arguments = DownDgradArguments(order, rows, inner, columns, len(w_down))
        arrays = {
            "z": z, "row_weight": row_weight, "dz": dz, "weighted_a": weighted_a,
            "dweight": dweight,
        }  # fmt: skip
        addresses = {name: array.data.ptr for name, array in arrays.items()}
        self._kernel(
            current_stream(),
            gemm_ctas(sms),
            *arguments(dy.data.ptr, w_down.data.ptr, **addresses),
        )
