"""The layer in JAX: one process for all GPUs, shard_map, ragged_all_to_all, batched GEMMs.

    python -m benchmarks.rivals_jax --cells '[{"model": "qwen3-30b-a3b", "ranks": 4}]'
        [--pass forward,backward,both] [--out FILE]

Rows of all (token, expert) pairs are sorted by expert, sent, multiplied, sent back, and summed at
home. Each expert's rows are padded to a fixed capacity, so that one batched cuBLAS GEMM does all
experts. The backward is written by hand: gathers alone, no scatter. Nothing overlaps but what XLA
overlaps by itself. Times are by the wall clock from call to result, so those of the slowest GPU,
with the host's part.
"""

from __future__ import annotations

import functools
import math
import os
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

import cometrt
from benchmarks.rivals import Rows, parse
from cometrt.bench.timing import WARM_UP, Method
from cometrt.bench.workloads import (
    Cell,
    distinct_experts,
    random_inputs,
    relative_error,
    routing,
    tolerance,
)

os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.90")

try:
    import jax
    import jax.numpy as jnp
    from jax import lax
    from jax.sharding import Mesh
    from jax.sharding import PartitionSpec as P
except ImportError as error:
    jax, MISSING = None, str(error)


class Saved(NamedTuple):
    """What a forward keeps for its backward, of each rank."""

    x_rows: Any
    z: Any
    home_rows: Any
    plan: Any


