"""The record that all kernels of a call take: what is the same in every call of a layer, and what
is not."""

from __future__ import annotations

from typing import Any

import numpy as np

from cometrt.cuda.report import OPERATIONS
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

_TABLES = slice(
    *(ParamStruct(exchange_params_dtype).place(EXCHANGE_TABLES[i]) + (i != 0) for i in (0, -1))
)
_WORDS = {
    name: ParamStruct(exchange_params_dtype).place(name)
    for name in exchange_params_dtype.names or ()
    if exchange_params_dtype.fields[name][0].itemsize == 8  # type: ignore[index]
}
_OF_CALL = slice(_WORDS["forward_epoch"], None)  # from here on all is of one call


class ExchangeParamsBuilder:
    """One layer's call record, used again in every call."""

    def __init__(self, world: World, shape: PlanShape, heap: SymmetricHeap, layer: int) -> None:
        self._world, self._shape, self._heap, self._layer = world, shape, heap, layer
        self._filled_for: tuple[Any, ...] = ()
        self.record = ParamStruct(exchange_params_dtype)

    def begin(self, operation: str, num_tokens: int, state: int, report: int) -> ParamStruct:
        """The record of a new call: no pointer but these is set. Valid until the next `begin`."""
        record, world_pointers = self.record, self.world_pointers()
        if self._filled_for != world_pointers:
            self._fill()
            self._filled_for = world_pointers
        record.words[_OF_CALL] = 0
        fields = record.fields
        fields["num_tokens"] = num_tokens
        fields["operation"] = OPERATIONS.index(operation)
        fields["num_counters"] = 0
        set_fields(record, state=state, report=report)
        return record

    def world_pointers(self) -> tuple[Any, ...]:
        """What a record depends on besides its call: another layer may make regions move, peers'
        too."""
        world = self._world
        return (world.generation, world.timeout_sec, world.regions.version)

    def _fill(self) -> None:
        """What the world and the layer are."""
        world, shape, call = self._world, self._shape, self.record.fields
        record = np.zeros(1, world_dtype)
        assert world.gpu is not None
        for peer in range(world.size):
            record["control"][0, peer] = world.gpu.control[peer]
            record["data"][0, peer] = world.regions.of("data", peer)
            record["flags"][0, peer] = world.regions.of("flags", peer)
            for parity in (0, 1):
                record["routing"][0, parity, peer] = world.regions.of(f"routing{parity}", peer)
        record["generation"] = world.generation
        record["timeout_ns"] = round(world.timeout_sec * 1e9)
        record["rank"], record["size"] = world.rank, world.size
        call["world"], call["g"] = record, geometry_params(shape)
        call["num_n_chunks"] = self._heap.table["partials_ready"].shape[-1]
        call["n_chunk_columns"] = shape.config.n_chunks(shape.geometry.spec.hidden)[0][1]
        for field, name in HEAP_OFFSETS.items():
            call[field] = self._heap.table[name].offset
        call["layer"], call["spec_hash"] = self._layer, shape.geometry.spec.digest()


def set_fields(record: ParamStruct, **values: int) -> None:
    """8-byte fields of a call's record."""
    words = record.words
    for name, value in values.items():
        words[_WORDS[name]] = value


def set_tables(record: ParamStruct, addresses: Any) -> None:
    """Of the plan: see `DevicePlanner.exchange_tables`."""
    record.words[_TABLES] = addresses
