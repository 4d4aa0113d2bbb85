"""Routers against plain loops, their backward against finite differences, the statistics."""

import numpy as np
import pytest

from cometrt import router


def logits_of(tokens=7, experts=12, seed=0):
    return np.random.default_rng(seed).normal(size=(tokens, experts))


@pytest.mark.parametrize("renormalize", [True, False])
def test_softmax_topk(renormalize):
    logits = logits_of()
    ids, weights = router.softmax_topk(logits, 3, renormalize=renormalize)
    assert ids.dtype == np.int32
    assert weights.dtype == np.float32
    for t in range(len(logits)):
        p = np.exp(logits[t]) / np.exp(logits[t]).sum()
        best = sorted(range(12), key=lambda e, p=p: -p[e])[:3]
        assert ids[t].tolist() == best
        expected = p[best] / (p[best].sum() if renormalize else 1)
        np.testing.assert_allclose(weights[t], expected, rtol=1e-6)


def test_ties_go_to_the_lower_id():
    assert router.softmax_topk(np.zeros((2, 5)), 3).ids.tolist() == [[0, 1, 2]] * 2
    assert router.sigmoid_topk(np.zeros((1, 5)), 2).ids.tolist() == [[0, 1]]


def test_extreme_logits_stay_finite():
    logits = np.array([[1e4, -1e4, 0.0]])
    assert np.isfinite(router.softmax_topk(logits, 2).weights).all()
    assert np.isfinite(router.sigmoid_topk(logits, 3, bias=np.zeros(3)).weights).all()
    low = np.full((1, 3), -1e4)  # all affinities underflow
    np.testing.assert_allclose(router.sigmoid_topk(low, 2, bias=np.zeros(3)).weights, [[0.5, 0.5]])


def test_sigmoid_keeps_its_digits_far_below_zero():
    logits = np.array([[-40.0, -41.0, -60.0]])
    ids, weights = router.sigmoid_topk(logits, 2, bias=np.zeros(3))
    p = 1 / (1 + np.exp(-1.0))  # sigmoid is exp there
    np.testing.assert_allclose(weights, [[p, 1 - p]], rtol=1e-6)
    dlogits = router.sigmoid_topk_backward(np.array([[1.0, 0.0]]), logits, ids)
    np.testing.assert_allclose(dlogits, [[p * (1 - p), -p * (1 - p), 0]], rtol=1e-6)
    plain = router.sigmoid_topk(logits, 1, bias=np.zeros(3), renormalize=False).weights
    np.testing.assert_allclose(plain, [[np.exp(-40.0)]], rtol=1e-6)


@pytest.mark.parametrize("renormalize", [True, False])
def test_sigmoid_topk_chooses_with_the_bias_and_weighs_without(renormalize):
    logits, bias = logits_of(), np.random.default_rng(1).normal(size=12)
    ids, weights = router.sigmoid_topk(logits, 4, bias=bias, renormalize=renormalize, scale=2.5)
    for t in range(len(logits)):
        s = 1 / (1 + np.exp(-logits[t]))
        best = sorted(range(12), key=lambda e, s=s: -(s[e] + bias[e]))[:4]
        assert ids[t].tolist() == best
        expected = 2.5 * s[best] / (s[best].sum() if renormalize else 1)
        np.testing.assert_allclose(weights[t], expected, rtol=1e-6)


