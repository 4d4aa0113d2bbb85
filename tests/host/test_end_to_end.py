"""benchmarks.end_to_end: the model's gradients with each MoE layer, processes and the table."""

import argparse
import dataclasses
import json
import subprocess
import sys
import time

import numpy as np
import pytest

from benchmarks import end_to_end, rivals, stacks, tables
from benchmarks.stacks import Results, Stack
from cometrt.models import Model
from tests.host.test_jax import mesh_of
from tests.jax_cases import environment
from tests.launch import ROOT

jax = pytest.importorskip("jax", reason="needs JAX")

import jax.numpy as jnp  # noqa: E402

from benchmarks import (  # noqa: E402
    end_to_end_model,
    end_to_end_part,
    rivals_jax,
    rivals_jax_mosaic,
)

TINY = Stack("tiny", ranks=4, layers=2, sequence=32, batch=1)
HERE = {"gpu": "A GPU", "driver": 13000, "date": "2026-01-01", "commit": "abc"}


# ---- the model ---------------------------------------------------------------------------------


def dense(x, ids, weights, w_up, w_down):
    """All experts of all tokens, in float32."""
    w_up, w_down = (
        jax.lax.all_gather(w, "x", tiled=True).astype(jnp.float32) for w in (w_up, w_down)
    )
    gate, up = jnp.split(jnp.einsum("th,eih->tei", x.astype(jnp.float32), w_up), 2, axis=-1)
    outputs = jnp.einsum("tei,ehi->teh", jax.nn.silu(gate) * up, w_down)
    chosen = jnp.take_along_axis(outputs, ids[..., None], axis=1)
    return jnp.einsum("tk,tkh->th", weights, chosen).astype(x.dtype)


def options(**changed):
    given = dict(
        stacks=[vars(TINY)], contenders=["fused"], device="host", processes=1, process=0, port=0,
        out="", steps=2, rounds=3, sustain_sec=0.01, limit_sec=60.0, timeout_sec=20.0,
    )  # fmt: skip
    return end_to_end_part.Options(**given | changed)


def expert_of_rows(rows, group_sizes):
    numbers = jnp.arange(len(group_sizes))
    return jnp.repeat(numbers, group_sizes, total_repeat_length=rows)


@pytest.fixture
def mosaic(monkeypatch):
    """Stand-ins for kernels that a CPU does not have, which check what these ask for."""

    def ragged_dot(a, b, *, group_sizes, transpose_rhs=False, **blocks):
        b = b.swapaxes(1, 2) if transpose_rhs else b
        check_blocks(b.shape[2], **blocks)
        assert a.shape[1] % blocks["block_k"] == 0
        products = jnp.einsum("rk,ekn->ren", a, b)
        experts = expert_of_rows(len(a), group_sizes)
        return jnp.take_along_axis(products, experts[:, None, None], axis=1)[:, 0]

    def transposed_ragged_dot(a, b, *, group_sizes, **blocks):
        check_blocks(b.shape[1], **blocks)
        assert a.shape[1] % blocks["block_m"] == 0
        of_expert = jax.nn.one_hot(expert_of_rows(len(a), group_sizes), len(group_sizes))
        return jnp.einsum("rm,rn,re->emn", a, b, of_expert.astype(a.dtype))

    def check_blocks(columns, *, block_m, block_n, block_k, max_concurrent_steps, grid_block_n):
        assert columns % (block_n * grid_block_n) == 0

    for function in (ragged_dot, transposed_ragged_dot):
        name = f"jax.experimental.pallas.ops.gpu.{function.__name__}_mgpu.{function.__name__}"
        monkeypatch.setattr(name, function)
    monkeypatch.setitem(stacks.SHAPES, "tiny", Model(128, 128, 8, 2))


def test_gradients_are_those_of_a_dense_layer(mosaic):
    mesh = mesh_of(axes=("x",))
    parameters, inputs = end_to_end_model.start(TINY, mesh)
    step = end_to_end_model.make_step(TINY, mesh, dense)
    loss, gradients = jax.block_until_ready(step(parameters, inputs))
    for contender in (*stacks.OURS, *stacks.RIVALS):
        with end_to_end_part.make_moe(contender, TINY, mesh, options()) as (moe, check):
            step = end_to_end_model.make_step(TINY, mesh, moe)
            found_loss, found = jax.block_until_ready(step(parameters, inputs))
            check()
        assert abs(found_loss - loss) < 1e-3 * loss, contender
        for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(gradients), strict=True):
            ours, theirs = (np.asarray(array, np.float64) for array in (ours, theirs))
            assert np.linalg.norm(ours - theirs) < 2e-2 * np.linalg.norm(theirs), contender


@pytest.mark.parametrize("contender", stacks.RIVALS)
def test_rows_that_do_not_fit_give_nan(mosaic, contender):
    stack = dataclasses.replace(TINY, sequence=128)
    layer = rivals_jax_mosaic.LAYERS[contender](stack.spec, 4, stack.tokens)
    ids = jnp.zeros((4 * stack.tokens, 2), jnp.int32).at[:, 1].set(1)  # all to rank 0
    x, weights = jnp.ones((len(ids), 128), jnp.bfloat16), jnp.ones(ids.shape)
    w_up, w_down = (jnp.ones((8, n, 128), jnp.bfloat16) for n in (256, 128))
    mesh, spec = mesh_of(axes=("x",)), jax.sharding.PartitionSpec("x")
    function = rivals_jax.differentiable(layer)
    y = jax.jit(jax.shard_map(function, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False))(
        x, ids, weights, w_up, w_down
    )
    assert bool(jnp.isnan(y).all())


