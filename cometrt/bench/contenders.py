"""One rank's layers and arrays: what is checked and timed beside each other."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import gc
from collections.abc import Callable, Iterable
from typing import Any

import cupy as cp
import numpy as np

import cometrt
from cometrt.bench.experts import Experts
from cometrt.bench.nccl import Nccl, NcclForward
from cometrt.bench.step_memory import Allocations, heap_bytes
from cometrt.bench.timing import Call, Method, StartBarrier, measure
from cometrt.bench.workloads import (
    PASSES,
    SHAPES,
    Cell,
    busiest_rank,
    crossing_bytes,
    device_normal,
    relative_error,
    routing,
    tolerance,
)
from cometrt.world.link import LINKS
from cometrt.world.partitions import gpu_sms, num_sms

LAYERS = {  # mode and pipeline chunks
    "sequential": ("sequential", 1),
    "fused": ("fused", 1),
    "chunked 2": ("chunked", 2),
    "chunked 4": ("chunked", 4),
}
FORWARD_ONLY = ("chunked 2", "chunked 4", "nccl", "planning")
CONTENDERS = ("fused", "sequential", "gemms", *FORWARD_ONLY)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What a run measures of each cell."""
    parser.add_argument("--pass", dest="passes", type=_chosen(PASSES), default=["forward"])
    parser.add_argument("--contenders", type=_chosen(CONTENDERS), default=list(CONTENDERS))
    parser.add_argument(
        "--inference", action="store_true", help="forwards that keep nothing for a backward"
    )
    Method.add_arguments(parser)


def _chosen(known: Any) -> Any:
    def parse(text: str) -> list[str]:
        names = text.split(",")
        if unknown := [name for name in names if name not in known]:
            raise argparse.ArgumentTypeError(f"{unknown} not among {', '.join(known)}")
        return names

    return parse


