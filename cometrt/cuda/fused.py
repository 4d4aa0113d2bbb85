"""The fused forward: dispatch within the up GEMM's launch, combine within the down GEMM's.

`cometrt.cuda.fused_backward` has the backward.
"""

from __future__ import annotations

import abc

import numpy as np

from cometrt.activations import ACTIVATIONS
from cometrt.cuda.engine import (
    GemmArguments,
    gemm_ctas,
    layer_n_tiles,
    layer_orders,
    layer_raster_groups,
)
from cometrt.cuda.exchange_params import Call
from cometrt.cuda.links import Links
from cometrt.cuda.types import Launches
from cometrt.heap import max_n_chunks
from cometrt.kernels.constants import BLOCK_M, BLOCK_N, NUM_ARRIVALS, SMALL_BLOCK_N
from cometrt.kernels.launch import Kernel, Macros, load_kernels
from cometrt.kernels.params import KernelArgument, ParamStruct
from cometrt.plan import PlanShape

# Of the down GEMM, wide: fewer than 1.75 for each of Hopper's 132 SMs (docs/performance_log.md).
_FEW_TILES = 230


def fused_counter_words(shape: PlanShape) -> dict[str, dict[str, int]]:
    """32-bit words of each array that the fused kernels count up, by field of ExchangeParams. Each
    pass begins with zeros.

    Of "pass": both passes. Of "recompute": the launch of a backward that computes z again with
    save="nothing". It has its own, since a later launch of the call also pulls rows.
    """
    num_chunks = max_n_chunks(shape)
    of_dispatch = {"tile_filled": shape.max_tiles, "queue_heads": 1, "arrivals": NUM_ARRIVALS}
    of_pass = of_dispatch | {
        "tile_done": shape.max_tiles * num_chunks,
        "queue_heads": 1 + 2 * num_chunks,
    }
    if shape.geometry.row_sets > 1:
        of_pass["turn_ends"] = shape.geometry.row_sets - 1
    recomputes = shape.geometry.spec.save == "nothing"
    return {"pass": of_pass, "recompute": of_dispatch if recomputes else {}}