def test_sigmoid_topk_limited_to_groups():
    logits, bias = logits_of(tokens=50), np.random.default_rng(1).normal(size=12)
    ids, _ = router.sigmoid_topk(logits, 3, bias=bias, num_groups=4, topk_groups=2)
    for t in range(len(logits)):
        choice = (1 / (1 + np.exp(-logits[t])) + bias).reshape(4, 3)
        score = np.sort(choice, axis=1)[:, 1:].sum(axis=1)
        groups = set(np.argsort(-score)[:2].tolist())
        allowed = [e for e in range(12) if e // 3 in groups]
        best = sorted(allowed, key=lambda e, c=choice: -c.ravel()[e])[:3]
        assert ids[t].tolist() == best


@pytest.mark.parametrize("num_groups", [1, 2, 4])
def test_no_tokens(num_groups):
    none, bias = np.zeros((0, 8)), np.zeros(8)
    options = {"num_groups": num_groups, "topk_groups": num_groups}
    for ids, weights in (
        router.softmax_topk(none, 2),
        router.softmax_topk(none, 2, renormalize=False),
        router.sigmoid_topk(none, 2, bias=bias, **options),
        router.sigmoid_topk(none, 2, bias=bias, renormalize=False, **options),
    ):
        assert (ids.shape, ids.dtype, weights.shape) == ((0, 2), np.int32, (0, 2))
        for backward in (router.softmax_topk_backward, router.sigmoid_topk_backward):
            assert backward(weights, none, ids).shape == (0, 8)
            assert backward(weights, none, ids, renormalize=False).shape == (0, 8)


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_backward_equals_finite_differences(kind, renormalize):
    logits, bias = logits_of(), np.random.default_rng(1).normal(size=12)
    if kind == "softmax":
        ids = router.softmax_topk(logits, 3, renormalize=renormalize).ids
    else:
        ids = router.sigmoid_topk(logits, 3, bias=bias, renormalize=renormalize).ids
    dweights = np.random.default_rng(2).normal(size=ids.shape)
    dweights[2, 1] = 0.0  # a pair that was dropped after routing

    def loss(logits):
        scores = np.exp(logits) if kind == "softmax" else 1 / (1 + np.exp(-logits))
        weights = np.take_along_axis(scores, ids, axis=1)
        if renormalize:
            weights = weights / weights.sum(axis=1, keepdims=True)
        elif kind == "softmax":
            weights = weights / scores.sum(axis=1, keepdims=True)
        return ((1.0 if kind == "softmax" else 1.7) * weights * dweights).sum()

    if kind == "softmax":
        found = router.softmax_topk_backward(dweights, logits, ids, renormalize=renormalize)
    else:
        found = router.sigmoid_topk_backward(
            dweights, logits, ids, renormalize=renormalize, scale=1.7
        )
    assert found.dtype == np.float32
    numeric = np.zeros_like(logits)
    for index in np.ndindex(logits.shape):
        step = np.zeros_like(logits)
        step[index] = 1e-5
        numeric[index] = (loss(logits + step) - loss(logits - step)) / 2e-5
    np.testing.assert_allclose(found, numeric, rtol=1e-5, atol=1e-7)


def test_load_statistics():
    stats = router.load_statistics(np.array([[0, 1], [0, 3], [0, -1]]), 4)
    assert stats.counts.tolist() == [3, 1, 0, 1]
    assert stats.imbalance == pytest.approx(3 / 1.25)
    assert stats.variation == pytest.approx(np.std([3, 1, 0, 1]) / 1.25)
    assert stats.idle == 1
    assert stats.dropped == pytest.approx(1 / 6)
    empty = router.load_statistics(np.zeros((0, 2), int), 4)
    assert (empty.imbalance, empty.variation, empty.idle, empty.dropped) == (0, 0, 4, 0)


def test_balance_loss():
    ids = np.array([[0], [1], [2], [3]])
    assert router.balance_loss(np.zeros((4, 4)), ids) == pytest.approx(1.0)
    hot = np.array([[9.0, 0, 0, 0]] * 4)
    assert router.balance_loss(hot, np.zeros((4, 1), int)) == pytest.approx(4.0, rel=1e-2)
    assert router.balance_loss(np.zeros((0, 4)), np.zeros((0, 1), int)) == 0.0
    assert router.balance_loss(np.zeros((3, 4)), np.full((3, 2), -1)) == 0.0


def test_padding_does_not_change_the_balance_loss():
    logits = logits_of(experts=8)
    ids = router.softmax_topk(logits, 2).ids
    ids[3, 1] = -1  # a dropped pair: its token counts
    counts, p = np.bincount(ids[ids >= 0], minlength=8), np.exp(logits)
    p /= p.sum(axis=1, keepdims=True)
    loss = router.balance_loss(logits, ids)
    assert loss == pytest.approx(8 * (counts / 13 * p.mean(axis=0)).sum())
    padding = np.array([[9.0] + [0.0] * 7] * 6)
    padded = np.concatenate([padding[:2], logits, padding])
    padded_ids = np.concatenate([np.full((2, 2), -1), ids, np.full((6, 2), -1)])
    assert router.balance_loss(padded, padded_ids) == pytest.approx(loss)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: router.softmax_topk(np.zeros(3), 1), r"logits must have shape \(T, E\)"),
        (lambda: router.softmax_topk(np.full((1, 3), np.nan), 1), "logits must be finite"),
        (lambda: router.softmax_topk(np.zeros((1, 3)), 4), r"topk must be an integer in \[1, 3\]"),
        (lambda: router.softmax_topk(np.zeros((1, 3)), 0), r"topk must be .* \(got 0\)"),
        (
            lambda: router.sigmoid_topk(np.zeros((1, 3)), 1, bias=np.zeros(2)),
            r"bias must be finite",
        ),
        (
            lambda: router.sigmoid_topk(np.zeros((1, 4)), 1, bias=np.zeros(4), num_groups=3),
            "num_groups must divide",
        ),
        (
            lambda: router.sigmoid_topk(np.zeros((1, 4)), 3, bias=np.zeros(4), num_groups=2),
            "topk must be <= 2",
        ),
        (
            lambda: router.sigmoid_topk(np.zeros((1, 4)), 1, bias=np.zeros(4), topk_groups=2),
            "topk_groups must be an integer in",
        ),
        (
            lambda: router.softmax_topk_backward(
                np.zeros((1, 2)), np.zeros((1, 4)), np.array([[0, -2]])
            ),
            r"ids must lie in \[-1, 4\)",
        ),
        (
            lambda: router.sigmoid_topk_backward(
                np.zeros((1, 1)), np.zeros((1, 4)), np.array([[0, 1]])
            ),
            "dweights and ids must have the same shape",
        ),
        (
            lambda: router.softmax_topk_backward(
                np.zeros((1, 2)), np.zeros((1, 4)), np.array([[1, 1]])
            ),
            "ids must be distinct within a token",
        ),
        (lambda: router.load_statistics(np.array([[4]]), 4), r"topk_ids must lie in \[-1, 4\)"),
        (lambda: router.load_statistics(np.array([[0.5]]), 4), "topk_ids must be integers"),
        (lambda: router.load_statistics(np.array([[0]]), 0), "num_experts must be an integer >= 1"),
        (
            lambda: router.balance_loss(np.zeros((2, 4)), np.array([[0]])),
            "topk_ids must have 2 rows",
        ),
    ],
)
def test_wrong_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()


