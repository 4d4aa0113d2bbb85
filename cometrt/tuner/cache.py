"""Tuned configs in JSON files: the user's, which tune() writes, and the one that is shipped.

A file holds {"schema": SCHEMA, "entries": {str(Key): entry}}. An entry has "config", the fields of
a TileConfig, and "ms", the milliseconds of each pass that was tuned: of "forward", or of "forward"
and "backward". A file or an entry that cannot be used is ignored with one warning, so a cache never
keeps a layer from being made. Only tune() writes, and it replaces such a file.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from cometrt.kernels.compiler import cache_folder, replace_files
from cometrt.legality import check_layer
from cometrt.nodes.slices import RailSlices
from cometrt.plan import TileConfig
from cometrt.specs import Geometry, MoESpec
from cometrt.world import World
from cometrt.world.partitions import gpu_name, num_sms

_log = logging.getLogger("cometrt")

SCHEMA = 3  # raised when a field of TileConfig or Key changes its name or its meaning
SHIPPED = Path(__file__).with_name("defaults.json")
_MAX_TOKENS_LOG2 = 31  # of the largest token bucket


@dataclasses.dataclass(frozen=True)
class Key:
    """What a config is tuned for. Fields without a line here mean the same as in `MoESpec`.

    Args:
        gpu: the GPU's name.
        sms: SMs that one rank's kernels run on.
        ranks, ep, tp: W = ep * tp.
        tokens: the token bucket: max_tokens, rounded up to a power of two.
        link: name of the emulated link, or "none".
        nodes: N, among which the ranks are spread. The text of a key of one node leaves it out.
        wanted_only: whether only wanted tokens cross between nodes. The text leaves it out if not.
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
    nodes: int = 1
    wanted_only: bool = False

    def __str__(self) -> str:
        fields = dataclasses.asdict(self)
        if self.nodes == 1:
            del fields["nodes"]
        if not self.wanted_only:
            del fields["wanted_only"]
        return ", ".join(f"{name}={value}" for name, value in fields.items())


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
        nodes=world.nodes,
        wanted_only=RailSlices.of(spec, world.nodes, world.node_index).wanted_only,
    )


def cache_file() -> Path:
    return cache_folder() / "tuned.json"


def look_up(world: World, spec: MoESpec, mode: str | None) -> TileConfig | None:
    """The tuned config for a layer, or None: that of the nearest token bucket in the user's file or
    in the shipped one. Of equally near buckets the larger one counts, of equal ones the user's. A
    GPU without any takes what is shipped for another one with as many SMs.

    Only device="cuda" in mode "fused" (or None) is tuned; everything else gives None.
    """
    if world.device != "cuda" or mode not in (None, "fused"):
        return None
    files = [(path, read_entries(path)) for path in (cache_file(), SHIPPED)]
    if not any(entries for _, entries in files):
        return None
    own, shipped = key_of(world, spec), files[1:]
    wanted = [(key, files) for key in _nearest_buckets(own)]
    for gpu in sorted(_gpus(shipped[0][1]) - {own.gpu}):
        other = dataclasses.replace(own, gpu=gpu)
        wanted += [(key, shipped) for key in _nearest_buckets(other)]
    for key, where in wanted:
        for path, entries in where:
            config = _config_of(path, key, entries)
            try:
                if config is not None:
                    check_layer(spec, world.size, "cuda", "fused", config, world.nodes)
                    return config
            except ValueError as error:
                warn_once(f"{path}: the entry for {key} is ignored: {error}")
    return None


def _gpus(entries: Iterable[str]) -> set[str]:
    """The GPUs of all keys, by the driver's names."""
    return {key.split(", ")[0].removeprefix("gpu=") for key in entries}


def _nearest_buckets(key: Key) -> Iterator[Key]:
    """The key itself, then those of other token buckets, nearest first."""
    own = key.tokens.bit_length() - 1
    for log2 in sorted(range(_MAX_TOKENS_LOG2 + 1), key=lambda n: (abs(n - own), -n)):
        yield dataclasses.replace(key, tokens=1 << log2)


def load(path: Path, key: Key) -> TileConfig | None:
    """The config that the file has for the key; None if it has none."""
    return _config_of(path, key, read_entries(path))


def _config_of(path: Path, key: Key, entries: dict[str, Any]) -> TileConfig | None:
    entry = entries.get(str(key))
    if entry is None:
        return None
    try:
        return TileConfig(**entry["config"])
    except (KeyError, TypeError, ValueError) as error:
        warn_once(f"{path}: the entry for {key} is ignored: {error}")
        return None


def store(path: Path, key: Key, config: TileConfig, ms: dict[str, float], **facts: Any) -> None:
    """Write an entry into the file, which other processes may read at the same time.

    Args:
        ms: milliseconds of each pass that was tuned.
        facts: kept in the entry, for people.

    The file is replaced as a whole, so a reader never sees half of it. If two processes store at
    once, one of the two entries may be lost. A folder that cannot be written causes a warning.
    """
    entries = read_entries(path)
    rounded = {which: round(value, 4) for which, value in ms.items()}
    entries[str(key)] = {"config": dataclasses.asdict(config), "ms": rounded} | facts
    text = json.dumps({"schema": SCHEMA, "entries": entries}, indent=1) + "\n"
    try:
        replace_files(path.parent, {path.name: text.encode()})
    except OSError as error:
        _log.warning("%s: the tuned config is not stored: %s", path, error)


def read_entries(path: Path) -> dict[str, Any]:
    """Entry by str(Key); none if the file is not there or cannot be used."""
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:  # the last one of deep nesting
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
