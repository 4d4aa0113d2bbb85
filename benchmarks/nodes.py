"""Measure a layer over several nodes, beside NCCL's all-to-all over all ranks.

    mpirun -n 4 python3 -m benchmarks.nodes [--ranks-per-node 2] [options]

    --models qwen3-30b-a3b,... --tokens 8192,... --calls 20 --rounds 5 --out nodes.json
    --slices 1,3,4    values of rail_slices to measure
    --parts 1,2       values of rail_parts to measure, with NCCL_CGA_CLUSTER_SIZE=1
    --nccl-sms 8      SMs that kernels leave to NCCL where tokens cross meanwhile; by default as
                      many as TileConfig says
    --limit 1         nodes of a token's experts, chosen at random for each token. Then each layer
                      over nodes is there twice: all tokens cross, or wanted ones alone ("wanted"),
                      with as much room (rail_tokens) as they take

GPUs of one host are cut into nodes. NCCL_MAX_NCHANNELS limits the channels of NCCL, and so its rate
between them: that of a network. More than one slice, and late parts, need it, or NCCL_MAX_CTAS. On
one host NCCL moves messages of up to 32 times NCCL_P2P_NVL_CHUNKSIZE (512 KiB) by half of the
channels or fewer: set it to 65536, so that slices have the rate of the whole. All this holds for
all contenders:

    nodes, n      the layer over several nodes, with n slices ("nodes, n, wanted": see --limit)
    nodes, late n the same with n late parts
    node alone    its node's layer, with the tokens of the rail, which nothing brings; with n > 1
                  slices "node alone, n", forwards
    rail alone    what crosses between nodes before and after it
    all-to-all    NCCL's all-to-all over all ranks, with the same GEMMs (forwards)
    one node      the fused layer with all ranks on one node

Milliseconds a call, back to back, of the slowest rank; the median of the rounds. Hidden, of each n:
(node alone + rail alone - nodes) / the smaller of the two, which have one slice. Host: milliseconds
in which the host queues a call.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cupy as cp
import numpy as np

import cometrt
from cometrt.bench.contenders import free_memory
from cometrt.bench.nccl import Experts, Nccl, NcclForward
from cometrt.bench.records import machine, write
from cometrt.bench.workloads import (
    SHAPES,
    Cell,
    device_normal,
    distinct_experts,
    relative_error,
    routing,
    tolerance,
)
from cometrt.nodes.crossing import slots_of
from cometrt.nodes.nccl_sms import sms_for_nccl
from cometrt.nodes.slices import RailSlices
from cometrt.residuals import Residuals
from cometrt.trace import NullTracer
from cometrt.world.nccl import max_ctas
from cometrt.world.partitions import leave_sms

CHANNELS = (
    *("NCCL_MAX_CTAS", "NCCL_MAX_NCHANNELS", "NCCL_MAX_P2P_NCHANNELS"),
    *("NCCL_P2P_DISABLE", "NCCL_SHM_DISABLE", "NCCL_P2P_NVL_CHUNKSIZE", "NCCL_CGA_CLUSTER_SIZE"),
    "CUDA_DEVICE_MAX_CONNECTIONS",
)
RANKS_PER_NODE = "COMETRT_RANKS_PER_NODE"
Run = Callable[[], Any]


class Contenders:
    """One rank's layers and arrays."""

    def __init__(
        self,
        nodes: cometrt.World,
        whole: cometrt.World,
        cell: Cell,
        rails: list[tuple[int, int]],
        nccl_sms: int | None = None,
        limit: int | None = None,
    ) -> None:
        """Collective.

        Args:
            nodes, whole: worlds of the same ranks, over several nodes and on one.
            rails: (rail_slices, rail_parts) of the layers.
            nccl_sms: of those where tokens cross while a node computes.
            limit: nodes of a token's experts; None: as they come.
        """
        self.layer = cometrt.MoELayer(nodes, cell.spec, "fused")
        ids, specs = routing(cell), {"": cell.spec}
        if limit is not None:
            ids = limited_routing(cell, nodes.nodes, limit)
            self.rail_tokens = most_wanted(cell, ids, nodes)
            specs[", wanted"] = dataclasses.replace(cell.spec, rail_tokens=self.rail_tokens)
        self.layers: dict[str, cometrt.MoELayer] = {}
        self.slices: dict[str, RailSlices] = {}
        self.left_to_nccl: dict[str, int] = {}
        for rail, (suffix, spec) in itertools.product(rails, specs.items()):
            (count, parts), place = rail, (nodes.nodes, nodes.node_index)
            config = dataclasses.replace(
                self.layer.config,
                rail_slices=count,
                rail_parts=parts,
                nccl_sms=nccl_sms if rail != (1, 0) else None,
            )
            name = f"nodes, {f'late {parts}' if parts else count}{suffix}"
            self.slices[name] = RailSlices.of(spec, *place, *rail)
            self.left_to_nccl[name] = sms_for_nccl(nodes, config)
            self.layers[name] = (
                self.layer
                if rail == (1, 0) and not suffix
                else cometrt.MoELayer(nodes, spec, "fused", config=config)
            )
        (self.whole_rail,) = RailSlices.of(cell.spec, nodes.nodes, nodes.node_index).calls()
        self.whole = cometrt.MoELayer(whole, cell.spec, "fused")
        self.planner = cometrt.MoELayer(whole, cell.spec, "sequential")
        model = SHAPES[cell.model]
        weights = np.random.default_rng(0).random(ids.shape, np.float32) + 0.5  # of all ranks
        cp.random.seed(nodes.rank)
        self.x, self.dy = (device_normal((cell.tokens, model.hidden)) for _ in range(2))
        geometry = self.layer.geometry
        self.weights = (
            device_normal(geometry.w_up_shape, model.hidden**-0.5),
            device_normal(geometry.w_down_shape, model.intermediate**-0.5),
        )
        self.ids, self.topk_weights = cp.asarray(ids[nodes.rank]), cp.asarray(weights[nodes.rank])
        arrays = (self.x, self.topk_weights, *self.weights)
        self.saved: dict[Any, Any] = {}  # of the contender whose backward is timed
        self.y, self.grads = cp.empty_like(self.x), cometrt.Gradients(*map(cp.empty_like, arrays))
        experts, nccl = Experts(self.planner, ids, weights, self.weights), Nccl.connect(whole)
        assert nccl is not None
        self.nccl = NcclForward(nccl, experts, whole, self.x, ids, weights)

    def forward(self, layer: cometrt.MoELayer) -> Any:
        given = (self.x, self.ids, self.topk_weights, *self.weights)
        return layer.forward(*given, out=self.y)[1]

    def backward(self, layer: cometrt.MoELayer) -> None:
        """Of one forward, again and again, which a layer does not allow."""
        executor, tracer = layer.executor, NullTracer()
        if layer not in self.saved:
            self.saved.clear()
            given = (self.x, self.ids, self.topk_weights, *self.weights)
            kept = executor.forward(*given, training=True, out=self.y, tracer=tracer)
            self.saved[layer] = self.residuals(len(self.x), kept)
        of = self.saved[layer]
        executor.backward(self.dy, of, out=self.grads, accumulate=False, tracer=tracer)

    def step(self, layer: cometrt.MoELayer) -> None:
        layer.backward(self.dy, self.forward(layer), out=self.grads)

    def node_forward(self) -> Residuals:
        executor: Any = self.layer.executor
        inner, rail, tracer = executor.inner, executor.rail, NullTracer()
        x = inner.buffer()
        given = (x, rail.all_ids, rail.all_weights, *self.weights)
        kept = inner.forward(*given, training=True, out=rail.results, tracer=tracer)
        return self.residuals(len(x), kept)

    def residuals(self, num_tokens: int, kept: Any) -> Residuals:
        w_up, w_down = self.weights
        return Residuals(serial=0, num_tokens=num_tokens, w_up=w_up, w_down=w_down, **kept)

    def slices_forward(self, name: str, layer: cometrt.MoELayer) -> None:
        """The node's layer, once for each slice."""
        executor: Any = layer.executor
        inner, rail, tracer = executor.inner, executor.rail, NullTracer()
        with leave_sms(self.left_to_nccl[name]):
            for of in self.slices[name].calls():
                at = slice(of.begin, of.end)
                given = (rail.rows[at], rail.all_ids[at], rail.all_weights[at], *self.weights)
                inner.forward(*given, training=True, out=rail.results[at], tracer=tracer)

    def node_backward(self) -> None:
        if self not in self.saved:
            self.saved.clear()
            self.saved[self] = self.node_forward()
        self.backward_of(self.saved[self])

    def node_step(self) -> None:
        self.backward_of(self.node_forward())

    def backward_of(self, saved: Residuals) -> None:
        executor: Any = self.layer.executor
        rail = executor.rail
        grads = cometrt.Gradients(rail.results, rail.dweights, self.grads.w_up, self.grads.w_down)
        executor.inner.backward(rail.rows, saved, out=grads, accumulate=False, tracer=NullTracer())

    def rail_forward(self) -> None:
        executor: Any = self.layer.executor
        rail, tables = executor.rail, (self.ids, self.topk_weights)
        rail.begin("forward", len(self.x), self.x, executor.inner.buffer(), *tables)
        rail.end_slice(0, self.whole_rail, rows=True, dweights=False)
        rail.end(self.y)

    def rail_step(self) -> None:
        self.rail_forward()
        self.rail_backward()

    def rail_backward(self) -> None:
        executor: Any = self.layer.executor
        rail = executor.rail
        rail.begin("backward", len(self.dy), self.dy, rail.rows, slots=rail.slots)
        rail.end_slice(0, self.whole_rail, rows=True, dweights=True)
        rail.end(self.grads.x, self.grads.topk_weights)

    def runs(self) -> dict[str, dict[str, Run]]:
        """By pass and contender."""

        def over(call: Callable[[cometrt.MoELayer], Any]) -> dict[str, Run]:
            return {name: functools.partial(call, layer) for name, layer in self.layers.items()}

        return {
            "forward": over(self.forward)
            | {
                "node alone": self.node_forward,
                **{
                    name.replace("nodes", "node alone"): functools.partial(
                        self.slices_forward, name, layer
                    )
                    for name, layer in self.layers.items()
                    if self.slices[name].count > 1
                },
                "rail alone": self.rail_forward,
                "all-to-all": self.nccl,
                "one node": lambda: self.forward(self.whole),
            },
            "backward": over(self.backward)
            | {
                "node alone": self.node_backward,
                "rail alone": self.rail_backward,
                "one node": lambda: self.backward(self.whole),
            },
            "both": over(self.step)
            | {
                "node alone": self.node_step,
                "rail alone": self.rail_step,
                "one node": lambda: self.step(self.whole),
            },
        }

    def check(self) -> dict[str, float]:
        """Relative errors of y from that on one node."""
        self.forward(self.whole)
        self.whole.synchronize()
        expected = self.y.copy()
        found = {}
        for name, layer in self.layers.items():
            self.y.fill(np.nan)
            self.forward(layer)
            layer.synchronize()
            found[name] = self.y.copy()
        self.nccl()
        cp.cuda.get_current_stream().synchronize()
        found["all-to-all"] = self.nccl.y
        errors = {name: float(relative_error(y, expected)) for name, y in found.items()}
        for name, error in errors.items():
            if not error <= tolerance("bfloat16"):
                raise cometrt.CometError(f"{name}: relative error {error:.2e}")
        return errors

    def close(self) -> None:
        self.saved.clear()
        for layer in {self.layer, *self.layers.values()}:
            layer.close()
        self.whole.close()
        self.planner.close()


