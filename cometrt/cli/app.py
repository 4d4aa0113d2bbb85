"""The commands and their options."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

import cometrt
from cometrt.cli.inputs import pick_device
from cometrt.cli.output import Output, Say, Show
from cometrt.cli.ranks import Processes, Threads, all_ranks, is_first, is_under_mpi
from cometrt.models import MODELS
from cometrt.world.threads import check_device

app = typer.Typer(
    help="Mixture-of-Experts layers whose token exchange hides under the expert GEMMs.",
    epilog="Without mpirun, ranks are threads: one for each GPU, or four. Under mpirun -n N "
    "cometrt ..., ranks are its processes. Exit status: 0 done, 1 something failed, "
    "2 wrong arguments.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Device = Annotated[
    Literal["auto", "host", "cuda"],
    typer.Option(help="Where the layer runs; auto: on Hopper GPUs if there are any."),
]
Ranks = Annotated[
    int | None,
    typer.Option(min=1, help="Threads that are ranks; default: one for each GPU, or four."),
]


def _known_model(name: str) -> str:
    if name not in MODELS:
        raise typer.BadParameter(f"must be one of {', '.join(MODELS)} (got {name!r})")
    return name


Model = Annotated[str, typer.Option(callback=_known_model, help=f"One of {', '.join(MODELS)}.")]
Tokens = Annotated[int, typer.Option(min=1, help="Tokens of each rank.")]
Tp = Annotated[int, typer.Option(min=1, help="Shards of each expert.")]
Scale = Annotated[
    int | None,
    typer.Option(min=1, help="Divides the model's H and I; default: 1 on GPUs, 16 on the host."),
]
Out = Annotated[Path, typer.Option(help="Folder for the timeline.")]

NO_GPU = {"skipped": "no GPU"}


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"cometrt {cometrt.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print it."),
    ] = False,
) -> None:
    """Options that need no command."""


def run(arguments: Sequence[str] | None) -> None:
    """Run a command, and exit."""
    app(args=None if arguments is None else list(arguments), prog_name="cometrt")


def execute(as_json: bool, work: Callable[[Output], int | None]) -> None:
    """Do a command's work, and exit with the status that it returns, or that its error means."""
    output = Output(as_json)
    try:
        status = work(output) or 0
    except ValueError as error:  # a wrong argument
        status = _failed(output, error, 2)
    except (cometrt.CometError, ImportError, OSError) as error:
        status = _failed(output, error, 1)
    except Exception:
        if is_under_mpi():  # other ranks may wait in MPI
            traceback.print_exc()
            Processes().abort()
        raise
    raise typer.Exit(status)


def _failed(output: Output, error: Exception, status: int) -> int:
    output.error(str(error))
    if is_under_mpi():
        Processes().abort()  # other ranks may wait in MPI
    return status


def first(world: cometrt.World, say: Say) -> Say:
    """`say` on rank 0, and nothing on others."""
    return say if world.rank == 0 else lambda text: None


def on_ranks(
    as_json: bool,
    device: str,
    ranks: int | None,
    text: str,
    work: Callable[[Threads | Processes, str, Say], dict[str, Any]],
    show: Show,
    *,
    needs_gpu: bool = False,
) -> None:
    """Run a command's work on all ranks, and print on rank 0 what it returns.

    Args:
        text: what takes the time.
        work: gets the ranks, the device, and a function that says what comes next.
        needs_gpu: without one, the command says so, unless `device` is "cuda".
    """

    def together(output: Output) -> None:
        if not is_under_mpi():
            # CUDA reads it when it starts; see `cometrt.spawn`. Processes do not need it, those of
            # `doctor` neither, and the multi-process service refuses them with it.
            os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
        here = pick_device(device)
        check_device(here)
        found = all_ranks(ranks, here)
        if needs_gpu and here == "host":
            if device == "host":
                raise ValueError("--device must be cuda or auto: this command needs a GPU")
            if found.rank == 0:
                output.result(NO_GPU, lambda console, _: console.print("no GPU: skipped"))
            return
        if found.rank:
            work(found, here, lambda text: None)
            return
        with output.working(text) as say:
            result = work(found, here, say)
        output.result(result, show)

    execute(as_json, together)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Check this machine: GPUs, compiler, MPI, shared memory. Says what to do about a failure."""
    from cometrt.cli import doctor

    if is_first():
        execute(as_json, doctor.run_doctor)


@app.command()
def demo(
    tokens: Annotated[int, typer.Option(min=1, help="Bytes of text of each rank.")] = 256,
    scale: Annotated[int, typer.Option(min=1, help="Divides the model's H and I.")] = 4,
    out: Out = Path("out"),
    ranks: Ranks = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Send real text through a layer, check every result, and draw the timeline."""
    from cometrt.cli import demo

    def work(found: Threads | Processes, here: str, say: Say) -> dict[str, Any]:
        return found.run(lambda world: demo.run(world, scale, tokens, out, first(world, say)), here)

    on_ranks(as_json, device, ranks, "making weights and tokens", work, demo.show)