class Rank:
    """One rank's layers and arrays.

    Args:
        ids: [W, T, K] of all ranks.
        names: of CONTENDERS; "sequential" is made in any case, to check the others.
        training: whether forwards keep what a backward needs.
        config: of "fused"; None: what a layer has that is not given one.
    """

    def __init__(
        self,
        world: cometrt.World,
        cell: Cell,
        ids: np.ndarray,
        names: list[str],
        *,
        training: bool,
        config: cometrt.TileConfig | None,
    ) -> None:
        """Collective."""
        self.world, self._training = world, training
        self._names, model = names, SHAPES[cell.model]
        self._held: dict[str, int] = {}  # bytes that a layer allocates when it is made
        self.layers = {
            name: self._layer(cell, name, config)
            for name in LAYERS
            if name in names or name == "sequential" or (name == "fused" and "planning" in names)
        }
        first = self.layers["sequential"]
        cp.random.seed(world.rank)
        self.x = self.layers.get("fused", first).buffer()[: cell.tokens]
        self.x[...] = device_normal(self.x.shape)
        self.dy = device_normal(self.x.shape)
        self.weights = (
            device_normal(first.geometry.w_up_shape, model.hidden**-0.5),
            device_normal(first.geometry.w_down_shape, model.intermediate**-0.5),
        )
        self.ids = cp.asarray(ids[world.rank])
        weights = np.random.default_rng(0).random(ids.shape, np.float32) + 0.5  # of all ranks
        self.topk_weights = cp.asarray(weights[world.rank])
        self.y = cp.empty_like(self.x)
        self._grads: cometrt.Gradients | None = None
        self._experts: Experts | None = None
        self._nccl: NcclForward | None = None
        if "gemms" in names or "nccl" in names:
            self._experts = Experts(first, ids, weights, self.weights)
            nccl = Nccl.connect(world) if "nccl" in names else None
            if nccl is not None:
                self._nccl = NcclForward(nccl, self._experts, world, self.x, ids, weights)

    def _layer(self, cell: Cell, name: str, config: Any) -> cometrt.MoELayer:
        mode, chunks = LAYERS[name]
        if mode != "fused":  # others gain nothing from phases, and read weights once for each
            config = cometrt.TileConfig(num_phases=1, pipeline_chunks=chunks)
        with Allocations() as made:
            layer = cometrt.MoELayer(self.world, cell.spec, mode, config=config)
        self._held[name] = made.now
        return layer

    # ---- calls ------------------------------------------------------------------------------

    def forward(self, name: str) -> Any:
        given = (self.x, self.ids, self.topk_weights, *self.weights)
        return self.layers[name].forward(*given, out=self.y, training=self._training)[1]

    def backward(self, name: str, saved: Any) -> None:
        self.layers[name].backward(self.dy, saved, out=self.grads)

    @property
    def grads(self) -> cometrt.Gradients:
        if self._grads is None:
            given = (self.x, self.topk_weights, *self.weights)
            self._grads = cometrt.Gradients(*map(cp.empty_like, given))
        return self._grads

    def calls(self, which: str) -> dict[str, Call]:
        """What is timed of a pass, by contender."""
        found = {}
        for name in self._names:
            if name in FORWARD_ONLY and which != "forward":
                continue
            if name in self.layers:
                found[name] = self._call(name, which)
            elif name == "planning":
                found[name] = self._planning()
            elif name == "gemms" and self._experts is not None:
                found[name] = self._gemms(self._experts, which)
            elif name == "nccl" and self._nccl is not None:
                found[name] = whole(self._nccl)
        return found

    def _call(self, name: str, which: str) -> Call:
        forward = functools.partial(self.forward, name)
        backward = functools.partial(self.backward, name)
        return {
            "forward": whole(forward),
            "backward": Call(backward, forward),
            "both": whole(lambda: backward(forward())),
        }[which]

    def _gemms(self, experts: Experts, which: str) -> Call:
        passes = {"forward": [experts.forward], "backward": [experts.backward]}
        runs = passes.get(which) or [experts.forward, experts.backward]
        return whole(lambda: [run() for run in runs])

    def _planning(self) -> Call:
        """A fused forward, of which all up to prepare is timed. Its kernels are launched one by
        one, since the launches of a graph cannot be watched."""
        executor: Any = self.layers["fused"].executor
        planned = cp.cuda.Event()
        prepare = executor.kernels["prepare"]

        def watched(stream: int, *args: Any) -> None:
            prepare(stream, *args)
            planned.record()

        def run(_: Any) -> None:
            executor.kernels["prepare"], executor.graphs.enabled = watched, False
            try:
                self.forward("fused")
            finally:
                executor.kernels["prepare"], executor.graphs.enabled = prepare, True

        return Call(run, ended=planned)

    # ---- memory -----------------------------------------------------------------------------

    def step_memory(self, name: str) -> dict[str, int]:
        """Collective: bytes at the peak of a forward and its backward, of the rank with most.

        arguments: all of both calls but x, their results included. heap: what peers reach, x
        included. layer: what the layer holds besides. calls: the most that the calls allocate,
        with what the forward saves. total: their sum.
        """
        layer, rest = self.layers[name], (self.dy, self.ids, self.topk_weights, self.y)
        arrays = (*rest, *self.weights, *self.grads)
        layer.synchronize()
        with Allocations() as calls:
            saved = self.forward(name)
            self.backward(name, saved)
            layer.synchronize()
        found = {
            "arguments": sum(array.nbytes for array in arrays),
            "heap": heap_bytes(layer),
            "layer": self._held[name],
            "calls": calls.peak,
        }
        ranks = self.world.allgather(found | {"total": sum(found.values())})
        return max(ranks, key=lambda rank: rank["total"])

    # ---- checking ---------------------------------------------------------------------------

    def check(self, *, backward: bool) -> dict[str, float]:
        """Collective: by contender, the largest relative error of a result from the sequential
        layer's. Results are NaN before each call.

        Raises:
            CometError: on all ranks, where an error is over the tolerance, or chunked has other
                bits than sequential.
        """
        expected = [array.copy() for array in self._results("sequential", backward)]
        errors = {}
        for name in [*self.layers, *(["nccl"] if self._nccl else [])]:
            of_layer = name in self.layers
            found = self._results(name, backward and of_layer)
            pairs = zip(found, expected, strict=False)  # NCCL has no gradients
            errors[name] = max(relative_error(one, other) for one, other in pairs)
        limits = {name: 0.0 if "chunked" in name else tolerance("bfloat16") for name in errors}
        wrong = {name: error for name, error in errors.items() if not error <= limits[name]}
        everywhere = [problem for problem in self.world.allgather(wrong) if problem]
        if everywhere:
            raise cometrt.CometError(f"results differ from those of sequential: {everywhere}")
        ranks = self.world.allgather(errors)
        return {name: max(rank[name] for rank in ranks) for name in errors}

    def _results(self, name: str, backward: bool) -> list[Any]:
        """y and the gradients, which the next call overwrites."""
        results = [self.y, *(self.grads if backward else ())]
        for array in results:
            array.fill(np.nan)
        cp.cuda.get_current_stream().synchronize()
        self.world.barrier()
        if name == "nccl":
            assert self._nccl is not None
            self._nccl()
            results = [self._nccl.y]
        else:
            saved = self.forward(name)
            if backward:
                self.backward(name, saved)
            self.layers[name].synchronize()
        cp.cuda.get_current_stream().synchronize()
        self.world.barrier()
        return results

    def close(self) -> None:
        for layer in self.layers.values():
            layer.close()
        self.world.barrier()


