"""Routers over random shapes, dtypes, masks, groups and biases, against plain loops."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings

from cometrt import router
from tests.router_cases import KINDS, RouterCase, check_ids, choices, plain_weights, router_cases


@settings(max_examples=200)
@given(router_cases())
def test_the_choice_is_that_of_plain_loops(case):
    ids, weights = case.topk(case.logits, case.k, **case.keywords)
    check_ids(case, ids)
    assert weights.dtype == np.float32
    assert (weights[ids < 0] == 0).all()
    moderate = np.abs(np.where(ids >= 0, np.take_along_axis(case.allowed, ids, 1), 0)) < 300
    if moderate.all():  # beyond, a plain quotient of scores underflows
        expected = plain_weights(case, case.allowed, ids)
        np.testing.assert_allclose(weights, expected, rtol=2e-6, atol=1e-38)


@settings(max_examples=25)
@given(router_cases(max_experts=1024, max_tokens=2))
def test_the_choice_among_many_experts(case):
    check_ids(case, case.topk(case.logits, case.k, **case.keywords).ids)


@settings(max_examples=100)
@given(router_cases())
def test_weights_of_given_ids_are_those_of_the_choice(case):
    ids, weights = case.topk(case.logits, case.k, **case.keywords)
    assert case.weights(case.logits, ids, **case.keywords).tobytes() == weights.tobytes()
    assert case.weights(case.logits, ids.astype(np.int64), **case.keywords).shape == ids.shape
    if case.keywords["renormalize"]:
        total = np.where((ids >= 0).any(axis=1), case.keywords["scale"], 0.0)
        np.testing.assert_allclose(weights.sum(axis=1), total, rtol=1e-5)


@settings(max_examples=100)
@given(router_cases())
def test_masked_experts_are_as_absent(case):
    # mask=False and a logit of -inf are the same, and no masked expert is chosen.
    ids, weights = case.topk(case.logits, case.k, **case.keywords)
    again = case.topk(case.allowed, case.k, **case.keywords | {"mask": None})
    assert again.ids.tobytes() == ids.tobytes()
    assert again.weights.tobytes() == weights.tobytes()
    gone = case.allowed == -np.inf
    assert not (np.take_along_axis(gone, np.maximum(ids, 0), 1) & (ids >= 0)).any()
    dlogits = case.backward(case.dweights(), case.logits, ids, **case.keywords)
    assert (dlogits[gone] == 0).all()


@settings(max_examples=60)
@given(router_cases(max_experts=16, max_topk=6, max_tokens=3, dtypes=(np.float64,)))
def test_backward_equals_finite_differences(case):
    case = dataclasses.replace(case, logits=np.clip(case.logits, -np.inf, 30))
    ids, _ = case.topk(case.logits, case.k, **case.keywords)
    dweights, logits = case.dweights(), case.allowed
    found = case.backward(dweights, case.logits, ids, **case.keywords)
    assert found.dtype == np.float32
    numeric = np.zeros(logits.shape)
    for index in zip(*np.nonzero(logits > -np.inf), strict=True):
        losses = []
        for step in (1e-5, -1e-5):
            moved = logits.copy()
            moved[index] += step
            losses.append((plain_weights(case, moved, ids) * dweights).sum())
        numeric[index] = (losses[0] - losses[1]) / 2e-5
    np.testing.assert_allclose(found, numeric, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_far_logits_keep_their_digits(kind):
    # Scores so far below 0 underflow, their quotients do not.
    far = RouterCase(kind, np.array([[-1500.0, -1501.0, -1900.0]]), 2, {})
    ids, weights = far.topk(far.logits, 2)
    assert ids.tolist() == [[0, 1]]
    slope = 0.5 if kind == "sqrt_softplus" else 1.0  # the score is exp(slope * logit) there
    w = 1 / (1 + np.exp(-slope))
    np.testing.assert_allclose(weights, [[w, 1 - w]], rtol=1e-6)
    dlogits = far.backward(np.array([[1.0, 0.0]]), far.logits, ids)
    expected = slope * w * (1 - w)
    np.testing.assert_allclose(dlogits, [[expected, -expected, 0]], rtol=1e-6)


def test_the_bias_chooses_and_does_not_weigh():
    logits = np.array([[2.0, 1.0, 0.0, -1.0]])
    for kind in KINDS:
        case = RouterCase(kind, logits, 2, {})
        ids, weights = case.topk(logits, 2, bias=np.array([0.0, 0, 0, 9]))
        assert ids.tolist() == [[3, 0]]
        assert weights.tobytes() == case.weights(logits, ids).tobytes()
        assert weights[0, 1] > weights[0, 0]


def test_the_two_scores_of_a_group():
    # Group 0 has the largest score, group 1 the largest sum of two.
    logits = np.log(np.array([[0.35, 0.01, 0.3, 0.34]]))
    options = {"num_groups": 2, "topk_groups": 1}
    assert router.softmax_topk(logits, 1, **options).ids.tolist() == [[0]]
    assert router.softmax_topk(logits, 1, group_score="top2", **options).ids.tolist() == [[3]]
    assert router.sigmoid_topk(logits, 1, **options).ids.tolist() == [[3]]
    assert router.sigmoid_topk(logits, 1, group_score="max", **options).ids.tolist() == [[0]]
    # The second expert of group 1 is masked: its sum has one term.
    mask = np.array([True, True, False, True])
    assert router.sigmoid_topk(logits, 1, mask=mask, **options).ids.tolist() == [[0]]


def test_fewer_experts_than_k():
    logits = np.array([[0.0, 1.0, -np.inf], [-np.inf] * 3])
    for kind in KINDS:
        case = RouterCase(kind, logits, 3, {})
        for renormalize in (True, False):
            ids, weights = case.topk(logits, 3, renormalize=renormalize)
            assert ids.tolist() == [[1, 0, -1], [-1, -1, -1]]
            assert (weights[0, :2] > 0).all()
            assert (weights[ids < 0] == 0).all()
            dweights = np.where(ids < 0, np.nan, 1.0)  # ignored there
            dlogits = case.backward(dweights, logits, ids, renormalize=renormalize)
            assert np.isfinite(dlogits).all()
            assert (dlogits[1] == 0).all()


def test_the_choice_of_a_masked_case_is_not_empty():
    # The strategy makes both: tokens with fewer experts than K, and tokens with more.
    seen = set()

    @settings(max_examples=200, database=None)
    @given(router_cases())
    def look(case):
        for row in choices(case):
            seen.add(bool((row > -np.inf).sum() >= case.k))

    look()
    assert seen == {True, False}
