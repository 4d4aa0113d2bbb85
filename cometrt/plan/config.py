"""`TileConfig`: tile sizes and tile orders of a layer."""

from __future__ import annotations

import dataclasses
from typing import Any

from cometrt.specs import ALIGNMENT, check_choice, check_int

ORDERS = ("phases", "columns")
GEMMS = ("engine", "cublas")
MAX_RAIL_SLICES = 16  # kMaxRailSlices of kernels_cu/nodes/rail_params.cuh
MAX_RAIL_PARTS = 4  # kMaxLateParts of kernels_cu/protocol/late_parts.cuh

_LATE_TOKEN_BLOCKS = 1024

# Of TileConfig: what concerns the rail between nodes.
RAIL_FIELDS = ("rail_slices", "rail_parts", "nccl_sms")


@dataclasses.dataclass(frozen=True)
class TileConfig:
    """Tile sizes and tile orders of a layer, equal on all ranks. Only block_m and gemm change the
    bits of results, and rail_slices and rail_parts those of weight gradients.

    The constructor checks each field. Rules that depend on the spec, the device or the mode are
    checked when a layer is made.

    Args:
        block_m: rows of an M-tile. The first row of each expert is a multiple of it. On "cuda"
            with gemm="engine" it must be 128.
        block_n: columns of an N-tile on "host"; a multiple of 16. The last N-tile may be narrower.
            The engine on "cuda" has 256, or 128 in the fused forward of small batches.
        block_tokens: the most tokens of a token block, the unit that combine reduces and pushes.
        min_token_blocks: a call has smaller token blocks where it would otherwise have fewer of
            them than this. Its blocks follow from the largest number of tokens of a rank.
        order: tile order of the down GEMM. "phases": whole rows, in reverse dispatch order.
            "columns" (COMET's): the same walk once for each N-chunk of H.
        num_phases: number of phases in the dispatch order. A tile belongs to the phase of its
            farthest row. 1: one phase. n >= 2: local tiles, then n - 1 equal groups of remote
            ranks, nearest first. With more phases the GEMM starts sooner, but reads each expert's
            weights once per phase.
        raster_group: number of N-tiles that all M-tiles of an expert compute before they go on to
            the next N-tiles; even. None: as many as the L2 cache can hold.
        n_chunk: columns of H that are reduced and pushed together if order="columns"; a multiple
            of block_n, and on "cuda" in mode "fused" of 256.
        gemm: the GEMM on "cuda": "engine" (kernels_cu/gemm) or "cublas".
        pipeline_chunks: number of parts of the dispatch order in mode "chunked". The pull of one
            part, the GEMMs of the part before and the push of the one before that overlap.
        comm_sms: SMs that pull and push beside the GEMMs in mode "chunked"; even. None: about an
            eighth of the SMs.
        dispatch_ctas, combine_ctas: number of CTAs whose comm warps transfer rows in the fused
            kernels dispatch_gemm and gemm_combine. None, or more than the grid has: all CTAs.
        backward_order, backward_n_chunk, backward_dispatch_ctas, backward_combine_ctas: the same of
            backward, where the up dgrad has the order of the down GEMM. None: as in forward. With
            save="nothing", dispatch_gemm has dispatch_ctas in a backward too.
        rail_slices: over several nodes, calls of the node's layer in one call. 1: all tokens at
            once, after they have crossed between nodes and before results do. n >= 3: half of the
            rank's own tokens, n - 2 parts of other nodes' tokens, the other half. Each part crosses
            while another slice is computed. 2 * nodes makes all slices equally large.
        rail_parts: over several nodes, in mode "fused" with rail_slices=1: parts in which tokens of
            other nodes arrive during the one call of the node's layer, and in which their results
            leave. It then has order="phases" and num_phases=1 in both passes, and min_token_blocks
            of at least 1024. 0: all tokens have crossed before the call.
        nccl_sms: on "cuda" with rail_slices > 1 or rail_parts > 0: SMs that the layer's kernels
            leave to NCCL; even. None: two for each CTA that NCCL_MAX_CTAS allows NCCL.

    Raises:
        ValueError: naming the argument, its value and the rule.
    """

    block_m: int = 128
    block_n: int = 128
    block_tokens: int = 64
    min_token_blocks: int = 256
    order: str = "phases"
    num_phases: int = 2
    raster_group: int | None = None
    n_chunk: int = 256
    gemm: str = "engine"
    pipeline_chunks: int = 2
    comm_sms: int | None = None
    dispatch_ctas: int | None = None
    combine_ctas: int | None = None
    backward_order: str | None = None
    backward_n_chunk: int | None = None
    backward_dispatch_ctas: int | None = None
    backward_combine_ctas: int | None = None
    rail_slices: int = 1
    rail_parts: int = 0
    nccl_sms: int | None = None

    def __post_init__(self) -> None:
        counts = ("block_m", "block_n", "block_tokens", "min_token_blocks", "n_chunk")
        for name in (*counts, "num_phases", "pipeline_chunks"):
            object.__setattr__(self, name, check_int(name, getattr(self, name), minimum=1))
        slices = check_int("rail_slices", self.rail_slices, minimum=1, maximum=MAX_RAIL_SLICES)
        object.__setattr__(self, "rail_slices", slices)
        if slices == 2:
            raise ValueError("rail_slices must be 1, or at least 3 (got 2)")
        parts = check_int("rail_parts", self.rail_parts, minimum=0, maximum=MAX_RAIL_PARTS)
        object.__setattr__(self, "rail_parts", parts)
        if parts and slices > 1:
            raise ValueError(f"rail_parts must be 0 with rail_slices={slices} (got {parts})")
        optional = ("raster_group", "dispatch_ctas", "combine_ctas", "comm_sms", "backward_n_chunk")
        for name in (*optional, "backward_dispatch_ctas", "backward_combine_ctas", "nccl_sms"):
            if (value := getattr(self, name)) is not None:
                even = name in ("raster_group", "comm_sms", "nccl_sms")
                object.__setattr__(self, name, check_int(name, value, minimum=2 if even else 1))
                if even and value % 2:
                    raise ValueError(f"{name} must be even (got {value})")
        check_choice("order", self.order, ORDERS)
        if self.backward_order is not None:
            check_choice("backward_order", self.backward_order, ORDERS)
        check_choice("gemm", self.gemm, GEMMS)
        if self.block_n % ALIGNMENT:
            raise ValueError(f"block_n must be a multiple of {ALIGNMENT} (got {self.block_n})")
        for name in ("n_chunk", "backward_n_chunk"):
            if (getattr(self, name) or 0) % self.block_n:
                raise ValueError(
                    f"{name} must be a multiple of block_n={self.block_n} "
                    f"(got {getattr(self, name)})"
                )

    def of_backward(self) -> TileConfig:
        """The config of a backward: its own fields, where they are not None, in place of those of
        a forward."""
        changes: dict[str, Any] = {}
        for name in ("order", "n_chunk", "dispatch_ctas", "combine_ctas"):
            if (value := getattr(self, f"backward_{name}")) is not None:
                changes[name] = value
            changes[f"backward_{name}"] = None
        return dataclasses.replace(self, **changes)

    def of_node(self) -> TileConfig:
        """The config of the layer within a node: with late parts, rows are multiplied in the order
        in which they arrive, and summed in the reverse order, in blocks for all combine warps."""
        if not self.rail_parts:
            return self
        orders: dict[str, Any] = {"order": "phases", "backward_order": None}
        blocks = max(self.min_token_blocks, _LATE_TOKEN_BLOCKS)
        return dataclasses.replace(
            self, num_phases=1, min_token_blocks=blocks, backward_n_chunk=None, **orders
        )

    def last_distances(self, size: int) -> list[int]:
        """The largest ring distance of each phase, with `size` ranks."""
        groups = min(self.num_phases, size) - 1
        if groups == 0:
            return [size - 1]
        return [0] + [-(-phase * (size - 1) // groups) for phase in range(1, groups + 1)]

    def num_n_chunks(self, hidden: int) -> int:
        """Length of `n_chunks(hidden)`."""
        return 1 if self.order == "phases" else -(-hidden // self.n_chunk)

    def n_chunks(self, hidden: int) -> list[tuple[int, int]]:
        """[begin, end) column ranges of H that are reduced and pushed together."""
        width = hidden if self.order == "phases" else self.n_chunk
        return _ranges(hidden, width)

    def n_tiles(self, begin: int, end: int) -> list[tuple[int, int]]:
        """[begin, end) column ranges of the N-tiles within the given range, on "host"."""
        return [(begin + lo, begin + hi) for lo, hi in _ranges(end - begin, self.block_n)]

    def tokens_per_block(self, num_tokens: int) -> int:
        """Tokens of a token block in a call in which the rank with most tokens has so many."""
        return max(1, min(self.block_tokens, -(-num_tokens // self.min_token_blocks)))

    def token_blocks(self, max_tokens: int) -> int:
        """The most token blocks that one rank pushes to one home, if no rank has more tokens."""
        smallest = min(max_tokens, self.min_token_blocks) if self.block_tokens > 1 else 0
        return max(smallest, -(-max_tokens // self.block_tokens))


def _ranges(length: int, width: int) -> list[tuple[int, int]]:
    return [(begin, min(begin + width, length)) for begin in range(0, length, width)]
