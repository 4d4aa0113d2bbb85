"""Checks of the arguments of forward and backward, before the call has any effect.

Each function raises a ValueError that names the argument, its value and the rule. `arrays` is the
HostArrays or CudaArrays of the world's device.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from cometrt.executor import Executor
from cometrt.plan_ahead import PlanAhead
from cometrt.residuals import Residuals
from cometrt.specs import Geometry, Gradients, check_positive
from cometrt.types import Array, Arrays

_FLOAT32 = np.dtype(np.float32)
# Name of a result: (the caller's array or None, shape, allowed dtypes). A new array gets the first.
WantedResults = dict[str, tuple[object, tuple[int, ...], tuple[np.dtype, ...]]]
_IDS = (np.dtype(np.int32), np.dtype(np.int64))


def check_forward(
    arrays: Arrays,
    geometry: Geometry,
    x: object,
    topk_ids: object,
    topk_weights: object,
    w_up: object,
    w_down: object,
) -> tuple[Array, Array, Array, Array, Array]:
    """Forward's five arrays in the device's array type: x, ids, weights, w_up, w_down."""
    spec, dtypes = geometry.spec, (geometry.spec.numpy_dtype,)
    tokens: Array = arrays.check("x", x, (None, spec.hidden), dtypes)
    _check_num_tokens("x", tokens, geometry)
    pairs = (len(tokens), spec.topk)
    return (
        tokens,
        arrays.check("topk_ids", topk_ids, pairs, _IDS),
        arrays.check("topk_weights", topk_weights, pairs, (_FLOAT32,)),
        *_check_weights(arrays, geometry, w_up, w_down),
    )


def check_planned_forward(
    arrays: Arrays, geometry: Geometry, x: object, plan: PlanAhead, w_up: object, w_down: object
) -> tuple[Array, None, None, Array, Array]:
    """As `check_forward`, of a forward with a plan, which stands for ids and weights."""
    spec = geometry.spec
    tokens: Array = arrays.check("x", x, (None, spec.hidden), (spec.numpy_dtype,))
    if len(tokens) != plan.num_tokens:
        raise ValueError(
            f"x must have the {plan.num_tokens} tokens of its plan (got {len(tokens)} rows)"
        )
    return (tokens, None, None, *_check_weights(arrays, geometry, w_up, w_down))


def check_tables(
    arrays: Arrays, geometry: Geometry, topk_ids: object, topk_weights: object
) -> tuple[Array, Array]:
    """The arrays of `layer.plan` in the device's array type: ids, weights."""
    topk = geometry.spec.topk
    ids: Array = arrays.check("topk_ids", topk_ids, (None, topk), _IDS)
    _check_num_tokens("topk_ids", ids, geometry)
    return ids, arrays.check("topk_weights", topk_weights, (len(ids), topk), (_FLOAT32,))


def check_one_of_tables_and_plan(topk_ids: object, topk_weights: object, plan: object) -> None:
    """Raise a ValueError unless a forward has either its tables or a plan."""
    if topk_ids is not None and topk_weights is not None and plan is None:
        return
    given = {"topk_ids": topk_ids, "topk_weights": topk_weights, "plan": plan}
    names = [name for name, value in given.items() if value is not None]
    if names not in (["topk_ids", "topk_weights"], ["plan"]):
        raise ValueError(
            f"forward must have either topk_ids and topk_weights, or plan "
            f"(got {' and '.join(names) or 'none of them'})"
        )


def _check_num_tokens(name: str, array: Array, geometry: Geometry) -> None:
    most = geometry.spec.max_tokens
    if len(array) > most:
        raise ValueError(f"{name} must have at most max_tokens={most} rows (got {len(array)})")


def _check_weights(
    arrays: Arrays, geometry: Geometry, w_up: object, w_down: object
) -> tuple[Array, Array]:
    dtypes = (geometry.spec.numpy_dtype,)
    return (
        arrays.check("w_up", w_up, geometry.w_up_shape, dtypes),
        arrays.check("w_down", w_down, geometry.w_down_shape, dtypes),
    )


