"""The arithmetic of a rank's experts in mode "sequential": GEMMs and activations, all rows in one
launch by the engine, or one GEMM an expert by cuBLAS."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from cometrt.cuda.engine import (
    GroupedGemm,
    layer_n_tiles,
    layer_raster_groups,
    new_tile_order,
    tile_order_params,
)
from cometrt.cuda.gemm import ExpertGemm
from cometrt.cuda.report import pinned
from cometrt.kernels.launch import load_kernels
from cometrt.kernels.params import (
    ParamStruct,
    activation_params_dtype,
    exchange_state_dtype,
    geometry_params,
)
from cometrt.plan import Plan, PlanShape
from cometrt.specs import Gradients
from cometrt.world.partitions import num_sms

_THREADS = 256
Rows = list[tuple[int, int]]  # [begin, end) of each expert


class EngineExperts:
    """The forward of all experts; how many rows each has is known on the device alone.

    Args:
        parts: of layer0's order; each may be a launch of its own.
        ok: as for `new_gemm_params`.

    Attributes:
        up_order, down_order: how the planner orders tiles for it: a TurnsParams each.
    """

    def __init__(self, shape: PlanShape, parts: int = 1, ok: int = 0) -> None:
        activation = shape.geometry.spec.activation
        self._up = {z: GroupedGemm(activation, write_z=z, ok=ok) for z in (False, True)}
        self._down = GroupedGemm(ok=ok)
        up, down = layer_n_tiles(shape)
        up_group, down_group = layer_raster_groups(shape)
        up_order = new_tile_order(shape.max_tiles, up, parts=parts)
        down_order = new_tile_order(shape.max_tiles, down, parts=parts)
        self._up_parts = [up_order.part(index) for index in range(parts)]
        self._down_parts = [down_order.part(index) for index in range(parts)]
        self.up_order = tile_order_params(up_order, up, raster_group=up_group)
        self.down_order = tile_order_params(
            down_order, down, backwards=True, raster_group=down_group
        )

    def forward(self, x_rows: Any, w_up: Any, w_down: Any, z: Any, a: Any, o: Any) -> None:
        """z (None: not written), a and o from the rows of x, when the turns are made."""
        for part in range(len(self._up_parts)):
            self.up(x_rows, w_up, z, a, part)
        for part in reversed(range(len(self._down_parts))):
            self.down(a, w_down, o, part)

    def up(self, x_rows: Any, w_up: Any, z: Any, a: Any, part: int, sms: int | None = None) -> None:
        self._up[z is not None](x_rows, w_up, a, self._up_parts[part], z=z, sms=sms)

    def down(self, a: Any, w_down: Any, o: Any, part: int, sms: int | None = None) -> None:
        self._down(a, w_down, o, self._down_parts[part], sms=sms)


class RowsOnHost:
    """What cuBLAS has to know of a plan.

    Args:
        state: the call's CallState, as bytes on the device.
    """

    def __init__(self, local_experts: int, state: Any) -> None:
        self._state, self._status = state, pinned(exchange_state_dtype)
        self._offsets = pinned(np.dtype(np.int32), local_experts + 1)

    def __call__(self, plan: Any) -> Rows:
        """Waits for the status: rows [begin, end) of each expert; empty if the call is over."""
        import cupy as cp

        runtime, stream = cp.cuda.runtime, cp.cuda.get_current_stream()
        kind = runtime.memcpyDeviceToHost
        for target, source in ((self._status, self._state), (self._offsets, plan.expert_offsets)):
            runtime.memcpyAsync(
                target.ctypes.data, source.data.ptr, target.nbytes, kind, stream.ptr
            )
        stream.synchronize()
        if not self._status["ok"][0]:
            return []
        return [(int(a), int(b)) for a, b in itertools.pairwise(self._offsets)]


class CublasExperts:
    """Forward and backward of all experts, where the host knows the rows of each."""

    def __init__(self, shape: PlanShape) -> None:
        self._shape, self._gemm = shape, ExpertGemm()
        self._activate, self._activate_backward = load_kernels(
            "sequential/activation.cu", "activate", "activate_backward"
        )
        self._warm_up()

    def forward(
        self, plan: Plan, rows: Rows, x_rows: Any, w_up: Any, w_down: Any, z: Any, a: Any, o: Any
    ) -> None:
        self._each("NT", x_rows, w_up, z, rows)
        self._run(self._activate, plan, z=z, a=a)
        self._each("NT", a, w_down, o, rows)

    def grad_rows(
        self, saved: Any, rows: Rows, dy_rows: Any, da: Any, dz: Any, weighted_a: Any,
        dweight_rows: Any, dx_rows: Any, plan: Plan,
    ) -> None:  # fmt: skip
        """All but dy_rows and plan are results; da [rows, I_s] is float32."""
        self._each("NN", dy_rows, saved.w_down, da, rows)
        self._run(
            self._activate_backward,
            plan,
            z=saved.z,
            a=weighted_a,
            da=da,
            dz=dz,
            dweight_rows=dweight_rows,
        )
        self._each("NN", dz, saved.w_up, dx_rows, rows)

    def grad_weights(
        self,
        rows: Rows,
        dz: Any,
        x_rows: Any,
        dy_rows: Any,
        weighted_a: Any,
        out: Gradients,
        accumulate: bool,
    ) -> None:
        for expert, (begin, end) in enumerate(rows):
            part = slice(begin, end)
            up, down = out.w_up[expert], out.w_down[expert]
            self._gemm("TN", dz[part], x_rows[part], up, accumulate=accumulate)
            self._gemm("TN", dy_rows[part], weighted_a[part], down, accumulate=accumulate)

    def _each(self, form: str, a: Any, weights: Any, c: Any, rows: Rows) -> None:
        for expert, (begin, end) in enumerate(rows):
            self._gemm(form, a[begin:end], weights[expert], c[begin:end])

    def _run(self, kernel: Any, plan: Any, **arrays: Any) -> None:
        params = ParamStruct(activation_params_dtype)
        params.fields["g"] = geometry_params(self._shape)
        arrays |= {"expert_offsets": plan.expert_offsets, "row_weight": plan.row_weight}
        for name, array in arrays.items():
            params.fields[name] = array.data.ptr
        kernel((8 * num_sms(),), _THREADS, params)

    def _warm_up(self) -> None:
        """Every kind of GEMM once: libraries load kernels when first used, and may wait for the
        whole device then, which must not happen while a peer's kernel waits for this rank."""
        import cupy as cp

        geometry = self._shape.geometry
        hidden, up, width = geometry.spec.hidden, geometry.up_columns, geometry.local_intermediate
        bf16 = geometry.spec.numpy_dtype
        rows = min(self._shape.capacity, 4 * self._shape.config.block_m)

        def zeros(*shape: int, dtype: Any = bf16) -> Any:
            return cp.zeros(shape, dtype)

        self._gemm("NT", zeros(rows, hidden), zeros(up, hidden), zeros(rows, up))
        self._gemm("NT", zeros(rows, width), zeros(hidden, width), zeros(rows, hidden))
        da = zeros(rows, width, dtype=cp.float32)
        self._gemm("NN", zeros(rows, hidden), zeros(hidden, width), da)
        self._gemm("NN", zeros(rows, up), zeros(up, hidden), zeros(rows, hidden))
        for dtype in (bf16, np.dtype(np.float32)):
            dw_up, dw_down = zeros(up, hidden, dtype=dtype), zeros(hidden, width, dtype=dtype)
            for accumulate in (False, True):
                self._gemm("TN", zeros(rows, up), zeros(rows, hidden), dw_up, accumulate=accumulate)
                self._gemm(
                    "TN", zeros(rows, hidden), zeros(rows, width), dw_down, accumulate=accumulate
                )