def n_chunk_tiles(shape: PlanShape, block_n: int = BLOCK_N) -> int:
    """N-tiles of the down GEMM, or of the up dgrad, that make an N-chunk."""
    return -(-shape.config.n_chunks(shape.geometry.spec.hidden)[0][1] // block_n)


def forward_block_n(shape: PlanShape) -> tuple[int, int]:
    """Columns of an N-tile of the fused forward's up and down GEMM.

    In a small batch a tile takes as long as its weights take to come. Narrow tiles keep more SMs
    busy where there are few, and end closer together. A tile of the down GEMM has few K blocks: so
    narrow ones pay only where wide ones would be less than two for each SM.
    """
    rows, experts = shape.balanced_rows, shape.geometry.local_experts
    if rows > BLOCK_M // 2 * experts or shape.geometry.row_sets > 1:
        return BLOCK_N, BLOCK_N
    _, n_tiles = layer_n_tiles(shape)
    few = min(rows, experts) * n_tiles < _FEW_TILES
    return SMALL_BLOCK_N, SMALL_BLOCK_N if few else BLOCK_N


class FusedPath(abc.ABC):
    """Two launches of one layer whose kernels may record themselves.

    Attributes:
        num_ctas: grid size of both launches.
    """

    num_ctas: int
    _kernels: dict[str, Kernel]

    @abc.abstractmethod
    def reschedule(self, shape: PlanShape) -> None:
        """Launch with this config's order, n_chunk, raster_group and comm CTAs from now on."""

    @abc.abstractmethod
    def load(self, *, trace: bool = False) -> dict[str, Kernel]:
        """Load the kernels; with `trace` they record themselves. No kernel may wait for a peer."""

    def use(self, kernels: dict[str, Kernel]) -> dict[str, Kernel]:
        """Launch these from now on; returns those that were launched before."""
        before, self._kernels = self._kernels, kernels
        return before


def path_macros(shape: PlanShape, trace: bool) -> Macros:
    """Macros of all builds of a layer's fused kernels."""
    late = (("LATE", 1),) if shape.geometry.row_sets > 1 else ()
    return (*late, *((("TRACE", 1),) if trace else ()))


class FusedForward(FusedPath):
    """The path of one layer's fused forward, in two launches.

    Args:
        ok: address of ExchangeState.ok.
        kernels: the layer's launches. "dispatch_gemm" and "gemm_combine" are added.

    Attributes:
        orders: TileOrderParams of the up and the down GEMM.
    """

    def __init__(self, shape: PlanShape, links: Links, ok: int, kernels: Launches) -> None:
        geometry, spec = shape.geometry, shape.geometry.spec
        width, experts = geometry.local_intermediate, geometry.num_weights
        self._shape, self._links, self._activation = shape, links, spec.activation
        self._block_n = block_n = forward_block_n(shape)
        n_chunk = n_chunk_tiles(shape, block_n[1])
        self._tile_orders = up, down = layer_orders(shape, n_chunk=n_chunk, block_n=block_n)
        self.orders = up.params, down.params
        # A pair of M-tiles of one expert is multiplied at once, and shares what it reads. Tiles of
        # several row sets are not, and read the same weights.
        once = shape.balanced_rows <= BLOCK_M * experts and geometry.row_sets == 1
        self._up = GemmArguments(
            up,
            shape.capacity,
            spec.hidden,
            width,
            experts,
            gated=spec.gated,
            ok=ok,
            reads_weights_once=once,
            block_n=block_n[0],
        )
        self._down = GemmArguments(
            down,
            shape.capacity,
            width,
            spec.hidden,
            experts,
            ok=ok,
            reads_weights_once=once,
            block_n=block_n[1],
        )
        self.num_ctas = gemm_ctas()
        self.reschedule(shape)
        self._kernels = self.load()
        kernels |= {"dispatch_gemm": self._dispatch_gemm, "gemm_combine": self._gemm_combine}

    def reschedule(self, shape: PlanShape) -> None:
        (up, down), (up_group, down_group) = self._tile_orders, layer_raster_groups(shape)
        up.walk(None, up_group)
        down.walk(n_chunk_tiles(shape, self._block_n[1]), down_group)
        self._dispatch_ctas = num_comm_ctas(shape.config.dispatch_ctas, self.num_ctas)
        self._combine_ctas = num_comm_ctas(shape.config.combine_ctas, self.num_ctas)

    def load(self, *, trace: bool = False) -> dict[str, Kernel]:
        macros = (*path_macros(self._shape, trace), *self._links.macros)
        up, down = ((("N_TILE", n),) if n != BLOCK_N else () for n in self._block_n)
        activation = list(ACTIVATIONS).index(self._activation)
        kernels = {}
        for write_z, name in enumerate(("inference", "training")):
            of_kind = (("ACTIVATION", activation), ("WRITE_Z", write_z), *up, *macros)
            (kernels[name],) = load_kernels(
                "fused/dispatch_gemm.cu", "dispatch_gemm", macros=of_kind
            )
        (kernels["combine"],) = load_kernels(
            "fused/gemm_combine.cu", "gemm_combine", macros=(*down, *macros)
        )
        return kernels

    def launch(self, kernels: Launches, stream: int, params: ParamStruct, call: Call) -> None:
        kernels["dispatch_gemm"](stream, params, call)
        kernels["gemm_combine"](stream, params, call)

    def _dispatch_gemm(self, stream: int, params: ParamStruct, call: Call) -> None:
        """Pull tokens into x_rows, and multiply: a, and z where it is saved or computed again."""
        at = call.at
        z = at.get("z", 0)
        self._kernels["training" if z else "inference"](
            stream,
            self.num_ctas,
            params,
            *self._up(at["x_rows"], at["w_up"], at["a"], z),
            self._links.dispatch,
            self._dispatch_ctas,
        )

    def _gemm_combine(self, stream: int, params: ParamStruct, call: Call) -> None:
        """Compute o, push partial rows, and add them up at home. Waits for peers."""
        at = call.at
        self._kernels["combine"](
            stream,
            self.num_ctas,
            params,
            *self._down(at["a"], at["w_down"], at["o"]),
            self._links.combine,
            self._combine_ctas,
        )


def num_comm_ctas(wanted: int | None, num_ctas: int) -> KernelArgument:
    """CTAs whose comm warps work. Ranks may have grids of different size: a config that asks for
    more CTAs than a launch has means all of them."""
    return KernelArgument(np.int32(num_ctas if wanted is None else min(wanted, num_ctas)))
