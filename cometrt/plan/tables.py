"""The plan: tables of fixed shape, one set per rank and forward, used again in backward.

A *pair* is one (source, token, k); its number is (source * max_tokens + token) * K + k, and
source * max_tokens + token is its *global token*. -1 fills what a table does not use.
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
    """Sizes of a plan's tables, from the spec alone, equal on all ranks."""

    geometry: Geometry
    config: TileConfig

    @functools.cached_property
    def digest(self) -> int:
        """63-bit hash: equal where tables and saved arrays have the same shapes and meaning. Most
        of the config only says who does what when."""
        config, size = self.config, self.geometry.size
        tables = config.block_m, config.block_tokens, config.last_distances(size)
        return digest(self.geometry.spec, size, *tables)

    @property
    def balanced_rows(self) -> float:
        """Rows of a rank when every rank brings max_tokens and all experts get the same."""
        spec = self.geometry.spec
        return self.geometry.size * spec.max_tokens * spec.topk / self.geometry.ep

    @property
    def capacity(self) -> int:
        """Rows a rank holds: capacity_factor times the balanced count, plus padding; a multiple
        of block_m, at most the worst case."""
        spec, block_m = self.geometry.spec, self.config.block_m
        local_experts = self.geometry.local_experts
        tokens = self.geometry.size * spec.max_tokens
        worst = tokens * min(spec.topk, local_experts)
        wanted = math.ceil(min(spec.capacity_factor * self.balanced_rows, worst))
        rows = wanted + local_experts * (block_m - 1)
        return rows // block_m * block_m  # an aligned need never exceeds an aligned bound

    @property
    def max_tiles(self) -> int:
        return self.capacity // self.config.block_m

    @property
    def global_tokens(self) -> int:
        return self.geometry.size * self.geometry.spec.max_tokens

    @property
    def max_contributors(self) -> int:
        """Most ranks that compute rows of one token."""
        return min(self.geometry.spec.topk, self.geometry.ep) * self.geometry.spec.tp

    @property
    def staging_rows(self) -> int:
        """Most partial rows that all contributors together send to one home."""
        return self.geometry.spec.max_tokens * min(self.max_contributors, self.geometry.size - 1)

    @property
    def blocks_per_home(self) -> int:
        return self.config.token_blocks(self.geometry.spec.max_tokens)


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """One rank's view of one exchange. int32 unless said.

    Rows, sorted by (local expert, ring distance of the source, token):
        expert_offsets [E_l + 1]: first row of each expert, a multiple of block_m; last, the end.
        expert_rows [E_l]: real rows of each expert; the rest up to the next offset are padding.
        row_pair [capacity]: pair of each row, -1 for a pad.
        row_weight [capacity] float32: router weight of each row, 0 for a pad.
        pair_row [W * max_tokens, K]: row of each pair that is computed here.
    M-tiles (tile m is rows [m * block_m, (m + 1) * block_m)):
        num_tiles [1]
        tile_expert, tile_distance [max_tiles]: expert, largest ring distance within the tile.
        tile_order [max_tiles]: layer0's order: by (wave of the distance, expert, index). Layer1
            walks it backwards.
    Dispatch:
        pull_tokens [W * max_tokens]: global tokens to pull, local ones too, in the order in
            which layer0 needs them.
        pull_offsets [max_tiles + 1]: the p-th tile in order needs pulls [0, offsets[p + 1]).
    Combine, as a contributor:
        send_tokens [W * max_tokens]: global tokens by home, in the order in which layer1
            finishes them; send_offsets [W + 1] by home; nothing for this rank itself.
        send_base [W]: this rank's first slot in each home's staging buffer.
        push_blocks [W * blocks_per_home]: items (home * blocks_per_home + block) in the order
            in which layer1 finishes them; num_blocks [1].
    Combine, as a home:
        staging_row [max_tokens, W]: staging slot of each own token from the contributor at ring
            distance d (column d; column 0, this rank itself, is not staged).
        staging_base [W]: first slot of the contributor at ring distance d.
    num_tokens [W]: tokens of each rank.

    expert_rows, tile_distance and num_tokens are for GEMMs on the device and for checks; the host
    executor does without.
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
    staging_row: np.ndarray
    staging_base: np.ndarray
    num_tokens: np.ndarray

    def arrays(self) -> tuple[np.ndarray, ...]:
        """All tables, in the order of the fields."""
        return tuple(getattr(self, field.name) for field in dataclasses.fields(self))

    @property
    def num_rows(self) -> int:
        """Rows in use, padding included."""
        return int(self.expert_offsets[-1])

    def dispatch_order(self) -> list[int]:
        return [int(tile) for tile in self.tile_order[: self.num_tiles[0]]]

    def combine_order(self) -> list[int]:
        """Layer0's order backwards: farthest source first, local tokens last."""
        return self.dispatch_order()[::-1]

    def pulls_of(self, position: int) -> np.ndarray:
        """Global tokens that the `position`-th tile of layer0 is the first to need."""
        return self.pull_tokens[self.pull_offsets[position] : self.pull_offsets[position + 1]]

    def pushes(self, shape: PlanShape) -> Iterator[tuple[int, int, np.ndarray]]:
        """(home, block, global tokens of the block), in the order in which layer1 ends them."""
        size = shape.config.block_tokens
        for item in self.push_blocks[: self.num_blocks[0]]:
            home, block = divmod(int(item), shape.blocks_per_home)
            tokens = self.send_tokens[self.send_offsets[home] : self.send_offsets[home + 1]]
            yield home, block, tokens[block * size : (block + 1) * size]


def plan_table_shapes(shape: PlanShape) -> dict[str, tuple[int, ...]]:
    """Shape of each table, in the order of Plan's fields."""
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
        "staging_row": (spec.max_tokens, size),
        "staging_base": (size,),
        "num_tokens": (size,),
    }
