"""Routers and losses over CuPy arrays against NumPy's: results, graphs, and errors of callers."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings

import cometrt
from cometrt import router
from tests.cases import Case, make_inputs, on_host
from tests.device.test_failures import Rank
from tests.router_cases import (
    KINDS,
    RouterCase,
    check_ids,
    router_cases,
    weights_are_within_two_ulp,
)

pytestmark = pytest.mark.gpu
DEEPSEEK = {"num_groups": 8, "topk_groups": 4, "group_score": "top2", "scale": 2.5}


def on_gpu(value):
    import cupy

    return cupy.asarray(value) if isinstance(value, np.ndarray) else value


def deepseek_case(kind, num_tokens, experts, k):
    """A router with bias, mask and groups."""
    rng = np.random.default_rng(experts)
    keywords = {
        "bias": 0.1 * rng.standard_normal(experts),
        "mask": rng.random((num_tokens, experts)) < 0.9,
        "num_groups": 4, "topk_groups": 2, "group_score": "top2",
        "scale": 2.5, "renormalize": True,
    }  # fmt: skip
    logits = rng.standard_normal((num_tokens, experts), np.float32)
    return RouterCase(kind, logits, k, keywords)


def check(case):
    """All three directions against NumPy's."""
    keywords = {name: on_gpu(value) for name, value in case.keywords.items()}
    logits = on_gpu(case.logits)
    found = case.topk(logits, case.k, **keywords)
    ids, weights = on_host(found.ids), on_host(found.weights)
    check_ids(case, ids)
    # For the same ids, also where a choice as good as equal was another one.
    expected = case.weights(case.logits, ids, **case.keywords)
    weights_are_within_two_ulp(weights, expected)
    for given_ids in (found.ids, found.ids.astype(np.int64)):
        given_weights = on_host(case.weights(logits, given_ids, **keywords))
        weights_are_within_two_ulp(given_weights, expected)
    for dtype in (np.float32, np.float64):
        dweights = case.dweights(dtype)
        dlogits = case.backward(on_gpu(dweights), logits, found.ids, **keywords)
        assert dlogits.dtype == np.float32
        # Beside rounding to float32, a gradient may be a difference of float64 terms.
        np.testing.assert_allclose(
            on_host(dlogits),
            case.backward(dweights, case.logits, ids, **case.keywords),
            rtol=3e-7,
            atol=1e-12,
        )


@settings(max_examples=300)
@given(router_cases())
def test_every_router_is_numpys(case):
    check(case)


@settings(max_examples=100)
@given(router_cases(max_experts=1024, max_tokens=9))
def test_among_many_experts(case):
    check(case)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("experts", [1, 31, 32, 33, 64, 128, 256, 512, 1024])
def test_every_build(kind, experts):
    rng = np.random.default_rng(experts)
    logits = rng.standard_normal((133, experts), np.float32)
    keywords = {"num_groups": 1, "topk_groups": 1, "group_score": "max", "scale": 1.0}
    for renormalize in (True, False):
        keywords["renormalize"] = renormalize
        check(RouterCase(kind, logits, min(experts, 32), keywords))


@pytest.mark.parametrize("kind", KINDS)
def test_many_tokens(kind):
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((8192, 256), np.float32)
    bias = 0.1 * rng.standard_normal(256)
    for more in ({"bias": bias}, {}, {"group_score": "max"}):
        keywords = DEEPSEEK | {"renormalize": True} | more
        expected = getattr(router, f"{kind}_topk")(logits, 8, **keywords)
        on_device = {name: on_gpu(value) for name, value in keywords.items()}
        found = getattr(router, f"{kind}_topk")(on_gpu(logits), 8, **on_device)
        same = (on_host(found.ids) == expected.ids).all(axis=1)
        assert same.mean() > 0.999  # the rest are near to equal
        weights_are_within_two_ulp(on_host(found.weights)[same], expected.weights[same])


