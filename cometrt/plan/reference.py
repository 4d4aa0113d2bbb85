"""The planner in NumPy. The device planner must compute identical tables.

Every rank computes its plan from the same routing tables by the same rules. So contributor and
home agree on every staging row without communication.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from cometrt.errors import CapacityError
from cometrt.plan.routing import RoutingTables, check_routing
from cometrt.plan.tables import Plan, PlanShape

_NEVER = np.iinfo(np.int32).max  # order index of a token that has no row on a rank


def make_plan(tables: RoutingTables, shape: PlanShape) -> Plan:
    """The plan of rank ``shape.geometry.rank``.

    Raises:
        RoutingError, CapacityError: the same on every rank.
    """
    spec, me = shape.geometry.spec, shape.geometry.rank
    check_routing(tables, spec)
    pairs = _Pairs.of(tables, shape)
    ranks = [_RankTiles.of(pairs, shape, rank) for rank in range(shape.geometry.size)]
    _check_capacity(ranks, shape)
    mine = ranks[me]

    pair_row = mine.rows_of(pairs)  # [W * Tm, K]
    row_pair = np.full(shape.capacity, -1, np.int32)
    row_weight = np.zeros(shape.capacity, np.float32)
    here = pair_row.ravel() >= 0
    row_pair[pair_row.ravel()[here]] = np.flatnonzero(here)
    row_weight[pair_row.ravel()[here]] = tables.weights.ravel()[here]

    first = mine.first_order_idx(pairs)  # [W * Tm]
    pull_tokens, pull_offsets = _pulls(first, mine, shape)
    block_tokens = shape.config.tokens_per_block(int(tables.num_tokens.max()))
    send_tokens, send_offsets, push_blocks, num_blocks = _sends(first, shape, block_tokens)
    bases = _staging_bases(pairs, shape)  # [home, contributor]
    staging_row, staging_base = _staging(pairs, ranks, bases, shape)
    return Plan(
        expert_offsets=(mine.first_tile * shape.config.block_m).astype(np.int32),
        expert_rows=mine.rows.astype(np.int32),
        row_pair=row_pair,
        row_weight=row_weight,
        pair_row=pair_row,
        num_tiles=np.array([mine.num_tiles], np.int32),
        tile_expert=_fill(mine.expert, shape.max_tiles),
        tile_distance=_fill(mine.distance, shape.max_tiles),
        tile_order=_fill(mine.order, shape.max_tiles),
        pull_tokens=pull_tokens,
        pull_offsets=pull_offsets,
        send_tokens=send_tokens,
        send_offsets=send_offsets,
        send_base=bases[:, me].astype(np.int32),
        push_blocks=push_blocks,
        num_blocks=np.array([num_blocks], np.int32),
        block_tokens=np.array([block_tokens], np.int32),
        staging_row=staging_row,
        staging_base=staging_base,
        num_tokens=tables.num_tokens.astype(np.int32),
    )


@dataclasses.dataclass(frozen=True, eq=False)
class _Pairs:
    """All pairs, and counts of them, equal on all ranks. Tm is max_tokens."""

    ids: np.ndarray  # [W * Tm, K], -1 if there is no pair
    source: np.ndarray  # [W * Tm]
    counts: np.ndarray  # [W, E] pairs of each source for each expert
    index: np.ndarray  # [W * Tm, K] index of the pair among its source's pairs for its expert
    token_counts: np.ndarray  # [W, EP] tokens of each source that have a pair in each EP group

    @staticmethod
    def of(tables: RoutingTables, shape: PlanShape) -> _Pairs:
        size, max_tokens, topk = tables.ids.shape
        geometry = shape.geometry
        used = np.arange(max_tokens) < tables.num_tokens[:, None]
        ids = np.where(used[:, :, None], tables.ids, -1).reshape(-1, topk)
        source = np.repeat(np.arange(size), max_tokens)
        num_experts = geometry.spec.num_experts
        flat = np.flatnonzero(ids.ravel() >= 0)
        key = np.repeat(source, topk)[flat] * num_experts + ids.ravel()[flat]
        counts = np.bincount(key, minlength=size * num_experts)
        by_key = np.argsort(key, kind="stable")  # stable: equal keys stay in (token, k) order
        start = np.cumsum(counts) - counts
        index = np.full(ids.size, -1)
        index[flat[by_key]] = np.arange(flat.size) - start[key[by_key]]
        group = ids // geometry.local_experts
        token_counts = np.stack(
            [
                np.bincount(source[((group == g) & (ids >= 0)).any(axis=1)], minlength=size)
                for g in range(geometry.ep)
            ],
            axis=1,
        )
        return _Pairs(
            ids, source, counts.reshape(size, num_experts), index.reshape(ids.shape), token_counts
        )


@dataclasses.dataclass(frozen=True, eq=False)
class _RankTiles:
    """The M-tiles of one rank. They follow from pair counts, so every rank computes all of them."""

    rank: int
    block_m: int
    first_expert: int
    rows: np.ndarray  # [E_l]
    first_tile: np.ndarray  # [E_l + 1]
    before: np.ndarray  # [W, E_l] rows of an expert from sources nearer than each source
    expert: np.ndarray  # [tiles]
    distance: np.ndarray  # [tiles]
    order: np.ndarray  # [tiles] the dispatch order
    order_idx: np.ndarray  # [tiles] inverse of order

    @staticmethod
    def of(pairs: _Pairs, shape: PlanShape, rank: int) -> _RankTiles:
        size, experts, block_m = (
            shape.geometry.size,
            shape.geometry.local_experts,
            shape.config.block_m,
        )
        first_expert = rank // shape.geometry.spec.tp * experts
        counts = pairs.counts[:, first_expert : first_expert + experts]
        ring = (rank + np.arange(size)) % size
        cumulative = np.cumsum(counts[ring], axis=0)  # [distance, E_l], inclusive
        before = np.empty_like(cumulative)
        before[ring] = cumulative - counts[ring]
        rows = cumulative[-1]
        tiles = -(-rows // block_m)
        first_tile = np.concatenate([[0], np.cumsum(tiles)])
        expert = np.repeat(np.arange(experts), tiles)
        index = np.arange(len(expert)) - first_tile[expert]
        last_row = np.minimum((index + 1) * block_m, rows[expert]) - 1
        distance = (cumulative[:, expert] <= last_row).sum(axis=0)  # of the tile's last row
        phase = np.searchsorted(shape.config.last_distances(size), distance)
        order = np.lexsort((index, expert, phase))
        inverse = np.empty_like(order)
        inverse[order] = np.arange(len(order))
        return _RankTiles(
            rank, block_m, first_expert, rows, first_tile, before, expert, distance, order, inverse
        )

    @property
    def num_tiles(self) -> int:
        return len(self.order)

    def rows_of(self, pairs: _Pairs, tokens: slice = slice(None)) -> np.ndarray:
        """[tokens, K] int32: row on this rank of each pair of the given global tokens, or -1."""
        expert = pairs.ids[tokens] - self.first_expert
        here = (pairs.ids[tokens] >= 0) & (expert >= 0) & (expert < len(self.rows))
        expert = np.where(here, expert, 0)
        row = self.first_tile[expert] * self.block_m + pairs.index[tokens]
        row += self.before[pairs.source[tokens][:, None], expert]
        return np.where(here, row, -1).astype(np.int32)

    def first_order_idx(self, pairs: _Pairs, tokens: slice = slice(None)) -> np.ndarray:
        """[tokens]: dispatch order index of the first tile that needs each token, or _NEVER.

        The combine order is the reverse, so there this tile is the last of the token's.
        """
        row = self.rows_of(pairs, tokens)
        if not self.num_tiles:
            return np.full(len(row), _NEVER)
        order_idx = self.order_idx[np.maximum(row, 0) // self.block_m]
        return np.where(row >= 0, order_idx, _NEVER).min(axis=1)


def _check_capacity(ranks: list[_RankTiles], shape: PlanShape) -> None:
    needs = [tiles.num_tiles * shape.config.block_m for tiles in ranks]
    if max(needs) > shape.capacity:
        rank = int(np.argmax(needs))
        raise too_many_rows(rank, needs[rank], shape)


def too_many_rows(
    rank: int, need: int, shape: PlanShape, factor: float | None = None
) -> CapacityError:
    """The CapacityError for a rank that needs `need` rows, padding rows included.

    Args:
        factor: the capacity_factor of the whole layer, where the shape is that within a node.
    """
    # Capacity includes the most padding rows possible, so only real rows scale with the factor.
    rows = need - shape.geometry.local_experts * (shape.config.block_m - 1)
    own = shape.geometry.spec.capacity_factor
    enough = math.ceil(100 * ((factor or own) / own * rows / shape.balanced_rows)) / 100
    return CapacityError.build(
        rank=rank, need=need, capacity=shape.capacity, capacity_factor=enough
    )


def _pulls(first: np.ndarray, mine: _RankTiles, shape: PlanShape) -> tuple[np.ndarray, np.ndarray]:
    """pull_tokens and pull_offsets; `first`: of `first_order_idx`."""
    tokens = np.flatnonzero(first < _NEVER)
    distance = (tokens // shape.geometry.spec.max_tokens - mine.rank) % shape.geometry.size
    tokens = tokens[np.lexsort((tokens, distance, first[tokens]))]
    offsets = np.searchsorted(first[tokens], np.arange(shape.max_tiles + 1), side="left")
    return _fill(tokens, shape.global_tokens), offsets.astype(np.int32)


def _finish_order(first: np.ndarray) -> np.ndarray:
    """Tokens that have rows, in the order in which the combine order completes them."""
    tokens = np.flatnonzero(first < _NEVER)
    return tokens[np.lexsort((tokens, -first[tokens]))]


def _sends(
    first: np.ndarray, shape: PlanShape, size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """send_tokens, send_offsets, push_blocks and num_blocks; `first`: of `first_order_idx`;
    `size`: of a token block."""
    geometry, max_tokens = shape.geometry, shape.geometry.spec.max_tokens
    by_home, keys, blocks = [], [], []
    for home in range(geometry.size):
        begin = home * max_tokens
        tokens = begin + _finish_order(first[begin : begin + max_tokens])
        if home == geometry.rank:
            tokens = tokens[:0]
        by_home.append(tokens)
        for block in range(-(-len(tokens) // size)):
            last = tokens[min((block + 1) * size, len(tokens)) - 1]
            keys.append((-int(first[last]), geometry.distance(home), block))
            blocks.append(home * shape.blocks_per_home + block)
    order = sorted(range(len(blocks)), key=keys.__getitem__)
    offsets = np.concatenate([[0], np.cumsum([len(tokens) for tokens in by_home])])
    return (
        _fill(np.concatenate(by_home), shape.global_tokens),
        offsets.astype(np.int32),
        _fill(np.array([blocks[i] for i in order], int), geometry.size * shape.blocks_per_home),
        len(blocks),
    )


def _staging_bases(pairs: _Pairs, shape: PlanShape) -> np.ndarray:
    """[home, contributor]: first staging row. Contributors follow in the order of ring distance."""
    size, tp = shape.geometry.size, shape.geometry.spec.tp
    base = np.zeros((size, size), int)
    for home in range(size):
        ring = (home + np.arange(1, size)) % size
        staged = pairs.token_counts[home, ring // tp]
        base[home, ring] = np.cumsum(staged) - staged
    return base


def _staging(
    pairs: _Pairs, ranks: list[_RankTiles], bases: np.ndarray, shape: PlanShape
) -> tuple[np.ndarray, np.ndarray]:
    """staging_row and staging_base of this rank as a home."""
    me, size, max_tokens = shape.geometry.rank, shape.geometry.size, shape.geometry.spec.max_tokens
    own = slice(me * max_tokens, (me + 1) * max_tokens)
    row = np.full((max_tokens, size), -1, np.int32)
    base = np.zeros(size, np.int32)
    for d in range(1, size):
        contributor = (me + d) % size
        tokens = _finish_order(ranks[contributor].first_order_idx(pairs, own))
        base[d] = bases[me, contributor]
        row[tokens, d] = base[d] + np.arange(len(tokens))
    return row, base


def _fill(values: np.ndarray, length: int) -> np.ndarray:
    """`values` as an int32 table of that length, filled up with -1."""
    table = np.full(length, -1, np.int32)
    table[: len(values)] = values
    return table
