"""Mode "chunked" has the bits of "sequential", whatever the chunks, on every kind of routing."""

import dataclasses

import numpy as np
import pytest

import cometrt
from cometrt.cuda.sequential import comm_sms
from tests import cases
from tests.cases import ROUTINGS, Case, make_inputs, on_device, on_host

pytestmark = pytest.mark.gpu


def compare(case, chunks, routings, *, sms=None, training=False):
    """Batches of both modes queued one behind the other; weights are the first batch's."""
    batches = [make_inputs(dataclasses.replace(case, routing=routing)) for routing in routings]
    config = dataclasses.replace(case.config, pipeline_chunks=chunks, comm_sms=sms)

    def fn(world):
        move, rank = on_device(world), world.rank
        weights = cometrt.shard_weights(
            batches[0].w_up, batches[0].w_down, rank, case.size, case.spec
        )
        weights = [move(part) for part in weights]
        layers = [
            cometrt.MoELayer(world, case.spec, mode, config=config)
            for mode in ("sequential", "chunked", "fused")
        ]
        queued = []
        for batch in batches:
            tables = [move(part[rank]) for part in (batch.x, batch.ids, batch.weights)]
            for layer in layers:
                out = move(cases.poisoned(tables[0].shape, case.spec.numpy_dtype))
                layer.forward(*tables, *weights, training=training, out=out)
                queued.append(out)
        for layer in layers:
            layer.close()
        return [on_host(y) for y in queued]

    for results in cometrt.spawn(fn, case.size, "cuda", timeout_sec=10):
        for sequential, chunked, fused in zip(*(iter(results),) * 3, strict=True):
            assert np.isfinite(sequential.astype(np.float32)).all()
            assert chunked.tobytes() == sequential.tobytes()
            assert fused.tobytes() == sequential.tobytes()


@pytest.mark.parametrize("chunks", [1, 2, 4, 7])
@pytest.mark.parametrize("ranks", [(1, 1), (2, 1), (3, 1), (4, 1), (4, 2), (8, 1)], ids=str)
def test_every_routing(ranks, chunks):
    compare(Case(ranks, gemm="engine"), chunks, ROUTINGS)


@pytest.mark.parametrize("order", ["phases", "columns"])
@pytest.mark.parametrize("chunks", [2, 4])
@pytest.mark.parametrize("ranks", [(1, 1), (2, 1), (4, 1), (4, 4)], ids=str)
def test_many_tiles(ranks, chunks, order, monkeypatch):
    monkeypatch.setattr(cases, "MAX_TOKENS", 900)
    monkeypatch.setattr(cases, "HIDDEN", 528)
    case = Case(ranks, order=order, gemm="engine", seed=ranks[0] % 2)
    compare(case, chunks, ("uniform", "skewed", "empty_rank", "uniform"), training=True)


@pytest.mark.parametrize("sms", [2, 4, 8, 998])
def test_any_number_of_sms_that_move_rows(sms, monkeypatch):
    monkeypatch.setattr(cases, "MAX_TOKENS", 900)
    compare(Case((4, 1), gemm="engine"), 3, ("uniform", "skewed"), sms=sms)


def test_more_terms_than_a_warp_has_lanes(monkeypatch):
    # Rows of a token are summed a lane a term, 32 at a time.
    monkeypatch.setattr(cases, "TOPK", 40)
    monkeypatch.setattr(Case, "spec", property(wide_spec))
    compare(Case((2, 1), "uniform", gemm="engine"), 2, ("uniform", "uniform"))


def wide_spec(case):
    return cometrt.MoESpec(48, 48, num_experts=96, topk=40, max_tokens=40, capacity_factor=4.0)


def test_a_wrong_call_and_a_right_one():
    case = Case((4, 1), gemm="engine")
    inputs = make_inputs(case)

    def fn(world):
        move, rank = on_device(world), world.rank
        weights = map(
            move, cometrt.shard_weights(inputs.w_up, inputs.w_down, rank, case.size, case.spec)
        )
        x, ids, factors = (move(part[rank]) for part in (inputs.x, inputs.ids, inputs.weights))
        weights = list(weights)
        with cometrt.MoELayer(world, case.spec, "chunked", config=case.config) as layer:
            right, _ = layer.forward(x, ids, factors, *weights)
            layer.synchronize()
            wrong = ids.copy()
            if rank == 2:
                wrong[3, 1] = case.spec.num_experts
            y, _ = layer.forward(x, wrong, factors, *weights)
            with pytest.raises(cometrt.RoutingError, match="rank 2, token 3, k 1"):
                layer.synchronize()
            assert np.isnan(on_host(y).astype(np.float32)).all()
            again, _ = layer.forward(x, ids, factors, *weights)
        assert on_host(again).tobytes() == on_host(right).tobytes()

    cometrt.spawn(fn, case.size, "cuda", timeout_sec=10)


def test_how_many_sms_move_rows():
    assert [comm_sms(sms, None) for sms in (8, 16, 32, 64, 132)] == [2, 2, 4, 8, 16]
    assert [comm_sms(16, wanted) for wanted in (2, 6, 14, 16, 132)] == [2, 6, 14, 14, 14]
