"""A wrong argument of a call is a ValueError on the rank that has it: the call has not happened,
may be repeated, and its answer is right."""

import contextlib
import dataclasses
import re

import ml_dtypes
import numpy as np
import pytest

import cometrt
from cometrt import trace
from tests.cases import Case, Output, check_case, make_inputs
from tests.host.test_arguments import SPEC

CASE = Case((2, 1))
BF16 = ml_dtypes.bfloat16


def bad_forward(name, change):
    return lambda arguments: arguments | {name: change(arguments.get(name))}


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("x", lambda a: a.tolist(), "x must be a numpy.ndarray on device='host' (got <class"),
        ("x", np.ma.masked_array, "x must not be a masked array: its mask would be"),
        ("topk_ids", np.ma.masked_array, "topk_ids must not be a masked array"),
        ("topk_weights", np.ma.masked_array, "topk_weights must not be a masked array"),
        ("w_up", np.ma.masked_array, "w_up must not be a masked array"),
        ("out", lambda a: np.ma.zeros((40, 48), BF16), "out must not be a masked array"),
        ("x", lambda a: a.astype(np.float32), "x must have dtype bfloat16 (got float32)"),
        ("x", lambda a: a[:, :32], "x must have shape (T, 48) (got ("),
        ("x", lambda a: a[0], "x must have shape (T, 48) (got (48,))"),
        ("x", lambda a: np.zeros((41, 48), BF16), "x must have at most max_tokens=40 rows (got 41"),
        ("x", lambda a: np.asfortranarray(a), "x must be C-contiguous (got strides"),
        ("topk_ids", lambda a: a.astype(np.uint32), "topk_ids must have dtype int32 or int64"),
        ("topk_ids", lambda a: a[:-1], "topk_ids must have shape ("),
        ("topk_ids", lambda a: a[:, :2], "topk_ids must have shape ("),
        ("topk_weights", lambda a: a.astype(float), "topk_weights must have dtype float32"),
        ("topk_weights", lambda a: a[:, ::-1], "topk_weights must be C-contiguous"),
        (
            "w_up",
            lambda a: a[:1],
            "w_up must have shape (4, 96, 48) (got (1, 96, 48)): the experts of this rank",
        ),
        ("w_up", lambda a: a.astype(np.float32), "w_up must have dtype bfloat16"),
        ("w_down", lambda a: a[:, :32], "w_down must have shape (4, 48, 48)"),
        ("training", lambda a: 1, "training must be True or False (got 1)"),
        ("out", lambda a: np.zeros((3, 48), BF16), "out must have shape ("),
        ("out", lambda a: np.zeros((40, 48)), "out must have dtype bfloat16 (got float64)"),
        ("stream", lambda a: 7, "stream must be None on device='host' (got 7)"),
    ],
)
def test_forward(name, change, message):
    inputs = make_inputs(CASE)

    def fn(world):
        r = world.rank
        w_up, w_down = cometrt.shard_weights(inputs.w_up, inputs.w_down, r, 2, CASE.spec)
        layer = cometrt.MoELayer(world, CASE.spec, config=CASE.config)
        good = {
            "x": inputs.x[r],
            "topk_ids": inputs.ids[r],
            "topk_weights": inputs.weights[r],
            "w_up": w_up,
            "w_down": w_down,
        }
        if r == 1:
            with pytest.raises(ValueError, match=re.escape(message) + r".* \[rank 1\]$"):
                layer.forward(**(good | {name: change(good.get(name))}))
        y, saved = layer.forward(**good)
        return Output(y, layer.backward(inputs.dy[r], saved))

    check_case(CASE, inputs, cometrt.spawn(fn, 2))


