"""A call, and the parameters that all its kernels take."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from cometrt.cuda.dgrad import dgrad_n_tiles
from cometrt.heap import SymmetricHeap
from cometrt.kernels.params import (
    EXCHANGE_TABLES,
    HEAP_OFFSETS,
    ParamStruct,
    exchange_params_dtype,
    geometry_params,
)
from cometrt.plan import PlanShape
from cometrt.world import World
from cometrt.world.layout import world_dtype
from cometrt.world.operations import OPERATIONS


class Call(NamedTuple):
    """One call: its sizes, and where its arrays lie.

    Attributes:
        operation: of OPERATIONS.
        at: address of each array on the device, by name; a missing one is null.
            Arguments: x, ids, weights, w_up, w_down; of a plan ids, weights; of a planned forward
            x, plan_epoch, tables, w_up, w_down; of backward dy, w_up, w_down.
            Results: out [T, H]; of backward also out_dweight, dw_up, dw_down; of a plan epoch and
            tables.
            Residuals: epoch, saved_x or x_rows, z unless save="nothing", tables.
            Scratch: all other arrays of `cometrt.cuda.buffers`. "scratch", the memory that holds
            them, stands for them until the call is launched.
            stats: CallStats in the place of the layer's own.
        ids_are_64: whether ids are int64.
        accumulate: whether weight gradients are added to what is there.
        float32_gradients: whether dw_up and dw_down are float32.
    """

    operation: str
    num_tokens: int
    at: Mapping[str, int]
    ids_are_64: bool = False
    accumulate: bool = False
    float32_gradients: tuple[bool, bool] = (False, False)

    @property
    def key(self) -> tuple[object, ...]:
        """All that its launches depend on, besides the world."""
        operation, num_tokens, at, *how = self
        return (operation, num_tokens, *how, *at.values())


# 8-byte field of ExchangeParams -> name in Call.at. _FORWARD: also of plans and planned forwards.
_FORWARD = {
    "x": "x",
    "ids": "ids",
    "weights": "weights",
    "forward_epoch": "plan_epoch",
    "saved_epoch": "epoch",
    "saved_x": "saved_x",
    "rows": "x_rows",
    "partial_rows": "o",
    "out": "out",
}
_BACKWARD = {
    "x": "saved_x",
    "dy": "dy",
    "forward_epoch": "epoch",
    "rows": "dy_rows",
    "partial_rows": "dx_rows",
    "dweight_rows": "dweight_rows",
    "out": "out",
    "out_dweight": "out_dweight",
}
_TABLES = slice(
    *(ParamStruct(exchange_params_dtype).index_of(EXCHANGE_TABLES[i]) + (i != 0) for i in (0, -1))
)
_INDEX = {
    name: ParamStruct(exchange_params_dtype).index_of(name)
    for name in exchange_params_dtype.names or ()
    if exchange_params_dtype.fields[name][0].itemsize == 8  # type: ignore[index]
}
_OF_CALL = slice(_INDEX["forward_epoch"], None)  # from here on every field is of one call


def num_dweight_partials(shape: PlanShape) -> int:
    """Partial sums of a row's dweight: the engine has one of each N-tile."""
    if shape.config.gemm == "cublas":
        return 1
    return dgrad_n_tiles(shape.geometry.local_intermediate)


