"""Router losses against plain loops, their backward against finite differences."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cometrt import router


@st.composite
def batches(draw):
    """logits [T, E], some masked, and ids [T, K] with dropped pairs and padding tokens."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    num_tokens, num_experts = draw(st.integers(0, 8)), draw(st.integers(1, 6))
    topk = draw(st.integers(1, num_experts))
    logits = 3 * rng.standard_normal((num_tokens, num_experts))
    order = np.argsort(rng.random(logits.shape), axis=1)
    ids = np.where(rng.random((num_tokens, topk)) < 0.3, -1, order[:, :topk])
    ids[rng.random(num_tokens) < 0.3] = -1
    logits[(rng.random(logits.shape) < 0.2) & (order > 0)] = -np.inf
    return logits, ids


def softmax(row):
    exponent = np.exp(row - row.max())
    return exponent / exponent.sum()


def plain_balance_loss(logits, ids, counts=None):
    counts = np.bincount(ids[ids >= 0], minlength=logits.shape[1]) if counts is None else counts
    rows = [softmax(row) for row, of in zip(logits, ids, strict=True) if (of >= 0).any()]
    if not rows or not counts.sum():
        return 0.0
    return logits.shape[1] * float(counts / counts.sum() @ np.mean(rows, axis=0))


def plain_z_loss(logits):
    rows = logits[np.isfinite(logits).any(axis=1)]
    return float(np.mean([np.log(np.exp(row).sum()) ** 2 for row in rows])) if len(rows) else 0.0


def numeric_gradient(loss, logits):
    found = np.zeros(logits.shape)
    for index in zip(*np.nonzero(np.isfinite(logits)), strict=True):
        step = np.zeros(logits.shape)
        step[index] = 1e-5
        found[index] = (loss(logits + step) - loss(logits - step)) / 2e-5
    return found


def check_gradient(found, loss, logits):
    assert found.dtype == np.float32
    assert found.shape == logits.shape
    np.testing.assert_allclose(found, numeric_gradient(loss, logits), rtol=1e-4, atol=1e-6)


@settings(max_examples=60)
@given(batches())
def test_balance_loss(batch):
    logits, ids = batch
    assert router.balance_loss(logits, ids) == pytest.approx(plain_balance_loss(logits, ids))
    found = router.balance_loss_backward(0.5, logits, ids)
    check_gradient(found, lambda x: 0.5 * plain_balance_loss(x, ids), logits)
    assert (found[(ids < 0).all(axis=1)] == 0).all()


@settings(max_examples=60)
@given(batches(), st.integers(1, 4))
def test_balance_loss_of_each_sequence(batch, num_sequences):
    logits, ids = batch
    length = len(logits) // num_sequences
    if length == 0:
        return
    logits, ids = logits[: num_sequences * length], ids[: num_sequences * length]
    parts = [slice(length * i, length * (i + 1)) for i in range(num_sequences)]
    parts = [of for of in parts if (ids[of] >= 0).any()]

    def loss(x):
        return float(np.mean([plain_balance_loss(x[of], ids[of]) for of in parts] or [0.0]))

    assert router.balance_loss(logits, ids, per_sequence=length) == pytest.approx(loss(logits))
    found = router.balance_loss_backward(1.0, logits, ids, per_sequence=length)
    check_gradient(found, loss, logits)


@settings(max_examples=60)
@given(batches())
def test_balance_loss_of_a_global_batch(batch):
    logits, ids = batch
    counts = np.arange(logits.shape[1]) * 10

    def loss(x):
        return plain_balance_loss(x, ids, counts)

    assert router.balance_loss(logits, ids, counts=counts) == pytest.approx(loss(logits))
    check_gradient(router.balance_loss_backward(1.0, logits, ids, counts=counts), loss, logits)


