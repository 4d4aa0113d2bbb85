"""The comm role: pull rows from their homes, send partial sums back, add them up at home.

In every function `tokens` are global tokens and a row of [n, K] `rows` holds one token's rows
on this rank in the order of k, -1 where the pair is computed elsewhere.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from cometrt.host.exchange import Exchange


def pull_rows(ex: Exchange, name: str, rows: np.ndarray) -> None:
    """Fill rows [capacity, H] with the tokens of `name` ("x" or "dy") that this rank needs.

    In layer0's order of need; a token crosses the link once and is written to all its rows.
    Releases tile_filled.
    """
    plan, config, spec = ex.plan, ex.shape.config, ex.shape.geometry.spec
    filled, me = ex.tile_filled[name], ex.world.rank
    row_bytes = spec.hidden * rows.dtype.itemsize
    for position, tile in enumerate(plan.dispatch_order()):
        tokens = plan.pulls_of(position)
        sources = tokens // spec.max_tokens
        remote = int((sources != me).sum())
        moved: dict[str, Any] = {
            "local_bytes": (len(tokens) - remote) * row_bytes,
            "link_bytes": remote * row_bytes,
        }
        with ex.step("comm", "pull", tile, **moved):
            begin = tile * config.block_m
            padding = begin + np.flatnonzero(plan.row_pair[begin : begin + config.block_m] < 0)
            rows[padding] = 0
            filled[tile] += len(padding)
            for source in np.unique(sources):
                part = tokens[sources == source]
                pulled = ex.heap.array(name, int(source))[part - source * spec.max_tokens]
                targets = plan.pair_row[part]
                for k in range(spec.topk):
                    here = targets[:, k] >= 0
                    rows[targets[here, k]] = pulled[here]
                written = targets[targets >= 0] // config.block_m
                filled += np.bincount(written, minlength=len(filled))


def combine(
    ex: Exchange,
    rows: np.ndarray,
    out: np.ndarray,
    *,
    weighted: bool,
    dweight_rows: np.ndarray | None = None,
) -> None:
    """Turn rows [capacity, H] into out [T, H]: the sum over each token's rows on all ranks.

    Chunk by chunk: reduce and push all blocks that have another home, then, one chunk behind,
    so that partial sums are under way meanwhile, add up at home. With `dweight_rows` [capacity]
    each row's weight gradient goes home with the first chunk.
    """
    for chunk in range(len(ex.n_chunks)):
        _reduce_and_push(ex, rows, chunk, weighted, dweight_rows if chunk == 0 else None)
        if chunk > 0:
            _reduce_at_home(ex, rows, out, chunk - 1, weighted)
    _reduce_at_home(ex, rows, out, len(ex.n_chunks) - 1, weighted)
    if dweight_rows is not None:
        me, max_tokens = ex.world.rank, ex.shape.geometry.spec.max_tokens
        _send_dweight(ex, me, me * max_tokens + np.arange(len(out)), dweight_rows)


def clear_dweight(ex: Exchange, num_tokens: int) -> None:
    """Before publishing: only kept pairs will be written, dropped ones have gradient 0."""
    ex.heap.array("dweight")[:, :num_tokens] = 0


def gather_dweight(ex: Exchange, num_tokens: int) -> np.ndarray:
    """[T, K] float32, after `combine`: the shards' parts added in shard order."""
    parts = ex.heap.array("dweight")[:, :num_tokens]
    total = parts[0].copy()
    for part in parts[1:]:
        total += part
    return total


def _reduce_and_push(
    ex: Exchange,
    rows: np.ndarray,
    chunk: int,
    weighted: bool,
    dweight_rows: np.ndarray | None,
) -> None:
    """Releases partials_ready at each home; acquires tile_done."""
    plan, me = ex.plan, ex.world.rank
    begin, end = ex.n_chunks[chunk]
    for home, block, tokens in plan.pushes(ex.shape):
        token_rows = plan.pair_row[tokens]
        _wait_rows(ex, token_rows, chunk)
        nbytes = len(tokens) * (end - begin) * rows.dtype.itemsize
        with ex.step("comm", "reduce and push", block, link_bytes=nbytes):
            partial = _sum_rows(ex, rows, token_rows, begin, end, weighted)
            slot = plan.send_base[home] + block * ex.shape.config.block_tokens
            staging = ex.heap.array("staging", home)
            staging[slot : slot + len(tokens), begin:end] = partial.astype(rows.dtype)
            if dweight_rows is not None:
                _send_dweight(ex, home, tokens, dweight_rows)
            ex.world.fence()
            ex.heap.array("partials_ready", home)[me, block, chunk] = ex.epoch


def _reduce_at_home(
    ex: Exchange, rows: np.ndarray, out: np.ndarray, chunk: int, weighted: bool
) -> None:
    """Own rows first, in fp32, then the contributors by ring distance. Acquires tile_done and
    partials_ready."""
    plan, me, size = ex.plan, ex.world.rank, ex.shape.config.block_tokens
    first_token = me * ex.shape.geometry.spec.max_tokens
    staging = ex.heap.array("staging")
    begin, end = ex.n_chunks[chunk]
    for first in range(0, len(out), size):
        last = min(first + size, len(out))
        token_rows = plan.pair_row[first_token + first : first_token + last]
        slots = plan.staging_row[first:last]
        _wait_rows(ex, token_rows, chunk)
        for d, contributor in enumerate(ex.shape.geometry.ring()[1:], start=1):
            staged = slots[slots[:, d] >= 0, d]
            for block in np.unique((staged - plan.staging_base[d]) // size):
                ex.wait_partials(contributor, int(block), chunk)
        nbytes = int((slots >= 0).sum()) * (end - begin) * rows.dtype.itemsize
        with ex.step("comm", "reduce at home", first // size, local_bytes=nbytes):
            total = _sum_rows(ex, rows, token_rows, begin, end, weighted)
            for d in range(1, ex.world.size):
                there = slots[:, d] >= 0
                total[there] += staging[slots[there, d], begin:end].astype(np.float32)
            out[first:last, begin:end] = total.astype(out.dtype)


def _wait_rows(ex: Exchange, token_rows: np.ndarray, chunk: int) -> None:
    ex.wait_done(np.unique(token_rows[token_rows >= 0] // ex.shape.config.block_m), chunk)


def _sum_rows(
    ex: Exchange,
    rows: np.ndarray,
    token_rows: np.ndarray,
    begin: int,
    end: int,
    weighted: bool,
) -> np.ndarray:
    """[n, end - begin] fp32: each token's rows here added in the order of k."""
    total = np.zeros((len(token_rows), end - begin), np.float32)
    for k in range(token_rows.shape[1]):
        here = token_rows[:, k] >= 0
        row = token_rows[here, k]
        term = rows[row, begin:end].astype(np.float32)
        if weighted:
            term *= ex.plan.row_weight[row, None]
        total[here] += term
    return total


def _send_dweight(ex: Exchange, home: int, tokens: np.ndarray, dweight_rows: np.ndarray) -> None:
    """Into this shard's part of the home's dweight: one writer for each (shard, token, k)."""
    staged = ex.heap.array("dweight", home)[ex.shape.geometry.shard]
    token_rows = ex.plan.pair_row[tokens]
    index, k = np.nonzero(token_rows >= 0)
    local = tokens[index] - home * ex.shape.geometry.spec.max_tokens
    staged[local, k] = dweight_rows[token_rows[index, k]]
