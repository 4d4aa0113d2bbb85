"""The tuner's candidates, and its search: coordinate descent over the settings of a config."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

from cometrt.legality import check_layer
from cometrt.plan import TileConfig
from cometrt.specs import MoESpec

PASSES = ("forward", "backward")
_SWEEPS = 2
_MIN_GAIN = 0.01  # fraction of the time; a smaller gain counts as noise
_N_CHUNKS = (512, 1024, 2048)
_NUM_PHASES = (1, 2, 4)
_CTAS_PER_COMM_CTA = (2, 4, 8)  # every second, fourth or eighth CTA transfers rows

Change = dict[str, Any]  # fields of a TileConfig


class Setting(NamedTuple):
    """Alternatives of which a config has one.

    Attributes:
        passes: of PASSES: those whose time depends on the setting.
        changes: the alternatives.
    """

    passes: tuple[str, ...]
    changes: list[Change]


class Found(NamedTuple):
    """The result of a search; times in milliseconds, by pass."""

    config: TileConfig
    ms: dict[str, float]
    base_ms: dict[str, float]


def candidates(
    base: TileConfig, spec: MoESpec, size: int, sms: int, *, training: bool
) -> list[Setting]:
    """The changes to try for each setting; of each pass, those with a larger effect come first.

    Changes that are equivalent for this shape appear once. The result is equal on all ranks.

    Args:
        base: where the search starts; in training of `with_own_backward`.
        sms: SMs of the smallest rank, equal on all ranks.
        training: whether backward's fields are settings too.
    """
    shared = PASSES if training else PASSES[:1]
    phases = {  # of equivalent values the last one stays: the base's
        tuple(TileConfig(num_phases=num_phases).last_distances(size)): {"num_phases": num_phases}
        for num_phases in (*_NUM_PHASES, size, base.num_phases)
    }
    square = max(2, math.isqrt(sms // 2) // 2 * 2)  # the tiles in flight then form a square
    groups = [None, *dict.fromkeys((square, 2 * square, 4 * square))]
    order, *comm = _of_pass(base, spec, sms, "forward")
    settings = [
        order,
        Setting(shared, list(phases.values())),
        Setting(shared, [{"raster_group": value} for value in groups]),
        *comm,
    ]
    return settings + (_of_pass(base, spec, sms, "backward") if training else [])


def _of_pass(base: TileConfig, spec: MoESpec, sms: int, which: str) -> list[Setting]:
    """Settings of one pass alone."""
    prefix = "" if which == "forward" else "backward_"

    def order(name: str, n_chunk: int | None) -> Change:
        return {f"{prefix}order": name, f"{prefix}n_chunk": n_chunk}

    orders = [order("phases", getattr(base, f"{prefix}n_chunk"))]
    orders += [order("columns", n_chunk) for n_chunk in _N_CHUNKS if n_chunk < spec.hidden]
    grid = max_grid(sms)
    every = None if which == "forward" else grid
    counts = [every, *dict.fromkeys(max(1, grid // n) for n in _CTAS_PER_COMM_CTA)]
    comm = [
        [{f"{prefix}{name}": value} for value in dict.fromkeys(counts)]
        for name in ("combine_ctas", "dispatch_ctas")
    ]
    return [Setting((which,), changes) for changes in (orders, *comm)]


def max_grid(sms: int) -> int:
    """CTAs of the largest launch on so many SMs."""
    return sms // 2 * 2


def with_own_backward(config: TileConfig, sms: int) -> TileConfig:
    """The same schedules, but backward's fields have values of their own: so they stay as they are
    when forward's change."""
    own, grid = config.of_backward(), max_grid(sms)
    return dataclasses.replace(
        config,
        backward_order=own.order,
        backward_n_chunk=own.n_chunk,
        backward_dispatch_ctas=own.dispatch_ctas or grid,
        backward_combine_ctas=own.combine_ctas or grid,
    )


def schedule(config: TileConfig, which: str) -> TileConfig:
    """What a pass depends on: configs with equal schedules have the same time."""
    if which == "backward":
        return config.of_backward()
    fields = [f.name for f in dataclasses.fields(config) if f.name.startswith("backward_")]
    none: Change = dict.fromkeys(fields)
    return dataclasses.replace(config, **none)


def roomiest(base: TileConfig, settings: list[Setting]) -> TileConfig:
    """A config whose memory serves the base with any of these changes to its N-chunks."""
    changes = [change for setting in settings for change in setting.changes]
    orders = [(of.order, of.n_chunk) for of in (base, base.of_backward())]
    for prefix in ("", "backward_"):
        names = f"{prefix}order", f"{prefix}n_chunk"
        orders += [(c[names[0]], c[names[1]]) for c in changes if names[0] in c]
    n_chunks = [n_chunk for order, n_chunk in orders if order == "columns"]
    if not n_chunks:
        return base
    return dataclasses.replace(base, order="columns", n_chunk=min(n_chunks))


def legal(base: TileConfig, change: Change, spec: MoESpec, size: int) -> TileConfig | None:
    """The changed config, or None if the fused kernels cannot run it for this spec and W=size."""
    try:
        config = dataclasses.replace(base, **change)
        check_layer(spec, size, "cuda", "fused", config)
    except ValueError:
        return None
    return config


def search(
    base: TileConfig,
    settings: list[Setting],
    spec: MoESpec,
    size: int,
    time: Callable[[TileConfig, str], float],
    expired: Callable[[], bool] = lambda: False,
) -> Found:
    """Coordinate descent from `base`: change one setting at a time, and keep what is faster.

    A setting is judged by the sum of the times of its passes. Each schedule of a pass is timed
    once.

    Args:
        settings: of `candidates`. Changes that `legal` refuses are not timed.
        time: measures a pass with a config in milliseconds. If it is equal on all ranks, so is the
            result.
        expired: whether no more may be timed; equal on all ranks. The base is timed in any case.
    """
    passes = dict.fromkeys(which for setting in settings for which in setting.passes)
    times: dict[tuple[str, TileConfig], float] = {}

    def ms(config: TileConfig, which: str) -> float:
        key = which, schedule(config, which)
        if key not in times:
            times[key] = time(config, which)
        return times[key]

    def found(best: TileConfig) -> Found:
        return Found(best, *({p: ms(config, p) for p in passes} for config in (best, base)))

    def is_faster(config: TileConfig, best: TileConfig, of: tuple[str, ...]) -> bool:
        return sum(ms(config, p) for p in of) < (1 - _MIN_GAIN) * sum(ms(best, p) for p in of)

    best = found(base).config
    for _ in range(_SWEEPS):
        before = best
        for setting in settings:
            for change in setting.changes:
                config = legal(best, change, spec, size)
                if config is None or config == best:
                    continue
                is_new = any((p, schedule(config, p)) not in times for p in setting.passes)
                if is_new and expired():
                    return found(best)
                if is_faster(config, best, setting.passes):
                    best = config
        if best == before:
            break
    return found(best)


def describe(config: TileConfig) -> str:
    """The fields that are not those of TileConfig()."""
    default = dataclasses.asdict(TileConfig())
    fields = dataclasses.asdict(config).items()
    changed = [f"{name}={value}" for name, value in fields if value != default[name]]
    return f"TileConfig({', '.join(changed)})"
