"""From a model's weights to shards and back: copies, any EP x TP, and what is refused."""

import re

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import cometrt

DTYPES = [np.dtype(d) for d in (ml_dtypes.bfloat16, np.float16, np.float32, np.float64, ">f4")]


def make_spec(tp=1, gated=True, intermediate=96, dtype="float32"):
    activation = "swiglu" if gated else "gelu"
    return cometrt.MoESpec(
        48, intermediate, 8, 2, 32, tp=tp, activation=activation, dtype=dtype, capacity_factor=8.0
    )


def make_weights(spec, dtypes=(np.float32, np.float32), seed=0):
    rng, parts = np.random.default_rng(seed), 2 if spec.gated else 1
    w_up = rng.normal(0, 0.1, (8, parts * spec.intermediate, 48))
    return w_up.astype(dtypes[0]), rng.normal(0, 0.1, (8, 48, spec.intermediate)).astype(dtypes[1])


def shard(weights, spec, size):
    return [cometrt.shard_weights(*weights, rank, size, spec) for rank in range(size)]


def same(found, expected):
    return found.dtype == expected.dtype and found.tobytes() == expected.tobytes()


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize(("size", "tp"), [(1, 1), (4, 1), (4, 2), (2, 2)])
def test_shards_are_copies(size, tp, gated, tmp_path):
    spec = make_spec(tp, gated)
    weights = make_weights(spec)
    mapped = []
    for name, array in zip(("up", "down"), weights, strict=True):
        np.save(tmp_path / f"{name}.npy", array)
        mapped.append(np.load(tmp_path / f"{name}.npy", mmap_mode="r+"))
    for whole in (weights, mapped):
        for parts in shard(whole, spec, size):
            for part, source in zip(parts, whole, strict=True):
                assert type(part) is np.ndarray
                assert part.flags.c_contiguous
                assert part.flags.writeable
                assert not np.shares_memory(part, source)


@given(
    ep=st.sampled_from([1, 2, 4, 8]),
    tp=st.sampled_from([1, 2, 3]),
    gated=st.booleans(),
    dtypes=st.tuples(st.sampled_from(DTYPES), st.sampled_from(DTYPES)),
    pair=st.sampled_from([tuple, list]),
)
def test_unshard_is_the_inverse(ep, tp, gated, dtypes, pair):
    spec = make_spec(tp, gated)
    weights = make_weights(spec, dtypes)
    shards = [pair(parts) for parts in shard(weights, spec, ep * tp)]
    whole = cometrt.unshard_weights(shards, spec)
    for found, expected in zip(whole, weights, strict=True):
        assert same(found, expected)
        assert found.flags.c_contiguous
        assert not any(np.shares_memory(found, part) for parts in shards for part in parts)


def test_shards_of_any_layout_are_taken():
    spec = make_spec(tp=2)
    weights = make_weights(spec)
    shards = [tuple(map(np.asfortranarray, parts)) for parts in shard(weights, spec, 4)]
    assert all(map(same, cometrt.unshard_weights(shards, spec), weights))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_layer_sharded_anew_gives_the_same_results(dtype):
    before, after = make_spec(2, dtype=dtype), make_spec(1, dtype=dtype)
    weights = make_weights(before, (before.numpy_dtype,) * 2)

    def run(world, shards, spec):
        rng = np.random.default_rng(world.rank)
        x, dy = rng.normal(size=(2, 20, 48)).astype(spec.numpy_dtype)
        routing = cometrt.router.softmax_topk(rng.normal(size=(20, 8)), 2)
        layer = cometrt.MoELayer(world, spec)
        y, saved = layer.forward(x, *routing, *shards[world.rank])
        return y, layer.backward(dy, saved)

    moved = shard(cometrt.unshard_weights(shard(weights, before, 4), before), after, 4)
    expected = cometrt.spawn(lambda world: run(world, shard(weights, after, 4), after), 4)
    found = cometrt.spawn(lambda world: run(world, moved, after), 4)
    for (y, grads), (y_expected, grads_expected) in zip(found, expected, strict=True):
        assert all(map(same, (y, *grads), (y_expected, *grads_expected)))

    # Gradients of both ways to shard are those of one model; they round differently.
    ways = [
        cometrt.unshard_weights([(grads.w_up, grads.w_down) for _, grads in results], spec)
        for spec, results in (
            (after, found),
            (before, cometrt.spawn(lambda w: run(w, shard(weights, before, 4), before), 4)),
        )
    ]
    for one, other in zip(*ways, strict=True):
        one, other = one.astype(float), other.astype(float)
        error = np.linalg.norm(one - other) / np.linalg.norm(one)
        assert error < (1e-5 if dtype == "float32" else 1e-2)


def replace(rank, index, change):
    def changed(shards):
        shards[rank][index] = change(shards[rank][index])
        return shards

    return changed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: tuple(s[0]), "shards[0] must be a pair (w_up, w_down) (got <class 'numpy.ndar"),
        (lambda s: s[:3], "tp must divide the number of ranks 3 (got tp=2)"),
        (lambda s: s[:2], "w_up of rank 0 must have shape (8, 96, 48) (got (4, 96, 48))"),
        (
            lambda s: s + s[:2],
            "num_experts must be divisible by the number of expert groups, ranks / tp = 6 / 2",
        ),
        (lambda s: [], "shards must be a list of one pair (w_up, w_down) per rank (got [])"),
        (lambda s: None, "shards must be a list of one pair (w_up, w_down) per rank (got None)"),
        (lambda s: iter(s), "shards must be a list of one pair (w_up, w_down) per rank (got <"),
        (lambda s: [*s[:3], s[3][:1]], "shards[3] must be a pair (w_up, w_down) (got 1 items)"),
        (lambda s: [*s[:3], None], "shards[3] must be a pair (w_up, w_down) (got <class 'NoneTyp"),
        (
            replace(1, 1, lambda a: a[:, :, :32]),
            "w_down of rank 1 must have shape (4, 48, 48) (got (4, 48, 32))",
        ),
        (
            replace(2, 0, lambda a: a.astype(np.float64)),
            "w_up of rank 2 must have rank 0's dtype float32 (got float64)",
        ),
        (
            replace(0, 1, lambda a: a.astype(np.float64)),
            "w_down of rank 1 must have rank 0's dtype float64 (got float32)",
        ),
        (replace(2, 0, np.ma.masked_array), "w_up of rank 2 must not be a masked array"),
        (replace(3, 1, lambda a: a.tolist()), "w_down of rank 3 must be a numpy.ndarray (got <cl"),
    ],
)
def test_unshard_refuses(change, message):
    spec = make_spec(tp=2)
    shards = [list(parts) for parts in shard(make_weights(spec), spec, 4)]
    with pytest.raises(ValueError, match=re.escape(message)):
        cometrt.unshard_weights(change(shards), spec)
    with pytest.raises(ValueError, match=r"spec must be a cometrt\.MoESpec"):
        cometrt.unshard_weights(shards, None)


@pytest.mark.parametrize("name", ["w_up_all", "w_down_all"])
def test_shard_refuses_masked_arrays(name):
    spec = make_spec()
    weights = dict(zip(("w_up_all", "w_down_all"), make_weights(spec), strict=True))
    weights[name] = np.ma.masked_array(weights[name])
    with pytest.raises(ValueError, match=f"{name} must not be a masked array"):
        cometrt.shard_weights(**weights, rank=0, size=4, spec=spec)
