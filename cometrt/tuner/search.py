"""The tuner's candidates, and its search over the settings of a config.

Coordinate descent finds a good config soon. A sweep over combinations of the settings takes the
rest of the time, and finds what two settings gain only together.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
import statistics
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from cometrt.legality import check_layer
from cometrt.plan import TileConfig
from cometrt.specs import MoESpec

PASSES = ("forward", "backward")
_SWEEPS = 2
_MIN_GAIN = 0.01  # fraction of the time; a smaller gain counts as noise
_MIN_GAIN_OF_MEDIANS = 0.002  # the same for medians of trials that took turns
_QUICK = 1, 2  # rounds and calls of a sweep's trial
_GROUPS, _FINALISTS, _TURNS = 2, 2, 7  # groups of a sweep, of each pass in a group, of each of them
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


class Timed(NamedTuple):
    """A trial of a pass."""

    ms: float
    which: str
    config: TileConfig


def candidates(
    base: TileConfig, spec: MoESpec, size: int, sms: int, *, training: bool
) -> list[Setting]:
    """The changes to try for each setting; of each pass, those with a larger effect come first.

    Changes that are equivalent for this shape appear once. The result is equal on all ranks.

    Args:
        base: where the search starts; in training of `with_own_backward`.
        size: number of ranks on a node.
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
    order, combine, dispatch = _of_pass(base, spec, sms, "forward")
    if spec.save == "nothing":  # see `schedule`
        dispatch = dispatch._replace(passes=shared)
    settings = [
        order,
        Setting(shared, list(phases.values())),
        Setting(shared, [{"raster_group": value} for value in groups]),
        combine,
        dispatch,
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


def schedule(config: TileConfig, which: str, spec: MoESpec) -> TileConfig:
    """What a pass depends on: configs with equal schedules have the same time. With save="nothing"
    a backward launches dispatch_gemm too, with the forward's dispatch_ctas."""
    config = config.of_node()
    if which == "backward":
        own = config.of_backward()
        if spec.save == "nothing":
            ctas, more = own.dispatch_ctas, config.dispatch_ctas
            own = dataclasses.replace(own, backward_dispatch_ctas=ctas, dispatch_ctas=more)
        return own
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


def legal(
    base: TileConfig, change: Change, spec: MoESpec, size: int, nodes: int = 1
) -> TileConfig | None:
    """The changed config, or None if the fused kernels cannot run it for this spec, W=size and
    N=nodes."""
    try:
        config = dataclasses.replace(base, **change)
        check_layer(spec, size, "cuda", "fused", config, nodes)
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
    nodes: int = 1,
) -> Found:
    """Coordinate descent from `base`: change one setting at a time, and keep what is faster.

    A setting is judged by the sum of the times of its passes. Each schedule of a pass is timed
    once.

    Args:
        settings: of `candidates`. Changes that `legal` refuses are not timed.
        time: measures a pass with a config in milliseconds. If it is equal on all ranks, so is the
            result. Infinite: the config cannot be used.
        expired: whether no more may be timed; equal on all ranks. The base is timed in any case.
    """
    passes = dict.fromkeys(which for setting in settings for which in setting.passes)
    times: dict[tuple[str, TileConfig], float] = {}

    def ms(config: TileConfig, which: str) -> float:
        key = which, schedule(config, which, spec)
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
                config = legal(best, change, spec, size, nodes)
                if config is None or config == best:
                    continue
                is_new = any((p, schedule(config, p, spec)) not in times for p in setting.passes)
                if is_new and expired():
                    return found(best)
                if is_faster(config, best, setting.passes):
                    best = config
        if best == before:
            break
    return found(best)


def combinations(
    best: TileConfig, settings: list[Setting], spec: MoESpec, size: int, nodes: int = 1
) -> Iterator[tuple[str, TileConfig]]:
    """(pass, config): all legal schedules of each pass, each once, in a random order that is equal
    on all ranks. The other pass has the fields of `best`."""
    passes = dict.fromkeys(which for setting in settings for which in setting.passes)
    found: dict[tuple[str, TileConfig], TileConfig] = {}
    for which in passes:
        own = [setting.changes for setting in settings if which in setting.passes]
        for changes in itertools.product(*own):
            change = {name: value for part in changes for name, value in part.items()}
            if config := legal(best, change, spec, size, nodes):
                found.setdefault((which, schedule(config, which, spec)), config)
    order = list(found.items())
    random.Random(0).shuffle(order)
    yield from ((which, config) for (which, _), config in order)


