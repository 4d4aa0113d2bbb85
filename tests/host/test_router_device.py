"""Routers and losses over a stand-in for CuPy's arrays: what they launch, and that nothing waits.

`tests/device/test_router.py` has the kernels' results.
"""

import re
import sys

import numpy as np
import pytest

from cometrt import router
from cometrt.kernels.compiler import kernels_folder
from cometrt.router import cuda, cuda_losses
from tests import cupy_stand_in
from tests.cupy_stand_in import asarray, to_host
from tests.router_cases import KINDS, RouterCase
from tests.router_kernels import Launches


@pytest.fixture
def launches(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", cupy_stand_in.module())
    launches = Launches()
    monkeypatch.setattr(cuda, "load_kernels", launches.load)
    cuda.load_build.cache_clear()
    yield launches
    cuda.load_build.cache_clear()


def logits_of(tokens=9, experts=40, seed=0):
    return asarray(np.random.default_rng(seed).standard_normal((tokens, experts), np.float32))


@pytest.mark.parametrize("kind", KINDS)
def test_each_direction_is_one_launch_on_the_current_stream(launches, kind):
    case, logits = RouterCase(kind, None, 3, {}), logits_of()
    bias, mask = asarray(np.zeros(40)), asarray(np.ones((9, 40), bool))
    keywords = {"bias": bias, "mask": mask, "num_groups": 4, "topk_groups": 2, "scale": 2.5}
    ids, weights = case.topk(logits, 3, **keywords)
    dlogits = case.backward(weights, logits, ids.astype(np.int64), **keywords)
    found = case.weights(logits, ids, **keywords)
    assert [launch[0] for launch in launches] == [
        "router_topk", "router_backward", "router_weights",
    ]  # fmt: skip
    for _, macros, stream, grid, struct in launches:
        assert macros == (("EXPERTS_PER_LANE", 2),)
        assert (stream, grid) == (5, 3)  # four tokens a block
        expected = {
            "logits": logits.ctypes.data, "bias": bias.ctypes.data, "mask": mask.ctypes.data,
            "scale": 2.5, "num_tokens": 9, "num_experts": 40, "topk": 3,
            "kind": KINDS.index(kind), "num_groups": 4, "topk_groups": 2, "renormalize": 1,
            "mask_stride": 40, "logits_type": 0, "bias_type": 1,
        }  # fmt: skip
        assert {name: struct[name] for name in expected} == expected
    topk, backward, given = (launch[-1] for launch in launches)
    assert (topk["out_ids"], topk["out_weights"]) == (ids.ctypes.data, weights.ctypes.data)
    assert topk["sum_of_two"] == (kind != "softmax")
    assert (backward["dweights"], backward["dlogits"]) == (weights.ctypes.data, dlogits.ctypes.data)
    assert (backward["ids_are_64"], given["ids_are_64"]) == (1, 0)
    assert (given["ids"], given["out_weights"]) == (ids.ctypes.data, found.ctypes.data)
    assert (ids.dtype, weights.dtype, dlogits.dtype) == (np.int32, np.float32, np.float32)
    assert (ids.shape, weights.shape, dlogits.shape) == ((9, 3), (9, 3), (9, 40))


def test_no_tokens_launch_nothing(launches):
    logits = logits_of(tokens=0)
    ids, weights = router.softmax_topk(logits, 3)
    assert router.softmax_topk_backward(weights, logits, ids).shape == (0, 40)
    assert (ids.shape, weights.shape) == ((0, 3), (0, 3))
    assert launches == []


def test_strided_arrays_are_copied(launches):
    logits = logits_of()[:, ::2]
    router.softmax_topk(logits, 3)
    assert launches[0][-1]["logits"] != logits.ctypes.data
    assert launches[0][-1]["num_experts"] == 20


def test_kernels_and_launches_mean_the_same_by_a_number():
    text = (kernels_folder() / "router/params.cuh").read_text()

    def written(enum):
        return re.search(rf"enum {enum} : int {{(.*?)}}", text).group(1).strip().split(", ")

    assert written("RouterKind") == ["k" + kind.title().replace("_", "") for kind in KINDS]
    assert written("ElementType") == ["k" + dtype.name.title() for dtype in cuda.NUMBER_DTYPES]


def test_the_smallest_build_that_holds_the_experts():
    found = [cuda.experts_per_lane(e) for e in (1, 32, 33, 64, 65, 256, 257, 1024)]
    assert found == [1, 1, 2, 2, 4, 8, 16, 32]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: router.softmax_topk(logits_of(experts=1025), 1),
            r"logits' number of experts must be <= 1024 on a GPU \(got 1025\)",
        ),
        (
            lambda: router.softmax_topk(logits_of(), 33),
            r"topk must be <= 32 on a GPU \(got 33\)",
        ),
        (
            lambda: router.softmax_topk(logits_of(), 1, num_groups=40),
            r"num_groups must be <= 32 on a GPU \(got 40\)",
        ),
        (
            lambda: router.softmax_topk(logits_of().astype(np.int32), 1),
            r"logits must have dtype float32 or .* on a GPU \(got int32\)",
        ),
        (
            lambda: router.softmax_topk(logits_of(), 1, bias=np.zeros(40)),
            "bias must be a CuPy array, as the first argument is, not NumPy's",
        ),
        (
            lambda: router.softmax_topk(np.zeros((2, 40)), 1, mask=asarray(np.ones(40, bool))),
            "mask must be a NumPy array, as the first argument is, not CuPy's",
        ),
        (
            lambda: router.softmax_topk(logits_of(), 1, mask=asarray(np.ones(41, bool))),
            r"mask must be bool of shape \(40,\) or \(9, 40\) \(got bool of shape \(41,\)\)",
        ),
        (
            lambda: router.softmax_topk_backward(
                np.zeros((9, 1)), logits_of(), asarray(np.zeros((9, 1), int))
            ),
            "dweights must be a CuPy array",
        ),
        (
            lambda: router.softmax_weights(logits_of(), asarray(np.zeros((9, 1), np.int8))),
            r"ids must have dtype int32 or int64 on a GPU \(got int8\)",
        ),
    ],
)
def test_wrong_arguments(launches, call, message):
    with pytest.raises(ValueError, match=message):
        call()
    assert launches == []


