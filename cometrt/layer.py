"""MoELayer: the public face. Checks arguments, owns results, hands the work to an executor."""

from __future__ import annotations

import contextlib
from typing import Any

from cometrt.agreement import agree
from cometrt.arguments import (
    WantedResults,
    check_backward,
    check_bool,
    check_forward,
    check_one_of_tables_and_plan,
    check_planned_forward,
    check_tables,
    check_tune,
    make_results,
)
from cometrt.call_scope import CallScope, FillingNaN
from cometrt.executor import Executor
from cometrt.layer_life import LayerLife
from cometrt.memory import buffers_of, check_room
from cometrt.node_specs import geometry_of_node
from cometrt.nodes import make_executor
from cometrt.nodes.slices import RailSlices
from cometrt.plan import PlanShape, TileConfig
from cometrt.plan_ahead import PlanAhead, plan_specs
from cometrt.residuals import ArraySpec, Origin, Residuals, Serials, Uses, array_specs
from cometrt.specs import Geometry, Gradients, MoESpec, check_int
from cometrt.trace import NullTracer, Tracer
from cometrt.tuner.tune import Progress, tune
from cometrt.types import Arrays
from cometrt.world import World


class MoELayer(LayerLife):
    """One Mixture-of-Experts layer spread over the ranks of a world.

    Construction is collective; so are `forward`, `backward` and `plan`, in the same order on all
    ranks.

    Below, T is this rank's tokens; H, I, E, K are the spec's hidden, intermediate, num_experts
    and topk; with W ranks there are EP = W / tp groups of experts, and this rank (group
    rank // tp, shard rank % tp) holds the I_s = I / tp columns of its shard of the
    E_l = E / EP experts of its group.

    On device="host" arrays are NumPy's, or any that NumPy imports by DLPack, and a call has ended
    when it returns. On "cuda" they are CuPy's, or any DLPack arrays on this rank's GPU; a call is
    queued on the stream, and a CometError of it is raised by `synchronize`, `close`, or the first
    call that begins after the device has come so far; calls queued behind one that failed do
    nothing until then. Only `synchronize` raises on all ranks after the same call: who wants to go
    on after an error asks it first. Calls may be captured in a CUDA graph, but for gemm="cublas";
    each rank's replays are then ordered by their owner, and after ``world.reset()`` it is captured
    again.

    Args:
        world: from ``cometrt.connect`` or ``cometrt.spawn``.
        spec: equal on all ranks.
        mode: "fused" (exchange and GEMMs overlap tile by tile), "sequential" (dispatch, GEMMs,
            combine one after the other; the same bits), "chunked" (on "cuda": sequential in
            `config.pipeline_chunks` on two streams; a baseline), or None: the best that `config`
            and the shape allow.
        config: tile sizes and orders; None: what `tune` has found for such a layer on this
            machine (as rank 0 knows it), else what is shipped for it, else TileConfig().

    Raises:
        ValueError: on all ranks, for a wrong argument on any of them or different ones.
        CometError: on all ranks, before anything is allocated, where memory is too small for what
            `MoESpec.memory` says.
        PeerTimeout: if a rank does not construct it too.
    """

    caller_allocates = False  # whether the caller brings all arrays of a call, scratch too

    def __init__(
        self,
        world: World,
        spec: MoESpec,
        mode: str | None = None,
        *,
        config: TileConfig | None = None,
    ) -> None:
        if not isinstance(world, World):
            raise ValueError(f"world must come from cometrt.connect or spawn (got {world!r})")
        with world.one_call.hold("MoELayer"):
            self._make(world, spec, mode, config)

    def _make(self, world: World, spec: MoESpec, mode: str | None, given: Any) -> None:
        self._layer, self.mode, config = agree(world, spec, mode, given)
        self.world, self.spec = world, spec
        self.tracer: Tracer = NullTracer()
        self.geometry = Geometry(spec, world.rank, world.size)
        self._use(config)
        check_room(world, self.shape, self.mode, self._slices, self.caller_allocates)
        self._serials, self._uses = Serials(), Uses()
        self._arrays: Arrays
        self.executor: Executor  # for tests and benchmarks: it may change with any version
        self._arrays, self.executor = make_executor(
            world, spec, self.shape, self._slices, self._layer, self.mode
        )
        self._scope = CallScope(world)
        self._finalizer = self.executor.keep_for(self)

    def forward(
        self,
        x: Any,
        topk_ids: Any = None,
        topk_weights: Any = None,
        w_up: Any = None,
        w_down: Any = None,
        *,
        plan: Any = None,
        training: bool = True,
        out: Any = None,
        stream: Any = None,
    ) -> tuple[Any, tuple[Any, ...] | None]:
        """y = the weighted sum of each token's experts. Collective.

        Args:
            x: [T, H] in spec.dtype, 0 <= T <= max_tokens; T may differ between ranks.
            topk_ids: [T, K] int32 or int64, distinct within a token, -1 for a dropped pair.
            topk_weights: [T, K] float32, finite.
            plan: of `plan`, in place of topk_ids and topk_weights; T is that of the plan, and all
                ranks pass the same one. It may serve any number of forwards.
            w_up: [E_l, 2 * I_s, H] in spec.dtype, the gate rows first; [E_l, I_s, H] where the
                activation is not gated. See ``cometrt.shard_weights``.
            w_down: [E_l, H, I_s] in spec.dtype.
            training: also return what `backward` needs.
            out: [T, H] to write y into; it may be x.
            stream: on "cuda", anything with ``__cuda_stream__``; None: CuPy's current stream,
                and always on "host".

        All arrays are C-contiguous. When it returns, x and the tables may be overwritten (on "cuda"
        by work queued behind it on the same stream); the weights must not change before backward.

        Returns:
            (y [T, H], saved); saved is None unless training.

        Raises:
            ValueError: for a wrong argument; the call has not happened.
            RoutingError, CapacityError: on every rank; nothing was exchanged.
            PeerTimeout, MismatchError: until ``world.reset()``.
            CometError: on "cuda": its plan failed.

        With an error of the call itself `out` is NaN. Where it is x, the tokens are lost.
        """
        with self._exchange("layer.forward", stream):
            arrays, dtypes = self._arrays, (self.spec.numpy_dtype,)
            check_one_of_tables_and_plan(topk_ids, topk_weights, plan)
            inputs: tuple[Any, ...]
            ahead = None
            if plan is None:
                tables = topk_ids, topk_weights
                inputs = check_forward(arrays, self.geometry, x, *tables, w_up, w_down)
            else:
                ahead = PlanAhead.unpack(
                    plan, self._plan_origin(), self._plan_specs, arrays, self._slices.count
                )
                inputs = check_planned_forward(arrays, self.geometry, x, ahead, w_up, w_down)
            check_bool("training", training)
            wanted: WantedResults = {"out": (out, inputs[0].shape, dtypes)}
            (y,) = make_results(arrays, self.executor, "forward", wanted)
            with FillingNaN(y):
                kept = self.executor.forward(
                    *inputs, plan=ahead, training=bool(training), out=y, tracer=self.tracer
                )
            if kept is None:
                return y, None
            *_, w_up, w_down = inputs
            serial = self._serials.next(self.world.generation)
            saved = Residuals(serial, len(y), w_up=w_up, w_down=w_down, **kept)
            return y, saved.pack(self._origin())

    def backward(
        self,
        dy: Any,
        saved: Any,
        *,
        out: Gradients | None = None,
        accumulate: bool = False,
        stream: Any = None,
    ) -> Gradients:
        """Gradients of sum(dy * y). Collective; once for each forward, in any order of them.

        Args:
            dy: [T, H] in spec.dtype, T that of the forward.
            saved: what that forward returned.
            out: Gradients to write into; a field that is None is made new. Weight gradients are
                in spec.dtype, or float32 where `out` has float32.
            accumulate: add to out.w_up and out.w_down, which must be given, in place of
                overwriting them; x and topk_weights are overwritten as always.
            stream: as for `forward`.

        Returns:
            Gradients: x [T, H] in spec.dtype, topk_weights [T, K] float32 (0 for a dropped
            pair), w_up and w_down of the weights' shapes.

        Raises:
            ValueError: for a wrong argument; the call has not happened.
            PeerTimeout, MismatchError: until ``world.reset()``; x and topk_weights of `out` are
                NaN. On the host its weight gradients are untouched then, and `saved` may be
                used again; on "cuda" they are unspecified, and the reset ends the use of `saved`.
            CometError: its forward failed. On "cuda" a backward that is queued behind a call whose
                error has not been raised yet does nothing: all of `out` is NaN, but for weight
                gradients with accumulate, which are untouched. It is the one backward of `saved`
                all the same: the host does not wait to know.
        """
        with self._exchange("layer.backward", stream):
            kept = Residuals.unpack(
                saved, self._origin(), self._saved_specs, self._arrays, self._slices.count
            )
            self._uses.check(kept)
            dy, wanted = check_backward(self._arrays, self.geometry, dy, kept, out, accumulate)
            grads = Gradients(*make_results(self._arrays, self.executor, "backward", wanted))
            with FillingNaN(grads.x, grads.topk_weights):
                self.executor.backward(
                    dy, kept, out=grads, accumulate=bool(accumulate), tracer=self.tracer
                )
            self._uses.add(kept)
        return grads

    def plan(self, topk_ids: Any, topk_weights: Any, *, stream: Any = None) -> tuple[Any, ...]:
        """Plan forwards of these tables ahead. Collective, and an exchange of its own, for which no
        token is needed: other work, such as shared experts, may follow before x is passed to
        ``forward(x, plan=plan, w_up=..., w_down=...)``.

        A plan serves any number of forwards of this layer, and their backwards in any order. The
        bits are those of forwards with the tables.

        Args:
            topk_ids, topk_weights: [T, K], as for `forward`. They may be overwritten when it
                returns (on "cuda" by work queued behind it on the same stream).
            stream: as for `forward`.

        Returns:
            The plan. It is a tuple of arrays like `saved`, namely meta, the epoch and the plan's
            tables. It is valid until ``world.reset()``, or a `tune` that changes the tables.

        Raises:
            ValueError: for a wrong argument; the call has not happened.
            RoutingError, CapacityError: on every rank; there is no plan.
            PeerTimeout, MismatchError: until ``world.reset()``.
        """
        with self._exchange("layer.plan", stream), FillingNaN():
            tables = check_tables(self._arrays, self.geometry, topk_ids, topk_weights)
            made = self.executor.plan(*tables, tracer=self.tracer)
            return PlanAhead(
                self._serials.next(self.world.generation), len(tables[0]), **made
            ).pack(self._plan_origin())

    def residuals(self, num_tokens: int) -> tuple[ArraySpec, ...]:
        """Name, shape and dtype of each array of `saved`, in its order: those of a forward of
        num_tokens tokens. They are the same for any number of tokens: `saved` has room for
        max_tokens.

        Raises:
            ValueError: if num_tokens is not in 0..max_tokens.
        """
        if check_int("num_tokens", num_tokens, minimum=0) > self.spec.max_tokens:
            raise ValueError(
                f"num_tokens must be at most max_tokens={self.spec.max_tokens} (got {num_tokens})"
            )
        return self._saved_specs

    def _use(self, config: TileConfig) -> None:
        world, slices = self.world, config.rail_slices
        rail = slices, config.rail_parts
        of_node = geometry_of_node(self.spec, world.rank, world.size, world.nodes, *rail)
        self.config, self.shape = config, PlanShape(of_node, config.of_node())
        self._slices = RailSlices.of(self.spec, world.nodes, world.node_index, *rail)
        residuals = buffers_of(world.device).residuals(self.shape)
        self._saved_specs = array_specs(self.shape, residuals, slices, self._slices.slots_shape)
        self._plan_specs = plan_specs(self._saved_specs)

    def _exchange(self, name: str, stream: Any) -> contextlib.AbstractContextManager[None]:
        return self._scope.exchange(name, self._arrays, self.executor, stream)

    def _origin(self) -> Origin:
        identity, generation = self.world.identity, self.executor.generation
        return Origin(identity, self._layer, self.shape.digest, self.geometry.rank, generation)

    def _plan_origin(self) -> Origin:
        return self._origin()._replace(generation=self.world.generation)

    def tune(
        self,
        inputs: tuple[Any, ...] | None = None,
        *,
        training: bool = True,
        budget_sec: float = 45.0,
        progress: Progress | None = None,
    ) -> TileConfig:
        """Find the fastest config for this layer's shape on this machine, by trials, use it from
        now on, and keep it for layers made later (``$COMETRT_CACHE_DIR/tuned.json``, or in the
        user's cache folder). Collective; on "cuda" in mode "fused". No result's bits change, but
        over several nodes those of weight gradients may, with `TileConfig.rail_slices`.

        Args:
            inputs: (x, topk_ids, topk_weights, w_up, w_down), as for `forward`, to be tuned for:
                on all ranks or on none. None: random ones, of max_tokens tokens a rank and as many
                rows for every expert, which take as much memory as the layer's weights.
            training: True: tune both passes, with a random dy; gradients take as much memory as
                the weights. False: tune forwards that keep nothing, and make no backward.
            budget_sec: seconds after which nothing more is tried. The fastest configs found by
                then take turns once more.
            progress: a function that rank 0 calls after each trial, with the number of trials so
                far, and the shortest milliseconds of any of them by pass, a dict.

        Returns:
            the config, equal on all ranks. It may differ from the last one in what `saved` and
            plans depend on: do the backward of every forward first, others are refused.

        Raises:
            ValueError: on all ranks, for a wrong argument on any of them, another device or mode,
                or a layer whose calls have been captured in a CUDA graph.
            CometError: what `synchronize` would raise, before anything is tried. CapacityError,
                RoutingError: for `inputs`; PeerTimeout on all ranks if one of them fails. The
                layer keeps its config then.
        """
        with self._scope.call("layer.tune"):
            return self._tune(inputs, training, budget_sec, progress)

    def _tune(
        self, inputs: Any, training: bool, budget_sec: float, progress: Progress | None
    ) -> TileConfig:
        world = self.world
        if world.device != "cuda" or self.mode != "fused":
            raise ValueError(
                f"tune() needs device='cuda' and mode 'fused' (got {world.device!r}, {self.mode!r})"
            )
        self._synchronize()
        given = inputs, training, budget_sec, progress, self.executor.captured
        checked = check_tune(self._arrays, self.geometry, *given)
        config, executor = tune(world, self.geometry, self._layer, self.config, *checked, progress)
        if executor is not None:
            if self._finalizer is not None:
                self._finalizer.detach()
            self._use(config)
            self.executor = executor
            self._finalizer = executor.keep_for(self)
        return config

    def __repr__(self) -> str:
        return f"<MoELayer {self._layer} of {self.world!r}, mode={self.mode!r}, {self.spec}>"
