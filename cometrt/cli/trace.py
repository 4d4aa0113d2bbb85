"""`cometrt trace`: a recording of a forward and a backward, as a picture and for Perfetto."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import cometrt
from cometrt.cli.inputs import random_inputs
from cometrt.cli.output import Say, percent, table

if TYPE_CHECKING:
    from rich.console import Console, Group

WARM_UP = 3  # calls before the recording


def run(
    world: cometrt.World,
    name: str,
    spec: cometrt.MoESpec,
    mode: str | None,
    rank: int | None,
    out: Path,
    say: Say,
) -> dict[str, Any]:
    """Collective: record one forward and one backward, and write both files on rank 0.

    Args:
        name: of the model, for the title.
        rank: as for `Timeline.save_png`.
        out: folder of the files.

    Raises:
        ValueError: if there is no such rank.
        CometError: if nothing is recorded on this device in this mode.
    """
    if rank is not None and rank >= world.size:
        raise ValueError(f"--rank must be below the number of ranks, {world.size} (got {rank})")
    layer = cometrt.MoELayer(world, spec, mode)
    inputs, dy = random_inputs(layer, spec.max_tokens)

    def step() -> None:
        _, saved = layer.forward(*inputs)
        layer.backward(dy, saved)

    say("warming up")
    for _ in range(WARM_UP):
        step()
    layer.synchronize()
    say("recording; the first time, the kernels that record are compiled")
    for _ in range(2):  # the first still warms up: kernels that record were just loaded
        with cometrt.trace.record(layer) as recording:
            world.barrier()
            step()
            layer.synchronize()
    timeline = recording.gather()
    if not timeline.events:
        raise cometrt.CometError(
            f"nothing is recorded on {world.device} in mode {layer.mode!r}: use mode 'fused'"
        )
    result: dict[str, Any] = {
        "model": name, "device": world.device, "mode": layer.mode, "ranks": world.size,
        "tokens": spec.max_tokens, "tp": spec.tp,
    }  # fmt: skip
    if world.rank == 0:
        say(f"drawing {len(timeline.events)} events")
        title = (
            f"{name}, {spec.max_tokens} tokens on each of {world.size} ranks, "
            f"{world.device}, {layer.mode}"
        )
        result |= files(timeline, title, out, rank)
    world.barrier()
    return result


def files(
    timeline: cometrt.trace.Timeline, title: str, out: Path, rank: int | None = None
) -> dict[str, Any]:
    """Write timeline.png and timeline.json into the folder. Returns their paths, and figures."""
    out.mkdir(parents=True, exist_ok=True)
    picture, perfetto = out / "timeline.png", out / "timeline.json"
    timeline.save_json(perfetto)
    found: dict[str, Any] = {
        "hidden_share": timeline.hidden_share,
        "milliseconds": timeline.span_sec * 1e3,
        "waits": [
            {"rank": rank, "role": role} | shares
            for (rank, role), shares in timeline.waits().items()
        ],
        "events": len(timeline.events),
        "perfetto": str(perfetto),
        "picture": None,
    }
    try:
        timeline.save_png(picture, title, rank=rank)
        found["picture"] = str(picture)
    except ImportError as missing:
        found["no_picture"] = str(missing)
    return found


def show(console: Console, found: dict[str, Any]) -> None:
    console.print(
        f"[bold]{found['model']}[/], {found['tokens']} tokens on each of {found['ranks']} ranks, "
        f"{found['device']}, {found['mode']}: {found['milliseconds']:.3f} ms"
    )
    show_files(console, found)


def show_files(console: Console, found: dict[str, Any]) -> None:
    """What `files` returned."""
    hidden, *paths = lines_of_files(found)
    console.print(hidden)
    console.print(shares_table(found["waits"]))
    for path in paths:
        console.print(path, soft_wrap=True, markup=False)


def lines_of_files(found: dict[str, Any]) -> list[str]:
    """The hidden share, and where both files are, of what `files` returned."""
    return [
        f"hidden share: {percent(found['hidden_share'])} of the time in which rows cross between "
        "ranks runs under GEMMs of the same rank",
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