def test_results_repeat_bit_by_bit():
    logits = on_gpu(np.random.default_rng(0).standard_normal((8192, 256), np.float32))
    one, other = (router.sigmoid_topk(logits, 8, **DEEPSEEK) for _ in range(2))
    assert on_host(one.ids).tobytes() == on_host(other.ids).tobytes()
    assert on_host(one.weights).tobytes() == on_host(other.weights).tobytes()


def test_strided_logits():
    logits = np.random.default_rng(0).standard_normal((20, 64), np.float32)
    found = router.softmax_topk(on_gpu(logits)[::2, ::-1], 4)
    expected = router.softmax_topk(logits[::2, ::-1], 4)
    assert on_host(found.ids).tobytes() == expected.ids.tobytes()


# ---- what a GPU cannot raise -----------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_a_wrong_logit_makes_its_token_nan(kind, wrong):
    case = RouterCase(kind, np.random.default_rng(0).standard_normal((6, 40)), 3, {})
    good = case.topk(on_gpu(case.logits), 3)
    logits = case.logits.copy()
    logits[2, 17] = wrong
    ids, weights = (on_host(a) for a in case.topk(on_gpu(logits), 3))
    others = [0, 1, 3, 4, 5]
    assert np.isnan(weights[2]).all()
    assert len(set(ids[2])) == 3
    assert (ids[others] == on_host(good.ids)[others]).all()
    assert (weights[others] == on_host(good.weights)[others]).all()
    dlogits = on_host(case.backward(on_gpu(case.dweights()), on_gpu(logits), good.ids))
    assert np.isnan(dlogits[2]).all()
    assert np.isfinite(dlogits[others]).all()
    assert np.isnan(on_host(case.weights(on_gpu(logits), good.ids))[2]).all()


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_a_wrong_bias_makes_all_tokens_nan(wrong):
    bias = np.zeros(40)
    bias[5] = wrong
    weights = router.sigmoid_topk(on_gpu(np.zeros((6, 40))), 3, bias=on_gpu(bias)).weights
    assert np.isnan(on_host(weights)).all()


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_a_wrong_logit_makes_losses_nan(wrong):
    logits, ids = np.zeros((40, 8)), on_gpu(np.zeros((40, 1), int))
    logits[21, 3] = wrong
    logits = on_gpu(logits)
    assert np.isnan(on_host(router.balance_loss(logits, ids)))
    assert np.isnan(on_host(router.z_loss(logits)))
    for dlogits in (
        router.z_loss_backward(1.0, logits),
        router.balance_loss_backward(1.0, logits, ids),
    ):
        assert np.isnan(on_host(dlogits)[21]).all()
        assert np.isfinite(np.delete(on_host(dlogits), 21, axis=0)).all()


@pytest.mark.parametrize("ids", [[3, 40], [3, -2], [3, 3]])
def test_wrong_ids_make_their_token_nan(ids):
    logits, dweights = on_gpu(np.zeros((2, 40))), on_gpu(np.ones((2, 2)))
    ids = on_gpu(np.array([[0, -1], ids]))
    for found in (
        router.softmax_topk_backward(dweights, logits, ids),
        router.softmax_weights(logits, ids),
    ):
        found = on_host(found)
        assert np.isfinite(found[0]).all()
        assert np.isnan(found[1]).all()


def test_a_nan_logit_is_a_routing_error_of_the_layer():
    case = Case((2, 1), mode="sequential", gemm="engine")
    inputs = make_inputs(case)

    def fn(world):
        rank = Rank(world, inputs, case.spec, case.config, case.mode)
        good = rank.topk_weights
        logits = np.zeros((len(rank.x), case.spec.num_experts), np.float32)
        if world.rank == 1:
            logits[3, 1] = np.nan
        rank.ids, rank.topk_weights = router.softmax_topk(on_gpu(logits), case.spec.topk)
        world.barrier()  # all have loaded their kernels
        y, _ = rank.forward()
        with pytest.raises(cometrt.RoutingError, match="rank 1, token 3"):
            rank.layer.synchronize()
        assert np.isnan(on_host(y).astype(np.float32)).all()
        rank.topk_weights = good
        rank.ids = router.softmax_topk(on_gpu(np.zeros_like(logits)), case.spec.topk).ids
        rank.step()  # the layer goes on

    assert min(len(x) for x in inputs.x) > 3
    cometrt.spawn(fn, 2, "cuda", timeout_sec=10)