class Layer:
    """The layer of one rank. Methods run inside shard_map over the axis "x"."""

    def __init__(self, spec: cometrt.MoESpec, ranks: int, tokens: int, most: int = 0) -> None:
        """most: rows of the busiest expert, where it is known to have many."""
        self.ranks, self.topk, self.experts = ranks, spec.topk, spec.num_experts
        self.pairs, self.local = tokens * spec.topk, spec.num_experts // ranks
        mean = ranks * self.pairs / spec.num_experts  # rows of an expert; five deviations more fit
        self.capacity = -(-max(most, int(mean + 5 * math.sqrt(mean) + 8)) // 64) * 64
        self.rows = self.local * self.capacity
        # XLA's kernel has a block for each update: more of them are faster.
        self.splits = max(1, 512 // spec.num_experts)

    def starts(self, counts: Any) -> Any:
        """Where the rows of each local expert begin: of their counts [W, E_l] on all ranks."""
        del counts
        return jnp.arange(self.local, dtype=jnp.int32) * self.capacity

    def fits(self, plan: dict[str, Any]) -> Any:
        return plan["table"].sum(0).max() <= self.capacity

    def plan(self, ids: Any) -> dict[str, Any]:
        flat = ids.reshape(-1)
        order = jnp.argsort(flat, stable=True).astype(jnp.int32)
        numbers = jnp.arange(self.pairs, dtype=jnp.int32)
        inverse = jnp.zeros_like(order).at[order].set(numbers, unique_indices=True)
        every = jnp.arange(self.experts, dtype=jnp.int32)
        counts = jnp.sum(flat[:, None] == every, 0, dtype=jnp.int32)
        table = lax.all_gather(counts, "x")  # [W, E]
        return {"order": order, "inverse": inverse.reshape(ids.shape), "table": table}

    def _tables(self, plan: dict[str, Any]) -> tuple[Any, Any]:
        """(begin there, begin here, rows sent, rows that come) of the way out, and of the way
        back."""
        me, table = lax.axis_index("x"), plan["table"]
        by_owner = table.reshape(self.ranks, self.ranks, self.local)  # source, owner, expert
        before = jnp.cumsum(by_owner, 0, dtype=jnp.int32) - by_owner  # rows of earlier sources
        at_expert = self.starts(by_owner.sum(0, dtype=jnp.int32)) + before
        at_home = (jnp.cumsum(table, 1, dtype=jnp.int32) - table).reshape(by_owner.shape)
        out = (at_home[me], at_expert[me], by_owner[me], by_owner[:, me])
        back = (at_expert[:, me], at_home[:, me], by_owner[:, me], by_owner[me])
        return out, back

    def _move(self, rows: Any, count: int, tables: tuple[Any, ...]) -> Any:
        """[count, H], zeros where nothing comes."""
        begin, there, sent, comes = tables
        out = jnp.zeros((count, rows.shape[1]), rows.dtype)
        (begin, sizes), (there, _) = self._split(begin, sent), self._split(there, sent)
        _, coming = self._split(jnp.zeros_like(comes), comes)
        if jax.default_backend() == "cpu":
            return ragged_on_cpu(rows, out, begin, sizes, there)
        return lax.ragged_all_to_all(rows, out, begin, sizes, there, coming, axis_name="x")

    def _split(self, begin: Any, size: Any) -> tuple[Any, Any]:
        """Begins and sizes of each update in `splits` parts."""
        cut = size[..., None] * jnp.arange(self.splits + 1, dtype=jnp.int32) // self.splits
        begins = begin[..., None] + cut[..., :-1]
        return begins.reshape(-1), (cut[..., 1:] - cut[..., :-1]).reshape(-1)

    def gemm(self, form: str, a: Any, b: Any, plan: dict[str, Any]) -> Any:
        """einsum over experts: rows are [E_l, capacity, columns]."""
        del plan
        a, b = (v.reshape(self.local, self.capacity, -1) if v.ndim == 2 else v for v in (a, b))
        c = jnp.einsum(form, a, b)
        return c.reshape(self.rows, -1) if form.endswith("ecn") else c

    def forward(self, x: Any, ids: Any, weights: Any, w_up: Any, w_down: Any) -> tuple[Any, Saved]:
        plan = self.plan(ids)
        out, back = self._tables(plan)
        x_rows = self._move(x[plan["order"] // self.topk], self.rows, out)
        z = self.gemm("eck,enk->ecn", x_rows, w_up, plan)
        gate, up = jnp.split(z.astype(jnp.float32), 2, 1)
        a = (jax.nn.silu(gate) * up).astype(x.dtype)
        rows = self.gemm("eck,enk->ecn", a, w_down, plan)
        home_rows = self._move(rows, self.pairs, back)
        of_token = home_rows[plan["inverse"]].astype(jnp.float32)
        y = jnp.einsum("tkh,tk->th", of_token, weights).astype(x.dtype)
        return y, Saved(x_rows, z, home_rows, plan)

    def backward(
        self, dy: Any, saved: Saved, weights: Any, w_up: Any, w_down: Any
    ) -> tuple[Any, ...]:
        """Gradients of x, weights, w_up and w_down."""
        plan, dtype = saved.plan, dy.dtype
        out, back = self._tables(plan)
        of_token = saved.home_rows[plan["inverse"]].astype(jnp.float32)
        dweights = jnp.einsum("th,tkh->tk", dy.astype(jnp.float32), of_token)
        pair_weights = weights.reshape(-1)[plan["order"]][:, None]
        rows = dy[plan["order"] // self.topk].astype(jnp.float32) * pair_weights
        dy_rows = self._move(rows.astype(dtype), self.rows, out)
        da = self.gemm("eck,ekn->ecn", dy_rows, w_down, plan).astype(jnp.float32)
        gate, up = jnp.split(saved.z.astype(jnp.float32), 2, 1)
        sigmoid = jax.nn.sigmoid(gate)
        a = (gate * sigmoid * up).astype(dtype)
        dgate, dup = da * up * sigmoid * (1 + gate * (1 - sigmoid)), da * gate * sigmoid
        dz = jnp.concatenate([dgate, dup], 1).astype(dtype)
        dx_rows = self._move(self.gemm("eck,ekn->ecn", dz, w_up, plan), self.pairs, back)
        dw_up = self.gemm("ecm,ecn->emn", dz, saved.x_rows, plan)
        dw_down = self.gemm("ecm,ecn->emn", dy_rows, a, plan)
        dx = jnp.sum(dx_rows[plan["inverse"]].astype(jnp.float32), 1).astype(dtype)
        return dx, dweights, dw_up, dw_down


def ragged_on_cpu(rows: Any, out: Any, begin: Any, sizes: Any, there: Any) -> Any:
    """ragged_all_to_all, which XLA does not have on the CPU, by all_gather: for tests."""
    every = lax.all_gather(rows, "x")  # [W, rows, H]
    updates = lax.all_gather(jnp.stack([begin, sizes, there]), "x")  # [W, 3, W * updates]
    mine = jnp.split(updates, len(every), axis=2)
    mine = jnp.stack(mine)[lax.axis_index("x")]  # [W, 3, updates]
    for source, (begin, sizes, there) in zip(every, mine, strict=True):
        ahead = jnp.arange(len(out))[:, None] - there  # [out, updates]
        inside = (ahead >= 0) & (ahead < sizes)
        place = jnp.where(inside, ahead + begin, 0).sum(axis=1)
        out = jnp.where(inside.any(axis=1)[:, None], source[place], out)
    return out


def differentiable(layer: Layer) -> Callable[..., Any]:
    """The layer as a function (x, ids, weights, w_up, w_down) -> y with a gradient. y is NaN where
    an expert has more rows than fit."""

    def forward(x: Any, ids: Any, weights: Any, w_up: Any, w_down: Any) -> tuple[Any, Any]:
        y, saved = layer.forward(x, ids, weights, w_up, w_down)
        y = jnp.where(layer.fits(saved.plan), y, jnp.nan)
        return y, (saved, weights, w_up, w_down)

    def backward(kept: tuple[Any, ...], dy: Any) -> tuple[Any, ...]:
        dx, *rest = layer.backward(dy, *kept)
        return dx, None, *rest

    function = jax.custom_vjp(lambda *arguments: forward(*arguments)[0])
    function.defvjp(forward, backward)
    return function


def compiled(layer: Layer, mesh: Any) -> dict[str, Callable[..., Any]]:
    """A compiled function for each pass. Its arrays hold those of all ranks, concatenated."""

    def both(dy: Any, x: Any, ids: Any, *weights: Any) -> Any:
        y, saved = layer.forward(x, ids, *weights)
        # As layers in between would, it keeps XLA from merging or dropping work.
        saved, dy = lax.optimization_barrier((saved, dy))
        return y, *layer.backward(dy, saved, *weights)

    def over_ranks(fn: Callable[..., Any]) -> Any:
        every = functools.partial(jax.shard_map, mesh=mesh, in_specs=P("x"), out_specs=P("x"))
        return jax.jit(every(fn, check_vma=False))

    passes = {"forward": layer.forward, "backward": layer.backward, "both": both}
    return {name: over_ranks(fn) for name, fn in passes.items()}


def check(mesh: Any) -> None:
    """A small layer and all of its gradients against the float64 reference.

    Raises:
        ValueError: where one is wrong.
    """
    size, tokens = mesh.size, 64
    spec = cometrt.MoESpec(128, 64, 4 * size, 4, tokens)
    rng = np.random.default_rng(0)
    scores = np.zeros(spec.num_experts)
    ids = [distinct_experts(rng, (tokens,), scores, spec.topk) for _ in range(size)]
    given = random_inputs(spec, ids, rng)
    dy, x, weights, ids = (np.concatenate(a) for a in (given.dy, given.x, given.weights, given.ids))
    model = (x, ids, weights, given.w_up, given.w_down, spec.activation)
    y, grads = cometrt.reference.moe_forward(*model), cometrt.reference.moe_backward(dy, *model)
    run = compiled(Layer(spec, size, tokens), mesh)["both"]
    found = run(dy, x, ids, weights, given.w_up, given.w_down)
    pairs = zip(found, (y, *grads), strict=True)
    errors = [relative_error(np.asarray(one), other) for one, other in pairs]
    if not max(errors) < 2 * tolerance("bfloat16"):
        raise ValueError(f"y, dx, dweights, dw_up, dw_down are off by {errors}")


def arrays_of(cell: Cell, mesh: Any) -> tuple[Any, ...]:
    """dy, x, ids, weights, w_up and w_down of all ranks, made on their GPUs."""
    spec, local = cell.spec, cell.spec.num_experts // mesh.size

    def normal(key: Any, *shape: int, scale: float = 1.0) -> Any:
        values = scale * jax.random.normal(key, shape, jnp.float32)
        return values.astype(jnp.bfloat16)

    def of_rank(key: Any, ids: Any) -> Any:
        keys = jax.random.split(jax.random.fold_in(key, lax.axis_index("x")), 5)
        up, down = (jax.random.split(keys[i], local) for i in (3, 4))
        hidden, inner = spec.hidden, spec.intermediate
        return (
            normal(keys[0], cell.tokens, hidden),
            normal(keys[1], cell.tokens, hidden),
            ids,
            jax.random.uniform(keys[2], ids.shape) + 0.5,
            # One expert after the other: float32 values of all of them take too much memory.
            lax.map(lambda k: normal(k, 2 * inner, hidden, scale=hidden**-0.5), up),
            lax.map(lambda k: normal(k, hidden, inner, scale=inner**-0.5), down),
        )

    make = jax.shard_map(
        of_rank, mesh=mesh, in_specs=(P(), P("x")), out_specs=P("x"), check_vma=False
    )
    return jax.jit(make)(jax.random.key(0), routing(cell).reshape(-1, spec.topk))


def measure(
    run: Callable[[Any], Any], before: Callable[[], Any] | None, method: Method
) -> tuple[list[float], float]:
    """(milliseconds of isolated calls, mean of sustained ones). `before` does not count: of
    sustained calls its own time, sustained, is subtracted."""
    ready, given = jax.block_until_ready, None
    for _ in range(WARM_UP):
        given = before and ready(before())
        ready(run(given))
    isolated = []
    for _ in range(method.rounds):
        given = before and ready(before())
        time.sleep(method.idle_ms / 1e3)
        begin = time.perf_counter()
        ready(run(given))
        isolated.append(1e3 * (time.perf_counter() - begin))
    del given
    if not method.sustain_sec:
        return isolated, 0.0
    count = max(3, math.ceil(1e3 * method.sustain_sec / float(np.median(isolated))))
    mean = sustained(lambda: run(before and before()), count)
    return isolated, mean - (sustained(before, count) if before else 0.0)


def sustained(call: Callable[[], Any], count: int) -> float:
    begin = time.perf_counter()
    for _ in range(count):
        last = call()
    jax.block_until_ready(last)
    return 1e3 * (time.perf_counter() - begin) / count


def measure_cell(cell: Cell, passes: list[str], mesh: Any, method: Method, rows: Rows) -> None:
    most = int(np.bincount(routing(cell).ravel()).max())
    layer = compiled(Layer(cell.spec, mesh.size, cell.tokens, most), mesh)
    dy, x, ids, *weights = arrays_of(cell, mesh)
    results = jax.tree.leaves(layer["both"](dy, x, ids, *weights))
    if not all(bool(jnp.isfinite(array).all()) for array in results):
        raise ValueError(f"{cell}: a result is not finite")
    del results

    def forward() -> Any:
        return layer["forward"](x, ids, *weights)[1]

    for which in passes:
        run, before = {
            "forward": (lambda _: layer["forward"](x, ids, *weights), None),
            "backward": (lambda saved: layer["backward"](dy, saved, *weights), forward),
            "both": (lambda _: layer["both"](dy, x, ids, *weights), None),
        }[which]
        rows.add(cell, which, "jax ragged", *measure(run, before, method))


def main(argv: list[str] | None = None) -> None:
    args = parse(__doc__, argv)
    if jax is None:
        sys.exit(f"JAX cannot be imported: {MISSING}")
    mesh = Mesh(np.array(jax.devices()[: args.cells[0].ranks]), ("x",))
    check(mesh)
    rows = Rows(args.out)
    for cell in args.cells:
        measure_cell(cell, args.passes, mesh, args.method, rows)


if __name__ == "__main__":
    main()
