"""Forward and backward of the layer against the float64 reference, on virtual ranks."""

import itertools

import numpy as np
import pytest
from allpairspy import AllPairs

import cometrt
from cometrt.activations import activate
from tests.cases import (
    ACTIVATIONS,
    RANKS,
    ROUTINGS,
    Case,
    Output,
    check_case,
    make_inputs,
    relative_error,
    run_case,
    spawn_case,
)

PARAMETERS = {
    "ranks": RANKS,
    "routing": list(ROUTINGS),
    "activation": ACTIVATIONS,
    "dtype": ["bfloat16", "float32"],
    "shard_columns": [16, 48, 80],
    "save": ["rows", "z", "nothing"],
    "order": ["phases", "columns"],
    "mode": ["fused", "sequential"],
    "seed": [0, 1],
}
PAIRWISE = [
    Case(**dict(zip(PARAMETERS, values, strict=True))) for values in AllPairs(PARAMETERS.values())
]
# The full product of what the mathematics depends on; what must not change a result takes turns.
TURNS = itertools.cycle(
    itertools.product(*(PARAMETERS[name] for name in ("save", "order", "mode", "seed")))
)
PRODUCT = [
    Case(ranks, routing, activation, dtype, columns, *turn)
    for (ranks, routing, activation, dtype, columns), turn in zip(
        itertools.product(*list(PARAMETERS.values())[:5]), TURNS, strict=False
    )
]


@pytest.mark.parametrize("case", PAIRWISE, ids=str)
def test_pairwise_against_reference(case):
    spawn_case(case)


@pytest.mark.full
@pytest.mark.parametrize("case", PRODUCT, ids=str)
def test_product_against_reference(case):
    spawn_case(case, repeats=1)


@pytest.mark.parametrize("ranks", [(1, 1), (4, 1), (4, 2), (5, 1)], ids=str)
@pytest.mark.parametrize("routing", ["uniform", "skewed"])
def test_modes_and_saves_have_the_same_bits(ranks, routing):
    digests = set()
    inputs = make_inputs(Case(ranks, routing))  # the case seeds its inputs: one for all here
    for save, mode in itertools.product(["rows", "z", "nothing"], ["fused", "sequential", None]):
        case = Case(ranks, routing, save=save, mode=mode)
        outputs = cometrt.spawn(
            lambda world, c=case: run_case(world, c, inputs, 1), case.size, timeout_sec=60
        )
        check_case(case, inputs, outputs)
        digests.add(tuple(output.digest() for output in outputs))
    assert len(digests) == 1


def test_activations_are_of_the_rounded_pre_activations():
    # So that backward, which has z in bf16 only, finds forward's a.
    case = Case((1, 1), shard_columns=80)
    inputs, y = make_inputs(case), spawn_case(case, repeats=1)[0].y
    wide = [w.astype(np.float32) for w in (inputs.x[0], inputs.w_up, inputs.w_down)]
    results = {}
    for rounded in (True, False):
        total = np.zeros_like(wide[0])
        for k in range(inputs.ids[0].shape[1]):
            for token, expert in enumerate(inputs.ids[0][:, k]):
                z = wide[1][expert] @ wide[0][token]
                z = z.astype(case.spec.numpy_dtype).astype(np.float32) if rounded else z
                a = activate(case.activation, z).astype(case.spec.numpy_dtype)
                o = (wide[2][expert] @ a.astype(np.float32)).astype(case.spec.numpy_dtype)
                total[token] += inputs.weights[0][token, k] * o.astype(np.float32)
        expected = total.astype(case.spec.numpy_dtype).astype(np.float64)
        results[rounded] = relative_error(y, expected)
    assert results[True] < 3e-4 < 1e-3 < results[False]


def test_inference_gives_the_same_y_and_saves_nothing():
    case = Case((4, 2))
    inputs = make_inputs(case)
    expected = spawn_case(case, repeats=1)

    def infer(world):
        w_up, w_down = cometrt.shard_weights(
            inputs.w_up, inputs.w_down, world.rank, world.size, case.spec
        )
        layer = cometrt.MoELayer(world, case.spec, config=case.config)
        tables = inputs.ids[world.rank], inputs.weights[world.rank]
        return layer.forward(inputs.x[world.rank], *tables, w_up, w_down, training=False)

    for (y, saved), output in zip(cometrt.spawn(infer, 4), expected, strict=True):
        assert saved is None
        assert y.tobytes() == output.y.tobytes()


def test_default_tiles_and_a_hidden_size_that_is_not_a_multiple_of_them():
    case = Case((4, 1))
    inputs = make_inputs(case)
    columns = {"order": "columns", "n_chunk": 32}
    of_backward = {"backward_order": "columns", "backward_n_chunk": 32}
    for config in (
        None,
        cometrt.TileConfig(block_n=32, **columns),
        cometrt.TileConfig(block_n=16, n_chunk=16, **of_backward),
        cometrt.TileConfig(block_n=32, backward_order="phases", **columns),
    ):

        def run(world, config=config):
            w_up, w_down = cometrt.shard_weights(
                inputs.w_up, inputs.w_down, world.rank, world.size, case.spec
            )
            layer = cometrt.MoELayer(world, case.spec, config=config)
            rank = world.rank
            y, saved = layer.forward(
                inputs.x[rank], inputs.ids[rank], inputs.weights[rank], w_up, w_down
            )
            return Output(y, layer.backward(inputs.dy[rank], saved))

        check_case(case, inputs, cometrt.spawn(run, 4))
