"""`buffer_call`: a JAX primitive whose work is a Python function over XLA's buffers.

It is `jax.experimental.buffer_callback` with XLA's side effect and without JAX's. XLA keeps every
call and merges none. JAX refuses its own effect in jax.checkpoint.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import jax
from jax.experimental.buffer_callback import buffer_callback
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

_call = Primitive("cometrt_call")
_call.multiple_results = True


def buffer_call(
    run: Callable[..., None],
    results: Sequence[jax.ShapeDtypeStruct],
    *operands: Any,
    aliases: dict[int, int],
) -> list[Any]:
    """Call ``run(context, results, *operands)`` when the program runs; the results.

    Args:
        run: gets XLA's context and buffers. It fills the results in place.
        results: their shapes and dtypes.
        aliases: operand -> result that shares its memory.
    """
    return _call.bind(
        *operands, run=run, results=tuple(results), aliases=tuple(sorted(aliases.items()))
    )


def _as_callback(*operands: Any, run: Any, results: Any, aliases: Any) -> Any:
    call = buffer_callback(
        run, results, has_side_effect=True, input_output_aliases=dict(aliases)
    )
    return call(*operands)


@functools.lru_cache(maxsize=256)
def _compiled(run: Any, results: Any, aliases: Any) -> Any:
    return jax.jit(functools.partial(_call.bind, run=run, results=results, aliases=aliases))


@_call.def_impl
def _run_eagerly(*operands: Any, run: Any, results: Any, aliases: Any) -> Any:
    return _compiled(run, results, aliases)(*operands)


@_call.def_abstract_eval
def _shapes(*_operands: Any, results: Any, **_params: Any) -> Any:
    return [jax.core.ShapedArray(result.shape, result.dtype) for result in results]


def _refuse_vmap(*_args: Any, **_params: Any) -> NoReturn:
    raise ValueError(
        "moe must not be called under vmap: its tokens are one batch; reshape x to [T, hidden]"
    )


def _refuse_jvp(*_args: Any, **_params: Any) -> NoReturn:
    raise ValueError("moe must be differentiated once, in reverse mode (jax.grad, jax.vjp)")


mlir.register_lowering(_call, mlir.lower_fun(_as_callback, multiple_results=True))
batching.primitive_batchers[_call] = _refuse_vmap
ad.primitive_jvps[_call] = _refuse_jvp
ad.primitive_transposes[_call] = _refuse_jvp
