"""layer.stats() on either device: rows and epochs."""

from __future__ import annotations

import numpy as np

import cometrt
from tests.cases import Case, make_inputs, on_device


def check_stats(case: Case, device: str) -> None:
    """Of a forward, of its backward, and of another forward."""
    inputs = make_inputs(case)

    def fn(world):
        r, move = world.rank, on_device(world)
        weights = cometrt.shard_weights(inputs.w_up, inputs.w_down, r, case.size, case.spec)
        args = [move(part[r]) for part in (inputs.x, inputs.ids, inputs.weights)]
        args += map(move, weights)
        dy, found = move(inputs.dy[r]), []
        with cometrt.MoELayer(world, case.spec, case.mode, config=case.config) as layer:
            found.append(layer.stats())
            _, saved = layer.forward(*args)
            layer.synchronize()
            found.append(layer.stats())
            layer.backward(dy, saved)
            layer.synchronize()
            found.append(layer.stats())
            layer.forward(*args)
            layer.synchronize()
            found.append(layer.stats())
        return found

    ranks = cometrt.spawn(fn, case.size, device)
    experts = case.spec.num_experts // (case.size // case.spec.tp)
    for rank, (none, *found) in enumerate(ranks):
        assert none is None
        first = rank // case.spec.tp * experts
        ids = np.concatenate([of.ravel() for of in inputs.ids]) - first
        rows = np.bincount(ids[(ids >= 0) & (ids < experts)], minlength=experts)
        for of in found:
            assert of.rows.dtype == np.int64
            np.testing.assert_array_equal(of.rows, rows)
            assert of.waited_us >= 0
        epochs = [of.epoch for of in found]
        assert epochs == [of.epoch for of in ranks[0][1:]]
        assert epochs[0] < epochs[1] < epochs[2]