# ---- graphs ------------------------------------------------------------------------------------


def captured(call):
    """A graph of a call, and the arrays that it writes. A wait for the GPU would break it."""
    import cupy

    stream = cupy.cuda.get_current_stream()
    call()  # kernels are loaded, and memory lies in the pool
    stream.synchronize()
    stream.begin_capture()
    results = call()
    graph = stream.end_capture()
    graph.upload(stream)
    return graph, results


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_is_captured_and_replayed(kind):
    import cupy

    rng = np.random.default_rng(0)
    batches = [rng.standard_normal((50, 64), np.float32) for _ in range(3)]
    case = RouterCase(kind, batches[0], 6, {})
    bias, dweights = np.zeros(64, np.float32), case.dweights(np.float32)

    def step(logits, bias, dweights):
        ids, weights = case.topk(logits, 6, bias=bias, num_groups=4, topk_groups=2)
        dlogits = case.backward(dweights, logits, ids)
        dlogits += router.balance_loss_backward(0.01, logits, ids, per_sequence=10)
        dlogits += router.z_loss_backward(0.001, logits, ids)
        losses = router.balance_loss(logits, ids), router.z_loss(logits)
        load = router.load_statistics(ids, 64)
        router.update_bias(bias, load.counts, rate=0.01)
        return ids, weights, dlogits, *losses, load.counts, load.imbalance

    with cupy.cuda.Stream(non_blocking=True) as stream:
        arrays = [on_gpu(array) for array in (batches[0], bias, dweights)]
        graph, results = captured(lambda: step(*arrays))
        arrays[1].fill(0)
        for batch in batches:
            arrays[0][...] = on_gpu(batch)
            graph.launch(stream)
            stream.synchronize()
            expected = step(batch, bias, dweights)
            for found, wanted in zip(results, expected, strict=True):
                np.testing.assert_allclose(on_host(found), wanted, rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(on_host(arrays[1]), bias, rtol=1e-6)


# ---- losses ------------------------------------------------------------------------------------


def check_losses(num_tokens, experts):
    """All losses against NumPy's. num_tokens: even."""
    rng = np.random.default_rng(1)
    logits = rng.standard_normal((num_tokens, experts), np.float32)
    logits[rng.random(logits.shape) < 0.1] = -np.inf
    ids = router.softmax_topk(logits, 4).ids
    ids[3:5], ids[7:8, 1] = -1, -1
    counts = np.arange(experts)
    arrays = on_gpu(logits), on_gpu(ids)
    for options in (
        {},
        {"per_sequence": 2},
        {"per_sequence": max(1, num_tokens // 2)},
        {"counts": counts},
    ):
        on_device = {name: on_gpu(value) for name, value in options.items()}
        loss = router.balance_loss(*arrays, **on_device)
        assert loss.shape == ()
        expected = router.balance_loss(logits, ids, **options)
        np.testing.assert_allclose(on_host(loss), expected, rtol=1e-12)
        np.testing.assert_allclose(
            on_host(router.balance_loss_backward(0.5, *arrays, **on_device)),
            router.balance_loss_backward(0.5, logits, ids, **options),
            rtol=1e-6,
            atol=1e-15,
        )
    np.testing.assert_allclose(
        on_host(router.z_loss(*arrays)), router.z_loss(logits, ids), rtol=1e-12
    )
    np.testing.assert_allclose(
        on_host(router.z_loss_backward(0.5, *arrays)),
        router.z_loss_backward(0.5, logits, ids),
        rtol=1e-6,
        atol=1e-15,
    )
    found, expected = (router.load_statistics(of, experts) for of in (arrays[1], ids))
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(on_host(one), other, rtol=1e-12)


@pytest.mark.parametrize("experts", [4, 20, 64, 128, 256, 512, 1024])
@pytest.mark.parametrize("num_tokens", [0, 12, 1000])
def test_losses_are_numpys(num_tokens, experts):
    check_losses(num_tokens, experts)


def test_losses_of_many_tokens():
    check_losses(40_000, 24)  # chunks of more than 16 tokens


def test_losses_repeat_bit_by_bit():
    logits = on_gpu(np.random.default_rng(0).standard_normal((8192, 256), np.float32))
    ids = router.softmax_topk(logits, 8).ids
    for call in (router.balance_loss, router.z_loss):
        assert len({on_host(call(logits, ids)).tobytes() for _ in range(20)}) == 1


@pytest.mark.parametrize("dtype", ["i", "l", "H", "f", "d", "e"])
def test_counts_and_coefficients_of_any_dtype(dtype):
    rng = np.random.default_rng(0)
    logits, counts = rng.standard_normal((30, 40)), rng.integers(0, 9, 40).astype(dtype)
    ids = router.softmax_topk(logits, 2).ids
    arrays, ones = [on_gpu(a) for a in (logits, ids, counts)], on_gpu(np.ones((), dtype))
    found = router.balance_loss(*arrays[:2], counts=arrays[2])
    np.testing.assert_allclose(
        on_host(found), router.balance_loss(logits, ids, counts=counts), rtol=1e-12
    )
    np.testing.assert_allclose(
        on_host(router.balance_loss_backward(ones, *arrays[:2], counts=arrays[2])),
        router.balance_loss_backward(1.0, logits, ids, counts=counts),
        rtol=1e-6,
        atol=1e-15,
    )
    biases = [np.zeros(40), np.zeros(40)]
    router.update_bias(biases[0], counts)
    on_device = on_gpu(biases[1])
    router.update_bias(on_device, arrays[2])
    assert (on_host(on_device) == biases[0]).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, ml_dtypes.bfloat16])
def test_a_bias_is_updated_in_place(dtype):
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 5, 1000)
    biases = rng.standard_normal((1000, 3)).astype(dtype)
    on_device = on_gpu(biases)
    router.update_bias(on_device[:, 1], on_gpu(counts), rate=0.25)
    router.update_bias(biases[:, 1], counts, rate=0.25)
    assert on_host(on_device).tobytes() == biases.tobytes()


@pytest.mark.parametrize("num_ids", [0, 1, 1023, 8192, 70_001])
@pytest.mark.parametrize("experts", [1, 33, 1024])
def test_load_statistics_are_numpys(num_ids, experts):
    rng = np.random.default_rng(0)
    skewed = (experts * rng.random((num_ids, 1)) ** 3).astype(np.int64)
    ids = np.where(rng.random(skewed.shape) < 0.1, -1, skewed)
    expected = router.load_statistics(ids, experts)
    for dtype in (np.int32, np.int64):
        found = router.load_statistics(on_gpu(ids.astype(dtype)), experts)
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(on_host(one), other, rtol=1e-12, atol=1e-15)


def test_ids_out_of_range_count_as_dropped():
    ids = on_gpu(np.array([[0, 1], [40, 2**31 - 1], [-2, 3]]))
    found = router.load_statistics(ids, 4)
    assert on_host(found.counts).tolist() == [1, 1, 0, 1]
    assert on_host(found.dropped) == 0.5
    logits = on_gpu(np.zeros((3, 4)))
    np.testing.assert_allclose(on_host(router.balance_loss(logits, ids)), 1.0)
    assert not on_host(router.balance_loss_backward(1.0, logits, ids))[1].any()
