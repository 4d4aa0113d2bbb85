"""The comm role: pull token rows, push partial rows to their homes, and reduce them there.

`tokens` are always global tokens. `token_rows` [n, K] holds each token's rows on this rank in the
order of k; -1: another rank computes the pair.
"""

from __future__ import annotations

import numpy as np

from cometrt.host.exchange import Exchange


def pull_rows(ex: Exchange, name: str, rows: np.ndarray) -> None:
    """Fill rows [capacity, H] with the tokens of `name` ("x" or "dy") that this rank computes.

    Pulls follow the dispatch order. A token crosses the link once and is written to all its rows.
    Signals tile_filled.
    """
    plan, config, spec = ex.plan, ex.shape.config, ex.shape.geometry.spec
    filled, me = ex.tile_filled[name], ex.world.rank
    row_bytes = spec.hidden * rows.dtype.itemsize
    for order_idx, tile in enumerate(plan.dispatch_order()):
        tokens = plan.pulls_of(order_idx)
        sources = tokens // spec.max_tokens
        remote = int((sources != me).sum())
        local_bytes, link_bytes = (len(tokens) - remote) * row_bytes, remote * row_bytes
        with ex.step("comm", "pull", tile, local_bytes=local_bytes, link_bytes=link_bytes):
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
    """Combine rows [capacity, H] into out [T, H]: the sum of each token's rows on all ranks.

    For each N-chunk, reduce and push the token blocks of other homes. The reduction at home runs
    one N-chunk behind, so that the partial rows it waits for are already on their way.

    Args:
        weighted: whether to multiply each row by its router weight.
        dweight_rows: [capacity] gradients of the router weights, sent with the first N-chunk.
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
    """Zero this rank's dweight before publishing. Contributors write only pairs that are kept."""
    ex.heap.array("dweight")[:, :num_tokens] = 0


def gather_dweight(ex: Exchange, num_tokens: int) -> np.ndarray:
    """dweight [T, K] float32 after `combine`: the sum of the shards' parts, in shard order."""
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
    """Reduce and push one N-chunk of all token blocks.

    Waits for tile_done; signals partials_ready.
    """
    plan, me = ex.plan, ex.world.rank
    begin, end = ex.n_chunks[chunk]
    for home, block, tokens in plan.pushes(ex.shape):
        token_rows = plan.pair_row[tokens]
        _wait_rows(ex, token_rows, chunk)
        nbytes = len(tokens) * (end - begin) * rows.dtype.itemsize
        with ex.step("comm", "reduce and push", block, link_bytes=nbytes):
            partial = _sum_rows(ex, rows, token_rows, begin, end, weighted)
            first = plan.send_base[home] + block * int(plan.block_tokens[0])
            staging = ex.heap.array("staging", home)
            staging[first : first + len(tokens), begin:end] = partial.astype(rows.dtype)
            if dweight_rows is not None:
                _send_dweight(ex, home, tokens, dweight_rows)
            ex.world.fence()
            ex.heap.array("partials_ready", home)[me, block, chunk] = ex.epoch


def _reduce_at_home(
    ex: Exchange, rows: np.ndarray, out: np.ndarray, chunk: int, weighted: bool
) -> None:
    """Reduce one N-chunk of this rank's tokens. Waits for tile_done and partials_ready.

    Sums are in fp32 and in a fixed order: own rows, then contributors by ring distance.
    """
    plan, me, size = ex.plan, ex.world.rank, int(ex.plan.block_tokens[0])
    first_token = me * ex.shape.geometry.spec.max_tokens
    staging = ex.heap.array("staging")
    begin, end = ex.n_chunks[chunk]
    for first in range(0, len(out), size):
        last = min(first + size, len(out))
        token_rows = plan.pair_row[first_token + first : first_token + last]
        staging_rows = plan.staging_row[first:last]
        _wait_rows(ex, token_rows, chunk)
        for d, contributor in enumerate(ex.shape.geometry.ring()[1:], start=1):
            staged = staging_rows[staging_rows[:, d] >= 0, d]
            for block in np.unique((staged - plan.staging_base[d]) // size):
                ex.wait_partials(contributor, int(block), chunk)
        nbytes = int((staging_rows >= 0).sum()) * (end - begin) * rows.dtype.itemsize
        with ex.step("comm", "reduce at home", first // size, local_bytes=nbytes):
            total = _sum_rows(ex, rows, token_rows, begin, end, weighted)
            for d in range(1, ex.world.size):
                there = staging_rows[:, d] >= 0
                total[there] += staging[staging_rows[there, d], begin:end].astype(np.float32)
            out[first:last, begin:end] = total.astype(out.dtype)


def _wait_rows(ex: Exchange, token_rows: np.ndarray, chunk: int) -> None:
    """Wait for tile_done of the N-chunk in all M-tiles that hold the rows."""
    ex.wait_done(np.unique(token_rows[token_rows >= 0] // ex.shape.config.block_m), chunk)


def _sum_rows(
    ex: Exchange,
    rows: np.ndarray,
    token_rows: np.ndarray,
    begin: int,
    end: int,
    weighted: bool,
) -> np.ndarray:
    """[n, end - begin] fp32: the sum of each token's rows on this rank, in the order of k."""
    total = np.zeros((len(token_rows), end - begin), np.float32)
    for k in range(token_rows.shape[1]):
        here = token_rows[:, k] >= 0
        row = token_rows[here, k]
        addend = rows[row, begin:end].astype(np.float32)
        if weighted:
            addend *= ex.plan.row_weight[row, None]
        total[here] += addend
    return total


def _send_dweight(ex: Exchange, home: int, tokens: np.ndarray, dweight_rows: np.ndarray) -> None:
    """Write into this shard's part of the home's dweight. Each (shard, token, k) has one writer."""
    staged = ex.heap.array("dweight", home)[ex.shape.geometry.shard]
    token_rows = ex.plan.pair_row[tokens]
    index, k = np.nonzero(token_rows >= 0)
    local = tokens[index] - home * ex.shape.geometry.spec.max_tokens
    staged[local, k] = dweight_rows[token_rows[index, k]]
