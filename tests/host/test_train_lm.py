"""The language model of the examples: its loss, its recoveries, and its checkpoints."""

import importlib
import os
import re
import types

import numpy as np
import pytest

import cometrt
from tests.host.test_jax import mesh_of, run_processes
from tests.launch import ROOT, mpirun

jax = pytest.importorskip("jax", reason="needs JAX")
pytest.importorskip("optax", reason="needs optax")
pytest.importorskip("safetensors", reason="needs safetensors")

STEPS = 16
FAST_COMPILE = "--xla_backend_optimization_level=0"  # and one device for each process
SHORT = ["--tiny", "--log-every", "4", "--save-every", "4"]


@pytest.fixture(scope="module")
def example():
    """The script as a module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "examples"))
        yield importlib.import_module("train_lm")


def run(example, out, *options, steps=STEPS):
    mesh_of()  # skips without four devices
    return example.train(
        example.parse([*SHORT, "--steps", str(steps), "--out", str(out), *options])
    )


@pytest.fixture(scope="module")
def dense(example, tmp_path_factory):
    """Losses of the reference, for a few steps more than the other runs make."""
    losses = run(example, tmp_path_factory.mktemp("dense"), "--dense", steps=STEPS + 4)
    assert losses[STEPS - 1] < losses[0] - 1
    return losses


@pytest.fixture(scope="module")
def groups(example, tmp_path_factory):
    """(folder, losses, printed) of a run of two groups of ranks, in one of which a step fails."""
    out = tmp_path_factory.mktemp("groups")
    printed = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("builtins.print", lambda text, **_: printed.append(text))
        losses = run(example, out, "--data", "2", "--fault", "routing", "--fault-step", "9")
    return out, losses, "\n".join(printed)


def check_losses(found, expected):
    np.testing.assert_allclose(found, expected[: len(found)], rtol=0, atol=1e-4)


def saved_losses(out):
    from safetensors.numpy import load_file

    return load_file(out / "checkpoint.safetensors")["losses"]


def test_loss_follows_the_dense_reference_on_shards_of_experts(example, dense, tmp_path):
    losses = run(example, tmp_path, "--tp", "2")
    assert len(losses) == STEPS
    check_losses(losses, dense)


def test_two_groups_of_ranks_recover_when_a_step_of_one_fails(groups, dense):
    out, losses, printed = groups
    assert "'data': 2, 'expert': 2" in printed
    assert "ranks [0, 1, 0, 1] are here" in printed
    back = re.findall(r"back to step \d+ \(\w+: topk_weights of rank \d", printed)
    assert back == ["back to step 8 (RoutingError: topk_weights of rank 1"], printed
    assert len(losses) == STEPS
    check_losses(losses, dense)
    check_losses(saved_losses(out), losses)


def test_progress_and_curve(groups):
    out, losses, printed = groups
    lines = re.findall(
        r"step +(\d+)  loss (\S+) nats/byte  [\d,]+ tokens/s  MoE (\d+)% of the time  "
        r"busiest expert (\S+)x the mean",
        printed,
    )
    assert [int(line[0]) for line in lines] == [4, 8, 12, 16]
    for step, loss, share, load in lines:
        assert abs(float(loss) - losses[int(step) - 1]) < 1e-3
        assert 0 < int(share) <= 100
        assert 1 <= float(load) <= 8
    pytest.importorskip("matplotlib")
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_a_stalled_process_under_mpirun(dense, tmp_path, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", FAST_COMPILE)
    fault = ["--fault", "stall", "--fault-step", "6", "--timeout", "4", "--steps", "8"]
    command = ["-m", "mpi4py", "examples/train_lm.py", *SHORT, *fault, "--out", str(tmp_path)]
    result = mpirun(2, *command, timeout_sec=200)
    assert result.returncode == 0, result.stdout + result.stderr
    back = re.findall(r"back to step 4 \(PeerTimeout: .*waited 4 s for source_ready", result.stdout)
    assert len(back) == 2, result.stdout
    losses = saved_losses(tmp_path)
    assert len(losses) == 8
    check_losses(losses, dense)


def test_other_processes_and_another_tp_go_on_from_a_checkpoint(groups, dense, monkeypatch):
    out, *_ = groups
    fast = {"XLA_FLAGS": FAST_COMPILE}
    monkeypatch.setattr("tests.host.test_jax.environment", lambda: os.environ | fast)
    more = ["--tp", "2", "--resume", "--steps", str(STEPS + 4), "--out", str(out)]
    outputs = run_processes(2, "examples/train_lm.py", *SHORT, *more, "--processes", "2")
    assert f"step {STEPS + 4:5d}  loss" in outputs[0]
    losses = saved_losses(out)
    assert len(losses) == STEPS + 4
    check_losses(losses, dense)


def states_of(example, out, data, tp):
    options = example.parse([*SHORT, "--data", str(data), "--tp", str(tp)])
    config = example.model_config(options)
    spec = config.moe_spec(128, tp, "float32", 4.0)
    optimizer = example.make_optimizer(1e-3)
    mesh = example.make_mesh(options)
    return example.States(mesh, spec, config, optimizer, out / "checkpoint.safetensors")


def test_a_checkpoint_has_the_experts_of_the_model(example, tmp_path):
    from safetensors.numpy import load_file

    mesh_of()
    states = states_of(example, tmp_path, 2, 1)
    state = states.start(seed=3)
    # Moments are as many experts as there are parameters.
    state["optimizer"] = jax.tree.map(
        lambda array: jax.numpy.arange(array.size, dtype=array.dtype).reshape(array.shape),
        state["optimizer"],
    )
    states.save(state, [2.0, 1.0])
    path = tmp_path / "checkpoint.safetensors"
    first = load_file(path)
    assert first["['parameters']['experts']['w_up']"].shape == (2, 8, 192, 64)
    assert first["['parameters']['experts']['w_down']"].shape == (2, 8, 64, 96)
    for data, tp in ((1, 1), (1, 2), (4, 1), (2, 2)):
        other = states_of(example, tmp_path, data, tp)
        loaded, losses = other.load()
        assert losses == [2.0, 1.0]
        w_up = loaded["parameters"]["experts"]["w_up"]
        ranks = 4 // data
        assert w_up.shape == (2, 8 * tp, 192 // tp, 64)
        assert w_up.addressable_shards[0].data.shape == (2, 8 * tp // ranks, 192 // tp, 64)
        path.unlink()
        other.save(loaded, losses)
        again = load_file(path)
        assert again.keys() == first.keys()
        for name, array in first.items():
            assert array.tobytes() == again[name].tobytes(), name
            assert array.shape == again[name].shape, name


def test_a_checkpoint_of_another_model_is_refused(example, groups):
    out, *_ = groups
    with pytest.raises(ValueError, match=r"must be of ModelConfig\(layers=3"):
        run(example, out, "--layers", "3", "--resume")


def test_a_step_that_fails_again_and_again_ends_the_run(example, capsys):
    trainer = object.__new__(example.Trainer)  # nothing is compiled
    trainer.moe, trainer.failures, error = None, 0, cometrt.RoutingError("always")
    trainer.states = types.SimpleNamespace(load=lambda: ("state", [3.0, 2.0]))
    for _ in range(2):
        trainer.recover(error, 4)
        assert (trainer.state, trainer.losses) == ("state", [3.0, 2.0])
    with pytest.raises(cometrt.RoutingError, match="always"):
        trainer.recover(error, 4)
    printed = capsys.readouterr().out
    assert printed.count("step 4 or one shortly before failed, back to step 2") == 2
