"""What the soak runs and how it judges memory, without a GPU."""

import pytest

from cometrt.legality import check_layer
from cometrt.specs import SAVE_MODES
from tests.device import soak


@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
def test_the_soak_has_legal_layers_of_every_save(size):
    models = soak.make_models(size)
    for model in models:
        assert check_layer(model.spec, size, "cuda", "fused", model.config) == "fused"
    assert {model.spec.save for model in models} == set(SAVE_MODES)
    assert len({model.name for model in models}) == len(models)
    assert {model.config.of_backward().order for model in models} == {"phases", "columns"}


def samples(*sizes):
    return [{"GPU": size, "host": 5} for size in sizes]


def test_memory_that_fills_caches_at_first_has_not_grown():
    filling = samples(*range(0, 60, 10), *[60, 61] * 9)
    assert soak.growth(filling) == {"GPU": 0, "host": 0}


def test_memory_that_grows_is_found():
    assert soak.growth(samples(*range(0, 240, 10)))["GPU"] == 230 - 110
    late = samples(*[7] * 23, 9)
    assert soak.growth(late) == {"GPU": 2, "host": 0}


def test_few_samples_say_nothing():
    assert soak.growth(samples(*[1] * 19)) == {}
