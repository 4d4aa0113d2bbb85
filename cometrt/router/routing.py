"""The routers' public functions. Each checks its arguments and calls `host` or `cuda`."""

from __future__ import annotations

from typing import Any, NamedTuple, TypedDict, Unpack

import numpy as np

from cometrt.router import cuda, host
from cometrt.router.options import (
    Options,
    check_dweights_form,
    check_ids_form,
    check_library,
    check_options,
    check_topk,
    on_device,
)
from cometrt.specs import check_unmasked


class Keywords(TypedDict, total=False):
    """The keywords of `softmax_topk`, which its backward takes too."""

    bias: Any
    mask: Any
    num_groups: int
    topk_groups: int
    group_score: str
    scale: float
    renormalize: bool


class Routing(NamedTuple):
    """A router's result: ids [T, K] int32, best first, and weights [T, K] float32."""

    ids: Any
    weights: Any


def softmax_topk(
    logits: Any,
    topk: int,
    *,
    bias: Any = None,
    mask: Any = None,
    num_groups: int = 1,
    topk_groups: int = 1,
    group_score: str = "max",
    scale: float = 1.0,
    renormalize: bool = True,
) -> Routing:
    """Choose the K experts with the largest softmax(logits) + bias.

    Args:
        logits: [T, E], floating. -inf: the expert may not be chosen.
        topk: K, at most the number of experts in `topk_groups` groups. A token with fewer experts
            to choose from gets id -1 and weight 0 for the others.
        bias: [E], added to the scores for the choice alone (ERNIE-4.5). It gets no gradient. None:
            zeros, and the choice is that of the largest logits.
        mask: bool, [E] or [T, E]. True: the expert may be chosen. Softmax leaves out the others.
        num_groups, topk_groups: group-limited choice. The E experts form `num_groups` equal
            groups. Only experts of the `topk_groups` best groups are chosen (DeepSeek-V3: 8 and
            4). 1 and 1: no limit.
        group_score: "max": a group's score is its largest biased score (DeepSeek-V2). "top2": the
            sum of its two largest ones (DeepSeek-V3), or the only one.
        scale: factor on the weights (DeepSeek-V3: 2.5).
        renormalize: True: divide each token's K scores by their sum, before scaling (Mixtral,
            Qwen3). False: the weights are the scores themselves (Qwen2-MoE), times scale.

    Returns:
        Arrays of the library of logits. The weights omit the bias.

    Raises:
        ValueError: for a wrong shape, dtype, K or group count. With NumPy also for NaN or +inf in
            logits, and for a bias that is not finite. With CuPy these make the token's weights
            NaN, for which `MoELayer` raises RoutingError.
    """
    return _topk(
        logits,
        topk,
        Options("softmax", bias, mask, num_groups, topk_groups, group_score, scale, renormalize),
    )


def sigmoid_topk(
    logits: Any,
    topk: int,
    *,
    bias: Any = None,
    mask: Any = None,
    num_groups: int = 1,
    topk_groups: int = 1,
    group_score: str = "top2",
    scale: float = 1.0,
    renormalize: bool = True,
) -> Routing:
    """Choose the K experts with the largest sigmoid(logits) + bias (DeepSeek-V3, MiniMax-M2).

    Arguments, results and errors are those of `softmax_topk`; group_score is "top2" by default.
    """
    return _topk(
        logits,
        topk,
        Options("sigmoid", bias, mask, num_groups, topk_groups, group_score, scale, renormalize),
    )


def sqrt_softplus_topk(
    logits: Any,
    topk: int,
    *,
    bias: Any = None,
    mask: Any = None,
    num_groups: int = 1,
    topk_groups: int = 1,
    group_score: str = "top2",
    scale: float = 1.0,
    renormalize: bool = True,
) -> Routing:
    """Choose the K experts with the largest sqrt(log(1 + exp(logits))) + bias (DeepSeek-V4).

    Arguments, results and errors are those of `softmax_topk`; group_score is "top2" by default.
    """
    return _topk(
        logits,
        topk,
        Options(
            "sqrt_softplus", bias, mask, num_groups, topk_groups, group_score, scale, renormalize
        ),
    )


