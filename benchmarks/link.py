"""Measure the link between ranks: rows pulled and pushed as the exchange moves them, by number of
CTAs, beside the copy engine and NCCL; and how long a flag or a load takes to cross.

    python -m benchmarks.link [--ranks W] [--out link.json]

Rank r moves to or from rank r + 1; "one way" rank 0 alone. Ranks have a GPU each if there are
enough, else partitions of one.
"""

from __future__ import annotations

import argparse
import functools
import os
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")

import cupy as cp
import numpy as np

import cometrt
from cometrt.bench.nccl import Nccl
from cometrt.bench.records import machine, write
from cometrt.bench.timing import StartBarrier
from cometrt.bench.workloads import cuda_function
from cometrt.world.partitions import num_sms

SOURCE = Path(__file__).with_name("link.cu")
BYTES, BLOCK_BYTES, COPY_CHUNK_BYTES = 256 << 20, 64 << 10, 4096
IDLE_MS = 5  # before what is timed
CTAS = (1, 2, 4, 8, 16, 32, 64, 128, 132)
REPEATS = 5
HOPS, LOADS = 1000, 2000
# Warps of a CTA that move rows, and copy stages of each: as in dispatch_gemm, and as in dispatch
# with 50 KB a warp.
PULLS = (2, 3), (4, 12)
PUSHES = 2, 8  # warps of a CTA: as in gemm_combine, and as in push


def p(pointer: int) -> np.uint64:
    return np.uint64(pointer)


def checksum(array: Any) -> int:
    return int((array * cp.arange(array.size)).sum())


