"""The options of a router, and the checks of arguments that NumPy and CuPy arrays share."""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import numpy as np

from cometrt.specs import check_choice, check_int, check_positive, check_unmasked

KINDS = ("softmax", "sigmoid", "sqrt_softplus")  # RouterKind of kernels_cu/router/params.cuh
GROUP_SCORES = ("max", "top2")


class Options(NamedTuple):
    """The keywords of a router; see `cometrt.router.softmax_topk`."""

    kind: str
    bias: Any = None
    mask: Any = None
    num_groups: int = 1
    topk_groups: int = 1
    group_score: str = "max"
    scale: float = 1.0
    renormalize: bool = True

    @property
    def by_score(self) -> bool:
        """Whether scores decide the choice. Otherwise logits do, which have the same order."""
        return self.bias is not None or (self.num_groups > 1 and self.group_score == "top2")


class Batch(NamedTuple):
    """What a loss is asked for.

    Attributes:
        logits: [T, E].
        ids: [T, K], or None: every token counts.
        length: tokens of a sequence.
        counts: [E], pairs of the global batch, or None: those of ids.
        device: whether the arrays are CuPy's.
    """

    logits: Any
    ids: Any
    length: int
    counts: Any
    device: bool


def on_device(array: object) -> bool:
    """Whether an array lies in a GPU's memory."""
    cupy = sys.modules.get("cupy")
    if cupy is not None and isinstance(array, getattr(cupy, "ndarray", ())):
        return True  # to look up its interface would make a dictionary, in microseconds
    return hasattr(array, "__cuda_array_interface__")


def check_library(name: str, array: Any, device: bool) -> Any:
    """Return an argument as an array of the library that logits is of.

    Args:
        device: whether logits is a CuPy array.

    Raises:
        ValueError: if the argument is of the other library, or a masked array.
    """
    check_unmasked(name, array)
    if device != on_device(array):
        ours, theirs = ("a CuPy", "NumPy") if device else ("a NumPy", "CuPy")
        raise ValueError(
            f"{name} must be {ours} array, as the first argument is, not {theirs}'s "
            f"(got {type(array)!r})"
        )
    return array if device else np.asarray(array)


def check_shape(logits: Any) -> tuple[int, int]:
    """Check the shape of logits. Returns T and E."""
    if len(logits.shape) != 2 or logits.shape[1] < 1:
        raise ValueError(f"logits must have shape (T, E), E >= 1 (got {logits.shape})")
    return logits.shape


def check_options(options: Options, logits: Any, device: bool) -> Options:
    """Check all but the values in arrays. Returns options whose arrays are as `check_library`."""
    num_tokens, num_experts = check_shape(logits)
    bias, mask = options.bias, options.mask
    if bias is not None:
        bias = check_library("bias", bias, device)
        if bias.shape != (num_experts,):
            raise ValueError(
                f"bias must be finite, of shape ({num_experts},) (got shape {bias.shape})"
            )
    if mask is not None:
        mask = check_library("mask", mask, device)
        if mask.dtype != bool or mask.shape not in ((num_experts,), (num_tokens, num_experts)):
            raise ValueError(
                f"mask must be bool of shape ({num_experts},) or ({num_tokens}, {num_experts}) "
                f"(got {mask.dtype} of shape {mask.shape})"
            )
    num_groups = check_int("num_groups", options.num_groups, minimum=1)
    topk_groups = check_int(
        "topk_groups", options.topk_groups, minimum=1, maximum=options.num_groups
    )
    if num_experts % num_groups:
        raise ValueError(f"num_groups must divide the {num_experts} experts (got {num_groups})")
    check_choice("group_score", options.group_score, GROUP_SCORES)
    scale = check_positive("scale", options.scale)
    return Options(
        options.kind,
        bias,
        mask,
        num_groups,
        topk_groups,
        options.group_score,
        scale,
        options.renormalize,
    )


def check_topk(topk: int, num_experts: int, options: Options) -> int:
    """Check K, which is at most the number of experts in `topk_groups` groups."""
    topk = check_int("topk", topk, minimum=1, maximum=num_experts)
    most = options.topk_groups * (num_experts // options.num_groups)
    if topk > most:
        raise ValueError(
            f"topk must be <= {most}, the experts of {options.topk_groups} of "
            f"{options.num_groups} groups (got {topk})"
        )
    return topk


def check_ids_form(name: str, ids: Any, num_tokens: int) -> None:
    """Check the dtype and the number of rows of ids [T, K]."""
    if len(ids.shape) != 2 or ids.dtype.kind != "i":
        raise ValueError(
            f"{name} must be integers of shape (T, K) (got {ids.dtype} of shape {ids.shape})"
        )
    if len(ids) != num_tokens:
        raise ValueError(f"{name} must have {num_tokens} rows, as logits has (got {len(ids)})")


def check_dweights_form(dweights: Any, ids: Any) -> None:
    if dweights.shape != ids.shape:
        raise ValueError(
            f"dweights and ids must have the same shape (T, K) "
            f"(got {dweights.shape} and {ids.shape})"
        )
