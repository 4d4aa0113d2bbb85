"""Measure the spike on one GPU split into four ranks; print a table and write JSON.

python benchmarks/spike/spike.py [results.json]
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from pathlib import Path

os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import cupy as cp
import ml_dtypes
import numpy as np

from cometrt.kernels import tensor_map
from cometrt.kernels.compiler import compile_cubin
from cometrt.world.layout import control_dtype, world_dtype
from cometrt.world.partitions import split_gpu

HERE = Path(__file__).resolve().parent
RANKS, BLOCK_M, BLOCK_N, BLOCK_TOKENS, SHARED = 4, 128, 128, 16, 4 * 32768
BF16 = ml_dtypes.bfloat16

pace = np.dtype([("free_at_ns", "u8"), ("picoseconds_per_byte", "u8")])
spike_params = np.dtype(
    [("world", world_dtype), ("epoch", "u8"), ("pull_pace", pace), ("push_pace", pace),
     ("x", "u8", RANKS),
     ("rows", "u8"), ("row_source", "u8"), ("tile_filled", "u8"), ("tile_done", "u8"),
     ("o", "u8"), ("token_rows", "u8"), ("staging", "u8", RANKS),
     ("partials_ready", "u8", RANKS), ("y", "u8"), ("ticket", "u8"), ("span_ns", "u8"),
     ("tokens", "i4"), ("hidden", "i4"), ("num_tiles", "i4"), ("num_comm", "i4"),
     ("stall_tile", "i4"), ("stall_rank", "i4")]
)  # fmt: skip


def median_spread(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {
        "median": statistics.median(ordered),
        "p10": ordered[len(ordered) // 10],
        "p90": ordered[-1 - len(ordered) // 10],
    }


class Fused:
    """Four ranks with random tokens; every token has two rows on every rank."""

    def __init__(self, module: cp.RawModule, tokens: int, hidden: int) -> None:
        self.kernel = module.get_function("fused")
        self.kernel.max_dynamic_shared_size_bytes = SHARED
        self.tokens, self.hidden = tokens, hidden
        self.partitions = split_gpu(RANKS)
        self.num_rows = RANKS * tokens * 2
        self.num_tiles = self.num_rows // BLOCK_M
        self.rng = np.random.default_rng(0)
        self.epoch, self.generation = 0, 1
        blocks = tokens // BLOCK_TOKENS
        self.ranks = []
        for rank in range(RANKS):
            w = self.rng.standard_normal((BLOCK_N, hidden)) / np.sqrt(hidden)
            # Rows by ring distance of the source, then k, then a random order of the tokens.
            source = np.concatenate(
                [
                    (rank + d) % RANKS * tokens + self.rng.permutation(tokens)
                    for d in range(RANKS)
                    for _ in range(2)
                ]
            ).astype(np.int32)
            token_rows = np.argsort(source, kind="stable").reshape(-1, 2).astype(np.int32)
            state = {
                "x": cp.zeros((tokens, hidden), BF16),
                "w": cp.asarray(w.astype(BF16)),
                "rows": cp.zeros((self.num_rows, hidden), BF16),
                "row_source": cp.asarray(source),
                "token_rows": cp.asarray(token_rows),
                "counters": cp.zeros(2 * self.num_tiles + 1, cp.uint32),
                "o": cp.zeros((self.num_rows, BLOCK_N), BF16),
                "staging": cp.zeros((RANKS * tokens, BLOCK_N), BF16),
                "partials_ready": cp.zeros(RANKS * blocks, cp.uint64),
                "y": cp.zeros((tokens, BLOCK_N), BF16),
                "control": cp.zeros(control_dtype.itemsize, cp.uint8),
                "span": cp.zeros(2, cp.uint64),
                "links": cp.zeros(2, cp.uint64),
            }
            state["a_map"] = tensor_map.encode(
                state["rows"].data.ptr, (self.num_rows, hidden), (BLOCK_M, 64)
            )
            state["b_map"] = tensor_map.encode(
                state["w"].data.ptr, (BLOCK_N, hidden), (BLOCK_N, 64)
            )
            self.ranks.append(state)

    def new_inputs(self) -> None:
        for state in self.ranks:
            x = self.rng.standard_normal((self.tokens, self.hidden)).astype(BF16)
            state["x"].set(x)
            for name in ("rows", "o", "staging", "y"):
                state[name].fill(float("nan"))

    def params(self, rank: int, *, num_comm, gbps, timeout_ms, stall) -> np.ndarray:
        state, p = self.ranks[rank], np.zeros(1, spike_params)
        world = p["world"][0]
        for peer in range(RANKS):
            world["control"][peer] = self.ranks[peer]["control"].data.ptr
            p["x"][0, peer] = self.ranks[peer]["x"].data.ptr
            p["staging"][0, peer] = self.ranks[peer]["staging"].data.ptr
            p["partials_ready"][0, peer] = self.ranks[peer]["partials_ready"].data.ptr
        world["generation"], world["timeout_ns"] = self.generation, int(timeout_ms * 1e6)
        world["rank"], world["size"], p["epoch"] = rank, RANKS, self.epoch
        if gbps:
            for i, name in enumerate(("pull_pace", "push_pace")):
                p[name][0]["free_at_ns"] = state["links"].data.ptr + 8 * i
                p[name][0]["picoseconds_per_byte"] = round(1000 / gbps)
        counters = state["counters"].data.ptr
        p["tile_filled"], p["tile_done"] = counters, counters + 4 * self.num_tiles
        p["ticket"] = counters + 8 * self.num_tiles
        for name in ("rows", "row_source", "token_rows", "o", "y"):
            p[name] = state[name].data.ptr
        p["span_ns"] = state["span"].data.ptr
        p["tokens"], p["hidden"], p["num_tiles"] = self.tokens, self.hidden, self.num_tiles
        p["num_comm"], (p["stall_rank"], p["stall_tile"]) = num_comm, stall
        return p

    def run(self, *, num_comm=4, gbps=0.0, timeout_ms=500.0, stall=(-1, -1)) -> list[float]:
        """One exchange; microseconds of each rank, from its first CTA's start to its last end."""
        self.epoch += 1
        for state in self.ranks:
            state["counters"].fill(0)
            state["span"].set(np.array([2**63, 0], np.uint64))
        cp.cuda.Device().synchronize()
        for rank, (stream, num_sms, _) in enumerate(self.partitions):
            state = self.ranks[rank]
            p = self.params(rank, num_comm=num_comm, gbps=gbps, timeout_ms=timeout_ms, stall=stall)
            maps = state["a_map"].value, state["b_map"].value
            with stream:
                self.kernel(
                    (num_sms,), (384,),
                    (p.view(f"V{spike_params.itemsize}"), *maps),
                    shared_mem=SHARED,
                )  # fmt: skip
        cp.cuda.Device().synchronize()
        spans = [state["span"].get() for state in self.ranks]
        return [int(end - begin) / 1e3 for begin, end in spans]

    def failures(self) -> list[dict[str, int]]:
        """What ranks reported of this generation, as rank 0 was told."""
        records = self.ranks[0]["control"].get().view(control_dtype)[0]["failure"]
        valid = records[records["generation"] == self.generation]
        return [{n: int(record[n]) for n in record.dtype.names} for record in valid]

    def error(self) -> float:
        """Largest ||y - expected|| / ||expected|| of a rank against float64."""
        x = np.concatenate([state["x"].get() for state in self.ranks]).astype(np.float64)
        w_sum = 2 * sum(state["w"].get().astype(np.float64) for state in self.ranks)
        expected = x @ w_sum.T
        worst = 0.0
        for rank, state in enumerate(self.ranks):
            part = expected[rank * self.tokens : (rank + 1) * self.tokens]
            difference = state["y"].get().astype(np.float64) - part
            worst = max(worst, float(np.linalg.norm(difference) / np.linalg.norm(part)))
        return worst