def softmax_topk_backward(
    dweights: Any, logits: Any, ids: Any, **keywords: Unpack[Keywords]
) -> Any:
    """Gradient of the logits, dlogits [T, E] float32, for `softmax_topk`.

    The choice of experts is piecewise constant and has no gradient.

    Args:
        dweights: [T, K], the gradient of the weights: ``grads.topk_weights``. Its entries at ids
            of -1 are ignored.
        logits: the argument of `softmax_topk`.
        ids: [T, K], the ids that it returned. For a pair that was dropped after routing, pass the
            router's id with a dweight of 0.
        keywords: those of `softmax_topk`. Bias and groups, which shape only the choice, have no
            effect.

    Raises:
        ValueError: if shapes do not match. With NumPy also for an id outside [-1, E) or repeated
            within a token, and for logits as `softmax_topk`; with CuPy these give NaN gradients.
    """
    return _backward(dweights, logits, ids, Options("softmax", **keywords))


def sigmoid_topk_backward(
    dweights: Any, logits: Any, ids: Any, **keywords: Unpack[Keywords]
) -> Any:
    """Gradient of the logits for `sigmoid_topk`; as `softmax_topk_backward`."""
    return _backward(dweights, logits, ids, Options("sigmoid", **keywords))


def sqrt_softplus_topk_backward(
    dweights: Any, logits: Any, ids: Any, **keywords: Unpack[Keywords]
) -> Any:
    """Gradient of the logits for `sqrt_softplus_topk`; as `softmax_topk_backward`."""
    return _backward(dweights, logits, ids, Options("sqrt_softplus", **keywords))


def softmax_weights(logits: Any, ids: Any, **keywords: Unpack[Keywords]) -> Any:
    """Weights [T, K] float32 that `softmax_topk` would give to these ids [T, K] if it chose them.

    With ids of an earlier call the weights are a smooth function of the logits: for checks of
    gradients, or for training with frozen routing. An id of -1 and a masked expert have weight 0.

    Args:
        logits, keywords: the arguments of `softmax_topk`.
        ids: [T, K], distinct within a token, except for -1.

    Raises:
        ValueError: as `softmax_topk_backward`; with CuPy, NaN weights in place of NaN gradients.
    """
    return _weights(logits, ids, Options("softmax", **keywords))


def sigmoid_weights(logits: Any, ids: Any, **keywords: Unpack[Keywords]) -> Any:
    """Weights that `sigmoid_topk` gives to ids; as `softmax_weights`."""
    return _weights(logits, ids, Options("sigmoid", **keywords))


def sqrt_softplus_weights(logits: Any, ids: Any, **keywords: Unpack[Keywords]) -> Any:
    """Weights that `sqrt_softplus_topk` gives to ids; as `softmax_weights`."""
    return _weights(logits, ids, Options("sqrt_softplus", **keywords))


def _topk(logits: Any, topk: int, options: Options) -> Routing:
    logits, device, options = _check(logits, options)
    topk = check_topk(topk, logits.shape[1], options)
    return Routing(*(cuda if device else host).topk(logits, topk, options))


def _weights(logits: Any, ids: Any, options: Options) -> Any:
    logits, device, options = _check(logits, options)
    ids = _check_ids(ids, logits, device)
    return (cuda if device else host).weights(logits, ids, options)


def _backward(dweights: Any, logits: Any, ids: Any, options: Options) -> Any:
    logits, device, options = _check(logits, options)
    ids = _check_ids(ids, logits, device)
    dweights = check_library("dweights", dweights, device)
    check_dweights_form(dweights, ids)
    return (cuda if device else host).backward(dweights, logits, ids, options)


def _check(logits: Any, options: Options) -> tuple[Any, bool, Options]:
    """The logits as an array, whether on a GPU, and the options with arrays of its library."""
    check_unmasked("logits", logits)
    device = on_device(logits)
    logits = logits if device else np.asarray(logits)
    return logits, device, check_options(options, logits, device)


def _check_ids(ids: Any, logits: Any, device: bool) -> Any:
    ids = check_library("ids", ids, device)
    check_ids_form("ids", ids, len(logits))
    return ids
