"""The fused forward: dispatch within the up GEMM's launch, combine within the down GEMM's."""

from __future__ import annotations

from typing import Any

import numpy as np

from cometrt.activations import ACTIVATIONS
from cometrt.cuda.engine import (
    SHARED_BYTES,
    THREADS,
    gemm_arguments,
    gemm_grid,
    new_turns,
    order_turns,
)
from cometrt.kernels.launch import load_kernels
from cometrt.plan import PlanShape
from cometrt.plan.turns import BLOCK_N, column_tiles
from cometrt.world.partitions import num_sms

_PAD_THREADS = 256
_LAYER0_BYTES = SHARED_BYTES + 6 * 4096 + 6 * 8  # sizeof(Memory) of fused/layer0.cu


class FusedForward:
    """One layer's two launches.

    Args:
        pull_pace, push_pace: of `pace_record`, for what comes and what leaves.
        num_comm: CTAs whose mover warps work; None: all.
    """

    def __init__(
        self,
        shape: PlanShape,
        pull_pace: np.ndarray,
        push_pace: np.ndarray,
        num_comm: int | None = None,
    ) -> None:
        import cupy as cp

        geometry, config, spec = shape.geometry, shape.config, shape.geometry.spec
        self._gated, self._num_comm = spec.gated, num_comm
        self._num_chunks = len(config.chunks(spec.hidden))
        self._chunk = -(-(config.chunks(spec.hidden)[0][1]) // BLOCK_N)
        self._up_columns = column_tiles(geometry.local_intermediate, gated=spec.gated)
        self._down_columns = column_tiles(spec.hidden, gated=False)
        self._up_turns = new_turns(shape.max_tiles, self._up_columns)
        self._down_turns = new_turns(shape.max_tiles, self._down_columns, self._chunk)
        number = list(ACTIVATIONS).index(spec.activation)
        self._layer0 = {}
        for z in (False, True):
            defines = (("ACTIVATION", number), ("WRITE_Z", int(z)))
            (self._layer0[z],) = load_kernels("fused/layer0.cu", "layer0", defines=defines)
            self._layer0[z].allow_shared(_LAYER0_BYTES)
        (self._layer1,) = load_kernels("fused/layer1.cu", "layer1")
        self._layer1.allow_shared(SHARED_BYTES)
        (self._zero_pads,) = load_kernels("exchange/rows.cu", "zero_pads")
        self._filled = cp.zeros(shape.max_tiles, cp.uint32)
        self._done = cp.zeros(shape.max_tiles * self._num_chunks, cp.uint32)
        self._pull_pace, self._push_pace = pull_pace, push_pace

    def begin(self, call: np.ndarray) -> None:
        """Counters of tiles start at zero in every call, on the call's stream."""
        for name, counters in (("tile_filled", self._filled), ("tile_done", self._done)):
            counters.data.memset_async(0, counters.nbytes)
            call[name] = counters.data.ptr

    def layer0(
        self, call: np.ndarray, plan: Any, ok: int, x_rows: Any, w_up: Any, z: Any, a: Any
    ) -> None:
        """Pull x into its rows and multiply: a, and z unless it is None. Both orders of tiles are
        made here, so that `layer1` is one launch."""
        self._zero_pads((num_sms(),), _PAD_THREADS, call)
        order_turns(plan, self._up_columns, ok=ok, out=self._up_turns)
        order_turns(
            plan,
            self._down_columns,
            backwards=True,
            chunk=self._chunk,
            ok=ok,
            out=self._down_turns,
        )
        arguments = gemm_arguments(x_rows, w_up, a, self._up_turns, gated=self._gated, z=z)
        kernel = self._layer0[z is not None]
        self._launch(kernel, call, (*arguments, self._pull_pace), _LAYER0_BYTES)

    def layer1(self, call: np.ndarray, a: Any, w_down: Any, o: Any) -> None:
        """Multiply, push partial rows, and add up at home: waits for peers."""
        arguments = gemm_arguments(a, w_down, o, self._down_turns, gated=False)
        self._launch(self._layer1, call, (*arguments, self._push_pace), SHARED_BYTES)

    def _launch(
        self, kernel: Any, call: np.ndarray, arguments: tuple[np.ndarray, ...], shared_bytes: int
    ) -> None:
        grid = gemm_grid()
        num_comm = grid[0] if self._num_comm is None else max(1, min(self._num_comm, grid[0]))
        kernel(
            grid,
            THREADS,
            call,
            *arguments,
            np.int32(num_comm),
            shared_bytes=shared_bytes,
        )
