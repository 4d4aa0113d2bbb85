"""How a layer's calls are queued: from addresses to launches, on a raw stream.

Every call is begin, publish, plan, path, finish. `publish` puts in place what peers read. `prepare`
makes the plan of a forward. `await_sources` comes before it, unless the planner is one block or the
world one rank. `agree` lets a backward use the plan of its forward. The path is what its mode does
between them and `finish`. A plan made ahead has no path; a planned forward has `prepare_planned` in
the place of `prepare`.

    fused       dispatch_gemm, gemm_combine
    sequential  dispatch, up, down, push, home_reduce
    chunked     the same for each pipeline chunk, on two streams

and of a backward:

    fused       dispatch_down_dgrad, up_dgrad_combine_wgrad; before them dispatch_gemm with
                save="nothing", for z
    others      backward_order, dispatch, down_dgrad, up_dgrad, push, wgrad, home_reduce; with
                save="nothing" dispatch of x and up before down_dgrad

With gemm="cublas" the GEMMs are cuBLAS's, and nothing orders tiles. A fused backward has
`prepare_backward` in the place of `agree`: it also orders tiles.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from cometrt.cuda import buffers
from cometrt.cuda.backward import BackwardGemms, EngineBackward, PlanTables
from cometrt.cuda.cublas import CublasBackward, CublasExperts, CublasForward
from cometrt.cuda.exchange_params import Call, ExchangeParamsBuilder
from cometrt.cuda.fused import FusedForward, FusedPath, fused_counter_words
from cometrt.cuda.fused_backward import FusedBackward
from cometrt.cuda.links import Links
from cometrt.cuda.planner import FLAGS, DevicePlanner
from cometrt.cuda.row_kernels import RowKernels
from cometrt.cuda.sequential import ChunkedForward, ExpertGemms, SequentialForward
from cometrt.cuda.stats import DeviceStats
from cometrt.cuda.types import Launches
from cometrt.heap import SymmetricHeap
from cometrt.kernels.launch import load_kernels
from cometrt.kernels.params import (
    EXCHANGE_TABLES,
    ParamStruct,
    exchange_state_dtype,
    tile_order_params_dtype,
    traced_exchange_state_dtype,
)
from cometrt.plan import PlanShape
from cometrt.world import World
from cometrt.world.partitions import num_sms

_NO_ORDER = ParamStruct(tile_order_params_dtype)
_OK_OFFSET = exchange_state_dtype.fields["ok"][1]  # type: ignore[index]


def forwards_pad(mode: str, recomputes: bool) -> bool:
    """Whether `prepare` and `prepare_planned` zero padding rows of a training forward. In other
    modes than "fused" `dispatch` does. A backward that computes z again pulls all rows into arrays
    of its own, whose padding `prepare_backward` zeroes: it reads no row of its forward."""
    return mode == "fused" and not recomputes


class ProtocolKernels:
    """What every call begins and ends with.

    Args:
        orders: TileOrderParams of the up and the down GEMM, which `prepare` and `prepare_planned`
            fill.
        pads: as `forwards_pad`.
        kernels: gets "publish", "await_sources", "plan", "prepare", "prepare_planned", "agree" and
            "finish".
    """

    def __init__(
        self,
        planner: DevicePlanner,
        orders: tuple[ParamStruct, ParamStruct],
        links: Links,
        kernels: Launches,
        *,
        pads: bool,
    ) -> None:
        self._planner, self._orders, self._links, self._pads = planner, orders, links, pads
        self._num_sms, self._tables = num_sms(), PlanTables(planner.table_offsets)
        (self._prepare_planned,) = load_kernels("plan/prepare_planned.cu", "prepare_planned")
        self._publish, self._await_sources, self._agree, self._finish = load_kernels(
            "protocol/publish.cu", "publish", "await_sources", "agree", "finish"
        )
        kernels |= {
            "publish": self._launch_publish,
            "await_sources": self._launch_await_sources,
            "plan": self._launch_plan,
            "prepare": self._launch_prepare,
            "prepare_planned": self._launch_prepare_planned,
            "agree": self._launch_agree,
            "finish": self._launch_finish,
        }

    def _launch_publish(self, stream: int, params: ParamStruct) -> None:
        self._publish(stream, self._num_sms, params)

    def _launch_await_sources(self, stream: int, params: ParamStruct, _call: Call) -> None:
        self._await_sources(stream, 1, params)

    def _launch_plan(self, stream: int, params: ParamStruct, call: Call) -> None:
        """Plan alone: no GEMM follows."""
        link = self._links.dispatch
        orders = _NO_ORDER, _NO_ORDER
        self._planner.prepare(stream, params, call.at["tables"], orders, link, pads=False)

    def _launch_prepare(self, stream: int, params: ParamStruct, call: Call) -> None:
        tables, link = call.at["tables"], self._links.dispatch
        self._planner.prepare(
            stream, params, tables, self._orders, link, pads=self._pads and "epoch" in call.at
        )

    def _launch_prepare_planned(self, stream: int, params: ParamStruct, call: Call) -> None:
        """Make the tile orders of the call's plan, zero padding rows, and wait for all ranks."""
        tables = self._tables.planned(call)
        pads = FLAGS[self._pads and "epoch" in call.at]
        self._prepare_planned(stream, self._num_sms, params, tables, *self._orders, pads)

    def _launch_agree(self, stream: int, params: ParamStruct, _call: Call) -> None:
        self._agree(stream, 1, params)

    def _launch_finish(self, stream: int, params: ParamStruct) -> None:
        self._finish(stream, self._num_sms, params)