class ExchangeParamsBuilder:
    """One layer's exchange params: one struct, filled again for every call.

    Args:
        fixed: operation -> address by field, the same in every such call. "recompute": of
            a backward's launch that computes z again, in place of the backward's.
        num_counters: operation -> 32-bit words at the field "counters".
        table_offsets: byte offset of each of EXCHANGE_TABLES in a plan's memory.
    """

    def __init__(
        self,
        world: World,
        shape: PlanShape,
        heap: SymmetricHeap,
        layer: int,
        fixed: Mapping[str, Mapping[str, int]],
        num_counters: Mapping[str, int],
        table_offsets: np.ndarray,
    ) -> None:
        self._world, self._shape, self._heap, self._layer = world, shape, heap, layer
        self._fixed, self._num_counters, self._table_offsets = fixed, num_counters, table_offsets
        self.reschedule(shape)
        self._filled_for: tuple[float, ...] = ()
        self._params = ParamStruct(exchange_params_dtype)

    def reschedule(self, shape: PlanShape) -> None:
        """Calls have the N-chunks of this config from now on."""
        self._config, self._backward_config = shape.config, shape.of_backward().config

    def begin(self, call: Call) -> ParamStruct:
        """The params of a new call. Valid until the next `begin`."""
        params, world = self._params, self.world_state()
        if self._filled_for != world:
            self._fill()
            self._filled_for = world
        forward = call.operation != "backward"
        params.uint64s[_OF_CALL] = 0
        fields = params.fields
        fields["num_tokens"] = call.num_tokens
        fields["operation"] = OPERATIONS.index(call.operation)
        fields["weighted"], fields["ids_are_64"] = forward, call.ids_are_64
        fields["num_counters"] = self._num_counters[call.operation]
        hidden = self._shape.geometry.spec.hidden
        config = self._config if forward else self._backward_config
        fields["num_n_chunks"] = config.num_n_chunks(hidden)
        fields["n_chunk_columns"] = config.n_chunks(hidden)[0][1]
        at, arrays = call.at, _FORWARD if forward else _BACKWARD
        set_fields(params, **{field: at.get(name, 0) for field, name in arrays.items()})
        set_fields(params, pull_offset=self._heap.table["x" if forward else "dy"].offset)
        if not forward:
            set_fields(params, **self._gradients(call))
            set_fields(params, x_rows=at["x_rows"] if "saved_x" in at else 0)
        set_fields(params, **self._fixed_of(call))
        params.uint64s[_TABLES] = self._table_offsets + np.uint64(at["tables"])
        return params

    def pull_x(self, params: ParamStruct, call: Call) -> None:
        """From here on `params` says that x is pulled, into x_rows."""
        set_fields(params, pull_offset=self._heap.table["x"].offset, rows=call.at["x_rows"])
        set_fields(params, num_parts=0, **self._fixed["recompute"])  # all of x has arrived

    def pull_dy(self, params: ParamStruct, call: Call) -> None:
        """From here on, after `pull_x`, `params` says that dy alone is pulled, into dy_rows."""
        set_fields(params, pull_offset=self._heap.table["dy"].offset, rows=call.at["dy_rows"])
        set_fields(params, x_rows=0, **self._fixed_of(call))

    def _fixed_of(self, call: Call) -> Mapping[str, int]:
        fixed = self._fixed[call.operation]
        return {**fixed, "stats": call.at["stats"]} if "stats" in call.at else fixed

    def _gradients(self, call: Call) -> dict[str, int]:
        """Fields of a backward's gradients."""
        geometry = self._shape.geometry
        fields = {"num_dweight_partials": num_dweight_partials(self._shape)}
        if call.accumulate:
            return fields
        shapes = {"dw_up": geometry.w_up_shape, "dw_down": geometry.w_down_shape}
        for (name, shape), wide in zip(shapes.items(), call.float32_gradients, strict=True):
            fields[name] = call.at[name]
            fields[f"{name}_bytes"] = math.prod(shape) * (4 if wide else 2)
        return fields

    def world_state(self) -> tuple[float, ...]:
        """What the params depend on besides the call. Another layer may make regions move, peers'
        too."""
        world = self._world
        return (world.generation, world.timeout_sec, world.regions.version)

    def _fill(self) -> None:
        """What the world and the layer are."""
        world, shape, params = self._world, self._shape, self._params.fields
        params["world"], params["g"] = world_params(world), geometry_params(shape)
        for field, name in HEAP_OFFSETS.items():
            params[field] = self._heap.table[name].offset
        params["layer"], params["spec_hash"] = self._layer, shape.geometry.spec.digest()


def world_params(world: World) -> np.ndarray:
    """The World of a rank, as it is now."""
    peers = np.zeros(1, world_dtype)
    assert world.gpu is not None
    for peer in range(world.size):
        peers["control"][0, peer] = world.gpu.control[peer]
        peers["data"][0, peer] = world.regions.of("data", peer)
        peers["flags"][0, peer] = world.regions.of("flags", peer)
        for parity in (0, 1):
            peers["routing"][0, parity, peer] = world.regions.of(f"routing{parity}", peer)
    peers["generation"] = world.generation
    peers["timeout_ns"] = round(world.timeout_sec * 1e9)
    peers["rank"], peers["size"] = world.rank, world.size
    return peers


def set_fields(params: ParamStruct, **values: int) -> None:
    """8-byte fields of exchange params."""
    uint64s = params.uint64s
    for name, value in values.items():
        uint64s[_INDEX[name]] = value
