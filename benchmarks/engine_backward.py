"""The backward's forms for `python -m benchmarks.engine`: activation and weight gradients."""

from __future__ import annotations

from typing import Any

import cupy as cp
import numpy as np

from benchmarks.engine_forms import (
    BF16,
    SKEW,
    Groups,
    RowsForm,
    Run,
    batched_run,
    edges,
    group_sizes,
    partitions_run,
    relative_error,
    some_experts,
    torch_run,
)
from cometrt.activations import activate_backward
from cometrt.bench.workloads import device_normal
from cometrt.cuda.dgrad import GroupedDgrad, GroupedDownDgrad, dgrad_n_tiles
from cometrt.cuda.engine import order_tiles, raster_group_of
from cometrt.cuda.wgrad import GroupedWgrad, Wgrad


class Dgrad(RowsForm):
    """Activation gradients alone: out [rows, n] = a [rows, k] b[expert] [k, n]."""

    layout = "NN"

    def order(self, groups: Groups) -> Any:
        _, k, n = self.b.shape
        return order_tiles(groups.tiles, dgrad_n_tiles(n), raster_group=raster_group_of(k))

    def engine(self, groups: Groups, b: Any) -> Run:
        gemm, order = GroupedDgrad(), self.order(groups)
        out = cp.empty((len(groups.rows), b.shape[2]), BF16)
        run: Run = lambda: gemm(groups.rows, b, out, order)  # noqa: E731
        run.out = out
        return run


class DownDgrad(Dgrad):
    """The down dgrad. Contender "all" also has the layer's epilogue: dz, weighted_a, dweight."""

    def __init__(self, rows: int, experts: int, n: int, k: int) -> None:
        super().__init__(rows, experts, n, k)
        self.z, self.weight = device_normal((rows, 2 * n)), cp.random.random(rows, np.float32)

    def runs(self) -> dict[str, Run | None]:
        return super().runs() | {"all": self._all()}

    def _all(self) -> Run:
        gemm, order, n = GroupedDownDgrad("swiglu"), self.order(self.equal), self.b.shape[2]
        rows, dz = len(self.z), cp.empty_like(self.z)
        results = dz, cp.empty((rows, n), BF16), cp.empty((rows, dgrad_n_tiles(n)), np.float32)
        given = self.equal.rows, self.b, self.z, self.weight
        run: Run = lambda: gemm(*given, *results, order)  # noqa: E731
        run.out = dz
        return run

    def errors(self, runs: dict[str, Run | None]) -> dict[str, float]:
        """As `RowsForm.errors`, and that of dz."""
        found, run = super().errors(runs), runs["all"]
        assert run is not None
        run.out.fill(float("nan"))
        run()
        found["all"] = 0.0
        for e in some_experts(self.equal):
            rows = cp.asarray(self.equal.of_expert(e).start + edges(int(self.equal.sizes[e])))
            weighted = self.weight[rows][:, None] * self.expected(self.equal, e, rows)
            z = self.z[rows].get().astype(np.float64)
            dz = cp.asarray(activate_backward("swiglu", z, weighted.get()))
            found["all"] = max(found["all"], relative_error(run.out[rows], dz))
        return found

    def bytes_of(self) -> dict[str, int]:
        a, b, z = self.equal.rows.nbytes, self.b.nbytes, self.z.nbytes
        return {"all": a + b + 2 * z + z // 2}


class WeightGradient:
    """Weight gradients: out [expert, m, n] = a^T b over the expert's rows of both.

    Contender "fp32" writes float32; "fp32+" and "bf16+" add to old values of that type. "dense" is
    one GEMM over one expert's rows and all experts' columns. It has the same FLOPs, K and bytes.

    Args:
        rows: number of rows of all experts together.
        experts, m, n: number of experts, and the shape of one gradient.
    """

    layout = "TN"

    def __init__(self, rows: int, experts: int, m: int, n: int) -> None:
        self.flops, self.facts = 2.0 * rows * m * n, {"m": m, "n": n}
        sizes = [group_sizes(rows, experts, skew) for skew in (0.0, SKEW)]
        self.equal, self.skewed = (
            (Groups(of_experts, m), Groups(of_experts, n)) for of_experts in sizes
        )

    def engine(self, a: Groups, b: Groups, dtype: Any = BF16, *, accumulate: bool = False) -> Run:
        """The GEMM's launch. Tiles are ordered once, before, as in the forms over rows."""
        experts, shape = len(a.sizes), (a.rows.shape[1], b.rows.shape[1])
        out = cp.zeros((experts, *shape), dtype)
        gemms = GroupedWgrad().ordered([Wgrad(a.rows, b.rows, out)], a.tiles, accumulate=accumulate)
        run: Run = lambda: gemms()  # noqa: E731
        run.out, run.start = out, 0.0 if accumulate else float("nan")
        return run

    def runs(self) -> dict[str, Run | None]:
        """The runs of all contenders, by name. None: it is not available."""
        (a, b), skewed = self.equal, self.skewed
        experts, rows = len(a.sizes), len(a.rows) // len(a.sizes)
        wide = device_normal((1, rows, experts * b.rows.shape[1]))
        return {
            "engine": self.engine(a, b),
            "torch": torch_run("TN", a.real_rows(), b.real_rows(), a.sizes),
            "batched": batched_run("TN", a.batch(), b.batch()),
            "dense": batched_run("TN", a.batch()[:1], wide),
            "skewed": self.engine(*skewed),
            "torch skewed": torch_run("TN", *(g.real_rows() for g in skewed), skewed[0].sizes),
            "partitions": partitions_run(
                experts, lambda part: self.engine(a.part(part), b.part(part))
            ),
            "fp32": self.engine(a, b, np.float32),
            "fp32+": self.engine(a, b, np.float32, accumulate=True),
            "bf16+": self.engine(a, b, accumulate=True),
        }

    def errors(self, runs: dict[str, Run | None]) -> dict[str, float]:
        """Relative errors of some rows against float64.

        Results are filled before a run: with NaN, or with 0 if the run adds to them.
        """
        names = ("engine", "batched", "fp32", "fp32+", "bf16+")
        found = {name: self._error(runs[name], *self.equal) for name in names}
        return found | {"skewed": self._error(runs["skewed"], *self.skewed)}

    def _error(self, run: Run, a: Groups, b: Groups) -> float:
        run.out.fill(getattr(run, "start", float("nan")))
        run()
        worst = 0.0
        for e in some_experts(a):
            of, picked = a.of_expert(e), cp.asarray(edges(run.out.shape[1]))
            columns = a.rows[of][:, picked].astype(np.float64)
            expected = columns.T @ b.rows[of].astype(np.float64)
            worst = max(worst, relative_error(run.out[e][picked], expected))
        return worst

    def bytes_of(self) -> dict[str, int]:
        """Least bytes that a contender of OWN reads and writes, by name."""
        a, b = self.equal
        elements = len(a.sizes) * a.rows.shape[1] * b.rows.shape[1]
        operands = a.rows.nbytes + b.rows.nbytes
        sizes = {"fp32": 4, "fp32+": 8, "bf16+": 4}
        return {name: operands + size * elements for name, size in sizes.items()}
