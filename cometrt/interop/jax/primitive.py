"""`buffer_call`: a JAX primitive whose work is a Python function over XLA's buffers.

It is `jax.experimental.buffer_callback` with an effect of its own. The effect keeps all calls of a
program in the order in which they were traced, also across jit, scan and jax.checkpoint: ranks must
make the same calls in the same order. JAX has public names neither for effects nor for a lowering
that takes a token, so this module imports private ones; nothing else does.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import jax
from jax import tree_util
from jax._src import buffer_callback, core, dispatch, effects
from jax._src.interpreters import partial_eval
from jax._src.lib.mlir.dialects import hlo
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir


class CallEffect(effects.Effect):
    """Of every call: none is dropped, merged or moved past another one."""

    def __str__(self) -> str:
        return "cometrt call"


for _allowing in (
    effects.lowerable_effects,
    effects.ordered_effects,
    effects.shardable_ordered_effects,  # in programs of several devices
    effects.control_flow_allowed_effects,
    effects.custom_derivatives_allowed_effects,
    effects.remat_allowed_effects,
):
    _allowing.add_type(CallEffect)

_EFFECT = CallEffect()


def _let_programs_run_ahead() -> None:
    """JAX keeps the token that a program returns for an ordered effect, and the next program with
    the effect does not start before it is ready. On a GPU that wait only costs time: programs
    follow each other on XLA's stream. So tokens of this effect on GPUs are not kept."""
    keep = dispatch.RuntimeTokenSet.set_token_result

    def set_token_result(tokens: Any, effect: Any, token: Any) -> None:
        if effect == _EFFECT and _is_on_gpu(token):
            tokens.current_tokens.pop(effect, None)
        else:
            keep(tokens, effect, token)

    dispatch.RuntimeTokenSet.set_token_result = set_token_result


def _is_on_gpu(token: Any) -> bool:
    return all(device.platform == "gpu" for device in token._buf.devices())


_let_programs_run_ahead()

_call = Primitive("cometrt_call")
_call.multiple_results = True


def _check_nothing(context: Any) -> None:
    pass


def buffer_call(
    run: Callable[..., None],
    results: Sequence[jax.ShapeDtypeStruct],
    *operands: Any,
    check: Callable[[Any], None] = _check_nothing,
) -> list[Any]:
    """Call ``run(context, results, *operands)`` when the program runs; the results.

    Args:
        run: gets XLA's context and buffers, and fills those of the results.
        results: their shapes and dtypes.
        check: hashable. It gets `axis_context` of JAX's lowering, which knows the devices of the
            program; what it raises, compiling raises.
    """
    return _call.bind(*operands, run=run, results=tuple(results), check=check, repeated=False)


@_call.def_effectful_abstract_eval
def _shapes(*_operands: Any, results: Any, **_params: Any) -> Any:
    return [core.ShapedArray(result.shape, result.dtype) for result in results], {_EFFECT}


@functools.lru_cache(maxsize=256)
def _compiled(run: Any, results: Any, check: Any) -> Any:
    params = {"run": run, "results": results, "check": check, "repeated": False}
    return jax.jit(functools.partial(_call.bind, **params))


@_call.def_impl
def _run_eagerly(*operands: Any, run: Any, results: Any, check: Any, repeated: bool) -> Any:
    del repeated
    return _compiled(run, results, check)(*operands)


def _lower(context: Any, *operands: Any, run: Any, check: Any, **_params: Any) -> Any:
    """As a custom call that takes the effect's token as its first operand and returns it."""
    _check_devices(context, check)

    def callback(context: Any, buffers: Any, _token: Any, *operands: Any) -> None:
        run(context, buffers[1:], *operands)

    token = core.abstract_token
    with_token = context.replace(
        avals_in=[token, *context.avals_in], avals_out=[token, *context.avals_out]
    )
    given = context.tokens_in.get(_EFFECT)
    after, *values = _custom_call(with_token, callback, given, *operands)
    context.set_tokens_out(mlir.TokenSet({_EFFECT: after}))
    return values


