"""Configs that tune() has found: one JSON file of the user's, and one that is shipped.

A file is {"format": _FORMAT, "entries": {str(Key): {"config": fields of a TileConfig, "ms": of a
forward}}}. What cannot be read, or used, is passed over with a warning: a cache is never the
reason why a layer cannot be made.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

from cometrt.kernels.compiler import cache_folder, replace_files
from cometrt.legality import check_layer
from cometrt.plan import TileConfig
from cometrt.specs import Geometry, MoESpec
from cometrt.world import World
from cometrt.world.partitions import gpu_name, num_sms

_log = logging.getLogger("cometrt")

_FORMAT = "cometrt tuner 1"
SHIPPED = Path(__file__).with_name("defaults.json")


@dataclasses.dataclass(frozen=True)
class Key:
    """What a config is tuned for; words as in `MoESpec`.

    Args:
        gpu: its name.
        sms: that a rank's kernels run on.
        ranks, ep, tp: W = ep * tp.
        tokens: max_tokens, rounded up to a power of two.
        link: name of the modelled link, or "none".
    """

    gpu: str
    sms: int
    ranks: int
    ep: int
    tp: int
    hidden: int
    intermediate: int
    num_experts: int
    topk: int
    tokens: int
    dtype: str
    link: str

    def __str__(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in dataclasses.asdict(self).items())


def key_of(world: World, spec: MoESpec) -> Key:
    """Of a layer on this rank's GPU."""
    return Key(
        gpu=gpu_name(),
        sms=num_sms(),
        ranks=world.size,
        ep=Geometry(spec, world.rank, world.size).ep,
        tp=spec.tp,
        hidden=spec.hidden,
        intermediate=spec.intermediate,
        num_experts=spec.num_experts,
        topk=spec.topk,
        tokens=1 << (spec.max_tokens - 1).bit_length(),
        dtype=spec.dtype,
        link=world.link.name if world.link else "none",
    )


def cache_file() -> Path:
    return cache_folder() / "tuned.json"


def look_up(world: World, spec: MoESpec, mode: str | None) -> TileConfig | None:
    """The config for this layer, from the user's file, else from the shipped one; None where
    neither has one, and for what is not tuned: device="host", another mode than "fused"."""
    if world.device != "cuda" or mode not in (None, "fused"):
        return None
    key = key_of(world, spec)
    for path in (cache_file(), SHIPPED):
        config = load(path, key)
        try:
            if config is not None:
                check_layer(spec, world.size, "cuda", "fused", config)
                return config
        except ValueError as error:
            _log.warning("%s: the config for %s is passed over: %s", path, key, error)
    return None


def load(path: Path, key: Key) -> TileConfig | None:
    """The config that the file has for the key, if any."""
    entry = _entries(path).get(str(key))
    if entry is None:
        return None
    try:
        return TileConfig(**entry["config"])
    except (KeyError, TypeError, ValueError) as error:  # of another version, or of someone's hand
        _log.warning("%s: the entry for %s is passed over: %s", path, key, error)
        return None


def store(path: Path, key: Key, config: TileConfig, ms: float) -> None:
    """Put it into the file, which others may be reading. Of two that store at once, one may be
    lost; the file is whole at all times. A folder that cannot be written to is a warning."""
    entries = _entries(path)
    entries[str(key)] = {"config": dataclasses.asdict(config), "ms": round(ms, 4)}
    text = json.dumps({"format": _FORMAT, "entries": entries}, indent=1) + "\n"
    try:
        replace_files(path.parent, {path.name: text.encode()})
    except OSError as error:
        _log.warning("%s: the tuned config is not kept: %s", path, error)


def _entries(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        _log.warning("%s is passed over: %s", path, error)
        return {}
    entries = found.get("entries") if isinstance(found, dict) else None
    if not isinstance(entries, dict) or found.get("format") != _FORMAT:
        _log.warning("%s is passed over: it is not a file of format %r", path, _FORMAT)
        return {}
    return entries