def sweep(
    base: TileConfig,
    found: Found,
    settings: list[Setting],
    spec: MoESpec,
    size: int,
    time: Callable[[TileConfig, str, tuple[int, int]], float],
    expired: Callable[[], bool],
    nodes: int = 1,
) -> Found:
    """Time combinations of the settings, those that differ least from what was found first, until
    there are none or the time is over. The fastest of each pass, what was found and the base then
    take turns, also when the time is over: a GPU is not equally fast all the time, so times of
    different moments may mislead. These are at most 42 trials of each pass, and all times of the
    result are their medians.

    Args:
        base, found: where `search` started, and what it found.
        time: measures a pass with a config, in so many rounds of so many calls.
        settings, spec, size, expired, nodes: as for `search`.
    """
    best, passes = found.config, tuple(found.ms)
    shared = [name for s in settings if len(s.passes) == len(passes) > 1 for name in s.changes[0]]

    def distance(of: tuple[str, TileConfig]) -> int:
        """How many settings of its pass differ from those of `best`."""
        which, config = of
        return sum(
            any(getattr(config, name) != getattr(best, name) for name in s.changes[0])
            for s in settings
            if which in s.passes
        )

    timed: list[Timed] = []
    for which, config in sorted(combinations(best, settings, spec, size, nodes), key=distance):
        if expired():
            break
        timed.append(Timed(time(config, which, _QUICK), which, config))
    turns: dict[tuple[str, TileConfig], list[float]]
    turns = {(which, config): [] for config in (best, base) for which in passes}
    for of_passes in _by_group(timed, shared, passes)[:_GROUPS]:
        for which, fastest in of_passes.items():
            turns |= {(which, one.config): [] for one in fastest[:_FINALISTS]}
    for _ in range(_TURNS):
        for (which, config), times in turns.items():
            times.append(time(config, which, _QUICK))
    medians = {of: statistics.median(times) for of, times in turns.items()}
    taken = [Timed(ms, which, config) for (which, config), ms in medians.items()]
    winner = _by_group(taken, shared, passes)[0]
    ms = {which: winner[which][0].ms for which in passes}
    of_best, of_base = ({p: medians[p, config] for p in passes} for config in (best, base))
    if sum(ms.values()) >= (1 - _MIN_GAIN_OF_MEDIANS) * sum(of_best.values()):
        return Found(best, of_best, of_base)
    return Found(_joined(*(winner[p][0].config for p in passes)), ms, of_base)


def _by_group(
    timed: list[Timed], shared: list[str], passes: tuple[str, ...]
) -> list[dict[str, list[Timed]]]:
    """Groups of configs that are equal in the fields `shared`: of one group, each pass may have
    another config. A group's configs by pass. The fastest come first, of groups that have each pass
    and of configs."""
    groups: dict[tuple[Any, ...], dict[str, list[Timed]]] = {}
    for one in sorted(timed, key=lambda one: one.ms):
        key = tuple(getattr(one.config, name) for name in shared)
        groups.setdefault(key, {which: [] for which in passes})[one.which].append(one)
    whole = [group for group in groups.values() if all(group.values())]
    return sorted(whole, key=lambda group: sum(fastest[0].ms for fastest in group.values()))


def _joined(forward: TileConfig, backward: TileConfig | None = None) -> TileConfig:
    """The forward's config, with the fields that are the backward's own from the backward's."""
    if backward is None:
        return forward
    names = [f.name for f in dataclasses.fields(forward) if f.name.startswith("backward_")]
    own: Change = {name: getattr(backward, name) for name in names}
    return dataclasses.replace(forward, **own)


def describe(config: TileConfig) -> str:
    """The fields that are not those of TileConfig()."""
    default = dataclasses.asdict(TileConfig())
    fields = dataclasses.asdict(config).items()
    changed = [f"{name}={value}" for name, value in fields if value != default[name]]
    return f"TileConfig({', '.join(changed)})"