def _lower_on_gpu(context: Any, *operands: Any, run: Any, check: Any, **_params: Any) -> Any:
    """As a custom call whose operands wait for the token, and whose first result the token waits
    for. It has no token itself, since XLA's GPU compiler stops at such a call in a loop. The two
    barriers order calls until XLA has scheduled them; it removes barriers after that."""
    _check_devices(context, check)

    def callback(context: Any, buffers: Any, *operands: Any) -> None:
        run(context, buffers, *operands)

    given = context.tokens_in.get(_EFFECT)
    before, *waiting = hlo.optimization_barrier([given, *operands])
    first, *rest = _custom_call(context, callback, *waiting)
    after, first = hlo.optimization_barrier([before, first])
    context.set_tokens_out(mlir.TokenSet({_EFFECT: after}))
    return [first, *rest]


def _check_devices(context: Any, check: Callable[[Any], None]) -> None:
    check(getattr(context.module_context, "axis_context", None))


def _custom_call(context: Any, callback: Callable[..., None], *operands: Any) -> Any:
    return buffer_callback._buffer_callback_lowering(
        context.replace(tokens_in=mlir.TokenSet(), tokens_out=None),
        *operands,
        callback=callback,
        in_tree=tree_util.tree_structure(((0,) * len(operands), {})),
        out_tree=tree_util.tree_structure((0,) * len(context.avals_out)),
        has_side_effect=True,
        input_output_aliases=(),
        command_buffer_compatible=False,  # a replay would not call Python
    )


def _split_by_policy(saveable: Any, unknown: list[bool], ready: list[bool], call: Any) -> Any:
    """jax.checkpoint: save a call's results or call again, as the policy says. Without this rule
    JAX never repeats what has an effect.

    Args:
        unknown: of each operand, whether only backward knows it.
        ready: whether backward has it already.

    Returns:
        the call in forward, the call in backward, whether its results are unknown and ready, and
        the operands that forward saves for backward.
    """
    num_results = len(call.outvars)
    forms = [operand.aval for operand in call.invars]
    if not any(unknown):
        policy = partial_eval.ensure_enum(saveable(call.primitive, *forms, **call.params))
        if not isinstance(policy, partial_eval.RecomputeType):
            return call, None, [False] * num_results, [False] * num_results, []
    saved = [
        operand
        for operand, there in zip(call.invars, ready, strict=True)
        if isinstance(operand, core.Var) and not there
    ]
    in_forward = None if any(unknown) else call
    again = call.replace(params=call.params | {"repeated": not any(unknown)})
    return in_forward, again, [any(unknown)] * num_results, [True] * num_results, saved


def _drop_if_repeated(used: list[bool], call: Any) -> Any:
    """A call that jax.checkpoint would repeat is dropped where all that is needed of it was saved.

    Args:
        used: of each result, whether anybody needs it.

    Returns:
        of each operand whether it is needed, and the call or None.
    """
    if call.params["repeated"] and not any(used):
        return [False] * len(call.invars), None
    return [True] * len(call.invars), call


def _refuse_vmap(*_args: Any, **_params: Any) -> NoReturn:
    raise ValueError(
        "moe must not be called under vmap: its tokens are one batch; reshape x to [T, hidden]"
    )


def _refuse_jvp(*_args: Any, **_params: Any) -> NoReturn:
    raise ValueError("moe must be differentiated once, in reverse mode (jax.grad, jax.vjp)")


mlir.register_lowering(_call, _lower)
mlir.register_lowering(_call, _lower_on_gpu, platform="cuda")
batching.primitive_batchers[_call] = _refuse_vmap
ad.primitive_jvps[_call] = _refuse_jvp
ad.primitive_transposes[_call] = _refuse_jvp
partial_eval.partial_eval_jaxpr_custom_rules[_call] = _split_by_policy
partial_eval.dce_rules[_call] = _drop_if_repeated
