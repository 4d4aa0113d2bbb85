"""The tables of a plan. Forward makes one set per rank; backward uses it again.

A *pair* is one (source, token, k). Its *global token* is source * max_tokens + token. Its index
is global token * K + k. Tables have fixed shapes; unused entries are -1.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator

import numpy as np

from cometrt.plan.config import TileConfig
from cometrt.specs import Geometry, digest


@dataclasses.dataclass(frozen=True)
class PlanShape:
    """Sizes of a plan's tables. They follow from spec, config and W, and are equal on all ranks."""

    geometry: Geometry
    config: TileConfig

    def of_backward(self) -> PlanShape:
        """The same tables, with the config of a backward."""
        return dataclasses.replace(self, config=self.config.of_backward())

    @functools.cached_property
    def digest(self) -> int:
        """63-bit hash. Equal digests: tables and residuals have the same shapes and meaning.

        The other fields of the config change only the schedule, not the tables.
        """
        config, geometry = self.config, self.geometry
        of_geometry = geometry.spec, geometry.size, geometry.row_sets
        blocks = config.block_m, config.block_tokens, config.min_token_blocks, config.rail_slices
        return digest(*of_geometry, *blocks, config.last_distances(geometry.size))

    @property
    def balanced_rows(self) -> float:
        """Rows of a rank if each rank has max_tokens tokens and all experts get equally many."""
        spec = self.geometry.spec
        return self.geometry.size * spec.max_tokens * spec.topk / self.geometry.ep

    @property
    def capacity(self) -> int:
        """Rows that a rank can hold, a multiple of block_m.

        capacity_factor times the balanced rows, but at most the rows of the worst routing; plus
        padding rows of each local expert.
        """
        spec, block_m = self.geometry.spec, self.config.block_m
        local_experts = self.geometry.local_experts
        tokens = self.geometry.size * spec.max_tokens
        worst = tokens * min(spec.topk, self.geometry.num_weights)  # all of a token's: in one set
        wanted = math.ceil(min(spec.capacity_factor * self.balanced_rows, worst))
        rows = wanted + local_experts * (block_m - 1)
        return rows // block_m * block_m  # rounding down is safe: the rows in use are aligned too

    @property
    def max_tiles(self) -> int:
        return self.capacity // self.config.block_m

    @property
    def global_tokens(self) -> int:
        return self.geometry.size * self.geometry.spec.max_tokens

    @property
    def max_contributors(self) -> int:
        """The most ranks that compute rows of one token."""
        return min(self.geometry.spec.topk, self.geometry.ep) * self.geometry.spec.tp

    @property
    def staging_rows(self) -> int:
        """The most partial rows that all contributors together push to one home."""
        return self.geometry.spec.max_tokens * min(self.max_contributors, self.geometry.size - 1)

    @property
    def blocks_per_home(self) -> int:
        return self.config.token_blocks(self.geometry.spec.max_tokens)


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """One rank's tables for one exchange, int32 unless stated. An expert is a plan expert, and E_l
    is `Geometry.local_experts`.

    Rows, sorted by (local expert, ring distance of the source, token):
        expert_offsets [E_l + 1]: first row of each expert, a multiple of block_m; last, the end.
        expert_rows [E_l]: number of real rows; padding rows fill up to the next offset.
        row_pair [capacity]: pair index of each row; -1 for a padding row.
        row_weight [capacity] float32: router weight of each row; 0 for a padding row.
        pair_row [W * max_tokens, K]: row of each pair that this rank computes.
    M-tiles (tile m is rows [m * block_m, (m + 1) * block_m)):
        num_tiles [1]
        tile_expert [max_tiles]
        tile_distance [max_tiles]: largest ring distance of the tile's rows.
        tile_order [max_tiles]: the dispatch order, sorted by (phase of the distance, expert,
            tile). The combine order is its reverse.
    Dispatch:
        pull_tokens [W * max_tokens]: global tokens to pull, local ones too, in the order in
            which the dispatch order needs them.
        pull_offsets [max_tiles + 1]: the i-th tile in order needs pull_tokens[: offsets[i + 1]].
    Combine, as a contributor:
        send_tokens [W * max_tokens]: global tokens to push, sorted by home, then by the order in
            which their last tile completes. Tokens of this rank itself are not included.
        send_offsets [W + 1]: begin of each home's tokens in send_tokens.
        send_base [W]: this rank's first staging row on each home.
        push_blocks [W * blocks_per_home]: token blocks (home * blocks_per_home + block) in the
            order in which they complete.
        num_blocks [1]
        block_tokens [1]: tokens of a token block in this exchange; the last one of a home may have
            fewer.
    Combine, as a home:
        staging_row [max_tokens, W]: staging row of each own token, by ring distance of the
            contributor. Column 0 is unused: rows of this rank itself are not staged.
        staging_base [W]: first staging row of the contributor at each ring distance.
    num_tokens [W]: tokens of each rank.

    The device's GEMMs and the tests read expert_rows, tile_distance and num_tokens; the host
    executor does not.
    """

    expert_offsets: np.ndarray
    expert_rows: np.ndarray
    row_pair: np.ndarray
    row_weight: np.ndarray
    pair_row: np.ndarray
    num_tiles: np.ndarray
    tile_expert: np.ndarray
    tile_distance: np.ndarray
    tile_order: np.ndarray
    pull_tokens: np.ndarray
    pull_offsets: np.ndarray
    send_tokens: np.ndarray
    send_offsets: np.ndarray
    send_base: np.ndarray
    push_blocks: np.ndarray
    num_blocks: np.ndarray
    block_tokens: np.ndarray
    staging_row: np.ndarray
    staging_base: np.ndarray
    num_tokens: np.ndarray

    def arrays(self) -> tuple[np.ndarray, ...]:
        """All tables in the order of the fields."""
        return tuple(getattr(self, field.name) for field in dataclasses.fields(self))

    @property
    def num_rows(self) -> int:
        """Rows in use, padding rows included."""
        return int(self.expert_offsets[-1])

    def dispatch_order(self) -> list[int]:
        """M-tiles in the order of the first GEMM: near sources first."""
        return [int(tile) for tile in self.tile_order[: self.num_tiles[0]]]

    def combine_order(self) -> list[int]:
        """M-tiles in the order of the second GEMM: far sources first, local tokens last."""
        return self.dispatch_order()[::-1]

    def pulls_of(self, order_idx: int) -> np.ndarray:
        """Global tokens whose first row lies in the tile at that index of the dispatch order."""
        return self.pull_tokens[self.pull_offsets[order_idx] : self.pull_offsets[order_idx + 1]]

    def pushes(self, shape: PlanShape) -> Iterator[tuple[int, int, np.ndarray]]:
        """(home, token block, its global tokens) in the order in which the blocks complete."""
        size = int(self.block_tokens[0])
        for index in self.push_blocks[: self.num_blocks[0]]:
            home, block = divmod(int(index), shape.blocks_per_home)
            tokens = self.send_tokens[self.send_offsets[home] : self.send_offsets[home + 1]]
            yield home, block, tokens[block * size : (block + 1) * size]


def plan_table_shapes(shape: PlanShape) -> dict[str, tuple[int, ...]]:
    """Name -> shape of each table, in the order of Plan's fields."""
    geometry, spec = shape.geometry, shape.geometry.spec
    size, experts = geometry.size, geometry.local_experts
    return {
        "expert_offsets": (experts + 1,),
        "expert_rows": (experts,),
        "row_pair": (shape.capacity,),
        "row_weight": (shape.capacity,),
        "pair_row": (shape.global_tokens, spec.topk),
        "num_tiles": (1,),
        "tile_expert": (shape.max_tiles,),
        "tile_distance": (shape.max_tiles,),
        "tile_order": (shape.max_tiles,),
        "pull_tokens": (shape.global_tokens,),
        "pull_offsets": (shape.max_tiles + 1,),
        "send_tokens": (shape.global_tokens,),
        "send_offsets": (size + 1,),
        "send_base": (size,),
        "push_blocks": (size * shape.blocks_per_home,),
        "num_blocks": (1,),
        "block_tokens": (1,),
        "staging_row": (spec.max_tokens, size),
        "staging_base": (size,),
        "num_tokens": (size,),
    }