LOGITS, IDS = np.ones((2, 4)), np.array([[0, 1], [2, 3]])


@pytest.mark.filterwarnings("ignore:the matrix subclass:PendingDeprecationWarning")
@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        (router.softmax_topk, {"logits": LOGITS, "topk": 2}),
        (router.sigmoid_topk, {"logits": LOGITS, "bias": np.ones(4), "topk": 2}),
        (router.softmax_topk_backward, {"dweights": LOGITS[:, :2], "logits": LOGITS, "ids": IDS}),
        (router.sigmoid_topk_backward, {"dweights": LOGITS[:, :2], "logits": LOGITS, "ids": IDS}),
        (router.load_statistics, {"topk_ids": IDS, "num_experts": 4}),
        (router.balance_loss, {"logits": LOGITS, "topk_ids": IDS}),
    ],
)
def test_masked_arrays_are_refused_and_matrices_are_arrays(function, arguments):
    expected = function(**arguments)
    arrays = {name: value for name, value in arguments.items() if np.ndim(value)}
    for name, value in arrays.items():
        with pytest.raises(ValueError, match=f"{name} must not be a masked array"):
            function(**(arguments | {name: np.ma.masked_array(value, mask=False)}))
    matrices = {name: np.matrix(value) for name, value in arrays.items() if value.ndim == 2}
    found = function(**(arguments | matrices))
    results = zip(found, expected, strict=True) if isinstance(found, tuple) else [(found, expected)]
    for ours, theirs in results:
        assert type(ours) is type(theirs)
        np.testing.assert_array_equal(ours, theirs)
