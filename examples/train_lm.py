"""Train a Transformer language model with Mixture-of-Experts layers in JAX, on several ranks.

    python examples/train_lm.py --tiny                        # four ranks on one CPU, or one GPU
    mpirun -n 4 python -m mpi4py examples/train_lm.py --tiny  # a process for each rank
    python examples/train_lm.py --tiny --processes 2 --process 0 --port 4000
    python examples/train_lm.py --tiny --data 2               # two groups of ranks with all experts

It predicts the next byte of Python's standard library. Experts are sharded over the ranks. All else
is data parallel: XLA sums its gradients. A step that fails is done again, from the last checkpoint.
Results are in the folder --out: a checkpoint, which `--resume` and other numbers of ranks take, and
the curve of the loss. examples/lm has the parts.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from lm.model import AXES, VOCABULARY, ModelConfig, dense_experts
from lm.state import States
from lm.step import TOKENS, make_optimizer, make_probe, make_step
from lm.text import Text

import cometrt
from cometrt.interop import jax as cometrt_jax

MAX_FAILURES = 3  # without a new checkpoint
TINY = {
    "layers": 2, "hidden": 64, "heads": 4, "sequence": 64, "experts": 8, "intermediate": 96,
    "batch": 8, "steps": 200, "save_every": 20, "rate": 5e-3,
}  # fmt: skip


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--tiny", action="store_true", help="a model and a run for two CPU cores")
    for name, value in (("layers", 4), ("hidden", 512), ("heads", 8), ("sequence", 512)):
        add(f"--{name}", type=int, default=value)
    add("--experts", type=int, default=16, help="of each layer")
    add("--topk", type=int, default=2, help="experts of a token")
    add("--intermediate", type=int, default=1024, help="columns of one expert")
    add("--batch", type=int, default=32, help="sequences of all ranks in a step")
    add("--steps", type=int, default=1000)
    add("--rate", type=float, default=1e-3)
    add("--seed", type=int, default=0)
    add("--data", type=int, default=1, help="groups of ranks, each with all experts")
    add("--tp", type=int, default=1, help="shards of each expert")
    add("--dtype", choices=["bfloat16", "float32"], help="default: bfloat16 on GPUs")
    add("--capacity-factor", type=float, help="default: the ranks of a group, at most 4")
    add("--attention", choices=["xla", "cudnn"], default="xla")
    add("--dense", action="store_true", help="the reference: plain JAX, on one device")
    add("--out", type=Path, default=Path("out/train_lm"), metavar="FOLDER")
    add("--resume", action="store_true", help="go on from the checkpoint of FOLDER")
    add("--log-every", type=int, default=10, help="steps")
    add("--save-every", type=int, default=100, help="steps")
    add("--timeout", type=float, default=60.0, help="longest wait for another rank, in seconds")
    add("--fault", choices=["routing", "stall"], help="a fault to recover from, on the last rank")
    add("--fault-step", type=int, default=15)
    add("--devices", type=int, default=4, help="CPU devices, in one process alone")
    add("--processes", type=int, help="without mpirun: how many there are")
    add("--process", type=int, help="without mpirun: which one this is")
    add("--port", type=int, help="without mpirun: a free one, the same for all processes")
    if parser.parse_known_args(arguments)[0].tiny:
        parser.set_defaults(**TINY)
    options = parser.parse_args(arguments)
    apart = (options.processes, options.process, options.port)
    if None in apart and apart != (None, None, None):
        parser.error("--processes, --process and --port must be given together")
    return options


def start_jax(options: argparse.Namespace) -> None:
    """Join the other processes, if there are any. Each process takes the GPU of its number."""
    if options.processes:
        jax.config.update("jax_cuda_visible_devices", str(options.process))
        jax.distributed.initialize(f"localhost:{options.port}", options.processes, options.process)
    elif any(name in os.environ for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")):
        jax.distributed.initialize(cluster_detection_method="mpi4py")
    else:
        jax.config.update("jax_num_cpu_devices", options.devices)


def make_mesh(options: argparse.Namespace) -> Any:
    """[data, expert]: one row for each group of ranks that has all experts."""
    devices = jax.devices()
    if options.dense or (jax.process_count() == 1 and devices[0].platform != "cpu"):
        devices = devices[:1]  # one process uses one GPU
    if options.dense and jax.process_count() > 1:
        raise SystemExit("--dense needs one process")
    for name, divisor in (("--data", options.data), ("--tp", options.tp)):
        if len(devices) % divisor:
            raise SystemExit(f"{name} must divide the number of ranks {len(devices)}")
    if options.batch % len(devices):
        raise SystemExit(f"--batch must be divisible by the number of ranks {len(devices)}")
    return jax.sharding.Mesh(np.array(devices).reshape(options.data, -1), AXES)


@contextlib.contextmanager
def make_moe(mesh: Any, spec: cometrt.MoESpec, options: argparse.Namespace) -> Iterator[Any]:
    """The MoE layer of the mesh; None if the reference is wanted."""
    if options.dense:
        yield None
        return
    with (
        cometrt_jax.connect(mesh, timeout_sec=options.timeout) as world,
        cometrt_jax.MoE(world, spec) as moe,
    ):
        yield moe


class Trainer:
    """A run: its compiled step, its state and its losses."""

    def __init__(self, options: argparse.Namespace, mesh: Any, spec: Any, moe: Any) -> None:
        self.options, self.mesh, self.moe = options, mesh, moe
        self.config = model_config(options)
        self.text = Text(options.sequence, options.batch, options.seed)
        optimizer = make_optimizer(options.rate)
        options.out.mkdir(parents=True, exist_ok=True)
        path = options.out / "checkpoint.safetensors"
        self.states = States(mesh, spec, self.config, optimizer, path)
        self.losses: list[float]
        if options.resume:
            self.state, self.losses = self.states.load()
        else:
            self.state, self.losses = self.states.start(options.seed), []
            self.states.save(self.state, self.losses)
        specs = self.states.specs(self.state["parameters"])
        shared = mesh, self.config, moe or dense_experts, spec.dtype
        step = make_step(*shared, options.attention, optimizer, specs)
        tokens = self.tokens(0)
        self.step = jax.jit(
            step, donate_argnums=0, out_shardings=(self.states.shardings(self.state), None)
        )
        # Compiled before the first step, since a rank waits only for --timeout.
        self.step = self.step.lower(self.state, tokens).compile()
        probe = jax.jit(make_probe(*shared, specs))
        self.probe = probe.lower(self.state["parameters"], tokens).compile()
        multihost_utils.sync_global_devices("compiled")
        jax.block_until_ready(self.probe(self.state["parameters"], tokens))  # not timed
        self.fault = options.fault
        self.failures = 0

    def tokens(self, step: int) -> Any:
        """The batch of a step, on the mesh."""
        batch = self.text.batch(step)
        if step == self.options.fault_step and self.fault == "routing":
            batch[-1] += VOCABULARY  # no bytes: the last rank's router gets NaN
        sharding = NamedSharding(self.mesh, TOKENS)
        return jax.make_array_from_callback(batch.shape, sharding, lambda index: batch[index])

    def run(self) -> list[float]:
        """Train, and return the losses of all steps."""
        options = self.options
        while len(self.losses) < options.steps:
            begin = len(self.losses)
            end = min(
                options.steps,
                *(
                    (begin // every + 1) * every
                    for every in (options.log_every, options.save_every)
                ),
            )
            started, pending = time.perf_counter(), []
            for step in range(begin, end):
                tokens = self.tokens(step)
                if step == options.fault_step:
                    self.stall()
                self.state, metrics = self.step(self.state, tokens)
                pending.append(metrics)
            values = jax.device_get(pending)  # waits
            seconds = (time.perf_counter() - started) / (end - begin)
            started = time.perf_counter()
            probed = float(self.probe(self.state["parameters"], tokens))
            # Of a layer that is timed alone, so it is an estimate.
            share = min(1.0, self.config.layers * (time.perf_counter() - started) / seconds)
            error = self.error_of(sum(each["loss"] + each["norm"] for each in values) + probed)
            if error is not None:
                self.recover(error, end)
                continue
            self.losses += [float(each["loss"]) for each in values]
            say(
                f"step {end:5d}  loss {self.losses[-1]:.3f} nats/byte  "
                f"{options.batch * options.sequence / seconds:,.0f} tokens/s  "
                f"MoE {share:.0%} of the time  busiest expert {values[-1]['load']:.2f}x the mean"
            )
            if end % options.save_every == 0 or end == options.steps:
                self.states.save(self.state, self.losses)
                self.failures = 0
        return self.losses

    def error_of(self, value: float) -> Exception | None:
        """What went wrong since the last time, on any rank: all ranks come to the same answer.

        Args:
            value: a sum of means over all ranks, into which every call has gone.
        """
        error: Exception | None = None
        try:
            if self.moe is not None:
                self.moe.check()
        except cometrt.CometError as found:  # in this rank's group
            error = found
        if math.isfinite(value):
            if error is not None:
                raise error
            return None
        return error or ArithmeticError("the loss or a gradient is not finite on some rank")

    def recover(self, error: Exception, step: int) -> None:
        """Collective: go back to the last checkpoint."""
        self.failures += 1
        self.fault = None  # it happens once
        if self.failures == MAX_FAILURES:
            raise error
        if self.moe is not None:
            self.moe.world.reset()
        self.state, self.losses = self.states.load()
        if jax.process_index() == 0 or isinstance(error, cometrt.CometError):
            print(
                f"process {jax.process_index()}: step {step} or one shortly before failed, back to "
                f"step {len(self.losses)} ({type(error).__name__}: {error})",
                flush=True,
            )

    def stall(self) -> None:
        if self.fault == "stall" and jax.process_index() == jax.process_count() - 1:
            time.sleep(self.options.timeout + 1)


def model_config(options: argparse.Namespace) -> ModelConfig:
    return ModelConfig(
        layers=options.layers,
        hidden=options.hidden,
        heads=options.heads,
        sequence=options.sequence,
        experts=options.experts,
        topk=options.topk,
        intermediate=options.intermediate,
    )


def say(text: str) -> None:
    if jax.process_index() == 0:
        print(text, flush=True)


def save_curve(losses: list[float], path: Path) -> None:
    """The loss of each step as a PNG, where matplotlib is installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        say("no curve: pip install matplotlib")
        return
    axes = Figure(figsize=(7, 4), layout="constrained").add_subplot()
    axes.plot(range(1, len(losses) + 1), losses)
    axes.set(xlabel="step", ylabel="loss [nats/byte]")
    axes.grid(alpha=0.3)
    axes.figure.savefig(path, dpi=120)


def train(options: argparse.Namespace) -> list[float]:
    """The losses of all steps. JAX has been started."""
    mesh = make_mesh(options)
    cpu = mesh.devices.flat[0].platform == "cpu"
    tokens = options.batch // mesh.devices.size * options.sequence
    capacity = options.capacity_factor or min(mesh.shape["expert"], 4.0)
    spec = model_config(options).moe_spec(
        tokens, options.tp, options.dtype or ("float32" if cpu else "bfloat16"), capacity
    )
    with make_moe(mesh, spec, options) as moe:
        say(f"{dict(mesh.shape)}, {moe or 'dense reference'}")
        losses = Trainer(options, mesh, spec, moe).run()
    if jax.process_index() == 0:
        save_curve(losses, options.out / "loss.png")
    return losses


def main() -> None:
    options = parse()
    start_jax(options)
    train(options)


if __name__ == "__main__":
    main()
