"""The tuner's candidates, and its search: coordinate descent over the settings of a config."""

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
_MIN_GAIN = 0.01  # fraction of the time; a smaller gain counts as noise
_N_CHUNKS = (512, 1024, 2048)
_NUM_PHASES = (1, 2, 4)
_CTAS_PER_COMM_CTA = (2, 4, 8)  # every second, fourth or eighth CTA transfers rows

Change = dict[str, Any]  # fields of a TileConfig


def candidates(base: TileConfig, spec: MoESpec, size: int, sms: int) -> list[list[Change]]:
    """The changes to try for each setting; settings with a larger effect come first.

    Changes that are equivalent for this shape appear once. The result is equal on all ranks.

    Args:
        sms: SMs of the smallest rank, equal on all ranks.
    """
    n_chunks = [n_chunk for n_chunk in _N_CHUNKS if n_chunk < spec.hidden]
    orders: list[Change] = [{"order": "phases", "n_chunk": base.n_chunk}]
    orders += [{"order": "columns", "n_chunk": n_chunk} for n_chunk in n_chunks]
    phases = {  # of equivalent values the last one stays: the base's
        tuple(TileConfig(num_phases=num_phases).last_distances(size)): {"num_phases": num_phases}
        for num_phases in (*_NUM_PHASES, size, base.num_phases)
    }
    grid = sms // 2 * 2  # CTAs of the largest launch
    square = max(2, math.isqrt(sms // 2) // 2 * 2)  # the tiles in flight then form a square
    groups = [None, *dict.fromkeys((square, 2 * square, 4 * square))]
    comm_ctas = [None, *dict.fromkeys(max(1, grid // n) for n in _CTAS_PER_COMM_CTA)]
    return [
        orders,
        list(phases.values()),
        [{"raster_group": value} for value in groups],
        [{"combine_ctas": value} for value in comm_ctas],
        [{"dispatch_ctas": value} for value in comm_ctas],
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
    """Coordinate descent from `base`: change one setting at a time, and keep what is faster.

    Args:
        settings: of `candidates`. Changes that `legal` refuses are not timed.
        time: measures a config in milliseconds. If it is equal on all ranks, so is the result.

    Returns:
        the fastest config and its time: `base` if no other is faster by more than noise.
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
                if found[config] < (1 - _MIN_GAIN) * found[best]:
                    best = config
        if best == before:
            break
    return best, found[best]
