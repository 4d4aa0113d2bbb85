"""Calls in a row on CUDA: any order of micro-batches, a slow rank, ranks that exchange nothing."""

import functools
import time

import numpy as np
import pytest

import cometrt
from cometrt.models import scaled_spec
from tests import cases
from tests.cases import Case, Output, check_case, make_inputs, on_device, on_host, spawn_case
from tests.host.test_orders import Rank as HostRank
from tests.host.test_orders import batches_of

pytestmark = pytest.mark.gpu


class Rank(HostRank):
    """As on the host, with arrays on the device; a slow rank sleeps before each call."""

    def __init__(self, world, case, batches, pause):
        super().__init__(world, case, batches)
        move, r = on_device(world), world.rank
        self.pause = pause
        self.w_up, self.w_down = move(self.w_up), move(self.w_down)
        self.arrays = [[move(part[r]) for part in (b.x, b.ids, b.weights, b.dy)] for b in batches]

    def forward(self, batch):
        time.sleep(self.pause)
        *inputs, _ = self.arrays[batch]
        self.y[batch], self.saved[batch] = self.layer.forward(*inputs, self.w_up, self.w_down)

    def backward(self, batch):
        time.sleep(self.pause)
        return self.layer.backward(self.arrays[batch][3], self.saved[batch])


def run_orders(case, batches, order, device="cuda"):
    """As on the host, with rank 2 slow."""

    def fn(world):
        rank = Rank(world, case, batches, 0.02 if world.rank == 2 else 0.0)
        grads = {}
        for step in order.split():
            if step[0] == "f":
                rank.forward(int(step[1:]))
            else:
                grads[int(step[1:])] = rank.backward(int(step[1:]))
        rank.layer.synchronize()
        return {
            b: Output(on_host(rank.y[b]), cometrt.Gradients(*map(on_host, g)))
            for b, g in grads.items()
        }

    results = cometrt.spawn(fn, case.size, device, timeout_sec=10)
    for batch in results[0]:
        check_case(case, batches[batch], [outputs[batch] for outputs in results])


@pytest.mark.parametrize("save", ["rows", "z", "nothing"])
@pytest.mark.parametrize(
    ("routings", "order"),
    [
        (("uniform", "skewed"), "f0 f1 f2 f3 f4 f5 b0 b1 b2 b3 b4 b5"),
        (("uniform", "one_token"), "f0 f1 b1 b0"),
        (("at_home", "uniform", "at_home"), "f0 b0 f1 b1 f2 b2"),
        (("at_home", "uniform", "at_home"), "f0 f1 f2 b2 b1 b0"),
    ],
)
@pytest.mark.parametrize("ranks", [(4, 1), (4, 2)], ids=str)
def test_any_order_with_a_slow_rank(ranks, routings, order, save):
    case = Case(ranks, save=save, mode="sequential", gemm="engine")
    batches = batches_of(case, 6, routings)

    run_orders(case, batches, order)


def test_calls_on_different_streams_follow_each_other():
    # The first call is held up before it pushes; the second, of another layer on another stream,
    # must not publish its epoch before that.
    case = Case((2, 1), mode="sequential", gemm="engine")
    batches = batches_of(case, 2, ("uniform", "skewed"))

    def fn(world):
        import cupy

        rank = Rank(world, case, batches, 0.0)
        layers = rank.layer, cometrt.MoELayer(world, case.spec, case.mode, config=case.config)
        streams = cupy.cuda.Stream(non_blocking=True), cupy.cuda.get_current_stream()
        work = cupy.ones(1 << 24, np.float32)
        push = layers[0].executor.kernels["push"]

        def push_late(*args):
            for _ in range(500):
                cupy.multiply(work, 1.0, out=work)
            push(*args)

        cupy.multiply(work, 1.0, out=work)  # whatever that loads, now
        streams[1].synchronize()
        if world.rank == 1:
            layers[0].executor.kernels["push"] = push_late
        results = [
            layer.forward(*rank.arrays[batch][:3], rank.w_up, rank.w_down, stream=stream)
            for batch, (layer, stream) in enumerate(zip(layers, streams, strict=True))
        ]
        outputs = []
        for batch, (layer, stream) in enumerate(zip(layers, streams, strict=True)):
            y, saved = results[batch]
            grads = layer.backward(rank.arrays[batch][3], saved, stream=stream)
            layer.synchronize()
            outputs.append(Output(on_host(y), cometrt.Gradients(*map(on_host, grads))))
        return outputs

    results = cometrt.spawn(fn, case.size, "cuda", timeout_sec=10)
    for batch in range(2):
        check_case(case, batches[batch], [outputs[batch] for outputs in results])


class ModelCase(Case):
    """A case with a known model's shape, scaled down."""

    model, factor = "", 1

    @property
    def spec(self):
        return scaled_spec(
            self.model, self.factor, max_tokens=96, tp=self.ranks[1], capacity_factor=4.0
        )

    @property
    def config(self):
        return cometrt.TileConfig(
            block_m=128, block_tokens=32, min_token_blocks=1, order=self.order, n_chunk=256
        )


@functools.lru_cache(maxsize=1)
def model_inputs(model, factor, ranks):
    """What all modes of a model share: with so many experts the references take long."""
    case = type("This", (ModelCase,), {"model": model, "factor": factor})(ranks)
    inputs = make_inputs(case)
    scale = np.float32(7 / np.sqrt(case.spec.hidden))
    inputs.w_up = (inputs.w_up.astype(np.float32) * scale).astype(inputs.w_up.dtype)
    return inputs


@pytest.mark.parametrize("mode", ["sequential", "fused", "fused-columns"])
@pytest.mark.parametrize("ranks", [(1, 1), (2, 1), (4, 1), (4, 2), (8, 1)], ids=str)
@pytest.mark.parametrize(
    ("model", "factor"),
    [("mixtral-8x7b", 16), ("qwen2-moe", 8), ("phi-3.5-moe", 16), ("qwen3-30b-a3b", 8),
     ("deepseek-v3", 16)],
)  # fmt: skip
def test_scaled_models(model, factor, ranks, mode, monkeypatch):
    mode, _, order = mode.partition("-")
    made = type("This", (ModelCase,), {"model": model, "factor": factor})
    case = made(ranks, mode=mode, order=order or "phases")
    monkeypatch.setattr(cases, "HIDDEN", case.spec.hidden)
    monkeypatch.setattr(cases, "TOPK", case.spec.topk)
    monkeypatch.setattr(cases, "MAX_TOKENS", 96)
    monkeypatch.setattr(cases, "make_inputs", lambda case: model_inputs(model, factor, ranks))
    spawn_case(case, device="cuda")
