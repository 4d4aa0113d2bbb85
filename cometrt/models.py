"""Shapes of the Mixture-of-Experts layers of well-known models, in full size or scaled down.

A shape describes the routed experts: H, I, E, K and the activation. It describes neither shared
experts nor the model's router.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from cometrt.specs import ALIGNMENT, MoESpec, check_choice, check_int


class Model(NamedTuple):
    """One layer: H, I of each expert, E, K and the activation, named as in `MoESpec`."""

    hidden: int
    intermediate: int
    num_experts: int
    topk: int
    activation: str = "swiglu"


MODELS = {
    # The first three as in COMET's table of models (arXiv 2502.19811).
    "mixtral-8x7b": Model(4096, 14336, 8, 2),
    "qwen2-moe": Model(2048, 1408, 64, 4),
    "phi-3.5-moe": Model(4096, 6400, 16, 2),
    "qwen3-30b-a3b": Model(2048, 768, 128, 8),  # arXiv 2505.09388
    "deepseek-v3": Model(7168, 2048, 256, 8),  # arXiv 2412.19437
}
"""Layers by model name, in full size."""


def scaled_spec(name: str, factor: int = 1, *, max_tokens: int, **spec: Any) -> MoESpec:
    """The MoESpec of a model's layer, with H and I divided by `factor`.

    Args:
        name: a key of MODELS.
        factor: divides H and I, which are then rounded up to legal multiples. E and K stay.
        max_tokens: as in ``MoESpec``.
        spec: further arguments of ``MoESpec``.

    Raises:
        ValueError: for an unknown model, a factor below 1, or an argument that ``MoESpec`` refuses.
    """
    check_choice("name", name, tuple(MODELS))
    factor = check_int("factor", factor, minimum=1)
    model = MODELS[name]
    tp = check_int("tp", spec.get("tp", 1), minimum=1)
    return MoESpec(
        hidden=_round_up(model.hidden / factor, ALIGNMENT),
        intermediate=_round_up(model.intermediate / factor, ALIGNMENT * tp),
        num_experts=model.num_experts,
        topk=model.topk,
        max_tokens=max_tokens,
        activation=model.activation,
        **spec,
    )


def _round_up(value: float, multiple: int) -> int:
    return -int(-value // multiple) * multiple
