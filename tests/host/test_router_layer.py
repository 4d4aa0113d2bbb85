"""Routers with a layer: the weight on the input, as Llama 4 has it, against finite differences."""

import numpy as np

import cometrt
from cometrt import router

SPEC = cometrt.MoESpec(16, 16, num_experts=4, topk=1, max_tokens=6, dtype="float32")


def loss_of(x, gate, ids, w_up, w_down, dy):
    """In float64: y = expert(score * x), of the given experts; loss = <y, dy>."""
    scores = 1 / (1 + np.exp(-np.take_along_axis(x @ gate, ids, axis=1)))
    ones = np.ones(ids.shape)
    y = cometrt.reference.moe_forward(scores * x, ids, ones, w_up, w_down, SPEC.activation)
    return float((y * dy).sum())


def numeric_gradient(loss, array):
    found = np.zeros(array.shape)
    for index in np.ndindex(array.shape):
        step = np.zeros(array.shape)
        step[index] = 1e-5
        found[index] = (loss(array + step) - loss(array - step)) / 2e-5
    return found


def test_the_weight_may_be_applied_to_the_input():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((6, SPEC.hidden)).astype(np.float32)
    dy = rng.standard_normal(x.shape).astype(np.float32)
    gate = (rng.standard_normal((SPEC.hidden, SPEC.num_experts)) / 4).astype(np.float32)
    w_up = rng.standard_normal((4, 32, 16)).astype(np.float32) / 4
    w_down = rng.standard_normal((4, 16, 16)).astype(np.float32) / 4

    def step(world):
        layer = cometrt.MoELayer(world, SPEC)
        logits = x @ gate
        ids, weights = router.sigmoid_topk(logits, 1, renormalize=False)
        y, saved = layer.forward(weights * x, ids, np.ones_like(weights), w_up, w_down)
        grads = layer.backward(dy, saved)
        dweights = (grads.x * x).sum(axis=1, keepdims=True)
        dlogits = router.sigmoid_topk_backward(dweights, logits, ids, renormalize=False)
        dx = weights * grads.x + dlogits @ gate.T
        return ids, y, dx, x.T @ dlogits

    (ids, y, dx, dgate), *_ = cometrt.spawn(step, 1, "host")
    wide = [a.astype(np.float64) for a in (x, gate, w_up, w_down, dy)]
    x64, gate64, experts, dy64 = wide[0], wide[1], wide[2:4], wide[4]
    np.testing.assert_allclose((y * dy).sum(), loss_of(x64, gate64, ids, *experts, dy64), rtol=1e-4)
    expected = numeric_gradient(lambda a: loss_of(a, gate64, ids, *experts, dy64), x64)
    np.testing.assert_allclose(dx, expected, rtol=1e-3, atol=1e-4)
    expected = numeric_gradient(lambda a: loss_of(x64, a, ids, *experts, dy64), gate64)
    np.testing.assert_allclose(dgate, expected, rtol=1e-3, atol=1e-4)
