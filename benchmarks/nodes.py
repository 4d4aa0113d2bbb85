"""Measure a layer over several nodes, beside NCCL's all-to-all over all ranks.

    mpirun -n 4 python3 -m benchmarks.nodes [--ranks-per-node 2] [options]

    --models qwen3-30b-a3b,... --tokens 8192,... --calls 20 --rounds 5 --out nodes.json

GPUs of one host are cut into nodes. NCCL_MAX_NCHANNELS limits the channels of NCCL, and so its rate
between them: that of a network. It holds for all contenders:

    nodes         the layer over several nodes
    node alone    its node's layer, with the tokens of the rail, which nothing brings
    rail alone    what crosses between nodes before and after it
    all-to-all    NCCL's all-to-all over all ranks, with the same GEMMs (forwards)
    one node      the fused layer with all ranks on one node

Milliseconds a call, back to back, of the slowest rank; the median of the rounds.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cupy as cp
import numpy as np

import cometrt
from cometrt.bench.contenders import free_memory
from cometrt.bench.nccl import Experts, Nccl, NcclForward
from cometrt.bench.records import machine, write
from cometrt.bench.workloads import SHAPES, Cell, device_normal, relative_error, routing, tolerance
from cometrt.residuals import Residuals
from cometrt.trace import NullTracer

CHANNELS = ("NCCL_MAX_NCHANNELS", "NCCL_MAX_P2P_NCHANNELS", "NCCL_P2P_DISABLE", "NCCL_SHM_DISABLE")
RANKS_PER_NODE = "COMETRT_RANKS_PER_NODE"
Run = Callable[[], Any]


class Contenders:
    """One rank's layers and arrays."""

    def __init__(self, nodes: cometrt.World, whole: cometrt.World, cell: Cell) -> None:
        """Collective.

        Args:
            nodes, whole: worlds of the same ranks, over several nodes and on one.
        """
        self.layer = cometrt.MoELayer(nodes, cell.spec, "fused")
        self.whole = cometrt.MoELayer(whole, cell.spec, "fused")
        self.planner = cometrt.MoELayer(whole, cell.spec, "sequential")
        model, ids = SHAPES[cell.model], routing(cell)
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
        self.y, self.grads = cp.empty_like(self.x), cometrt.Gradients(*map(cp.empty_like, arrays))
        experts, nccl = Experts(self.planner, ids, weights, self.weights), Nccl.connect(whole)
        assert nccl is not None
        self.nccl = NcclForward(nccl, experts, whole, self.x, ids, weights)

    def forward(self, layer: cometrt.MoELayer) -> Any:
        given = (self.x, self.ids, self.topk_weights, *self.weights)
        return layer.forward(*given, out=self.y)[1]

    def step(self, layer: cometrt.MoELayer) -> None:
        layer.backward(self.dy, self.forward(layer), out=self.grads)

    def node_forward(self) -> Residuals:
        executor: Any = self.layer.executor
        inner, rail, tracer = executor.inner, executor.rail, NullTracer()
        x = inner.buffer()
        given = (x, rail.all_ids, rail.all_weights, *self.weights)
        kept = inner.forward(*given, training=True, out=rail.results, tracer=tracer)
        w_up, w_down = self.weights
        return Residuals(serial=0, num_tokens=len(x), w_up=w_up, w_down=w_down, **kept)

    def node_step(self) -> None:
        executor: Any = self.layer.executor
        rail, saved = executor.rail, self.node_forward()
        grads = cometrt.Gradients(rail.results, rail.dweights, self.grads.w_up, self.grads.w_down)
        executor.inner.backward(rail.rows, saved, out=grads, accumulate=False, tracer=NullTracer())

    def rail_forward(self) -> None:
        executor: Any = self.layer.executor
        x, tables = executor.inner.buffer(), (self.ids, self.topk_weights)
        executor.rail.gather("forward", len(self.x), self.x, x, *tables)
        executor.rail.send_back(self.y)

    def rail_step(self) -> None:
        executor: Any = self.layer.executor
        self.rail_forward()
        executor.rail.gather("backward", len(self.dy), self.dy, executor.rail.rows)
        executor.rail.send_back(self.grads.x, self.grads.topk_weights)

    def runs(self) -> dict[str, dict[str, Run]]:
        """By pass and contender."""
        return {
            "forward": {
                "nodes": lambda: self.forward(self.layer),
                "node alone": self.node_forward,
                "rail alone": self.rail_forward,
                "all-to-all": self.nccl,
                "one node": lambda: self.forward(self.whole),
            },
            "both": {
                "nodes": lambda: self.step(self.layer),
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
        self.y.fill(np.nan)
        self.forward(self.layer)
        self.layer.synchronize()
        self.nccl()
        cp.cuda.get_current_stream().synchronize()
        found = {"nodes": self.y, "all-to-all": self.nccl.y}
        errors = {name: float(relative_error(y, expected)) for name, y in found.items()}
        for name, error in errors.items():
            if not error <= tolerance("bfloat16"):
                raise cometrt.CometError(f"{name}: relative error {error:.2e}")
        return errors

    def close(self) -> None:
        self.layer.close()
        self.whole.close()
        self.planner.close()


def time_run(world: cometrt.World, run: Run, calls: int, rounds: int) -> float:
    """Milliseconds a call, of the slowest rank; the median of the rounds."""
    stream, found = cp.cuda.get_current_stream(), []
    for _ in range(3):
        run()
    for _ in range(rounds):
        stream.synchronize()
        world.barrier()
        begin, end = cp.cuda.Event(), cp.cuda.Event()
        begin.record(stream)
        for _ in range(calls):
            run()
        end.record(stream)
        end.synchronize()
        ms = cp.cuda.get_elapsed_time(begin, end) / calls
        found.append(max(world.allgather(ms)))
    return statistics.median(found)


def measure(nodes: cometrt.World, whole: cometrt.World, cell: Cell, args: Any) -> dict[str, Any]:
    """Collective: the entry of a cell."""
    contenders = Contenders(nodes, whole, cell)
    errors = contenders.check()
    times = {
        which: {name: time_run(nodes, run, args.calls, args.rounds) for name, run in runs.items()}
        for which, runs in contenders.runs().items()
    }
    contenders.close()
    sent = 2 * 2 * cell.tokens * cell.spec.hidden * (nodes.nodes - 1)  # x and y of a forward
    entry: dict[str, Any] = {"errors": errors, "times": times}
    entry["rail_gbps"] = sent / times["forward"]["rail alone"] / 1e6
    entry["hidden"] = {}
    for which, ms in times.items():
        apart = ms["node alone"] + ms["rail alone"] - ms["nodes"]
        entry["hidden"][which] = apart / min(ms["node alone"], ms["rail alone"])
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
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    if unknown := set(args.models.split(",")) - set(SHAPES):
        parser.error(f"--models must be of {', '.join(SHAPES)} (got {', '.join(unknown)})")
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
        print(f"  {which} ms: {shown}; hidden {entry['hidden'][which]:.2f}", flush=True)


if __name__ == "__main__":
    try:
        main()
    except Exception:
        import traceback

        from mpi4py import MPI

        traceback.print_exc()
        sys.stderr.flush()
        MPI.COMM_WORLD.Abort(1)