def test_an_array_of_another_gpu_is_refused(launches, monkeypatch):
    monkeypatch.setattr(sys.modules["cupy"].cuda.runtime, "getDevice", lambda: 1)
    with pytest.raises(ValueError, match=r"logits must be on the current GPU 1 \(got GPU 0\)"):
        router.softmax_topk(logits_of(), 1)


def test_an_array_of_another_library_is_refused(launches):
    class Foreign:
        __cuda_array_interface__ = {"version": 3}  # noqa: RUF012
        shape = (2, 4)

    with pytest.raises(ValueError, match="logits must be a NumPy or CuPy array"):
        router.softmax_topk(Foreign(), 1)


# ---- losses ------------------------------------------------------------------------------------


def same(found, expected):
    assert isinstance(found, cupy_stand_in.ndarray)
    np.testing.assert_allclose(to_host(found), expected, rtol=1e-12, atol=1e-15)


FORWARD = ["router_loss_sums", "router_loss_totals"]
BACKWARD = [*FORWARD, "router_loss_backward"]


def loss_arguments(num_tokens, experts=8):
    """Logits and ids with padding and a dropped pair, in NumPy and on the stand-in."""
    logits = np.random.default_rng(1).standard_normal((num_tokens, experts))
    ids = router.softmax_topk(logits, 2).ids
    ids[3:5], ids[7:8, 1] = -1, -1
    return (logits, ids), (asarray(logits), asarray(ids))