def readonly(shape, dtype):
    array = np.zeros(shape, dtype)
    array.flags.writeable = False
    return array


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda g: {"dy": g["dy"].astype(np.float32)}, "dy must have dtype bfloat16 (got float32)"),
        (lambda g: {"dy": g["dy"][1:]}, "dy must have shape ("),
        (lambda g: {"dy": np.ma.masked_array(g["dy"])}, "dy must not be a masked array"),
        (lambda g: {"saved": None}, "saved must be the tuple of 26 that forward(training=True)"),
        (lambda g: {"saved": g["saved"][:-1]}, "(got 25 items)"),
        (lambda g: {"saved": (1, *g["saved"][1:])}, "saved must begin with forward's meta array"),
        (lambda g: {"saved": (np.full(7, np.inf), *g["saved"][1:])}, "saved must begin with"),
        (lambda g: {"saved": (np.array([None] * 7), *g["saved"][1:])}, "saved must begin with"),
        (lambda g: {"saved": g["other"]}, "saved must come from this layer's forward (layer is 0,"),
        (lambda g: {"accumulate": "yes"}, "accumulate must be True or False (got 'yes')"),
        (lambda g: {"accumulate": True}, "out must have w_up and w_down when accumulate=True"),
        (lambda g: {"out": g["dy"]}, "out must be a cometrt.Gradients or None"),
        (
            lambda g: {"out": cometrt.Gradients(np.zeros((1, 48), BF16), None, None, None)},
            "out.x must have shape (",
        ),
        (
            lambda g: {"out": cometrt.Gradients(None, np.zeros((1, 3), np.float32), None, None)},
            "out.topk_weights must have shape (",
        ),
        (
            lambda g: {"out": cometrt.Gradients(None, None, np.zeros((4, 96, 48)), None)},
            "out.w_up must have dtype bfloat16 or float32 (got float64)",
        ),
        (
            lambda g: {"out": cometrt.Gradients(None, None, None, readonly((4, 48, 48), BF16))},
            "out.w_down must be writable",
        ),
        (lambda g: {"stream": 0}, "stream must be None on device='host' (got 0)"),
    ],
)
def test_backward(change, message):
    inputs = make_inputs(CASE)

    def fn(world):
        r = world.rank
        w_up, w_down = cometrt.shard_weights(inputs.w_up, inputs.w_down, r, 2, CASE.spec)
        layer = cometrt.MoELayer(world, CASE.spec, config=CASE.config)
        other = cometrt.MoELayer(world, CASE.spec, config=CASE.config)
        model = inputs.x[r], inputs.ids[r], inputs.weights[r], w_up, w_down
        y, saved = layer.forward(*model)
        good = {"dy": inputs.dy[r], "saved": saved}
        extra = {"other": other.forward(*model)[1]}
        if r == 0:
            with pytest.raises(ValueError, match=re.escape(message) + r".* \[rank 0\]$"):
                layer.backward(**(good | change(good | extra)))
        return Output(y, layer.backward(**good))

    check_case(CASE, inputs, cometrt.spawn(fn, 2))


def test_a_rank_is_named_only_beside_others():
    def fn(world):
        layer, ids = cometrt.MoELayer(world, CASE.spec, config=CASE.config), np.zeros((1, 3))
        with pytest.raises(ValueError, match="topk_ids must have dtype") as error:
            layer.plan(ids, ids)
        return str(error.value)

    text = "topk_ids must have dtype int32 or int64 (got float64)"
    assert cometrt.spawn(fn, 1) == [text]
    assert cometrt.spawn(fn, 2) == [f"{text} [rank 0]", f"{text} [rank 1]"]


def test_saved_is_flat_of_fixed_shape_and_good_for_one_backward():
    inputs = make_inputs(CASE)
    shapes = []

    def fn(world):
        r = world.rank
        w_up, w_down = cometrt.shard_weights(inputs.w_up, inputs.w_down, r, 2, CASE.spec)
        layer = cometrt.MoELayer(world, CASE.spec, config=CASE.config)
        for tokens in (20, 3, 0):
            _, saved = layer.forward(
                inputs.x[r][:tokens],
                inputs.ids[r][:tokens],
                inputs.weights[r][:tokens],
                w_up,
                w_down,
            )
            assert type(saved) is tuple
            assert saved[-2] is w_up
            assert saved[-1] is w_down
            shapes.append(tuple((array.shape, str(array.dtype)) for array in saved))
            specs = layer.residuals(tokens)
            assert tuple((of.shape, str(of.dtype)) for of in specs) == shapes[-1]
            assert not saved[0].flags.writeable  # what a caller carries is all there is
            layer.backward(inputs.dy[r][:tokens], saved)
            with pytest.raises(ValueError, match="saved must be used for one backward only"):
                layer.backward(inputs.dy[r][:tokens], saved)

        assert [of.name for of in specs[:4]] == ["meta", "epoch", "x", "z"]
        for tokens, rule in ((-1, ">= 0"), (41, "at most max_tokens=40"), (1.5, "integer")):
            with pytest.raises(ValueError, match=f"num_tokens must be .*{rule}"):
                layer.residuals(tokens)

    cometrt.spawn(fn, 2)
    assert len(set(shapes)) == 1