def test_nothing_begins_after_its_time():
    rows = end_to_end_part.measure_stack(
        TINY, mesh_of(axes=("x",)), options(limit_sec=-1.0), time.monotonic()
    )
    assert list(rows) == [{"contender": "fused", "skipped": end_to_end_part.LATE}]


# ---- the command -------------------------------------------------------------------------------


FAST = {"XLA_FLAGS": "--xla_backend_optimization_level=0"}  # to compile


def run(*arguments, **changed):
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.end_to_end", "--device", "host", *arguments],
        capture_output=True, text=True, cwd=ROOT, timeout=200, env=environment() | FAST | changed,
    )  # fmt: skip


SMALL = "--models tiny --sequence 32 --batch 1 --steps 4 --rounds 3 --sustain-sec 0.1".split()


def test_processes_measure_and_keep_what_was_measured(tmp_path):
    out = tmp_path / "end_to_end.json"
    command = [*SMALL, "--out", str(out), "--contenders"]
    found = run(*command, "fused,sequential,jax batched")
    assert found.returncode == 0, found.stdout + found.stderr
    (entry,) = json.loads(out.read_text())["cells"].values()
    assert entry["shape"]["kv_heads"] == 2
    for contender in ("fused", "sequential", "jax batched"):
        figures = stacks.figures(entry, contender)
        assert figures["loss_gap"] < 1e-2
        assert figures["tokens_per_sec"] > 0
        assert entry["times"][contender]["losses"][-1] < entry["times"][contender]["losses"][0]
        assert contender in found.stdout
    assert 0 < stacks.figures(entry, "fused")["loss_noise"] < 1e-2
    found = run(*command, "jax mosaic")  # a CPU has no such kernels
    assert found.returncode == 1
    assert "jax mosaic   failed with exit code 1" in found.stdout
    (kept,) = json.loads(out.read_text())["cells"].values()
    assert kept["times"].pop("jax mosaic") == {"skipped": "failed with exit code 1"}
    assert kept == entry


def test_under_mpirun_it_says_how_to_start_it():
    found = run(*SMALL, PMI_SIZE="2", PMI_RANK="0")
    assert found.returncode == 1
    assert "start it without mpirun" in found.stderr


def test_a_part_whose_time_is_over_says_so():
    args = argparse.Namespace(steps=1, rounds=1, sustain_sec=0.1)
    rows = end_to_end.measure_part([TINY], ["fused", "sequential"], "host", args, 0.0)
    assert [row["skipped"] for row in rows] == ["stopped after 0 s"] * 2


def test_a_process_that_fails_ends_the_others():
    begin = time.monotonic()
    sleeps, fails = ([sys.executable, "-c", f"import sys, time; {code}"] for code in (
        "time.sleep(60)", "sys.exit(3)"
    ))  # fmt: skip
    assert rivals.run([sleeps, fails], 50) == "failed with exit code 3"
    assert time.monotonic() - begin < 20


# ---- figures and the table ---------------------------------------------------------------------

STACK = Stack("qwen3-30b-a3b", ranks=4, layers=2, sequence=4096, batch=2)


def measured(ms, losses, **more):
    spread = {"median": ms, "p10": ms - 1, "p90": ms + 1}
    return {"ms": spread, "without_ms": 5.0, "compile_sec": 9.0, "losses": losses} | more


def test_the_table(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    assert tables.end_to_end_table() == ["Not measured yet."]
    results = Results(tmp_path / "end_to_end.json", HERE)
    noisy = {"noisy_losses": [4.0, 2.02]}
    for contender, found in {
        "fused": measured(20.0, [4.0, 2.0], **noisy),
        "sequential": measured(25.0, [4.0, 2.0]),
        "jax batched": measured(30.0, [4.0, 2.04]),
        "jax mosaic": {"skipped": "failed"},
    }.items():
        results.add(STACK, {"stack": str(STACK), "contender": contender} | found)
    assert tables.end_to_end_table()[4:] == [
        "| qwen3-30b-a3b W=4 L=2 S=4096 B=2 | 32, 4, 128 "
        "| 20.00 (19.00 to 21.00), 1,638,400, 75% | 25.00 (24.00 to 26.00), 1,310,720, 80% "
        "| 30.00 (29.00 to 31.00), 1,092,267, 83% | - | 1.250 | 1.500 | 2.0e-02 (1.0e-02) | abc |"
    ]
    (entry,) = results.cells.values()
    assert stacks.lines(entry)[3] == "  jax mosaic   failed"


def test_results_of_another_commit_are_replaced(tmp_path):
    path = tmp_path / "end_to_end.json"
    row = {"stack": str(STACK), "contender": "fused"}
    first = Results(path, HERE)
    first.add(STACK, row | measured(20.0, [1.0]))
    first.add(STACK, row | {"skipped": "stopped after 1 s"})  # a later run, which keeps the figures
    again = Results(path, HERE)
    assert again.cells[str(STACK)]["times"]["fused"] == measured(20.0, [1.0])
    other = Results(path, HERE | {"commit": "def"})
    other.add(STACK, row | {"contender": "sequential"} | measured(30.0, [1.0]))
    assert list(other.cells[str(STACK)]["times"]) == ["sequential"]
