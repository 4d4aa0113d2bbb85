"""`MoE`: the layer as a function of JAX, with its gradient."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from cometrt.closing import Closing
from cometrt.errors import first_original
from cometrt.interop.jax.calls import BufferLayer, HostLayer, Rank, struct, structs
from cometrt.interop.jax.primitive import buffer_call
from cometrt.interop.jax.worlds import JaxWorld, on_ranks
from cometrt.specs import Geometry, MoESpec
from cometrt.world import World

RESIDUALS = "cometrt_residuals"
"""Name of the layer's results and residuals, for policies of jax.checkpoint."""

_FLOAT32 = np.dtype(np.float32)
_IDS = (np.dtype(np.int32), np.dtype(np.int64))


def save_residuals() -> Any:
    """A policy of jax.checkpoint: what the layer needs in backward is saved, and all else is
    computed again."""
    return jax.checkpoint_policies.save_only_these_names(RESIDUALS)


class MoE(Closing):
    """One Mixture-of-Experts layer in JAX programs.

    Construction is collective. So is each call when the program runs: all ranks run the same
    program. Its calls run in the order in which they were traced.

    With a mesh, call it inside `jax.shard_map` over all axes of the mesh, with tokens and experts
    sharded over the world's axis. Without a mesh, call it in each process on its own arrays, or
    inside a `jax.shard_map` over the processes' devices.

    It may be differentiated once, in reverse mode. vmap is refused. One object may serve many
    layers of a model, in `jax.lax.scan` too: the weights are arguments.

    A call that fails while the program runs gives NaN, and the program goes on. `check` raises its
    error, and so does the next call of this object from Python.

    Args:
        world: from `cometrt.interop.jax.connect`, or a world of `cometrt.connect`.
        spec: equal on all ranks.
        mode: as for `cometrt.MoELayer`.

    Attributes:
        layers: of the ranks of this process, for tests and benchmarks: they may change with any
            version.

    Raises:
        ValueError, CometError, PeerTimeout: as `cometrt.MoELayer`.
    """

    def __init__(self, world: JaxWorld | World, spec: MoESpec, mode: str | None = None) -> None:
        if isinstance(world, World):
            if world.nodes > 1:
                raise ValueError(f"world must be of one host (got {world.nodes} nodes)")
            world = JaxWorld({0: world})
        if not isinstance(world, JaxWorld):
            raise ValueError(f"world must come from connect (got {world!r})")
        self.world, self.spec = world, spec
        self.layers = on_ranks(
            {
                index: functools.partial(_make_layer, member, spec, mode)
                for index, member in world.ranks.items()
            }
        )
        self._ranks = {index: Rank(of, world.locks[index]) for index, of in self.layers.items()}
        layer = next(iter(self.layers.values()))
        self._geometry: Geometry = layer.geometry
        self.mode = layer.mode
        self._kept, self._backward_scratch = structs(layer.kept), structs(layer.backward_scratch())
        self._forward_scratch = {
            training: structs(layer.forward_scratch(training)) for training in (False, True)
        }
        self._run_forward = {
            training: functools.partial(self._forward_on_rank, training)
            for training in (False, True)
        }
        self._run_backward = functools.partial(self._backward_on_rank)
        self._check_devices = world.placement.check  # one object, which JAX compares by identity
        self._apply = jax.custom_vjp(functools.partial(self._forward, False))
        self._apply.defvjp(functools.partial(self._forward, True), self._backward)

    def __call__(self, x: Any, topk_ids: Any, topk_weights: Any, w_up: Any, w_down: Any) -> Any:
        """y = the weighted sum of each token's experts, of each rank.

        Args:
            x: [T, H] in spec.dtype, the tokens of a rank; 0 <= T <= max_tokens.
            topk_ids: [T, K] int32 or int64, distinct within a token, -1 for a dropped pair.
            topk_weights: [T, K] float32, finite.
            w_up: [E_l, 2 * I_s, H] in spec.dtype, the gate rows first; [E_l, I_s, H] where the
                activation is not gated.
            w_down: [E_l, H, I_s] in spec.dtype.

        Returns:
            y [T, H] in spec.dtype.

        Raises:
            ValueError: when it is traced: for shapes and dtypes that are not a rank's, outside of
                the shard_map that the world's mesh needs, and after `close`, also of the world.
                When it is compiled: for devices that are not the world's, or in another order.
            RoutingError, CapacityError, PeerTimeout, MismatchError: of an earlier call.
        """
        for rank in self._ranks.values():
            rank.layer.check_open()
        self._on_ranks(Rank.raise_found)
        arrays = [jnp.asarray(array) for array in (x, topk_ids, topk_weights, w_up, w_down)]
        self._index()
        self._check(*arrays)
        axes = frozenset[str]().union(*map(_varying, arrays))
        return self._apply(*_vary(axes, arrays))

    def check(self) -> None:
        """Wait for the programs that have been started, and raise the first error of their calls.
        Call it on all ranks after the same step.

        Raises:
            RoutingError, CapacityError: the same on every rank; the layer goes on.
            PeerTimeout, MismatchError: until ``world.reset()``.
            ValueError: after `close`.
        """
        jax.effects_barrier()
        self._on_ranks(Rank.check)

    def close(self) -> None:
        """Wait for the programs that have been started, and give the layer up on the ranks of this
        process. A compiled program that calls it later gets NaN. Raises what `check` would."""
        jax.effects_barrier()
        self._on_ranks(Rank.close)

    def _on_ranks(self, method: Callable[[Rank], None]) -> None:
        """Call it for each rank of this process, also if one raises, and raise the first error."""
        errors: list[tuple[float, BaseException]] = []
        for rank in self._ranks.values():
            try:
                method(rank)
            except Exception as error:
                errors.append((len(errors), error))
        if errors:
            raise first_original(errors)

    def abandon(self, error: BaseException) -> None:
        """As `close`, because of `error`: it neither waits nor raises."""
        for rank in self._ranks.values():
            with rank.layer.on_gpu():
                rank.layer.abandon(error)

    def __repr__(self) -> str:
        return f"<MoE of {self.world!r}, mode={self.mode!r}, {self.spec}>"

    # ---- when it is traced ------------------------------------------------------------------

    def _check(self, x: Any, ids: Any, weights: Any, w_up: Any, w_down: Any) -> None:
        spec, geometry = self.spec, self._geometry
        own, where = (spec.numpy_dtype,), ""
        if self.world.size > 1:
            axis = f"axis {self.world.axis!r}" if self.world.axis else "the ranks"
            where = f" on each rank: shard it over {axis}"
        _check_form("x", x, (None, spec.hidden), own, where)
        num_tokens = x.shape[0]
        if num_tokens > spec.max_tokens:
            raise ValueError(
                f"x must have at most max_tokens={spec.max_tokens} rows{where} (got {num_tokens})"
            )
        _check_form("topk_ids", ids, (num_tokens, spec.topk), _IDS, where)
        _check_form("topk_weights", weights, (num_tokens, spec.topk), (_FLOAT32,), where)
        _check_form("w_up", w_up, geometry.w_up_shape, own, where)
        _check_form("w_down", w_down, geometry.w_down_shape, own, where)

    def _index(self) -> Any:
        """Place of the device in the flattened mesh; 0 if this process has one rank.

        Raises:
            ValueError: outside of the shard_map that the mesh needs.
        """
        mesh = self.world.mesh
        if mesh is None:
            here = jax.sharding.get_abstract_mesh()
            if here.size > max(self.world.size, jax.process_count()):
                raise ValueError(
                    "world must come from connect(mesh) to be used in a shard_map over several "
                    f"devices of a process (got {self.world!r} in a mesh of {dict(here.shape)})"
                )
            return jnp.int32(0)
        index = jnp.int32(0)
        for name, size in mesh.shape.items():
            try:
                found = jax.lax.axis_size(name)
            except NameError:
                found = 1
                if size > 1 or name == self.world.axis:
                    raise ValueError(
                        f"moe must be called inside jax.shard_map over all axes of its mesh "
                        f"{dict(mesh.shape)} (axis {name!r} is not mapped here)"
                    ) from None
            if found != size:
                raise ValueError(
                    f"moe must be called inside jax.shard_map over its own mesh "
                    f"{dict(mesh.shape)} (axis {name!r} has {found} devices here)"
                )
            if len(self._ranks) > 1:
                index = index * size + (jax.lax.axis_index(name) if size > 1 else 0)
        return index

    def _forward(self, training: bool, *arrays: Any) -> Any:
        x, _, _, w_up, w_down = arrays
        kept_forms = self._kept if training else []
        results = [self._form(x.shape), *kept_forms, *self._forward_scratch[training]]
        found = self._buffer_call(self._run_forward[training], results, *arrays)
        y, *kept = _vary(_varying(x), found[: 1 + len(kept_forms)])
        if not training:
            return y
        y, *kept = (checkpoint_name(array, RESIDUALS) for array in (y, *kept))
        return y, (tuple(kept), w_up, w_down)

    def _backward(self, saved: Any, dy: Any) -> Any:
        kept, w_up, w_down = saved
        pairs = (dy.shape[0], self.spec.topk)
        forms = [
            self._form(dy.shape),
            struct(pairs, _FLOAT32),
            self._form(w_up.shape),
            self._form(w_down.shape),
        ]
        results = [*forms, *self._backward_scratch]
        found = self._buffer_call(self._run_backward, results, dy, *kept, w_up, w_down)
        dx, dweights, dw_up, dw_down = _vary(_varying(w_up), found[: len(forms)])
        return dx, np.zeros(pairs, jax.dtypes.float0), dweights, dw_up, dw_down

    def _buffer_call(self, run: Any, results: Any, *operands: Any) -> list[Any]:
        return buffer_call(run, results, *operands, self._index(), check=self._check_devices)

    def _form(self, shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
        return struct(shape, self.spec.numpy_dtype)

    # ---- when it runs -----------------------------------------------------------------------

    def _rank(self, index: Any) -> Rank:
        if len(self._ranks) == 1:
            return next(iter(self._ranks.values()))
        return self._ranks[int(np.asarray(index))]

    def _forward_on_rank(self, training: bool, context: Any, results: Any, *operands: Any) -> None:
        *arguments, index = operands
        y, *rest = results
        num_kept = len(self._kept) if training else 0
        kept, scratch = rest[:num_kept], rest[num_kept:]
        self._rank(index).forward(context, arguments, y, kept, scratch)

    def _backward_on_rank(self, context: Any, results: Any, dy: Any, *operands: Any) -> None:
        *kept, w_up, w_down, index = operands
        self._rank(index).backward(context, dy, kept, (w_up, w_down), results[:4], results[4:])


def _make_layer(world: World, spec: MoESpec, mode: str | None) -> BufferLayer:
    """Collective: a layer on the world's device."""
    if world.device == "host":
        return HostLayer(world, spec, mode)
    from cometrt.interop.jax.cuda_calls import CudaLayer

    return CudaLayer(world, spec, mode)


def _check_form(
    name: str,
    array: Any,
    shape: tuple[int | None, ...],
    dtypes: tuple[np.dtype, ...],
    where: str,
) -> None:
    """Raise a ValueError unless dtype and shape are as required."""
    if array.dtype not in dtypes:
        rule = " or ".join(str(dtype) for dtype in dtypes)
        raise ValueError(f"{name} must have dtype {rule} (got {array.dtype})")
    fits = len(array.shape) == len(shape) and all(
        want in (None, have) for want, have in zip(shape, array.shape, strict=True)
    )
    if not fits:
        rule = ", ".join("T" if length is None else str(length) for length in shape)
        raise ValueError(f"{name} must have shape ({rule}){where} (got {array.shape})")


def _varying(array: Any) -> frozenset[str]:
    """Mesh axes over which an array differs, as shard_map knows it with check_vma=True."""
    form = jax.typeof(array)
    kind = getattr(form, "manual_axis_type", form)
    return frozenset(getattr(kind, "varying", getattr(kind, "vma", ())) or ())


def _vary(axes: frozenset[str], arrays: Sequence[Any]) -> list[Any]:
    """The arrays as such that may differ over those axes."""
    missing = [tuple(sorted(axes - _varying(array))) for array in arrays]
    return [
        jax.lax.pcast(array, names, to="varying") if names else array
        for array, names in zip(arrays, missing, strict=True)
    ]