@pytest.mark.parametrize("experts", [8, 40])
@pytest.mark.parametrize("num_tokens", [0, 12, 60])
def test_losses_equal_numpys_without_a_wait(launches, num_tokens, experts):
    on_host, arrays = loss_arguments(num_tokens, experts)
    for options in (
        {},
        {"per_sequence": 4},
        {"per_sequence": max(1, num_tokens // 2)},
        *({"counts": np.arange(experts).astype(dtype)} for dtype in "bHilfd"),
    ):
        on_gpu = {name: asarray(v) if name == "counts" else v for name, v in options.items()}
        same(router.balance_loss(*arrays, **on_gpu), router.balance_loss(*on_host, **options))
        for dloss in (0.5, asarray(0.5), asarray(np.ones(1, np.float32) / 2)):
            same(
                router.balance_loss_backward(dloss, *arrays, **on_gpu),
                router.balance_loss_backward(0.5, *on_host, **options),
            )
    same(router.z_loss(*arrays), router.z_loss(*on_host))
    same(router.z_loss_backward(0.5, *arrays), router.z_loss_backward(0.5, *on_host))
    same(router.z_loss(arrays[0]), router.z_loss(on_host[0]))
    names = [launch[0] for launch in launches]
    assert names[:5] == (FORWARD + BACKWARD if num_tokens else [])


def test_a_loss_of_many_tokens_has_larger_chunks(launches):
    logits = np.random.default_rng(0).standard_normal((3 * cuda_losses.MAX_CHUNKS * 16, 2))
    same(router.z_loss(asarray(logits)), router.z_loss(logits))
    assert launches[0][3] == cuda_losses.MAX_CHUNKS


@pytest.mark.parametrize("num_tokens", [0, 60])
def test_statistics_and_bias_equal_numpys_by_one_launch(launches, num_tokens):
    on_host, arrays = loss_arguments(num_tokens)
    for dtype in (np.int32, np.int64):
        found = router.load_statistics(arrays[1].astype(dtype), 8)
        for one, other in zip(found, router.load_statistics(on_host[1], 8), strict=True):
            same(one, other)
    for dtype in (np.float32, np.float64):
        biases, rows = np.zeros((8, 3), dtype), np.zeros((3, 8), dtype)
        for bias in (biases[:, 1], rows[1]):  # in place, also where strided
            other = (
                asarray(bias.copy()) if bias.flags.c_contiguous else asarray(biases.copy())[:, 1]
            )
            router.update_bias(bias, np.arange(8) // 2)
            router.update_bias(other, asarray(np.arange(8) // 2))
            assert bias.any()
            same(other, bias)
    names = [launch[0] for launch in launches]
    assert names == ["router_load"] * 2 + ["router_update_bias"] * 4


def test_wrong_ids_do_not_wait_either(launches):
    ids = np.zeros((40, 1), int)
    ids[2], ids[3] = 8, -7
    found = router.load_statistics(asarray(ids), 8)
    assert to_host(found.counts).tolist() == [38] + [0] * 7
    same(found.dropped, 2 / 40)
    logits = asarray(np.zeros((40, 8)))
    same(router.balance_loss(logits, asarray(ids)), 1.0)
    assert not to_host(router.balance_loss_backward(1.0, logits, asarray(ids)))[2:4].any()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: router.z_loss(logits_of(experts=1025)),
            r"logits' number of experts must be <= 1024 on a GPU \(got 1025\)",
        ),
        (
            lambda: router.load_statistics(asarray(np.zeros((1, 1), int)), 1025),
            r"num_experts must be <= 1024 on a GPU \(got 1025\)",
        ),
        (
            lambda: router.load_statistics(asarray(np.zeros((1, 1), np.int8)), 4),
            r"topk_ids must have dtype int32 or int64 on a GPU \(got int8\)",
        ),
        (
            lambda: router.z_loss_backward(asarray(np.ones(2)), logits_of()),
            r"dloss must be one number \(got an array of shape \(2,\)\)",
        ),
        (
            lambda: router.update_bias(asarray(np.zeros(4)), np.ones(4)),
            "counts must be a CuPy array, as the first argument is, not NumPy's",
        ),
        (
            lambda: router.update_bias(asarray(np.zeros(1025)), asarray(np.ones(1025))),
            r"bias' number of experts must be <= 1024 on a GPU \(got 1025\)",
        ),
    ],
)
def test_wrong_arguments_of_losses(launches, call, message):
    with pytest.raises(ValueError, match=message):
        call()
    assert launches == []


def test_the_stand_in_sees_waits():
    array = asarray(np.ones(3))
    for wait in (bool, float, int, lambda a: a.item(), lambda a: a[a > 0]):
        with pytest.raises(AssertionError, match="waits for the GPU"):
            wait(array[0] if wait in (bool, float, int) else array)
