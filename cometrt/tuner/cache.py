"""Tuned configs in JSON files: the user's, which tune() writes, and the one that is shipped.

A file holds {"schema": SCHEMA, "entries": {str(Key): {"config": fields of a TileConfig, "ms":
milliseconds of a forward}}}. A file or an entry that cannot be used is ignored with one warning,
so a cache never keeps a layer from being made. Only tune() writes, and it replaces such a file.
"""

from __future__ import annotations

import dataclasses
import functools
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

SCHEMA = 2  # raised when a field of TileConfig or Key changes its name or its meaning
SHIPPED = Path(__file__).with_name("defaults.json")


@dataclasses.dataclass(frozen=True)
class Key:
    """What a config is tuned for. Fields without a line here mean the same as in `MoESpec`.

    Args:
        gpu: the GPU's name.
        sms: SMs that one rank's kernels run on.
        ranks, ep, tp: W = ep * tp.
        tokens: max_tokens, rounded up to a power of two.
        link: name of the emulated link, or "none".
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
    """The key of a layer on this rank's GPU."""
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
    """The tuned config for a layer: from the user's file, else from the shipped file, else None.

    Only device="cuda" in mode "fused" (or None) is tuned; everything else gives None.
    """
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
            warn_once(f"{path}: the entry for {key} is ignored: {error}")
    return None


def load(path: Path, key: Key) -> TileConfig | None:
    """The config that the file has for the key; None if it has none."""
    entry = _read_entries(path).get(str(key))
    if entry is None:
        return None
    try:
        return TileConfig(**entry["config"])
    except (KeyError, TypeError, ValueError) as error:
        warn_once(f"{path}: the entry for {key} is ignored: {error}")
        return None


def store(path: Path, key: Key, config: TileConfig, ms: float) -> None:
    """Write the config into the file, which other processes may read at the same time.

    The file is replaced as a whole, so a reader never sees half of it. If two processes store at
    once, one of the two entries may be lost. A folder that cannot be written causes a warning.
    """
    entries = _read_entries(path)
    entries[str(key)] = {"config": dataclasses.asdict(config), "ms": round(ms, 4)}
    text = json.dumps({"schema": SCHEMA, "entries": entries}, indent=1) + "\n"
    try:
        replace_files(path.parent, {path.name: text.encode()})
    except OSError as error:
        _log.warning("%s: the tuned config is not stored: %s", path, error)


def _read_entries(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        warn_once(f"{path} is ignored: {error}")
        return {}
    schema = found.get("schema") if isinstance(found, dict) else None
    if schema != SCHEMA or not isinstance(found.get("entries"), dict):
        warn_once(
            f"{path} is ignored: schema must be {SCHEMA} (got {schema!r}); tune() rewrites it"
        )
        return {}
    return dict(found["entries"])


@functools.cache
def warn_once(text: str) -> None:
    """Log a warning, the first time that this process has it."""
    _log.warning(text)