def test_nothing_saved_but_tokens():
    case = dataclasses.replace(CASE, save="nothing")
    inputs = make_inputs(case)

    def fn(world):
        r = world.rank
        weights = cometrt.shard_weights(inputs.w_up, inputs.w_down, r, 2, case.spec)
        layer = cometrt.MoELayer(world, case.spec, config=case.config)
        saved = layer.forward(inputs.x[r], inputs.ids[r], inputs.weights[r], *weights)[1]
        specs = layer.residuals(len(inputs.x[r]))
        names = [of.name for of in specs]
        assert names[:3] == ["meta", "epoch", "x"]
        assert "z" not in names
        assert [(a.shape, a.dtype) for a in saved] == [(of.shape, of.dtype) for of in specs]
        assert saved[2].shape == (case.spec.max_tokens, case.spec.hidden)
        assert saved[2][: len(inputs.x[r])].tobytes() == inputs.x[r].tobytes()
        with pytest.raises(ValueError, match="saved must be the tuple of"):
            layer.backward(inputs.dy[r], saved[:3] + saved[2:])
        layer.backward(inputs.dy[r], saved)

    cometrt.spawn(fn, 2)


def test_copies_of_saved_count_as_one_use():
    inputs = make_inputs(CASE)

    def fn(world):
        r = world.rank
        weights = cometrt.shard_weights(inputs.w_up, inputs.w_down, r, 2, CASE.spec)
        layer = cometrt.MoELayer(world, CASE.spec, config=CASE.config)
        tokens = inputs.x[r], inputs.ids[r], inputs.weights[r]
        first, second = (layer.forward(*tokens, *weights)[1] for _ in range(2))
        copy = tuple(array.copy() for array in first)
        one = layer.backward(inputs.dy[r], copy)
        with pytest.raises(ValueError, match="saved must be used for one backward only"):
            layer.backward(inputs.dy[r], first)
        other = layer.backward(inputs.dy[r], list(second))
        for a, b in zip(one, other, strict=True):
            assert a.tobytes() == b.tobytes()

    cometrt.spawn(fn, 2)


@pytest.mark.parametrize("index", [1, 2, 3, 4, 7, -2, -1])
def test_arrays_of_saved_that_have_changed_are_refused(index):
    inputs = make_inputs(CASE)

    def fn(world):
        r = world.rank
        weights = cometrt.shard_weights(inputs.w_up, inputs.w_down, r, 2, CASE.spec)
        layer = cometrt.MoELayer(world, CASE.spec, config=CASE.config)
        saved = layer.forward(inputs.x[r], inputs.ids[r], inputs.weights[r], *weights)[1]
        for change in (lambda a: a[:-1], lambda a: np.zeros(a.shape), lambda a: None):
            wrong = list(saved)
            wrong[index] = change(wrong[index])
            with pytest.raises(ValueError, match=rf"saved\[{index % len(saved)}\] \(\w+\) must"):
                layer.backward(inputs.dy[r], wrong)
        layer.backward(inputs.dy[r], saved)  # the world runs on

    cometrt.spawn(fn, 2)


