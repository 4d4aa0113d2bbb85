"""What all forms of the engine's benchmark share: rows by expert, contenders, and timing.

A form is one GEMM of a layer, such as the down dgrad. A contender is one way to compute it.
"""

from __future__ import annotations

import functools
import random
import statistics
import types
from collections.abc import Callable
from typing import Any

import cupy as cp
import ml_dtypes
import numpy as np

from cometrt.bench.workloads import cuda_function, device_normal
from cometrt.kernels.compiler import kernels_folder
from cometrt.kernels.constants import BLOCK_M
from cometrt.world.partitions import split_gpu, use_partition

Run = Any  # queues a contender on the current stream; its `out` is what it writes
BF16 = np.dtype(ml_dtypes.bfloat16)
SKEW = 0.256  # coefficient of variation of skewed loads
PARTITIONS, REPEATS = 8, 4
IDLE_NS = 1_000_000  # the GPU idles so long before each timed run
EDGE_ROWS = 40  # the first and the last rows of an expert's result that are checked


# ---- groups of rows ----------------------------------------------------------------------------


def group_sizes(rows: int, experts: int, skew: float) -> np.ndarray:
    """Rows of each expert; `skew` is the coefficient of variation of the loads."""
    z = np.random.default_rng(0).standard_normal(experts)
    z = (z - z.mean()) / z.std()
    shares = np.maximum(1 + skew * z, 0) / experts
    sizes = np.floor(shares / shares.sum() * rows).astype(np.int64)
    sizes[0] += rows - sizes.sum()
    return sizes


