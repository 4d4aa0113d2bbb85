"""The layer in PyTorch: NCCL's all-to-all, torch._grouped_mm, and Triton kernels for the rest.

    python -m torch.distributed.run --standalone --nproc-per-node 4 -m benchmarks.rivals_torch
        --cells '[{"model": "qwen3-30b-a3b", "ranks": 4}]' [--pass forward,both] [--out FILE]

"torch dedup" sends a token once to each rank that wants it, and partial sums come back. "torch
pairs" sends a row for each (token, expert), as Megatron-LM and TorchTitan do. The host waits once
in a call, for the counts of all ranks. The backward is written by hand and needs no second up GEMM;
weight gradients are computed while dx travels. Both passes plan within their time.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

import cometrt
from benchmarks.rivals import Rows, parse
from cometrt.bench.timing import WARM_UP, Method
from cometrt.bench.workloads import Cell, distinct_experts, random_inputs, routing, tolerance

try:
    import torch
    import torch.distributed as dist

    from benchmarks.rivals_torch_kernels import gather_rows, sum_rows, swiglu, swiglu_backward
except ImportError as error:
    torch, MISSING = None, str(error)

ALIGN = 8  # rows of an expert begin at a multiple: grouped GEMMs want 16 bytes of bf16


class ExpertRows:
    """Which row of the grouped GEMMs is which (unit, k) that has arrived; no wait of the host.

    Args:
        ids: [N, K] local expert of each unit's pair, or -1.
        weights: [N, K].
        rows: how many there may be, with padding rows.

    Attributes:
        ends: [E_l], of each expert's rows.
        row_of: [N, K], or -1.
        unit: [rows], or -1.
        row_weight: [rows], 0 for padding rows.
    """

    def __init__(self, ids: Any, weights: Any, experts: int, rows: int) -> None:
        (units, topk), device = ids.shape, ids.device
        flat = torch.where(ids >= 0, ids, experts).reshape(-1).to(torch.int16)
        keys, order = torch.sort(flat, stable=True)
        bounds = torch.arange(experts + 1, device=device, dtype=keys.dtype)
        starts = torch.searchsorted(keys, bounds)  # of each expert, then of what is not local
        counts = starts[1:] - starts[:-1]
        padded = (counts + ALIGN - 1) // ALIGN * ALIGN
        ends = torch.cumsum(padded, 0)
        self.ends = ends.to(torch.int32)
        shift = torch.cat([ends - padded - starts[:-1], ends.new_zeros(1)])
        row = torch.arange(units * topk, device=device) + shift[keys.long()]
        local = keys < experts
        row = torch.where(local, row, rows)
        self.row_of = torch.empty(units * topk, dtype=torch.int32, device=device)
        self.row_of[order] = torch.where(local, row, -1).to(torch.int32)
        self.row_of = self.row_of.view(units, topk)
        pair = torch.full((rows + 1,), -1, dtype=torch.int64, device=device)
        pair[row] = order
        pair = pair[:rows]
        self.unit = torch.where(pair >= 0, pair // topk, -1).to(torch.int32)
        self.weights, self.rows = weights, rows
        self.row_weight = torch.where(pair >= 0, weights.reshape(-1)[pair.clamp(min=0)], 0.0)


class Exchange:
    """All-to-all of units: tokens, or (token, expert) pairs. Own units do not pass through NCCL."""

    def __init__(self, experts: int, *, pairs: bool) -> None:
        self.rank, self.size, self.pairs = dist.get_rank(), dist.get_world_size(), pairs
        self.local = experts // self.size
        peers = [rank for rank in range(self.size) if rank != self.rank]
        self.order = torch.tensor([*peers, self.rank], device=_device())
        self.index_of_pair = torch.argsort(self.order)

    def plan(self, ids: Any, weights: Any) -> ExpertRows:
        """ids, weights: [T, K] of this rank."""
        self.tokens, self.topk = ids.shape
        me, size, device = self.rank, self.size, ids.device
        if self.pairs:
            ids, weights = ids.reshape(-1, 1), weights.reshape(-1, 1)
        units, columns = ids.shape
        self.owner = ids // self.local
        sent_to = self.owner[None] == self.order[:, None, None]
        wants = sent_to.any(-1)  # [size, units], in this rank's order of ranks
        place = torch.cumsum(wants.reshape(-1).to(torch.int32), 0, dtype=torch.int32) - 1
        # Units and rows from each rank to each, known to all: the one wait of the host.
        mine = torch.empty((size, 2), dtype=torch.int64, device=device)
        mine[self.order] = torch.stack([wants.sum(1), sent_to.sum((1, 2))], 1)
        table = torch.empty((size, size, 2), dtype=torch.int64, device=device)
        dist.all_gather_into_tensor(table.view(-1), mine.view(-1))
        table = table.tolist()
        others = [rank if rank != me else None for rank in range(size)]
        self.send = [0 if rank is None else table[me][rank][0] for rank in others]
        self.receive = [0 if rank is None else table[rank][me][0] for rank in others]
        self.sent, self.received, self.own = sum(self.send), sum(self.receive), table[me][me][0]
        rows = sum(table[rank][me][1] for rank in range(size))
        # At home the copies of units lie by rank, this rank's own last.
        total = self.sent + self.own
        unit = torch.arange(units, device=device, dtype=torch.int32).repeat(size)
        index = torch.empty(total + 1, dtype=torch.int32, device=device)
        index[torch.where(wants.reshape(-1), place, total).long()] = unit
        sources = index[:total]
        self.copies = torch.where(wants, place.view(size, units), -1).t().contiguous()
        self.x_index = sources // self.topk if self.pairs else sources
        self.home = self.copies  # whose sum is a token's
        if self.pairs:
            self.home = self.copies.max(1).values.view(self.tokens, self.topk).contiguous()
        # ids and weights travel together, as 32-bit words.
        words = torch.cat([ids.to(torch.int32), weights.view(torch.int32)], 1)[sources.long()]
        got = torch.empty((self.received + self.own, 2 * columns), dtype=words.dtype, device=device)
        got[self.received :] = words[self.sent :]
        self._exchange(got[: self.received], words[: self.sent], self.receive, self.send).wait()
        expert = got[:, :columns] - me * self.local
        expert = torch.where((expert >= 0) & (expert < self.local), expert, -1)
        weights = got[:, columns:].contiguous().view(torch.float32)
        return ExpertRows(expert, weights, self.local, rows + (ALIGN - 1) * self.local)

    def dispatch(self, x: Any) -> Any:
        """[units that arrive, H]; own ones are copied while the others travel."""
        got, send = _new(x, self.received + self.own), _new(x, self.sent)
        gather_rows(send, x, self.x_index[: self.sent])
        work = self._exchange(got[: self.received], send, self.receive, self.send)
        gather_rows(got[self.received :], x, self.x_index[self.sent :])
        work.wait()
        return got

    def combine(
        self,
        rows: ExpertRows,
        values: Any,
        weights: Any,
        extra: Any = None,
        meanwhile: Callable[[], Any] = lambda: None,
    ) -> tuple[Any, Any]:
        """Sums of each unit's rows go home and are added to [T, H].

        Args:
            values: [rows, H].
            weights: [units, K] or None.
            extra: [units, K] float32, which goes home too, to [T, K].
            meanwhile: queues work while they travel.
        """
        n, back, part = self.received, _new(values, self.sent + self.own), None
        part = sum_rows(_new(values, n), values, rows.row_of[:n], _first(weights, n))
        works = [self._exchange(back[: self.sent], part, self.send, self.receive)]
        home = None
        if extra is not None:
            home = _new(extra, self.sent + self.own)
            works.append(self._exchange(home[: self.sent], extra[:n], self.send, self.receive))
            home[self.sent :] = extra[n:]
        own = None if weights is None else weights[n:]
        sum_rows(back[self.sent :], values, rows.row_of[n:], own)
        meanwhile()
        for work in works:
            work.wait()
        y = sum_rows(_new(back, self.tokens), back, self.home)
        if home is None:
            return y, None
        if self.pairs:
            return y, home.view(-1)[self.home.reshape(-1).long()].view(self.tokens, self.topk)
        at = self.copies.gather(1, self.index_of_pair[self.owner])
        return y, home.gather(0, at.long())

    def _exchange(self, out: Any, given: Any, out_sizes: list[int], sizes: list[int]) -> Any:
        return dist.all_to_all_single(out, given, out_sizes, sizes, async_op=True)


class Layer:
    def __init__(self, exchange: Exchange, w_up: Any, w_down: Any) -> None:
        """w_up [E_l, 2 I, H], w_down [E_l, H, I]."""
        self.exchange, self.w_up, self.w_down = exchange, w_up, w_down

    def forward(self, x: Any, ids: Any, weights: Any) -> tuple[Any, Any]:
        """(y, what the backward needs)."""
        rows = self.exchange.plan(ids, weights)
        x_rows = gather_rows(_new(x, rows.rows), self.exchange.dispatch(x), rows.unit)
        z = torch._grouped_mm(x_rows, self.w_up.transpose(1, 2), offs=rows.ends)
        o = torch._grouped_mm(swiglu(z), self.w_down.transpose(1, 2), offs=rows.ends)
        y, _ = self.exchange.combine(rows, o, rows.weights)
        return y, (x_rows, z, rows)

    def backward(self, dy: Any, saved: Any) -> tuple[Any, ...]:
        """Gradients of x, weights, w_up and w_down."""
        x_rows, z, rows = saved
        dy_rows = gather_rows(_new(dy, rows.rows), self.exchange.dispatch(dy), rows.unit)
        da = torch._grouped_mm(dy_rows, self.w_down, offs=rows.ends)
        dz, weighted_a, dweight = swiglu_backward(z, da, rows.row_weight)
        dx_rows = torch._grouped_mm(dz, self.w_up, offs=rows.ends)
        at = rows.row_of
        extra = torch.where(at >= 0, dweight[at.clamp(min=0).long()], 0.0)
        of_weights: list[Any] = []

        def weight_gradients() -> None:
            of_weights.append(torch._grouped_mm(dz.t(), x_rows, offs=rows.ends))
            of_weights.append(torch._grouped_mm(dy_rows.t(), weighted_a, offs=rows.ends))

        dx, dweights = self.exchange.combine(rows, dx_rows, None, extra, weight_gradients)
        return dx, dweights, *of_weights


def _new(like: Any, rows: int) -> Any:
    return torch.empty((rows, like.shape[1]), dtype=like.dtype, device=like.device)


def _first(array: Any, count: int) -> Any:
    return None if array is None else array[:count]


def _device() -> Any:
    return torch.device("cuda", torch.cuda.current_device())


# ---- checking ------------------------------------------------------------------------------------


def to_device(array: np.ndarray) -> Any:
    if array.dtype.itemsize == 2:
        array = np.ascontiguousarray(array).view(np.int16)
        return torch.from_numpy(array).to(_device()).view(torch.bfloat16)
    return torch.from_numpy(np.ascontiguousarray(array)).to(_device())


def far(found: Any, expected: Any) -> float:
    found, expected = found.double(), torch.as_tensor(expected, device=found.device).double()
    return float((found - expected).norm() / expected.norm())


def check(*, pairs: bool) -> None:
    """A small layer and all of its gradients against the float64 reference; tokens differ by rank.

    Raises:
        ValueError: where one is wrong on any rank.
    """
    rank, size = dist.get_rank(), dist.get_world_size()
    spec = cometrt.MoESpec(256, 128, 8 * size, 3, 96)
    rng = np.random.default_rng(0)
    scores = np.zeros(spec.num_experts)
    ids = [distinct_experts(rng, (96 - r,), scores, spec.topk) for r in range(size)]
    given = random_inputs(spec, ids, rng)
    model = (np.concatenate(given.x), np.concatenate(ids), np.concatenate(given.weights))
    model = (*model, given.w_up, given.w_down, spec.activation)
    y = cometrt.reference.moe_forward(*model)
    grads = cometrt.reference.moe_backward(np.concatenate(given.dy), *model)
    tokens = slice(sum(map(len, ids[:rank])), sum(map(len, ids[: rank + 1])))
    experts = slice(8 * rank, 8 * rank + 8)
    layer = Layer(
        Exchange(spec.num_experts, pairs=pairs),
        to_device(given.w_up[experts]),
        to_device(given.w_down[experts]),
    )
    x, dy, weights = (to_device(a[rank]) for a in (given.x, given.dy, given.weights))
    found, saved = layer.forward(x, to_device(ids[rank].astype(np.int64)), weights)
    dx, dweights, dw_up, dw_down = layer.backward(dy, saved)
    errors = [
        far(found, y[tokens]),
        far(dx, grads.x[tokens]),
        far(dweights, grads.topk_weights[tokens]),
        far(dw_up, grads.w_up[experts]),
        far(dw_down, grads.w_down[experts]),
    ]
    worst = slowest(errors)
    if not max(worst) < 2 * tolerance("bfloat16"):
        raise ValueError(f"y, dx, dweights, dw_up, dw_down are off by {worst}")


# ---- timing --------------------------------------------------------------------------------------


def slowest(values: list[float]) -> list[float]:
    """The largest of all ranks, one by one."""
    found = torch.tensor(values, dtype=torch.float64, device=_device())
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return [float(value) for value in found.cpu()]


def meet() -> None:
    torch.cuda.synchronize()
    dist.barrier()
    torch.cuda.synchronize()


def measure(
    run: Callable[[Any], Any], before: Callable[[], Any], method: Method
) -> tuple[list[float], float]:
    """(milliseconds of isolated calls, mean of sustained ones), of the slowest rank; `before` is
    not timed."""
    for _ in range(WARM_UP):
        run(before())
    isolated = []
    for _ in range(method.rounds):
        given = before()
        torch.cuda.synchronize()
        time.sleep(method.idle_ms / 1e3)
        meet()
        isolated.append(timed(run, given))
        del given
    isolated = slowest([begin.elapsed_time(end) for begin, end in isolated])
    if not method.sustain_sec:
        return isolated, 0.0
    count = max(3, math.ceil(1e3 * method.sustain_sec / float(np.median(isolated))))
    meet()
    pairs = [timed(run, before(), wait=False) for _ in range(count)]
    torch.cuda.synchronize()
    return isolated, slowest([sum(b.elapsed_time(e) for b, e in pairs) / count])[0]


def timed(run: Callable[[Any], Any], given: Any, *, wait: bool = True) -> tuple[Any, Any]:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run(given)
    end.record()
    if wait:
        end.synchronize()
    return begin, end


def measure_cell(cell: Cell, passes: list[str], name: str, method: Method, rows: Rows) -> None:
    rank, spec = dist.get_rank(), cell.spec
    device, local = _device(), spec.num_experts // dist.get_world_size()
    generator = torch.Generator(device).manual_seed(rank)

    def normal(*shape: int, scale: float = 1.0) -> Any:
        out = torch.empty(shape, dtype=torch.bfloat16, device=device)
        for part in out if len(shape) == 3 else [out]:
            part.copy_(scale * torch.randn(part.shape, generator=generator, device=device))
        return out

    x, dy = normal(cell.tokens, spec.hidden), normal(cell.tokens, spec.hidden)
    ids = to_device(routing(cell)[rank].astype(np.int64))
    weights = torch.rand(ids.shape, generator=generator, device=device) + 0.5
    layer = Layer(
        Exchange(spec.num_experts, pairs=name.endswith("pairs")),
        normal(local, 2 * spec.intermediate, spec.hidden, scale=spec.hidden**-0.5),
        normal(local, spec.hidden, spec.intermediate, scale=spec.intermediate**-0.5),
    )

    def forward() -> Any:
        return layer.forward(x, ids, weights)[1]

    def backward(saved: Any) -> Any:
        return layer.backward(dy, saved)

    y, saved = layer.forward(x, ids, weights)
    if not all(bool(torch.isfinite(array).all()) for array in (y, *backward(saved))):
        raise ValueError(f"{cell}: a result is not finite")
    del y, saved
    for which in passes:
        run, before = {
            "forward": (lambda _: forward(), lambda: None),
            "backward": (backward, forward),
            "both": (lambda _: backward(forward()), lambda: None),
        }[which]
        found = measure(run, before, method)
        if rank == 0:
            rows.add(cell, which, name, *found)


def main(argv: list[str] | None = None) -> None:
    args = parse(__doc__, argv)
    if torch is None:
        sys.exit(f"PyTorch cannot be imported: {MISSING}")
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    dist.init_process_group("nccl", device_id=_device())
    rows = Rows(args.out if dist.get_rank() == 0 else None)
    for name in ("torch dedup", "torch pairs"):
        check(pairs=name.endswith("pairs"))
        for cell in args.cells:
            measure_cell(cell, args.passes, name, args.method, rows)
            torch.cuda.empty_cache()
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
