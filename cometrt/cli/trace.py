"""`cometrt trace`: a recording of a forward and a backward, as a picture and for Perfetto."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import cometrt
from cometrt.cli.inputs import random_inputs
from cometrt.cli.output import Say, percent, table
from cometrt.trace import Comparison, Timeline

if TYPE_CHECKING:
    from rich.console import Console, Group

MODES = ("sequential", "fused")  # from top to bottom, where both are drawn
WARM_UP = 3  # calls before the recording


def run(
    world: cometrt.World,
    name: str,
    spec: cometrt.MoESpec,
    mode: str | None,
    rank: int | None,
    out: Path,
    say: Say,
    title: str | None = None,
) -> dict[str, Any]:
    """Collective: record one forward and one backward, and write both files on rank 0.

    Args:
        name: of the model.
        mode: as for `MoELayer`; "both": record "sequential" and "fused", and draw one above the
            other.
        rank: as for `Timeline.save_png`.
        out: folder of the files.
        title: of the picture; None: what was recorded.

    Raises:
        ValueError: if there is no such rank, or `out` is a file.
    """
    check_folder(out)
    if rank is not None and rank >= world.size:
        raise ValueError(f"--rank must be below the number of ranks, {world.size} (got {rank})")
    timelines = {}
    for of_layer in MODES if mode == "both" else (mode,):
        with cometrt.MoELayer(world, spec, of_layer) as layer:
            timelines[layer.mode] = record(layer, say)
    found = "both" if mode == "both" else next(iter(timelines))
    result: dict[str, Any] = {
        "model": name, "device": world.device, "mode": found, "ranks": world.size,
        "tokens": spec.max_tokens, "tp": spec.tp,
    }  # fmt: skip
    if world.rank == 0:
        say(f"drawing {sum(len(of.events) for of in timelines.values())} events")
        if title is None:
            title = f"{name}, {spec.max_tokens:,} tokens on each of {world.size} ranks, "
            title += world.device if mode == "both" else f"{world.device}, {found}"
        result |= files(timelines, title, out, rank)
    world.barrier()
    return result


def check_folder(out: Path) -> None:
    """Before the work whose files it will hold.

    Raises:
        ValueError: if it is a file.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out must be a folder (got {str(out)!r}, a file)")


def record(layer: cometrt.MoELayer, say: Say) -> Timeline:
    """Collective: the timeline of one forward and one backward."""
    world = layer.world
    inputs, dy = random_inputs(layer, layer.geometry.spec.max_tokens)

    def step() -> None:
        _, saved = layer.forward(*inputs)
        layer.backward(dy, saved)

    say(f"warming up, {layer.mode}")
    for _ in range(WARM_UP):
        step()
    layer.synchronize()
    say("recording; the first time, the kernels that record are compiled")
    for _ in range(2):  # the first still warms up: kernels that record were just loaded
        with cometrt.trace.record(layer) as recording:
            world.barrier()
            step()
            layer.synchronize()
    return recording.gather()


def files(
    timelines: dict[str, Timeline], title: str, out: Path, rank: int | None = None
) -> dict[str, Any]:
    """Write timeline.png and timeline.json into the folder. Returns their paths, and figures: those
    of a single timeline, or "modes" with those of each."""
    out.mkdir(parents=True, exist_ok=True)
    picture, perfetto = out / "timeline.png", out / "timeline.json"
    drawn: Timeline | Comparison
    if len(timelines) == 1:
        (drawn,) = timelines.values()
        found = figures(drawn)
    else:
        drawn = Comparison(timelines)
        found = {"modes": {mode: figures(of) for mode, of in timelines.items()}}
    drawn.save_json(perfetto)
    found |= {"perfetto": str(perfetto), "picture": None}
    try:
        drawn.save_png(picture, title, rank=rank)
        found["picture"] = str(picture)
    except ImportError as missing:
        found["no_picture"] = str(missing)
    return found


def figures(timeline: Timeline) -> dict[str, Any]:
    return {
        "hidden_share": timeline.hidden_share,
        "milliseconds": timeline.span_sec * 1e3,
        "waits": [
            {"rank": rank, "role": role} | shares
            for (rank, role), shares in timeline.waits().items()
        ],
        "events": len(timeline.events),
    }


def show(console: Console, found: dict[str, Any]) -> None:
    layer = f"{found['tokens']} tokens on each of {found['ranks']} ranks, {found['device']}"
    modes = found.get("modes", {found["mode"]: found})
    for mode, of in modes.items():
        console.print(f"[bold]{found['model']}[/], {layer}, {mode}: {of['milliseconds']:.3f} ms")
        console.print(line_of_share(of))
        console.print(shares_table(of["waits"]))
    show_paths(console, found)


def show_files(console: Console, found: dict[str, Any]) -> None:
    """What `files` returned of one timeline."""
    console.print(line_of_share(found))
    console.print(shares_table(found["waits"]))
    show_paths(console, found)


def show_paths(console: Console, found: dict[str, Any]) -> None:
    for path in lines_of_paths(found):
        console.print(path, soft_wrap=True, markup=False)


def line_of_share(found: dict[str, Any]) -> str:
    return (
        f"hidden share: {percent(found['hidden_share'])} of the time in which rows cross between "
        "ranks runs under GEMMs of the same rank"
    )


def lines_of_paths(found: dict[str, Any]) -> list[str]:
    """Where both files are, of what `files` returned."""
    return [
        f"picture: {found['picture'] or 'none: ' + found['no_picture']}",
        f"for Perfetto (ui.perfetto.dev): {found['perfetto']}",
    ]


def shares_table(waits: list[dict[str, Any]]) -> Group:
    """Of `Waits`, a line a role of each rank."""
    names = [name for name in cometrt.trace.Waits.NAMES if any(name in of for of in waits)]
    rows = []
    for of in waits:
        shares = [of.get(name, 0.0) for name in names]
        rows.append([f"{of['rank']} {of['role']}", *map(percent, shares), percent(1 - sum(shares))])
    heads = [name.replace("work", "working").replace("_", " ") for name in names]
    return table("where the time of each role went", "rank", *heads, "the rest", rows=rows)