def events_us(launch, repeats: int = 10) -> dict[str, float]:
    launch()
    times = []
    for _ in range(repeats):
        begin, end = cp.cuda.Event(), cp.cuda.Event()
        begin.record()
        launch()
        end.record()
        end.synchronize()
        times.append(cp.cuda.get_elapsed_time(begin, end) * 1e3)
    return median_spread(times)


def single_measurements(module: cp.RawModule, report) -> None:
    copy = module.get_function("copy_rows")
    copy.max_dynamic_shared_size_bytes = SHARED
    hidden, num_rows = 2048, 1 << 17
    source = cp.random.standard_normal((num_rows, hidden), cp.float32).astype(BF16)
    target = cp.empty_like(source)
    order = cp.random.permutation(num_rows).astype(cp.int32)
    for num_comm in (1, 2, 4, 8, 16, 32):
        rows = min(num_rows, 4096 * num_comm)
        us = events_us(
            lambda n=num_comm, r=rows: copy(
                (n,), (384,),
                (source, target, order, np.int32(r), np.int32(2 * hidden), np.uint64(0),
                 np.uint64(0)),
                shared_mem=SHARED,
            )
        )  # fmt: skip
        gbps = rows * hidden * 2 / us["median"] / 1e3
        report(f"pull, {num_comm} CTAs", gbps / num_comm, "GB/s per CTA (one way)", us)
    for name, terms in (("reduce and push, 2 terms", 2), ("home reduce, 4 terms", 4)):
        add = module.get_function(f"sum_{terms}_rows")
        for num_comm in (1, 8, 32):
            tokens = 2048 * num_comm
            index = cp.random.randint(0, num_rows, tokens * terms).astype(cp.int32)
            us = events_us(
                lambda n=num_comm, t=tokens, f=add, i=index: f(
                    (n,), (384,),
                    (source, i, target, np.int32(t), np.int32(hidden)),
                )
            )  # fmt: skip
            gbps = tokens * hidden * 2 / us["median"] / 1e3
            report(f"{name}, {num_comm} CTAs", gbps / num_comm, "GB/s of results per CTA", us)
    free_at = cp.zeros(1, cp.uint64)
    for nominal in (20.0, 50.0, 100.0):
        us = events_us(
            lambda g=nominal: copy(
                (8,), (384,),
                (source, target, order, np.int32(32768), np.int32(2 * hidden),
                 np.uint64(free_at.data.ptr), np.uint64(round(1000 / g))),
                shared_mem=SHARED,
            )
        )  # fmt: skip
        rate = 32768 * hidden * 2 / us["median"] / 1e3
        report(f"paced link, nominal {nominal:.0f} GB/s, 8 CTAs", rate, "GB/s", us)


