"""One rank of benchmarks/layer.py: its layers, its arrays, and what is timed."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import cupy as cp
import numpy as np

import cometrt
from benchmarks.layer_cells import SHAPES, Cell

WARM_UP = 2  # rounds
_GATE = r"""
extern "C" __global__ void gate(volatile int* open, int number) {
  unsigned long long begin, now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(begin));
  do {
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
  } while (*open < number && now - begin < 5000000000ull);
}
"""


class Gate:
    """All ranks begin at once: each queues `close`, and its work; then one opens."""

    def __init__(self) -> None:
        self._memory = cp.cuda.alloc_pinned_memory(4)
        self._flag = np.frombuffer(self._memory, np.int32, 1)
        self._flag[0] = 0

    def close(self, number: int) -> None:
        cp.RawKernel(_GATE, "gate")((1,), (1,), (np.uint64(self._memory.ptr), np.int32(number)))

    def open(self, number: int) -> None:
        self._flag[0] = number


def take_turns(
    world: cometrt.World, gate: Gate, contenders: dict[str, Callable[[], Any]], rounds: int
) -> dict[str, list[float]]:
    """Milliseconds of each, [rounds], on this rank, from a gate on that all ranks share.
    Collective."""
    stream, number = cp.cuda.get_current_stream(), 0
    gate.close(0)
    stream.synchronize()
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for index in range(rounds + WARM_UP):
        for name, contender in contenders.items():
            number += 1
            world.barrier()
            gate.close(number)
            begin, end = cp.cuda.Event(), cp.cuda.Event()
            begin.record()
            last = contender()
            end.record()
            world.barrier()
            if world.rank == 0:
                gate.open(number)
            end.synchronize()
            if index >= WARM_UP:
                times[name].append(cp.cuda.get_elapsed_time(begin, last or end))
    return times


def random_bf16(shape: tuple[int, ...], scale: float = 1.0) -> Any:
    out = cp.empty(shape, _BF16)
    flat = out.reshape(-1)
    for begin in range(0, flat.size, 1 << 26):
        part = flat[begin : begin + (1 << 26)]
        part[...] = (cp.random.standard_normal(part.size, dtype=cp.float32) * scale).astype(_BF16)
    return out


def relative_distance(y: Any, expected: Any) -> float:
    """A few rows at a time, since memory is scarce."""
    squares = cp.zeros(2, np.float64)
    for begin in range(0, len(y), 1024):
        one, other = (a[begin : begin + 1024].astype(np.float32) for a in (y, expected))
        squares += cp.stack([((one - other) ** 2).sum(), (other**2).sum()])
    distance, size = squares.get()
    return float(math.sqrt(distance / size))


_BF16 = Cell("mixtral-8x7b").spec.numpy_dtype


class Rank:
    """One rank's layers and arrays.

    Args:
        comm_sms: of "chunked", each a contender; None: the default.
        replay: time graphs of the layers' calls.
        config: of "fused"; None: what a layer has that is not given one.

    Attributes:
        contenders: what is timed: each queues one call, and may return the event that ends it.
        expected: once checked, the sequential layer's result.
    """

    def __init__(
        self,
        world: cometrt.World,
        cell: Cell,
        ids: np.ndarray,
        comm_sms: list[int | None],
        replay: bool,
        config: cometrt.TileConfig | None,
    ) -> None:
        model = SHAPES[cell.model]
        self.world = world
        self.layers = self._make_layers(cell, comm_sms, config)
        cp.random.seed(world.rank)
        fused = self.layers["fused"]
        rng = np.random.default_rng(world.rank)
        self.x = fused.buffer()[: cell.tokens]
        self.x[...] = random_bf16(self.x.shape)
        self.weights = (
            random_bf16(fused.geometry.w_up_shape, model.hidden**-0.5),
            random_bf16(fused.geometry.w_down_shape, model.intermediate**-0.5),
        )
        self.ids = cp.asarray(ids[world.rank])
        self.topk_weights = cp.asarray(rng.random(self.ids.shape, np.float32) + 0.5)
        self.y, self.expected = (cp.empty(self.x.shape, _BF16) for _ in range(2))
        self._graph_memory = cp.cuda.MemoryPool()
        self._planned: Any = None
        self._mark_planning()
        gemms = self._record_gemms()
        calls = self._capture_all() if replay else {n: self._call(n) for n in self.layers}
        self.contenders: dict[str, Callable[[], Any]] = {
            **calls,
            "gemms": gemms,
            "planning": self._plan,
        }

    def _make_layers(
        self, cell: Cell, comm_sms: list[int | None], config: cometrt.TileConfig | None
    ) -> dict[str, cometrt.MoELayer]:
        # Others gain nothing by beginning with own tokens, and read weights twice for it.
        make = functools.partial(cometrt.TileConfig, num_phases=1)
        kinds = {"fused": ("fused", config), "sequential": ("sequential", make())}
        for parts in (2, 4):
            for sms in comm_sms:
                name = f"chunked {parts}" + (f" by {sms}" if sms else "")
                kinds[name] = "chunked", make(pipeline_chunks=parts, comm_sms=sms)
        return {
            name: cometrt.MoELayer(self.world, cell.spec, mode, config=config)
            for name, (mode, config) in kinds.items()
        }

    def _forward(self, name: str) -> None:
        self.layers[name].forward(self.x, self.ids, self.topk_weights, *self.weights, out=self.y)

    def _call(self, name: str) -> Callable[[], Any]:
        return lambda: self._forward(name)

    def _mark_planning(self) -> None:
        """Note, in calls of the fused layer, when its plan is made."""
        planner = self.layers["fused"]._executor._planner
        real = planner.prepare

        def prepare(*arguments: Any) -> None:
            real(*arguments)
            if self._planned is not None:
                self._planned.record()

        planner.prepare = prepare

    def _plan(self) -> Any:
        """A fused call, of which publish and prepare are timed."""
        self._planned = planned = cp.cuda.Event()
        graphs = self.layers["fused"]._executor.graphs
        graphs.enabled = False  # a replay could not be watched
        self._forward("fused")
        graphs.enabled = True
        self._planned = None
        return planned

    def _record_gemms(self) -> Callable[[], Any]:
        """The sequential layer's GEMMs of a call, with their data in place."""
        engine, calls = self.layers["sequential"]._executor._engine, []
        real = engine.forward

        def record(*arguments: Any) -> None:
            calls.append(arguments)
            real(*arguments)

        engine.forward = record
        self._forward("sequential")
        engine.forward = real
        self.layers["sequential"].synchronize()
        return lambda: real(*calls[0])

    def _capture_all(self) -> dict[str, Callable[[], Any]]:
        """A graph of each layer's call. They run one at a time and share a pool that is nobody
        else's. Each call before takes the memory that its capture will find there: nothing is
        allocated while ranks capture."""
        stream, graphs = cp.cuda.get_current_stream(), {}
        for name, layer in self.layers.items():
            with cp.cuda.using_allocator(self._graph_memory.malloc):
                self._forward(name)
                layer.synchronize()
                self.world.barrier()
                stream.begin_capture()
                self._forward(name)
                graphs[name] = stream.end_capture()
            layer._executor.captured.clear()
            self.world.barrier()
            graphs[name].upload(stream)
            stream.synchronize()
            self.world.barrier()
        return {n: functools.partial(graph.launch, stream) for n, graph in graphs.items()}

    def check(self) -> float:
        """Largest relative distance of a contender's result from sequential's, all of them
        poisoned before; chunked has the same bits, or a distance of infinity."""
        stream, largest = cp.cuda.get_current_stream(), 0.0
        for name in ["sequential", *(name for name in self.layers if name != "sequential")]:
            self.y.fill(np.nan)
            stream.synchronize()
            self.world.barrier()
            self.contenders[name]()
            self.world.barrier()
            stream.synchronize()
            self.layers[name].synchronize()
            if name == "sequential":
                self.expected[...] = self.y
            distance = relative_distance(self.y, self.expected)
            if not distance <= (0.0 if name.startswith("chunked") else 1.0):  # NaN is wrong too
                distance = math.inf
            largest = max(largest, distance)
        self.world.barrier()
        return largest

    def close(self) -> None:
        for layer in self.layers.values():
            layer.close()
        self.world.barrier()
