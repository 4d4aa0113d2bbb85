"""benchmarks.jax_step: the whole of it on the CPU, and what it tells of calls on a GPU."""

import itertools
import json
import subprocess
import sys
import types

import pytest

from benchmarks import jax_step
from tests.jax_cases import environment
from tests.launch import ROOT

pytest.importorskip("jax", reason="needs JAX")

from benchmarks import jax_step_part

SMALL = "--model tiny --tokens 16 --device host --rounds 2 --warm-up 1 --steps 2"


def test_a_step_on_the_cpu(tmp_path):
    out = tmp_path / "step.json"
    command = [sys.executable, "-m", "benchmarks.jax_step", *SMALL.split(), "--out", str(out)]
    command += ["--ranks", "1,2", "--layers", "1"]
    found = subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=200
    )
    assert found.returncode == 0, found.stdout + found.stderr
    cells = json.loads(out.read_text())["cells"]
    assert list(cells) == ["tiny W=1 T=16 L=1", "tiny W=2 T=16 L=1"]
    for entry in cells.values():
        medians = {name: side["us"]["median"] for name, side in entry["times"].items()}
        ratio = medians["JAX"] / medians["calls"]
        assert entry["overhead_percent"] == pytest.approx(100 * (ratio - 1))
        assert all(len(side["rounds_us"]) == 2 for side in entry["times"].values())
    assert "JAX over the calls: " in found.stdout


def test_what_was_not_measured_is_an_error(tmp_path, capsys):
    out = tmp_path / "step.json"
    options = [*SMALL.split(), "--ranks", "1", "--limit-sec", "0", "--out", str(out)]
    with pytest.raises(SystemExit, match="not everything was measured"):
        jax_step.main(options)
    assert "stopped after 0 s" in capsys.readouterr().out
    assert not out.exists()


def test_a_watched_round_tells_calls_from_what_is_between_them(monkeypatch):
    """A forward of 2 ms and a backward of 5 ms; 1 ms between them, 3 ms between steps."""
    at = {"forward": (0, 2), "backward": (3, 8)}
    now, done = itertools.count(), []

    class Event:
        @property
        def done(self):
            done.append(True)
            return len(done) % 2 == 0  # before a forward of the next step

        def record(self):
            step, place = divmod(next(now), 4)
            self.ms = 11 * step + (*at["forward"], *at["backward"])[place]

        def synchronize(self):
            pass

    cuda = types.SimpleNamespace(Event=Event, get_elapsed_time=lambda a, b: b.ms - a.ms)
    monkeypatch.setitem(sys.modules, "cupy", types.SimpleNamespace(cuda=cuda))
    queued = []
    executor = types.SimpleNamespace(enqueue=queued.append)

    def run():
        executor.enqueue("forward")
        executor.enqueue("backward")

    side = jax_step_part.Side(run, lambda last: None, types.SimpleNamespace(executor=executor))
    world = types.SimpleNamespace(barrier=lambda: None, allgather=lambda us: [us])
    options = types.SimpleNamespace(steps=4, layers=1)
    found = jax_step_part.watched(side, world, options)
    assert queued == ["forward", "backward"] * 4
    assert executor.enqueue == queued.append  # as before
    assert [found[name] for name in ("forward us", "backward us")] == [2000, 5000]
    assert found["between calls us"] == 1000
    assert found["between steps us"] == 3000
    assert found["idle"] == pytest.approx(3 / 7)


PROGRAM = """HloModule jit_step
fused { %p = f32[2] parameter(0) ROOT %c = f32[2] copy(%p) }
ENTRY %main (a: bf16[8,4]) -> (bf16[8,4]) {
  %a = bf16[8,4]{1,0} parameter(0)
  %call = (bf16[8,4]{1,0}, s8[16]{0}) custom-call(%a), custom_call_target="xla_buffer_python"
  %y = bf16[8,4]{1,0} get-tuple-element(%call), index=0
  %copy.1 = bf16[8,4]{1,0} copy(%y)
  %fusion = f32[4]{0} fusion(%y), kind=kLoop, calls=fused
  ROOT %out = (bf16[8,4]{1,0}) tuple(%copy.1)
}
"""


def test_what_else_a_program_runs():
    assert jax_step_part.others(PROGRAM) == ["copy bf16[8,4]{1,0}", "fusion f32[4]{0}"]