def tiles_of(sizes: np.ndarray) -> Any:
    """The plan's tables that the engine reads, for so many rows of each expert."""
    num_tiles = -(-sizes // BLOCK_M)
    offsets = np.concatenate([[0], np.cumsum(num_tiles)]) * BLOCK_M
    tables = {
        "tile_order": np.arange(num_tiles.sum()),
        "num_tiles": np.array([num_tiles.sum()]),
        "tile_expert": np.repeat(np.arange(len(sizes)), num_tiles),
        "expert_offsets": offsets,
        "expert_rows": sizes,
    }
    on_gpu = {name: cp.asarray(table.astype(np.int32)) for name, table in tables.items()}
    return types.SimpleNamespace(**on_gpu, offsets=offsets)


class Groups:
    """Rows for all experts, padded to M-tiles as the layer keeps them.

    Args:
        sizes: rows of each expert.
        columns: of a row.
        rows: [padded rows, columns]; None: random ones, and zeros for padding.
    """

    def __init__(self, sizes: np.ndarray, columns: int, rows: Any = None) -> None:
        self.sizes, self.tiles = sizes, tiles_of(sizes)
        self.rows = rows
        if rows is None:
            self.rows = cp.zeros((int(self.tiles.offsets[-1]), columns), BF16)
            for begin, size in zip(self.tiles.offsets[:-1], sizes, strict=True):
                self.rows[begin : begin + size] = device_normal((int(size), columns))

    def part(self, experts: slice) -> Groups:
        """The groups of some experts, in the same memory."""
        begin, end = (int(self.tiles.offsets[i]) for i in (experts.start, experts.stop))
        return Groups(self.sizes[experts], self.rows.shape[1], self.rows[begin:end])

    def of_expert(self, expert: int) -> slice:
        """The expert's real rows."""
        begin = int(self.tiles.offsets[expert])
        return slice(begin, begin + int(self.sizes[expert]))

    def real_rows(self) -> Any:
        """All rows without padding, as other libraries want them."""
        return cp.concatenate([self.rows[self.of_expert(e)] for e in range(len(self.sizes))])

    def batch(self) -> Any:
        """[experts, rows of an expert, columns]. Groups must be equal and without padding rows."""
        return self.rows.reshape(len(self.sizes), -1, self.rows.shape[1])


def some_experts(groups: Groups) -> list[int]:
    """The experts whose results are checked: the first, the middle and the last one."""
    last = len(groups.sizes) - 1
    return [e for e in sorted({0, (last + 1) // 2, last}) if groups.sizes[e]]


def edges(count: int) -> np.ndarray:
    """Indices of the first and the last EDGE_ROWS of so many rows."""
    rows = np.arange(count)
    return np.unique(np.concatenate([rows[:EDGE_ROWS], rows[-EDGE_ROWS:]]))


def relative_error(found: Any, expected: Any) -> float:
    return float(cp.linalg.norm(found.astype(np.float64) - expected) / cp.linalg.norm(expected))


# ---- contenders ----------------------------------------------------------------------------------

# Layouts: "NT" out = a [M, K] b [N, K]^T; "NN" a [M, K] b [K, N]; "TN" a [K, M]^T b [K, N].


def batched_run(layout: str, a: Any, b: Any) -> Run:
    """cuBLAS: out[i] = op(a[i]) op(b[i]) for all i, in one call."""
    from cupy.cuda import device
    from cupy_backends.cuda.libs import cublas

    handle, transposes = device.get_cublas_handle(), (cublas.CUBLAS_OP_N, cublas.CUBLAS_OP_T)
    batch, inner = len(a), a.shape[2 if layout[0] == "N" else 1]
    rows, columns = a.shape[1 if layout[0] == "N" else 2], b.shape[1 if layout[1] == "T" else 2]
    out = cp.empty((batch, rows, columns), BF16)
    one, zero = np.ones(1, np.float32), np.zeros(1, np.float32)
    # cuBLAS is column-major: it computes out^T = op(b)^T op(a)^T.
    op_b, op_a = (transposes[of == "T"] for of in reversed(layout))

    def run() -> None:
        cublas.setStream(handle, cp.cuda.get_current_stream().ptr)
        cublas.gemmStridedBatchedEx(
            handle, op_b, op_a, columns, rows, inner, one.ctypes.data,
            b.data.ptr, 14, b.shape[2], b.shape[1] * b.shape[2],
            a.data.ptr, 14, a.shape[2], a.shape[1] * a.shape[2],
            zero.ctypes.data, out.data.ptr, 14, columns, rows * columns, batch, 68, -1,
        )  # fmt: skip

    run()
    run.out = out
    return run


def torch_run(layout: str, a: Any, b: Any, sizes: np.ndarray) -> Run | None:
    """torch._grouped_mm, on rows without padding. None if this PyTorch does not have it."""
    try:
        import torch

        first, second = (torch.from_dlpack(array) for array in (a, b))
        first = first.t() if layout[0] == "T" else first
        second = second.transpose(-2, -1) if layout[1] == "T" else second
        ends = torch.tensor(np.cumsum(sizes), dtype=torch.int32, device="cuda")
        stream = torch.cuda.ExternalStream(cp.cuda.get_current_stream().ptr)

        def run() -> None:
            with torch.cuda.stream(stream):
                run.out = torch._grouped_mm(first, second, offs=ends)  # type: ignore[attr-defined]

        run()
        return run
    except Exception as error:
        print(f"  no torch._grouped_mm: {error}")
        return None


def partitions_run(experts: int, engine_of: Callable[[slice], Run]) -> Run:
    """The engine on eight partitions of 16 SMs at once, each with an eighth of the experts.

    A run repeats its work `REPEATS` times, so that starting and joining streams hardly counts.

    Args:
        engine_of: makes the run of some experts on the current partition.
    """
    parts, each = split_gpu(PARTITIONS), experts // PARTITIONS
    jobs: list[Run] = []
    cp.cuda.Device().synchronize()  # operands are there before other streams read them
    for i, part in enumerate(parts):
        with use_partition(part):
            jobs.append(engine_of(slice(i * each, (i + 1) * each)))
    ended = [cp.cuda.Event(disable_timing=True) for _ in parts]

    def run() -> None:
        current = cp.cuda.get_current_stream()
        begin = current.record()
        for part, job, event in zip(parts, jobs, ended, strict=True):
            part.stream.wait_event(begin)
            with use_partition(part):
                for _ in range(REPEATS):
                    job()
            event.record(part.stream)
            current.wait_event(event)

    return run


class RowsForm:
    """A GEMM over rows: out [rows, n] = a [rows, k] op(b[expert]).

    Args:
        rows: number of rows of all experts together.
        experts, n, k: number of experts, and the shape of b[expert].
    """

    layout = "NT"  # of every expert's GEMM

    def __init__(self, rows: int, experts: int, n: int, k: int) -> None:
        self.flops, self.facts = 2.0 * rows * n * k, {"n": n, "k": k}
        shape = (n, k) if self.layout == "NT" else (k, n)
        self.b = device_normal((experts, *shape), k**-0.5)
        self.equal, self.skewed = (Groups(group_sizes(rows, experts, s), k) for s in (0.0, SKEW))

    def engine(self, groups: Groups, b: Any) -> Run:
        """The run of cometrt's engine."""
        raise NotImplementedError

    def runs(self) -> dict[str, Run | None]:
        """The runs of all contenders, by name. None: it is not available."""
        rows, (equal, skewed) = int(self.equal.sizes.sum()), (self.equal, self.skewed)
        k, b, layout = equal.rows.shape[1], self.b, self.layout
        return {
            "engine": self.engine(equal, b),
            "torch": torch_run(layout, equal.real_rows(), b, equal.sizes),
            "batched": batched_run(layout, equal.batch(), b),
            "dense": batched_run(layout, device_normal((1, rows, k)), b[:1]),
            "skewed": self.engine(skewed, b),
            "torch skewed": torch_run(layout, skewed.real_rows(), b, skewed.sizes),
            "partitions": partitions_run(
                len(b), lambda part: self.engine(equal.part(part), b[part])
            ),
        }

    def errors(self, runs: dict[str, Run | None]) -> dict[str, float]:
        """Relative errors of some rows against float64. Before a run, results are NaN."""
        found = {name: self._error(runs[name], self.equal) for name in ("engine", "batched")}
        return found | {"skewed": self._error(runs["skewed"], self.skewed)}

    def _error(self, run: Run, groups: Groups) -> float:
        run.out.fill(float("nan"))
        run()
        out = run.out.reshape(-1, run.out.shape[-1])  # equal groups have no padding rows
        worst = 0.0
        for e in some_experts(groups):
            rows = cp.asarray(groups.of_expert(e).start + edges(int(groups.sizes[e])))
            expected = self.expected(groups, e, rows)
            worst = max(worst, relative_error(out[rows], expected))
        return worst

    def expected(self, groups: Groups, expert: int, rows: Any) -> Any:
        """The given rows of the product in float64."""
        b = self.b[expert].astype(np.float64)
        return groups.rows[rows].astype(np.float64) @ (b.T if self.layout == "NT" else b)

    def bytes_of(self) -> dict[str, int]:
        """Least bytes that a contender of OWN reads and writes, by name."""
        return {}


# ---- timing --------------------------------------------------------------------------------------


@functools.cache
def _barrier() -> tuple[Any, Any]:
    source = kernels_folder() / "protocol" / "start_barrier.cu"
    return cuda_function(source, "start_barrier"), cp.zeros(1, cp.uint64)


def hold_back() -> None:
    """Hold the current stream for IDLE_NS. The host queues the timed run meanwhile."""
    kernel, never = _barrier()
    kernel((1,), (1,), (np.uint64(never.data.ptr), np.uint64(IDLE_NS)))


def measure(runs: dict[str, Run], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each run in each round. Two rounds before them are not timed."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    order = random.Random(0)
    for index in range(rounds + 2):
        # The GPU's clocks depend on the run before. So every round has a new random order.
        for name, run in order.sample(list(runs.items()), len(runs)):
            hold_back()
            begin, end = cp.cuda.Event(), cp.cuda.Event()
            begin.record()
            run()
            end.record()
            end.synchronize()
            if index >= 2:
                times[name].append(cp.cuda.get_elapsed_time(begin, end))
    return times


@functools.cache
def copy_rate() -> float:
    """Bytes per millisecond, read and written, of a copy between two large arrays."""
    source = cp.zeros(1 << 28, np.float32)
    target = cp.empty_like(source)
    times = measure({"copy": functools.partial(cp.copyto, target, source)}, 9)["copy"]
    return 2 * source.nbytes / statistics.median(times)