@app.command()
def bench(
    model: Model = "qwen3-30b-a3b",
    tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens of each rank; default: 8192 on GPUs, 128 on the host."),
    ] = None,
    tp: Tp = 1,
    rounds: Annotated[int, typer.Option(min=1, help="Isolated calls of each.")] = 9,
    seconds: Annotated[float, typer.Option(min=0, help="Of sustained calls of each.")] = 2.0,
    ranks: Ranks = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Measure a model's layer: both passes, isolated and sustained, beside NCCL if it is there."""
    from cometrt.cli import bench

    def work(found: Threads | Processes, here: str, say: Say) -> dict[str, Any]:
        count = tokens or (8192 if here == "cuda" else 128)
        return bench.run(found, here, model, count, tp, rounds, seconds, say)

    on_ranks(as_json, device, ranks, f"making layers of {model}", work, bench.show)


@app.command()
def tune(
    model: Model = "qwen3-30b-a3b",
    tokens: Tokens = 8192,
    tp: Tp = 1,
    inference: Annotated[
        bool, typer.Option("--inference", help="Tune for forwards that keep nothing.")
    ] = False,
    budget_sec: Annotated[
        float, typer.Option(min=0.001, help="Seconds after which nothing more is tried.")
    ] = 45.0,
    ranks: Ranks = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Find the fastest config of a model's layer here; layers made later use it."""
    from cometrt.cli import tune

    def work(found: Threads | Processes, here: str, say: Say) -> dict[str, Any]:
        given = model, tokens, tp, not inference, budget_sec
        return found.run(lambda world: tune.run(world, *given, first(world, say)), here)

    text = f"making a layer of {model}, {tokens} tokens a rank"
    on_ranks(as_json, device, ranks, text, work, tune.show, needs_gpu=True)


@app.command()
def trace(
    model: Model = "qwen3-30b-a3b",
    tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens of each rank; default: 8192 on GPUs, 256 on the host."),
    ] = None,
    tp: Tp = 1,
    scale: Scale = None,
    mode: Annotated[
        Literal["fused", "sequential", "both"] | None,
        typer.Option(help="Default: the best; both: sequential above fused, on one scale."),
    ] = None,
    rank: Annotated[
        int | None, typer.Option(min=0, help="Draw a lane for each CTA of this rank alone.")
    ] = None,
    title: Annotated[str | None, typer.Option(help="Of the picture.")] = None,
    out: Out = Path("out"),
    ranks: Ranks = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Record a forward and a backward of a model's layer: a picture, and a file for Perfetto."""
    from cometrt.cli import trace

    def work(found: Threads | Processes, here: str, say: Say) -> dict[str, Any]:
        spec = cometrt.models.scaled_spec(
            model,
            scale or (1 if here == "cuda" else 16),
            max_tokens=tokens or (8192 if here == "cuda" else 256),
            tp=tp,
        )
        name = model if scale in (1, None) and here == "cuda" else f"{model} / {scale or 16}"

        def record(world: cometrt.World) -> dict[str, Any]:
            return trace.run(world, name, spec, mode, rank, out, first(world, say), title)

        return found.run(record, here)

    on_ranks(as_json, device, ranks, f"making a layer of {model}", work, trace.show)


@app.command()
def memory(
    model: Model = "qwen3-30b-a3b",
    ranks: Annotated[int, typer.Option(min=1, help="Number of ranks, W.")] = 8,
    tp: Tp = 1,
    tokens: Annotated[
        list[int] | None, typer.Option(min=1, help="Tokens of each rank; may be repeated.")
    ] = None,
    scale: Annotated[int, typer.Option(min=1, help="Divides the model's H and I.")] = 1,
    save: Annotated[
        Literal["rows", "z", "nothing"], typer.Option(help="What a forward keeps.")
    ] = "rows",
    mode: Annotated[
        Literal["fused", "sequential"] | None, typer.Option(help="Default: the best.")
    ] = None,
    inference: Annotated[
        bool, typer.Option("--inference", help="Without what a backward needs.")
    ] = False,
    device: Annotated[Literal["host", "cuda"], typer.Option(help="Where it would run.")] = "cuda",
    as_json: Json = False,
) -> None:
    """Compute the memory that a model's layer takes on each rank. Allocates nothing."""
    from cometrt.cli import memory

    def work(output: Output) -> None:
        found = memory.run(
            model, ranks, tp, tokens or [8192], scale, save, mode, not inference, device
        )
        output.result(found, memory.show)

    if is_first():
        execute(as_json, work)