class Side:
    """One rank's memory and kernels, and where its neighbour's memory is."""

    def __init__(self, world: cometrt.World) -> None:
        """Collective."""
        self.world, self._barrier = world, StartBarrier(world)
        names = ("pull", "push", "hop", "chase", "fetch")
        self.kernels = {name: cuda_function(SOURCE, name) for name in names}
        most = max(warps * lanes for warps, lanes in PULLS) * COPY_CHUNK_BYTES
        self.kernels["pull"].max_dynamic_shared_size_bytes = most
        rng = np.random.default_rng(world.rank)
        numbers = rng.integers(0, 2**31, BYTES // 8, np.int64)
        self.data = cp.asarray(numbers)
        self.target = cp.zeros(BYTES // 8, cp.int64)
        self.flags = cp.zeros(BYTES // BLOCK_BYTES, cp.uint64)
        self.zeros = cp.zeros(1 << 16, cp.uint64)
        self.took = cp.zeros(1, cp.uint64)
        stream = cp.cuda.get_current_stream()
        stream.synchronize()
        arrays = (self.data, self.target, self.flags, self.zeros)
        shared = [world.allgather(array.data.ptr) for array in arrays]
        self.neighbour = (world.rank + 1) % world.size
        theirs = [pointers[self.neighbour] for pointers in shared]
        self.there = dict(zip(("data", "target", "flags", "zeros"), theirs, strict=True))
        self.devices = world.allgather(cp.cuda.Device().id)

    # ---- what moves ---------------------------------------------------------------------------

    def pull(self, kind: tuple[int, int], ctas: int) -> None:
        warps, lanes = kind
        shared = warps * lanes * COPY_CHUNK_BYTES
        arguments = p(self.target.data.ptr), p(self.there["data"]), p(BYTES), np.int32(lanes)
        self.kernels["pull"]((ctas,), (32 * warps,), arguments, shared_mem=shared)

    def push(self, warps: int, ctas: int) -> None:
        self._move(self.there["target"], self.data.data.ptr, self.there["flags"], warps, ctas)

    def load(self, warps: int, ctas: int) -> None:
        """The same by ordinary loads from the neighbour."""
        self._move(self.target.data.ptr, self.there["data"], self.flags.data.ptr, warps, ctas)

    def _move(self, to: int, source: int, flags: int, warps: int, ctas: int) -> None:
        arguments = p(to), p(source), p(BYTES), p(BLOCK_BYTES), p(flags), p(1)
        self.kernels["push"]((ctas,), (32 * warps,), arguments)

    def by_nccl(self, nccl: Nccl, *, both: bool) -> Callable[[], None] | None:
        """As `copy`: to this rank from its neighbour; one way, to rank 0 alone."""
        before = (self.world.rank - 1) % self.world.size
        receives = {self.neighbour: self.target} if both or self.world.rank == 0 else {}
        sends = {before: self.data} if both or before == 0 else {}
        return functools.partial(nccl.exchange, sends, receives) if sends or receives else None

    def copy(self) -> None:
        mine, theirs = self.devices[self.world.rank], self.devices[self.neighbour]
        cp.cuda.runtime.memcpyPeerAsync(
            self.target.data.ptr, mine, self.there["data"], theirs, BYTES,
            cp.cuda.get_current_stream().ptr,
        )  # fmt: skip

    # ---- measuring ----------------------------------------------------------------------------

    def check(self, pulled: bool) -> None:
        """After a transfer in which all took part: the neighbour's data has come, or its own."""
        cp.cuda.get_current_stream().synchronize()
        self.world.barrier()
        before = (self.world.rank - 1) % self.world.size
        sums = self.world.allgather(checksum(self.data))
        found, expected = checksum(self.target), sums[self.neighbour if pulled else before]
        if found != expected:
            raise SystemExit(f"rank {self.world.rank}: what crossed is wrong")
        self.target.fill(0)
        cp.cuda.get_current_stream().synchronize()
        self.world.barrier()

    def gbps(self, run: Callable[[], None] | None) -> float:
        """Collective: of the slowest rank that takes part."""
        found = []
        for _ in range(REPEATS + 1):
            cp.cuda.get_current_stream().synchronize()
            self._barrier.close(IDLE_MS)
            begin, end = cp.cuda.Event(), cp.cuda.Event()
            begin.record()
            if run is not None:
                run()
            end.record()
            end.synchronize()
            ms = cp.cuda.get_elapsed_time(begin, end) if run is not None else 0.0
            found.append(BYTES / max(self.world.allgather(ms)) / 1e6)
        return statistics.median(found[1:])

    def hop_us(self, data_rows: int) -> float | None:
        """Between ranks 0 and 1: a flag's way, after that many rows of 512 bytes; None: lost."""
        self.flags.fill(0)
        self.target.fill(0)
        cp.cuda.get_current_stream().synchronize()
        pointers = self.world.allgather((self.flags.data.ptr, self.target.data.ptr))
        rank = self.world.rank
        if rank < 2:
            flags, data = pointers[1 - rank]
            numbers = map(np.int32, (HOPS, data_rows, rank == 0))
            arguments = p(self.flags.data.ptr), p(flags), p(data), *numbers, p(self.took.data.ptr)
            self.kernels["hop"]((1,), (32,), arguments)
        took = int(self.took.get()[0]) if rank < 2 else 0
        took = min(self.world.allgather(took)[:2])
        return took / (2 * HOPS) / 1000 if took else None

    def load_us(self, pointer: int, bulk_bytes: int) -> float:
        """Microseconds of a load that begins when the one before it ends, on rank 0 alone.

        Args:
            bulk_bytes: of a bulk load; 0: an ordinary load of eight bytes.
        """
        self.world.barrier()
        if self.world.rank == 0:
            for _ in range(2):
                took = p(self.took.data.ptr)
                if bulk_bytes:
                    arguments = p(pointer), np.int32(LOADS), np.uint32(bulk_bytes), took
                    self.kernels["fetch"]((1,), (1,), arguments, shared_mem=bulk_bytes)
                else:
                    self.kernels["chase"]((1,), (1,), (p(pointer), np.int32(LOADS), took))
        cp.cuda.get_current_stream().synchronize()
        self.world.barrier()
        return float(self.world.allgather(int(self.took.get()[0]))[0]) / LOADS / 1000


def measure(ranks: int, out: Path | None) -> dict[str, Any]:
    found: dict[str, Any] = {"machine": machine(), "ranks": ranks, "gbps": {}, "us": {}}

    def keep(group: str, name: str, value: Any) -> None:
        found[group][name] = value
        write(out, found)

    def fn(world: cometrt.World) -> None:
        side = Side(world)
        found["shared_gpu"] = world.shares_gpu
        note = keep if world.rank == 0 else lambda *_: None
        for rows in (0, 1, 4):
            note("us", f"hop after {512 * rows} bytes", side.hop_us(rows))
        for where, zeros in (("here", side.zeros.data.ptr), ("there", side.there["zeros"])):
            for size in (0, 16, 4096):
                note("us", f"load of {size or 8} bytes {where}", side.load_us(zeros, size))
        side.copy()
        side.check(pulled=True)
        for kind in PULLS:
            side.pull(kind, num_sms())
            side.check(pulled=True)
        side.push(PUSHES[0], num_sms())
        side.check(pulled=False)
        nccl = Nccl.connect(world)
        if nccl is not None:  # it connects ranks in the first call, which nothing may hold up
            found["nccl"] = nccl.version
            side.by_nccl(nccl, both=True)()
            side.check(pulled=True)
        for both in (False, True):
            way = "both ways" if both else "one way"
            takes_part = both or world.rank == 0
            note("gbps", f"copy engine, {way}", side.gbps(side.copy if takes_part else None))
            if nccl is not None:
                note("gbps", f"NCCL, {way}", side.gbps(side.by_nccl(nccl, both=both)))
            for name, (move, kind) in MOVES.items():
                rates = {}
                for ctas in CTAS:
                    if ctas <= num_sms():
                        run = functools.partial(move, side, kind, ctas)
                        rates[ctas] = side.gbps(run if takes_part else None)
                note("gbps", f"{name}, {way}", rates)

    cometrt.spawn(fn, ranks, "cuda", timeout_sec=15)
    return found


MOVES = {
    **{f"pull {warps}x{lanes}": (Side.pull, (warps, lanes)) for warps, lanes in PULLS},
    **{f"push {warps}": (Side.push, warps) for warps in PUSHES},
    "load 8": (Side.load, 8),
}


def line(name: str, rates: Any) -> str:
    if not isinstance(rates, dict):
        return f"{name:28s} {rates:6.0f}"
    return f"{name:28s} " + " ".join(f"{rate:6.0f}" for rate in rates.values())


def show(found: dict[str, Any]) -> None:
    print(f"GB/s by CTAs{'':16s} " + " ".join(f"{ctas:6d}" for ctas in CTAS))
    for name, rates in found["gbps"].items():
        print(line(name, rates))
    for name, us in found["us"].items():
        print(f"{name:28s} " + ("lost" if us is None else f"{us:6.2f} us"))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path)
    parser.add_argument("--ranks", type=int, default=cp.cuda.runtime.getDeviceCount())
    args = parser.parse_args()
    show(measure(args.ranks, args.out))


if __name__ == "__main__":
    main()