def limited_routing(cell: Cell, nodes: int, limit: int) -> np.ndarray:
    """[W, T, K] int32: a token chooses so many nodes at random, and uniformly of their experts."""
    rng, of_node = np.random.default_rng(0), cell.spec.num_experts // nodes
    shape = cell.ranks, cell.tokens
    chosen = distinct_experts(rng, shape, np.zeros(nodes), limit)
    ids = distinct_experts(rng, shape, np.zeros(limit * of_node), cell.spec.topk)
    node = np.take_along_axis(chosen, ids // of_node, axis=-1)
    return (node * of_node + ids % of_node).astype(np.int32)


def most_wanted(cell: Cell, ids: np.ndarray, nodes: cometrt.World) -> int:
    """The most tokens of a rank that another node wants."""
    weights = np.ones(ids.shape[1:], np.float32)
    places = (rank // nodes.ranks_per_node for rank in range(cell.ranks))
    return max(
        slots_of(of_rank, weights, cell.spec, nodes.nodes, node)[1]
        for of_rank, node in zip(ids, places, strict=True)
    )


def time_run(world: cometrt.World, run: Run, calls: int, rounds: int) -> tuple[float, float]:
    """Milliseconds of a call, and in which the host queues it, of the slowest rank; the medians of
    the rounds."""
    stream, found, host = cp.cuda.get_current_stream(), [], []
    for _ in range(3):
        run()
    for _ in range(rounds):
        stream.synchronize()
        world.barrier()
        begin, end = cp.cuda.Event(), cp.cuda.Event()
        begin.record(stream)
        queued = time.perf_counter()
        for _ in range(calls):
            run()
        host_ms = 1e3 * (time.perf_counter() - queued) / calls
        end.record(stream)
        end.synchronize()
        ranks = world.allgather((cp.cuda.get_elapsed_time(begin, end) / calls, host_ms))
        for values, of_rank in zip((found, host), zip(*ranks, strict=True), strict=True):
            values.append(max(of_rank))
    return statistics.median(found), statistics.median(host)


def measure(nodes: cometrt.World, whole: cometrt.World, cell: Cell, args: Any) -> dict[str, Any]:
    """Collective: the entry of a cell."""
    rails = [(count, 0) for count in args.slices] + [(1, parts) for parts in args.parts]
    contenders = Contenders(nodes, whole, cell, rails, args.nccl_sms, args.limit)
    errors = contenders.check()
    measured = {
        which: {name: time_run(nodes, run, args.calls, args.rounds) for name, run in runs.items()}
        for which, runs in contenders.runs().items()
    }
    times, host = (
        {which: {name: of[part] for name, of in runs.items()} for which, runs in measured.items()}
        for part in (0, 1)
    )
    contenders.close()
    sent = 2 * 2 * cell.tokens * cell.spec.hidden * (nodes.nodes - 1)  # x and y of a forward
    entry: dict[str, Any] = {"errors": errors, "times": times, "host_ms": host}
    entry["nodes"] = [nodes.nodes, nodes.ranks_per_node]
    if args.limit is not None:
        entry |= {"limit": args.limit, "rail_tokens": contenders.rail_tokens}
    entry["rail_gbps"] = sent / times["forward"]["rail alone"] / 1e6
    entry["hidden"] = {}
    for which, ms in times.items():
        apart = ms["node alone"], ms["rail alone"]
        entry["hidden"][which] = {
            name: (sum(apart) - value) / min(apart)
            for name, value in ms.items()
            if name.startswith("nodes") and not name.endswith("wanted")
        }
    return entry


def connect(comm: Any, ranks_per_node: int) -> cometrt.World:
    os.environ[RANKS_PER_NODE] = str(ranks_per_node)
    return cometrt.connect(comm, device="cuda", timeout_sec=30)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", default="qwen3-30b-a3b")
    parser.add_argument("--tokens", default="8192")
    parser.add_argument("--ranks-per-node", type=int, default=2)
    parser.add_argument("--calls", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--slices", default="1,3,4")
    parser.add_argument("--parts", default="")
    parser.add_argument("--nccl-sms", type=int)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    if unknown := set(args.models.split(",")) - set(SHAPES):
        parser.error(f"--models must be of {', '.join(SHAPES)} (got {', '.join(unknown)})")
    if args.limit is not None and args.limit < 1:
        parser.error(f"--limit must be at least 1 (got {args.limit})")
    args.slices = sorted(map(int, args.slices.split(",")))
    args.parts = sorted(map(int, filter(None, args.parts.split(","))))
    if (args.slices[-1] > 1 or args.parts) and max_ctas(os.environ) is None:
        parser.error("set NCCL_MAX_NCHANNELS or NCCL_MAX_CTAS, or measure --slices 1 alone")
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    channels = {name: os.environ[name] for name in CHANNELS if name in os.environ}
    data: dict[str, Any] = {"machine": machine(), "nccl": channels, "cells": {}}
    with connect(comm, args.ranks_per_node) as nodes, connect(comm, comm.Get_size()) as whole:
        for model in args.models.split(","):
            for tokens in map(int, args.tokens.split(",")):
                cell = Cell(model, comm.Get_size(), tokens=tokens)
                entry = data["cells"][str(cell)] = measure(nodes, whole, cell, args)
                free_memory([cp.cuda.Device().id])
                if comm.Get_rank() == 0:
                    show(cell, nodes, entry)
                    write(args.out, data)


def show(cell: Cell, nodes: cometrt.World, entry: dict[str, Any]) -> None:
    print(f"{cell}, {nodes.nodes} x {nodes.ranks_per_node}: rail {entry['rail_gbps']:.1f} GB/s")
    for which, ms in entry["times"].items():
        shown = ", ".join(f"{name} {value:.3f}" for name, value in ms.items())
        hidden = ", ".join(f"{name} {of:.2f}" for name, of in entry["hidden"][which].items())
        host = ", ".join(f"{name} {of:.3f}" for name, of in entry["host_ms"][which].items())
        print(f"  {which} ms: {shown}; hidden: {hidden}; host: {host}", flush=True)


if __name__ == "__main__":
    try:
        main()
    except Exception:
        import traceback

        from mpi4py import MPI

        traceback.print_exc()
        sys.stderr.flush()
        MPI.COMM_WORLD.Abort(1)