def test_ranks_average_to_the_balance_loss_of_the_global_batch():
    # Counts are summed over the ranks. Then the mean of the ranks' losses is the whole batch's.
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((12, 8))
    ids = router.softmax_topk(logits, 2).ids
    ranks = [(logits[i : i + 4], ids[i : i + 4]) for i in (0, 4, 8)]
    counts = sum(router.load_statistics(of, 8).counts for _, of in ranks)
    losses = [router.balance_loss(*rank, counts=counts) for rank in ranks]
    assert np.mean(losses) == pytest.approx(router.balance_loss(logits, ids))
    gradients = [router.balance_loss_backward(1 / 3, *rank, counts=counts) for rank in ranks]
    np.testing.assert_allclose(
        np.concatenate(gradients), router.balance_loss_backward(1.0, logits, ids), rtol=1e-6
    )


@settings(max_examples=60)
@given(batches())
def test_z_loss(batch):
    logits, ids = batch
    assert router.z_loss(logits) == pytest.approx(plain_z_loss(logits))
    check_gradient(router.z_loss_backward(0.5, logits), lambda x: 0.5 * plain_z_loss(x), logits)
    counted = (ids >= 0).any(axis=1)
    assert router.z_loss(logits, ids) == pytest.approx(plain_z_loss(logits[counted]))
    found = router.z_loss_backward(1.0, logits, ids)
    check_gradient(found, lambda x: plain_z_loss(x[counted]), logits)


def test_losses_of_tokens_without_any_expert():
    logits = np.full((2, 3), -np.inf)
    ids = np.full((2, 1), -1)
    assert router.balance_loss(logits, ids) == router.z_loss(logits) == 0.0
    assert not router.balance_loss_backward(1.0, logits, ids).any()
    assert not router.z_loss_backward(1.0, logits).any()


def test_update_bias_moves_towards_balance():
    bias = np.zeros(4, np.float32)
    assert router.update_bias(bias, np.array([10, 0, 5, 5]), rate=0.25) is None
    assert bias.tolist() == [-0.25, 0.25, 0, 0]
    logits = np.random.default_rng(0).standard_normal((256, 8)) + np.linspace(0, 2, 8)
    bias = np.zeros(8)
    loads = []
    for _ in range(100):
        ids = router.sigmoid_topk(logits, 2, bias=bias).ids
        loads.append(router.load_statistics(ids, 8))
        router.update_bias(bias, loads[-1].counts, rate=0.01)
    assert loads[0].imbalance > 1.5
    assert loads[-1].imbalance < 1.1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: router.balance_loss(np.zeros((3, 4)), np.zeros((3, 1), int), per_sequence=2),
            r"per_sequence must divide the 3 tokens \(got 2\)",
        ),
        (
            lambda: router.balance_loss(
                np.zeros((2, 4)), np.zeros((2, 1), int), per_sequence=1, counts=np.ones(4)
            ),
            "counts must be None with per_sequence",
        ),
        (
            lambda: router.balance_loss(np.zeros((2, 4)), np.zeros((2, 1), int), counts=np.ones(3)),
            r"counts must be numbers of shape \(4,\) \(got float64 of shape \(3,\)\)",
        ),
        (lambda: router.z_loss(np.zeros(3)), r"logits must have shape \(T, E\)"),
        (lambda: router.z_loss(np.full((1, 2), np.nan)), r"logits must be finite, .* \(got nan\)"),
        (
            lambda: router.z_loss(np.zeros((2, 4)), np.zeros((1, 1), int)),
            "topk_ids must have 2 rows",
        ),
        (
            lambda: router.z_loss(np.zeros((1, 4)), np.full((1, 1), 4)),
            r"topk_ids must lie in \[-1, 4\)",
        ),
        (
            lambda: router.update_bias(np.zeros(4, int), np.ones(4)),
            r"bias must be floating, of shape \(E,\) \(got int64",
        ),
        (
            lambda: router.update_bias([0.0], np.ones(1)),
            "bias must be a NumPy or CuPy array",
        ),
        (
            lambda: router.update_bias(np.zeros(4), np.ones(4), rate=0.0),
            r"rate must be a finite number > 0 \(got 0.0\)",
        ),
    ],
)
def test_wrong_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()
