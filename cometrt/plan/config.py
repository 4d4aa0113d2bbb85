"""How a layer is cut into tiles, blocks and chunks: one frozen, printable record."""

from __future__ import annotations

import dataclasses

from cometrt.specs import ALIGNMENT, check_choice, check_int

LAYER1_ORDERS = ("waves", "columns")
GEMMS = ("engine", "cublas")
MOST_TERMS = 128  # kMostTerms of kernels_cu/fused/row_sums.cuh
ENGINE_BLOCK_M, ENGINE_BLOCK_N = 128, 256  # BLOCK_M, BLOCK_N of kernels_cu/gemm/tile.cuh


@dataclasses.dataclass(frozen=True)
class TileConfig:
    """Tile sizes and the order of layer1, equal on all ranks.

    Args:
        block_m: rows of an M-tile; every expert's first row is aligned to it.
        block_n: output columns of one GEMM tile on the host; the last tile of a row of tiles may be
            narrower. The engine of "cuda" always has 256.
        block_tokens: tokens of one reduce-and-push item.
        layer1_order: "waves" (whole rows, layer0's order backwards) or "columns" (COMET's: the
            same walk, but chunk after chunk of H).
        waves: groups of sources, by ring distance, whose tiles follow each other in layer0 (and
            backwards in layer1): this rank itself, then even groups; 1: all sources together. Few
            of them read weights seldom, many wait for nobody far away.
        group: N-tiles that all M-tiles of an expert take before its next N-tiles, in the engine, an
            even number; None: as many as the cache can keep (`plan.turns.best_group`).
        chunk: columns of H that are reduced and pushed together in "columns"; a multiple of
            block_n, and on "cuda" in mode "fused" of 256.
        parts: of layer0's order in mode "chunked", the baseline of two streams: what is pulled,
            multiplied and pushed one behind the other.
        comm_sms: SMs that move rows beside a GEMM in mode "chunked", an even number; None: about
            an eighth.
        gemm: on "cuda", "engine" (kernels_cu/gemm; block_m is 128 then) or "cublas".
        num_comm0, num_comm1: CTAs of the fused layer0 and layer1 whose mover warps work; None, or
            more than a launch has: all of them. Changes when rows move, never a result's bits.

    Raises:
        ValueError: naming the argument, its value and the rule.
    """

    block_m: int = 128
    block_n: int = 128
    block_tokens: int = 64
    layer1_order: str = "waves"
    waves: int = 2
    group: int | None = None
    chunk: int = 256
    gemm: str = "engine"
    parts: int = 2
    comm_sms: int | None = None
    num_comm0: int | None = None
    num_comm1: int | None = None

    def __post_init__(self) -> None:
        for name in ("block_m", "block_n", "block_tokens", "chunk", "waves", "parts"):
            object.__setattr__(self, name, check_int(name, getattr(self, name), minimum=1))
        for name in ("group", "num_comm0", "num_comm1", "comm_sms"):
            if (value := getattr(self, name)) is not None:
                even = name in ("group", "comm_sms")
                object.__setattr__(self, name, check_int(name, value, minimum=2 if even else 1))
                if even and value % 2:
                    raise ValueError(f"{name} must be even (got {value})")
        check_choice("layer1_order", self.layer1_order, LAYER1_ORDERS)
        check_choice("gemm", self.gemm, GEMMS)
        if self.block_n % ALIGNMENT:
            raise ValueError(f"block_n must be a multiple of {ALIGNMENT} (got {self.block_n})")
        if self.chunk % self.block_n:
            raise ValueError(
                f"chunk must be a multiple of block_n={self.block_n} (got {self.chunk})"
            )

    def best_mode(self, device: str, terms: int) -> str:
        """What mode=None means; `terms` as for `check_on`."""
        if device == "cuda" and (self.gemm != "engine" or terms > MOST_TERMS):
            return "sequential"
        return "fused"

    def check_on(self, device: str, mode: str, terms: int) -> None:
        """Raise ValueError for what that device's kernels cannot do.

        Args:
            terms: most that are added for one token: topk and the number of ranks.
        """
        if mode == "chunked":
            if device != "cuda":
                raise ValueError(
                    f"mode must be 'fused' or 'sequential' on device={device!r} (got {mode!r})"
                )
            if self.gemm != "engine":
                raise ValueError(f"gemm must be 'engine' in mode 'chunked' (got {self.gemm!r})")
        if device == "cuda" and mode == "fused":
            if terms > MOST_TERMS:
                raise ValueError(
                    f"topk + ranks must be at most {MOST_TERMS} on device='cuda' in mode 'fused' "
                    f"(got {terms})"
                )
            if self.gemm != "engine":
                raise ValueError(
                    f"gemm must be 'engine' on device='cuda' in mode 'fused' (got {self.gemm!r})"
                )
            if self.layer1_order == "columns" and self.chunk % ENGINE_BLOCK_N:
                raise ValueError(
                    f"chunk must be a multiple of {ENGINE_BLOCK_N} on device='cuda' in mode "
                    f"'fused' (got {self.chunk})"
                )
        if device == "cuda" and self.gemm == "engine" and self.block_m != ENGINE_BLOCK_M:
            raise ValueError(
                f"block_m must be {ENGINE_BLOCK_M} on device='cuda' with gemm='engine' "
                f"(got {self.block_m})"
            )

    def last_distances(self, size: int) -> list[int]:
        """The largest ring distance of each wave, among that many ranks."""
        groups = min(self.waves, size) - 1
        if groups == 0:
            return [size - 1]
        return [0] + [-(-wave * (size - 1) // groups) for wave in range(1, groups + 1)]

    def num_chunks(self, hidden: int) -> int:
        """Column ranges of H that are reduced and pushed together."""
        return 1 if self.layer1_order == "waves" else -(-hidden // self.chunk)

    def chunks(self, hidden: int) -> list[tuple[int, int]]:
        """Those ranges."""
        width = hidden if self.layer1_order == "waves" else self.chunk
        return _ranges(hidden, width)

    def n_tiles(self, begin: int, end: int) -> list[tuple[int, int]]:
        """Column ranges of the GEMM tiles that cover [begin, end)."""
        return [(begin + lo, begin + hi) for lo, hi in _ranges(end - begin, self.block_n)]

    def token_blocks(self, max_tokens: int) -> int:
        """Most blocks of tokens that one rank sends to one home."""
        return -(-max_tokens // self.block_tokens)


def _ranges(length: int, width: int) -> list[tuple[int, int]]:
    return [(begin, min(begin + width, length)) for begin in range(0, length, width)]