def test_closed_layers_and_worlds_refuse_calls():
    inputs = make_inputs(CASE)

    def fn(world):
        r = world.rank
        w_up, w_down = cometrt.shard_weights(inputs.w_up, inputs.w_down, r, 2, CASE.spec)
        model = inputs.x[r], inputs.ids[r], inputs.weights[r], w_up, w_down
        layer = cometrt.MoELayer(world, CASE.spec)
        layer.close()
        layer.close()
        for call in (lambda: layer.forward(*model), layer.synchronize, layer.buffer):
            with pytest.raises(ValueError, match=r"layer must be open \(it was closed\)"):
                call()
        second = cometrt.MoELayer(world, CASE.spec)
        world.barrier()
        world.close()
        world.close()
        for call in (
            lambda: second.forward(*model),
            second.buffer,
            second.synchronize,
            world.barrier,
            world.reset,
        ):
            with pytest.raises(ValueError, match=r"world must be open \(it was closed\)"):
                call()

    cometrt.spawn(fn, 2)


@pytest.mark.parametrize("other", ["world", "layer", "rank", "tiles"])
def test_saved_of_something_else_is_refused(other):
    inputs = make_inputs(CASE)

    def forward(world, config=CASE.config, layers=1):
        r = world.rank
        w_up, w_down = cometrt.shard_weights(inputs.w_up, inputs.w_down, r, 2, CASE.spec)
        for _ in range(layers):
            layer = cometrt.MoELayer(world, CASE.spec, config=config)
        model = inputs.x[r], inputs.ids[r], inputs.weights[r], w_up, w_down
        return layer, layer.forward(*model)[1]

    tiles = cometrt.TileConfig(block_m=32)
    strangers = {
        "world": lambda: cometrt.spawn(forward, 2),
        "tiles": lambda: cometrt.spawn(lambda world: forward(world, tiles), 2),
    }.get(other, lambda: None)()

    def use(world):
        layer, saved = forward(world)
        if other == "layer":
            stranger = forward(world)[1]
        elif other == "rank":
            stranger = world.allgather(saved)[1 - world.rank]
        else:
            stranger = strangers[world.rank][1]
        name = "world" if other == "tiles" else other
        rule = rf"saved must come from this layer's forward \({name} is "
        with pytest.raises(ValueError, match=rule):
            layer.backward(inputs.dy[world.rank], stranger)
        layer.backward(inputs.dy[world.rank], saved)

    cometrt.spawn(use, 2)


def test_record_wants_a_layer():
    with pytest.raises(ValueError, match=r"layer must be a cometrt\.MoELayer"), trace.record(3):
        pass


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "gpt-2"}, "name must be one of mixtral-8x7b, qwen2-moe, phi-3.5-moe, qwen3"),
        ({"factor": 0}, "factor must be an integer >= 1 (got 0)"),
        ({"factor": 1.5}, "factor must be an integer >= 1 (got 1.5)"),
        ({"tp": 0}, "tp must be an integer >= 1 (got 0)"),
        ({"max_tokens": 0}, "max_tokens must be an integer >= 1 (got 0)"),
        ({"dtype": "int8"}, "dtype must be one of bfloat16, float32 (got 'int8')"),
    ],
)
def test_scaled_spec(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        cometrt.models.scaled_spec(**({"name": "qwen2-moe", "max_tokens": 8} | arguments))


@pytest.mark.parametrize("name", list(cometrt.models.MODELS))
@pytest.mark.parametrize(("factor", "tp"), [(1, 1), (1, 2), (7, 1), (16, 4), (1000, 2)])
def test_every_scale_of_every_model_is_legal(name, factor, tp):
    model = cometrt.models.MODELS[name]
    spec = cometrt.models.scaled_spec(name, factor, max_tokens=8, tp=tp)
    assert (spec.num_experts, spec.topk) == (model.num_experts, model.topk)
    for wide, scaled in ((model.hidden, spec.hidden), (model.intermediate, spec.intermediate)):
        assert wide / factor <= scaled < wide / factor + 16 * tp


def test_record_puts_the_previous_tracer_back():
    def fn(world):
        layer = cometrt.MoELayer(world, cometrt.MoESpec(**SPEC))
        before = layer.tracer
        with contextlib.suppress(KeyError), trace.record(layer):
            raise KeyError
        assert layer.tracer is before

    cometrt.spawn(fn, 1)