def check_backward(
    arrays: Arrays, geometry: Geometry, dy: object, kept: Residuals, out: object, accumulate: object
) -> tuple[Array, WantedResults]:
    """Backward's dy in the device's array type, and its results in the order of `Gradients`."""
    spec, dtypes = geometry.spec, (geometry.spec.numpy_dtype,)
    gradient: Array = arrays.check("dy", dy, (kept.num_tokens, spec.hidden), dtypes)
    check_bool("accumulate", accumulate)
    given = Gradients(None, None, None, None) if out is None else out
    if not isinstance(given, tuple) or len(given) != len(Gradients._fields):
        raise ValueError(f"out must be a cometrt.Gradients or None (got {type(out)!r})")
    given = Gradients(*given)
    if accumulate and (given.w_up is None or given.w_down is None):
        raise ValueError("out must have w_up and w_down when accumulate=True (got None)")
    pairs, weight_dtypes = (len(gradient), spec.topk), (*dtypes, _FLOAT32)
    return gradient, {
        "out.x": (given.x, gradient.shape, dtypes),
        "out.topk_weights": (given.topk_weights, pairs, (_FLOAT32,)),
        "out.w_up": (given.w_up, geometry.w_up_shape, weight_dtypes),
        "out.w_down": (given.w_down, geometry.w_down_shape, weight_dtypes),
    }


def check_results(
    arrays: Arrays, wanted: WantedResults, buffer: tuple[int, int]
) -> list[Array | None]:
    """Check the result arrays that the caller gave, and convert them to the device's array type.

    Args:
        buffer: addresses [begin, end) of the heap memory that holds `layer.buffer()`. Peers read
            it. Only y and dx may lie there, and only at its begin, over their own tokens.
    """
    given: list[Array | None] = []
    begin, end = buffer
    for name, (array, shape, dtypes) in wanted.items():
        if array is None:
            given.append(None)
            continue
        result = arrays.check(name, array, shape, dtypes, writable=True)
        first = arrays.address(result)
        if first < end and first + result.nbytes > begin:
            _check_overlap(name, first, result.nbytes, begin)
        given.append(result)
    return given


def make_results(
    arrays: Arrays, executor: Executor, operation: str, wanted: WantedResults
) -> list[Any]:
    """Results in the order of `wanted`: those that were given, or new memory. Memory is made last,
    after all arguments are checked.

    Raises:
        ValueError: for a wrong result.
        BaseException: where there is no memory. The world is stopped then, since peers may be in
            the call already.
    """
    given = check_results(arrays, wanted, executor.buffer_range())
    try:
        return [
            arrays.empty(shape, dtypes[0]) if result is None else result
            for result, (_, shape, dtypes) in zip(given, wanted.values(), strict=True)
        ]
    except BaseException as error:
        executor.stop_world(error, operation)
        raise


def _check_overlap(name: str, first: int, nbytes: int, begin: int) -> None:
    """Of a result at address `first` that overlaps the buffer."""
    if not nbytes:
        return
    if name not in ("out", "out.x"):
        raise ValueError(f"{name} must not lie in layer.buffer() (got a view of it)")
    if first != begin:
        raise ValueError(
            f"{name} must begin where layer.buffer() begins if they overlap "
            f"(got a view that begins {first - begin:+} bytes from there)"
        )


def check_tune(
    arrays: Arrays,
    geometry: Geometry,
    inputs: Any,
    training: object,
    budget_sec: object,
    progress: object,
    captured: object,
) -> tuple[tuple[Array, ...] | None, bool, float, str]:
    """Arguments of `layer.tune`: (inputs, training, budget_sec, ""), or with an error's message.

    Args:
        captured: whether calls of the layer are in a CUDA graph.
    """
    try:
        if inputs is not None:
            if not isinstance(inputs, tuple) or len(inputs) != 5:
                raise ValueError("inputs must be (x, topk_ids, topk_weights, w_up, w_down)")
            inputs = check_forward(arrays, geometry, *inputs)
        training, budget_sec = (
            check_bool("training", training),
            check_positive("budget_sec", budget_sec),
        )
        if progress is not None and not callable(progress):
            raise ValueError(f"progress must be a function or None (got {progress!r})")
        if captured:
            raise ValueError("layer must not be in a CUDA graph when it is tuned")
    except ValueError as error:
        return None, False, 0.0, str(error)
    return inputs, training, budget_sec, ""


def check_bool(name: str, value: object) -> bool:
    """`value` as a bool. Raise a ValueError if it is neither True nor False."""
    if not isinstance(value, (bool, np.bool_)):
        raise ValueError(f"{name} must be True or False (got {value!r})")
    return bool(value)
