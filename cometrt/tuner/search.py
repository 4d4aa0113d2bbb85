"""Candidates, and the way from one config to a faster one: one setting after the other."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable
from typing import Any

from cometrt.legality import check_layer
from cometrt.plan import TileConfig
from cometrt.specs import MoESpec

_log = logging.getLogger("cometrt")

_PASSES = 2
_GAIN = 0.01  # of the time: what changes less is taken for noise
_CHUNKS = (512, 1024, 2048)  # columns
_NUM_PHASES = (1, 2, 4)
_PARTS = (2, 4, 8)  # one CTA in so many moves rows

Change = dict[str, Any]  # fields of a TileConfig


def candidates(base: TileConfig, spec: MoESpec, size: int, sms: int) -> list[list[Change]]:
    """For each setting what to try, the same on all ranks if `sms`, of the smallest rank, is.

    Settings that move more come first. What would be the same as another for this shape is left
    out.
    """
    chunks = [chunk for chunk in _CHUNKS if chunk < spec.hidden]
    orders: list[Change] = [{"order": "phases", "n_chunk": base.n_chunk}]
    orders += [{"order": "columns", "n_chunk": chunk} for chunk in chunks]
    distances = {  # of equal ones the base's stays
        tuple(TileConfig(num_phases=num_phases).last_distances(size)): {"num_phases": num_phases}
        for num_phases in (*_NUM_PHASES, size, base.num_phases)
    }
    grid = sms // 2 * 2  # at most
    square = max(2, math.isqrt(sms // 2) // 2 * 2)  # about as many columns as rows at one time
    groups = [None, *dict.fromkeys((square, 2 * square, 4 * square))]
    movers = [None, *dict.fromkeys(max(1, grid // part) for part in _PARTS)]
    return [
        orders,
        list(distances.values()),
        [{"raster_group": value} for value in groups],
        [{"combine_ctas": value} for value in movers],
        [{"dispatch_ctas": value} for value in movers],
    ]


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
    settings: list[list[Change]],
    spec: MoESpec,
    size: int,
    time: Callable[[TileConfig], float],
) -> tuple[TileConfig, float]:
    """Coordinate descent from `base`: the best of each setting's candidates, all others kept.

    Args:
        settings: of `candidates`.
        time: milliseconds of a config, equal on all ranks; then so is what is chosen.

    Returns:
        the fastest config and its time; `base` unless another is faster by more than noise.
    """
    best, found = base, {base: time(base)}
    for _ in range(_PASSES):
        before = best
        for changes in settings:
            for change in changes:
                config = legal(best, change, spec, size)
                if config is None or config in found:
                    continue
                found[config] = time(config)
                _log.info("%.4f ms: %s", found[config], config)
                if found[config] < (1 - _GAIN) * found[best]:
                    best = config
        if best == before:
            break
    return best, found[best]
