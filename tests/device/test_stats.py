"""layer.stats() on GPUs: what `finish` writes to the host."""

import numpy as np
import pytest

import cometrt
from tests.cases import Case, make_inputs, on_device
from tests.stats_cases import check_stats

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("mode", ["fused", "sequential", "chunked"])
@pytest.mark.parametrize("ranks", [(1, 1), (4, 1), (2, 2)])
def test_stats_are_those_of_the_newest_call(ranks, mode):
    check_stats(Case(ranks, mode=mode, gemm="engine"), "cuda")


def test_ranks_wait_for_the_last_one_to_begin():
    import cupy as cp

    case = Case((2, 1), mode="fused", gemm="engine")
    inputs = make_inputs(case)
    delay = cp.RawKernel(
        """extern "C" __global__ void delay(long long ns) {
          unsigned long long begin, now;
          asm volatile("mov.u64 %0, %globaltimer;" : "=l"(begin));
          do asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now)); while (now - begin < ns);
        }""",
        "delay",
    )

    def fn(world):
        r, move = world.rank, on_device(world)
        weights = cometrt.shard_weights(inputs.w_up, inputs.w_down, r, case.size, case.spec)
        args = [move(part[r]) for part in (inputs.x, inputs.ids, inputs.weights)]
        args += map(move, weights)
        with cometrt.MoELayer(world, case.spec, case.mode, config=case.config) as layer:
            delay((1,), (1,), (np.int64(1),))  # loaded before any kernel waits for a peer
            cp.cuda.get_current_stream().synchronize()
            world.barrier()
            for _ in range(3):
                delay((1,), (1,), (np.int64(20_000_000 if r == 1 else 1),))
                layer.forward(*args)
                layer.synchronize()
                world.barrier()
            return layer.stats().waited_us

    early, late = cometrt.spawn(fn, 2, "cuda")
    assert early >= 10_000
    assert late < early


@pytest.mark.parametrize("mode", ["fused", "sequential"])
def test_gemms_of_mode_fused_wait_for_rows_on_their_way(mode):
    """A GEMM begins while the first rows are on their way. A pass begins at 0 again."""
    case = Case((2, 1), mode=mode, gemm="engine")
    inputs = make_inputs(case)

    def fn(world):
        r, move = world.rank, on_device(world)
        weights = cometrt.shard_weights(inputs.w_up, inputs.w_down, r, case.size, case.spec)
        args = [move(part[r]) for part in (inputs.x, inputs.ids, inputs.weights)]
        args += map(move, weights)
        dy, found = move(inputs.dy[r]), []
        with cometrt.MoELayer(world, case.spec, case.mode, config=case.config) as layer:
            for _ in range(3):
                _, saved = layer.forward(*args)
                layer.synchronize()
                found.append(layer.stats().rows_waited_us)
                layer.backward(dy, saved)
                layer.synchronize()
                found.append(layer.stats().rows_waited_us)
        return found

    for found in cometrt.spawn(fn, 2, "cuda"):
        if mode == "sequential":
            assert found == [0] * 6
        else:
            assert all(0 < of < 1e6 for of in found)


def test_stats_are_read_while_calls_run():
    """Rows and epoch are of one call: calls of even epochs exchange neighbouring experts."""
    case = Case((2, 1), mode="fused", gemm="engine")
    inputs = make_inputs(case)

    def fn(world):
        r, move = world.rank, on_device(world)
        weights = cometrt.shard_weights(inputs.w_up, inputs.w_down, r, case.size, case.spec)
        x, topk_weights, *weights = map(move, (inputs.x[r], inputs.weights[r], *weights))
        ids = inputs.ids[r]
        tables = move(ids), move(np.where(ids >= 0, ids ^ 1, ids))
        found = []
        with cometrt.MoELayer(world, case.spec, case.mode, config=case.config) as layer:
            for call in range(200):
                layer.forward(x, tables[call % 2], topk_weights, *weights, training=False)
                found.append(layer.stats())
                if call >= 198:
                    layer.synchronize()
                    found.append(layer.stats())
        return [of for of in found if of is not None]

    for found in cometrt.spawn(fn, 2, "cuda"):
        epochs = [of.epoch for of in found]
        assert epochs == sorted(epochs)
        assert epochs[-1] >= 200
        rows = {(of.epoch % 2, of.rows.tobytes()) for of in found}
        assert len(rows) == len({of for _, of in rows}) == 2
