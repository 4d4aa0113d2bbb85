"""How a layer is cut into tiles, token blocks and N-chunks: one frozen, printable record."""

from __future__ import annotations

import dataclasses

from cometrt.specs import ALIGNMENT, check_choice, check_int

ORDERS = ("phases", "columns")
GEMMS = ("engine", "cublas")


@dataclasses.dataclass(frozen=True)
class TileConfig:
    """Tile sizes and orders, equal on all ranks. No setting but block_m changes a result's bits.

    Args:
        block_m: rows of an M-tile. Every expert's first row is a multiple of it.
        block_n: output columns of an N-tile on the host. The last N-tile of a row of tiles may be
            narrower. The engine of "cuda" always has 256.
        block_tokens: tokens of a token block, the unit that is reduced and pushed.
        order: order of the down GEMM's tiles. "phases": whole rows, in the dispatch order
            backwards. "columns" (COMET's): that walk once for each N-chunk of H.
        num_phases: number of phases in the dispatch order. A tile belongs to the phase of its
            farthest row. 1: one phase. n >= 2: local tiles, then n - 1 equal groups of remote
            ranks, nearest first. More phases start sooner and read each expert's weights once per
            phase.
        raster_group: N-tiles that all M-tiles of an expert take before its next N-tiles; even.
            None: as many as the L2 cache can hold (`plan.tile_order.best_raster_group`).
        n_chunk: columns of H that are reduced and pushed together in order "columns"; a multiple
            of block_n, and on "cuda" in mode "fused" of 256.
        gemm: on "cuda", "engine" (kernels_cu/gemm; block_m is 128 then) or "cublas".
        pipeline_chunks: pieces of the dispatch order in mode "chunked". While one is multiplied,
            the next is pulled and the last is pushed.
        comm_sms: SMs that move rows beside a GEMM in mode "chunked"; even. None: about an eighth.
        dispatch_ctas, combine_ctas: CTAs whose comm warps work, in the fused kernels
            dispatch_gemm and gemm_combine. None, or more than a launch has: all of them.

    Raises:
        ValueError: naming the argument, its value and the rule.
    """

    block_m: int = 128
    block_n: int = 128
    block_tokens: int = 64
    order: str = "phases"
    num_phases: int = 2
    raster_group: int | None = None
    n_chunk: int = 256
    gemm: str = "engine"
    pipeline_chunks: int = 2
    comm_sms: int | None = None
    dispatch_ctas: int | None = None
    combine_ctas: int | None = None

    def __post_init__(self) -> None:
        counts = ("block_m", "block_n", "block_tokens", "n_chunk", "num_phases", "pipeline_chunks")
        for name in counts:
            object.__setattr__(self, name, check_int(name, getattr(self, name), minimum=1))
        for name in ("raster_group", "dispatch_ctas", "combine_ctas", "comm_sms"):
            if (value := getattr(self, name)) is not None:
                even = name in ("raster_group", "comm_sms")
                object.__setattr__(self, name, check_int(name, value, minimum=2 if even else 1))
                if even and value % 2:
                    raise ValueError(f"{name} must be even (got {value})")
        check_choice("order", self.order, ORDERS)
        check_choice("gemm", self.gemm, GEMMS)
        if self.block_n % ALIGNMENT:
            raise ValueError(f"block_n must be a multiple of {ALIGNMENT} (got {self.block_n})")
        if self.n_chunk % self.block_n:
            raise ValueError(
                f"n_chunk must be a multiple of block_n={self.block_n} (got {self.n_chunk})"
            )

    def last_distances(self, size: int) -> list[int]:
        """The largest ring distance of each phase, among that many ranks."""
        groups = min(self.num_phases, size) - 1
        if groups == 0:
            return [size - 1]
        return [0] + [-(-phase * (size - 1) // groups) for phase in range(1, groups + 1)]

    def num_n_chunks(self, hidden: int) -> int:
        return 1 if self.order == "phases" else -(-hidden // self.n_chunk)

    def n_chunks(self, hidden: int) -> list[tuple[int, int]]:
        """Column ranges of H that are reduced and pushed together."""
        width = hidden if self.order == "phases" else self.n_chunk
        return _ranges(hidden, width)

    def n_tiles(self, begin: int, end: int) -> list[tuple[int, int]]:
        """Column ranges of the N-tiles that cover [begin, end), on the host."""
        return [(begin + lo, begin + hi) for lo, hi in _ranges(end - begin, self.block_n)]

    def token_blocks(self, max_tokens: int) -> int:
        """Most token blocks that one rank sends to one home."""
        return -(-max_tokens // self.block_tokens)


def _ranges(length: int, width: int) -> list[tuple[int, int]]:
    return [(begin, min(begin + width, length)) for begin in range(0, length, width)]