def measure_cell(
    world: cometrt.World,
    cell: Cell,
    args: argparse.Namespace,
    config: cometrt.TileConfig | None = None,
    gbps: float | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, dict[str, Any]]:
    """Collective: check a cell, and measure its passes; entries of `cometrt.bench.records` by pass,
    equal on all ranks.

    Args:
        args: of `add_arguments`.
        config: of the fused layer; None: what a layer gets by itself.
        gbps: of the link, each way; None: that of the emulated link, or none.
        say: is called with what comes next.
    """
    ids, training = routing(cell), not args.inference
    if args.inference and args.passes != ["forward"]:
        raise ValueError("--inference has forwards alone")
    rank = Rank(world, cell, ids, args.contenders, training=training, config=config)
    say("checking results; the first time, kernels are compiled")
    errors = rank.check(backward=args.passes != ["forward"])
    barrier, method = StartBarrier(world), Method.of(args)
    if gbps is None and cell.link is not None:
        gbps = LINKS[cell.link]
    share = num_sms() / gpu_sms() if world.shares_gpu else 1.0  # of the GPU, and so of the link
    crossing = crossing_bytes(cell, ids)
    fused, memory = rank.layers.get("fused"), {}
    if args.passes != ["forward"]:
        asked = [name for name in ("fused", "sequential") if name in args.contenders]
        memory = {name: rank.step_memory(name) for name in asked}
    facts = {
        "cell": dataclasses.asdict(cell),
        "link_ms": 1e3 * crossing / (gbps * 1e9 * share) if gbps else 0.0,
        "gbps": gbps,
        "crossing_bytes": crossing,
        "busiest_rank": busiest_rank(cell, ids),
        "sms": num_sms(),
        "training": training,
        "method": dataclasses.asdict(method),
        "config": dataclasses.asdict(fused.config) if fused else None,
        "error": errors,
        "step_bytes": memory,
    }
    found = {}
    for which in args.passes:
        say(f"measuring {which}")
        flops = cell.flops(which) * (cell.ranks if world.shares_gpu else 1)  # of the GPU
        times = measure(world, barrier, rank.calls(which), method)
        found[which] = facts | {"flops": flops, "times": times}
    rank.close()
    return found


def free_memory(devices: Iterable[int]) -> None:
    """Free the memory that ended ranks have left on these GPUs."""
    gc.collect()  # cycles hold some
    for device in devices:
        with cp.cuda.Device(device):
            cp.get_default_memory_pool().free_all_blocks()


def whole(run: Callable[[], Any]) -> Call:
    """All of it is timed. Its result is dropped, so that the next call gets the same memory."""

    def timed(_: Any) -> None:
        run()

    return Call(timed)