def hop(module: cp.RawModule, partitions, report) -> None:
    kernel, hops = module.get_function("ping_pong"), 2000
    flags, ns = cp.zeros(2, cp.uint64), cp.zeros(2, cp.uint64)
    times = []
    for _ in range(10):
        flags.fill(0)
        cp.cuda.Device().synchronize()
        for side in range(2):
            with partitions[side].stream:
                kernel(
                    (1,), (1,),
                    (flags[side:], flags[1 - side :], np.int32(hops), np.int32(side), ns[side:]),
                )  # fmt: skip
        cp.cuda.Device().synchronize()
        times.append(float(ns.get()[0]) / hops)
    spread = median_spread(times)
    report("flag hop between partitions", spread["median"], "ns", spread)


def main() -> None:
    begin = time.perf_counter()
    module = cp.RawModule(path=str(compile_cubin(HERE / "spike.cu").path))
    properties = cp.cuda.runtime.getDeviceProperties(0)
    results: dict[str, object] = {
        "gpu": properties["name"].decode(),
        "sms": properties["multiProcessorCount"],
        "cuda_driver": cp.cuda.runtime.driverGetVersion(),
        "date": time.strftime("%Y-%m-%d"),
        "commit": os.environ.get("COMETRT_COMMIT", ""),
        "measurements": [],
    }

    def report(name: str, value: float, unit: str, spread: dict[str, float]) -> None:
        results["measurements"].append(
            {"name": name, "value": value, "unit": unit, "spread": spread}
        )
        print(f"{name:44s} {value:9.2f} {unit}", flush=True)

    single_measurements(module, report)
    spike = Fused(module, tokens=1024, hidden=2048)
    hop(module, spike.partitions, report)

    for num_comm in (2, 4, 8):
        for gbps in (0.0, 92.0):
            errors, spans = [], []
            for call in range(20):
                if call < 3:
                    spike.new_inputs()
                spans.append(max(spike.run(num_comm=num_comm, gbps=gbps)))
                if call < 3:
                    errors.append(spike.error())
            assert max(errors) < 1e-2, errors
            assert not spike.failures(), spike.failures()
            name = f"fused, {num_comm} comm of {spike.partitions[0].num_sms} CTAs, "
            name += f"link {gbps:.0f} GB/s" if gbps else "no pacing"
            spread = median_spread(spans[1:])
            report(name, spread["median"], "us", spread)
            print(f"    error {max(errors):.1e}, p10 {spread['p10']:.1f}, p90 {spread['p90']:.1f}")

    again = [state["y"].get().tobytes() for state in spike.ranks]
    spike.run(num_comm=4)
    same = again == [state["y"].get().tobytes() for state in spike.ranks]
    report("bitwise equal on repeat", float(same), "", {})

    wall = time.perf_counter()
    spike.run(timeout_ms=50.0, stall=(2, 5))
    seconds = time.perf_counter() - wall
    failed = spike.failures()
    print(f"stalled rank 2, tile 5: ended in {seconds * 1e3:.0f} ms; records {failed}")
    assert failed
    assert seconds < 5
    results["stall"] = failed
    # A new generation: the stop of the old one does not reach it.
    spike.generation += 1
    spike.new_inputs()
    spike.run()
    report("error after a stop and a reset", spike.error(), "relative", {})
    assert spike.error() < 1e-2
    results["seconds"] = time.perf_counter() - begin
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(json.dumps(results, indent=1) + "\n")
    print(f"done in {results['seconds']:.1f} s")


if __name__ == "__main__":
    main()