class Path(Protocol):
    """What a mode launches between the plan and the end of a call."""

    def launch(self, kernels: Launches, stream: int, params: ParamStruct, call: Call) -> None: ...


class NoPath:
    """Of a plan: nothing is left to do."""

    def launch(self, kernels: Launches, stream: int, params: ParamStruct, call: Call) -> None:
        pass


class CallQueue:
    """One layer's. Making it allocates all that `enqueue` uses besides the arrays of a call.

    Args:
        report: address of the world's ExchangeReports.
        meet: as for `cometrt.cuda.cublas.CublasExperts`.

    Attributes:
        kernels: the layer's launches, by name. Every launch goes through it: a test or a benchmark
            may put a function of its own around one, or in its place. Nothing in it refers to it,
            so that a dropped layer frees its memory at once.
        planner: makes the plans.
        state: ExchangeState of the running call, as bytes.
        stats: of the newest call.
        part_sums: of ExchangeParams.
        fused: the paths of mode "fused", of both passes; empty in other modes.
    """

    def __init__(
        self,
        world: World,
        shape: PlanShape,
        layer: int,
        mode: str,
        heap: SymmetricHeap,
        report: int,
        meet: Callable[[], None],
    ) -> None:
        import cupy as cp

        planner_words, fused_words = buffers.num_counters(shape, mode)
        counters = cp.zeros(planner_words + fused_words, cp.uint32)
        self.state = cp.zeros(traced_exchange_state_dtype.itemsize, cp.uint8)
        links = Links(world.link)
        self.planner = DevicePlanner(shape, counters[:planner_words], links.macros)
        self.stats = DeviceStats(shape.geometry.local_experts, shape.geometry.row_sets)
        state = {
            "state": int(self.state.data.ptr),
            "report": report,
            "stats": self.stats.address,
        }
        fixed = state | {
            "all_ids": int(self.planner.ids.data.ptr),
            "all_weights": int(self.planner.weights.data.ptr),
            "progress": int(self.planner.progress.data.ptr),
            "counters": int(counters.data.ptr),
        }
        counters_of: dict[str, dict[str, int]] = {"pass": {}, "recompute": {}}
        if mode == "fused":
            address = fixed["counters"] + 4 * planner_words
            for launches, fields in fused_counter_words(shape).items():
                for name, words in fields.items():
                    counters_of[launches][name] = address
                    address += 4 * words
        geometry, late = shape.geometry, {}
        self.part_sums = cp.zeros(geometry.row_sets, cp.uint32)
        if geometry.row_sets > 1:
            late = {
                "num_parts": geometry.row_sets - 1,
                "part_rows": geometry.part_rows,
                "late_rows": geometry.late_rows,
                "part_sums": int(self.part_sums.data.ptr),
            }
        fixed |= late
        state |= late
        # Calls that make no plan leave the planner's counters as they are.
        begin = fixed["counters"] + 4 * planner_words if mode == "fused" else 0
        with_a_plan = state | {"counters": begin} | counters_of["pass"]
        operations = {
            "forward": fixed | counters_of["pass"],
            "planned forward": with_a_plan,
            "backward": with_a_plan,
            "plan": fixed,
            "recompute": counters_of["recompute"],
        }
        num_counters = {
            "forward": counters.size,
            "planned forward": fused_words,
            "backward": fused_words,
            "plan": planner_words,
        }
        self._params = ExchangeParamsBuilder(
            world,
            shape,
            heap,
            layer,
            operations,
            num_counters=num_counters,
            table_offsets=self.planner.offsets_of(EXCHANGE_TABLES),
        )
        self.kernels: Launches = {}
        kernels, ok = self.kernels, fixed["state"] + _OK_OFFSET
        chunks = buffers.num_pipeline_chunks(shape, mode)
        self.fused: tuple[FusedPath, ...] = ()
        forward: Path
        backward: Path
        offsets, recomputes = self.planner.table_offsets, shape.geometry.spec.save == "nothing"
        if mode != "fused":
            RowKernels(shape, links, kernels, self.planner.block_order_idx, chunks)
        if mode == "fused":
            forward = FusedForward(shape, links, ok, kernels)
            orders = forward.orders
            recompute = orders[0] if recomputes else _NO_ORDER
            backward = FusedBackward(shape, links, self._params, offsets, ok, recompute, kernels)
            self.fused = forward, backward
        elif shape.config.gemm == "cublas":
            cublas = CublasExperts(shape, fixed["state"], offsets, meet, kernels)
            orders = _NO_ORDER, _NO_ORDER
            forward, backward = (
                CublasForward(cublas),
                CublasBackward(cublas, self._params, recomputes),
            )
        else:
            orders = ExpertGemms(shape, ok, kernels, chunks).orders
            recompute = orders[0] if recomputes else _NO_ORDER
            BackwardGemms(shape, offsets, ok, recompute, kernels)
            backward = EngineBackward(self._params, chunks if recomputes else 0)
            forward = ChunkedForward(shape.config) if mode == "chunked" else SequentialForward()
        ProtocolKernels(self.planner, orders, links, kernels, pads=forwards_pad(mode, recomputes))
        self._paths: dict[str, Path] = {
            "forward": forward,
            "planned forward": forward,
            "backward": backward,
            "plan": NoPath(),
        }
        several = self.planner.fills_gpu and shape.geometry.size > 1
        waits = ("await_sources",) if several else ()
        self._plans = {
            "forward": (*waits, "prepare"),
            "planned forward": ("prepare_planned",),
            "backward": ("prepare_backward" if mode == "fused" else "agree",),
            "plan": (*waits, "plan"),
        }

    def enqueue(self, stream: int, call: Call) -> None:
        """Queue a call on a raw stream. It allocates nothing, captures nothing, meets no other
        rank's host and waits for nothing. With gemm="cublas" `stream` must be CuPy's current one,
        the host waits for the plan, and ranks of one process meet.
        """
        params, kernels = self._params.begin(call), self.kernels
        kernels["publish"](stream, params)
        for name in self._plans[call.operation]:
            kernels[name](stream, params, call)
        self._paths[call.operation].launch(kernels, stream, params, call)
        kernels["finish"](stream, params)

    def reschedule(self, shape: PlanShape) -> None:
        """In mode "fused": launch with the schedule of another config from now on."""
        self._params.reschedule(shape)
        for path in self.fused:
            path.reschedule(shape)

    def depends_on(self) -> tuple[float, ...]:
        """What a call's launches depend on besides the call."""
        return self._params.world_state()
