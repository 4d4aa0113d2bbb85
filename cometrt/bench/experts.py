"""The expert GEMMs of a layer alone, without the exchange of tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cupy as cp
import numpy as np

import cometrt
from cometrt.bench.workloads import device_normal
from cometrt.cuda.dgrad import GroupedDgrad, GroupedDownDgrad, dgrad_n_tiles
from cometrt.cuda.engine import GroupedGemm, order_tiles, raster_group_of
from cometrt.cuda.wgrad import GroupedWgrad, Wgrad


class Experts:
    """A rank's grouped GEMMs, planned as a layer plans them, with rows of its own.

    Args:
        layer: whose planner is used.
        ids, weights: [W, T, K] of all ranks.
        expert_weights: w_up and w_down of this rank.

    Attributes:
        plan: on the device.
        x_rows, o: [capacity, H], input and output; x_rows begins with random values.
    """

    def __init__(
        self,
        layer: cometrt.MoELayer,
        ids: np.ndarray,
        weights: np.ndarray,
        expert_weights: tuple[Any, Any],
    ) -> None:
        shape, geometry = layer.shape, layer.geometry
        size, tokens, _ = ids.shape
        routing = (ids, weights, np.full(size, tokens, np.int32))
        executor: Any = layer.executor
        self.plan = executor.queue.planner.plan(*map(cp.asarray, routing))
        hidden, inner, up = layer.spec.hidden, geometry.local_intermediate, geometry.up_columns
        self._w_up, self._w_down = expert_weights
        self._up = GroupedGemm(layer.spec.activation, write_z=True)
        self._down = GroupedGemm()
        self._up_order = order_tiles(
            self.plan, self._up.num_n_tiles(up), raster_group=raster_group_of(hidden)
        )
        self._down_order = order_tiles(
            self.plan,
            self._down.num_n_tiles(hidden),
            raster_group=raster_group_of(inner),
            backwards=True,
        )
        self.x_rows = device_normal((shape.capacity, hidden))
        dtype = self.x_rows.dtype
        self._z, self._a, self.o = (
            cp.zeros((shape.capacity, columns), dtype) for columns in (up, inner, hidden)
        )
        self._backward: Callable[[], None] | None = None
        self._activation = layer.spec.activation

    def forward(self) -> None:
        """Queue the up and the down GEMM."""
        self._up(self.x_rows, self._w_up, self._a, self._up_order, z=self._z)
        self._down(self._a, self._w_down, self.o, self._down_order)

    def backward(self) -> None:
        """Queue the down dgrad, the up dgrad and both weight gradients, after a forward."""
        if self._backward is None:
            self._backward = self._make_backward()
        self._backward()

    def _make_backward(self) -> Callable[[], None]:
        """Results of their own; tiles are ordered once, here."""
        inner, hidden = self._a.shape[1], self.o.shape[1]
        down, up, plan = GroupedDownDgrad(self._activation), GroupedDgrad(), self.plan
        down_order, up_order = (
            order_tiles(plan, dgrad_n_tiles(columns), raster_group=raster_group_of(k))
            for columns, k in ((inner, hidden), (hidden, self._z.shape[1]))
        )
        row_weight = cp.ones(len(self.o), np.float32)
        dy_rows, dz, weighted_a = map(cp.zeros_like, (self.x_rows, self._z, self._a))
        dweight = cp.empty((len(self.o), dgrad_n_tiles(inner)), np.float32)
        grads = [
            Wgrad(dz, self.x_rows, cp.empty_like(self._w_up)),
            Wgrad(dy_rows, weighted_a, cp.empty_like(self._w_down)),
        ]
        down_arrays = dy_rows, self._w_down, self._z, row_weight, dz, weighted_a, dweight
        dy_rows[...] = self.x_rows
        wgrads = GroupedWgrad().ordered(grads, plan)

        def run() -> None:
            down(*down_arrays, down_order)
            up(dz, self._w_up, self.o, up_order)
            wgrads()

        return run
