"""Top-k routers with their backward, router losses, and statistics of the experts' load.

A router computes ``topk_ids`` and ``topk_weights`` for ``MoELayer.forward`` from logits. Its
backward turns ``grads.topk_weights`` into the gradient of the logits. All functions take NumPy or
CuPy arrays, compute in float64, and return arrays of the same library. Of equal scores the lower
expert id wins, so routing is deterministic. A masked array is a ValueError, because NumPy would
drop its mask.

With CuPy a router's forward and its backward are one kernel each, on CuPy's current stream. Nothing
waits for the GPU, so calls can be captured in CUDA graphs. E is at most 1,024, K and the number of
groups at most 32.
The chosen ids are NumPy's, unless two scores are within 4 units in the last place of float64.

Sources: softmax top-k as in Switch (arXiv 2101.03961) and Mixtral (arXiv 2401.04088); group-limited
choice as in DeepSeek-V2 (arXiv 2405.04434); sigmoid with a selection bias as in DeepSeek-V3 (arXiv
2412.19437, 2.1.2), whose bias update is that of arXiv 2408.15664; z-loss as in ST-MoE (arXiv
2202.08906).
"""

from cometrt.router.losses import (
    LoadStatistics,
    balance_loss,
    balance_loss_backward,
    load_statistics,
    update_bias,
    z_loss,
    z_loss_backward,
)
from cometrt.router.routing import (
    Routing,
    sigmoid_topk,
    sigmoid_topk_backward,
    sigmoid_weights,
    softmax_topk,
    softmax_topk_backward,
    softmax_weights,
    sqrt_softplus_topk,
    sqrt_softplus_topk_backward,
    sqrt_softplus_weights,
)

__all__ = [
    "LoadStatistics",
    "Routing",
    "balance_loss",
    "balance_loss_backward",
    "load_statistics",
    "sigmoid_topk",
    "sigmoid_topk_backward",
    "sigmoid_weights",
    "softmax_topk",
    "softmax_topk_backward",
    "softmax_weights",
    "sqrt_softplus_topk",
    "sqrt_softplus_topk_backward",
    "sqrt_softplus_weights",
    "update_bias",
    "z_loss",
    "z_loss_backward",
]
