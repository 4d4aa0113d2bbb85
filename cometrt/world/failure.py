"""`Failure`: the reason why a world stopped. Its record is written into every control block."""

from __future__ import annotations

import dataclasses
import re

import numpy as np

from cometrt.errors import CometError, MismatchError, PeerTimeout

KINDS = ("", "raised", "mismatch", "timeout")  # most informative first
# The index of a flag in this tuple stands for it in records.
FLAGS = (
    "",
    "source_ready",
    "tile_filled",
    "tile_done",
    "partials_ready",
    "rendezvous",
    "reset",
    "close",
    "plan_step",
    "rail_tokens",
    "rail_partials",
)
_TEXT_BYTES = 480
SLOW = "a rank that is only slow needs a longer timeout_sec"  # part of every timeout message

_WAIT_FIELDS = ("waiter", "peer", "tile", "chunk", "epoch", "expected", "found")
FAILURE_NUMBERS = ("generation", "kind", "flag", *_WAIT_FIELDS)
failure_dtype = np.dtype(
    [(name, np.int64) for name in FAILURE_NUMBERS] + [("text", f"S{_TEXT_BYTES}")]
)


@dataclasses.dataclass(frozen=True)
class Failure:
    """One failure. Fields are those of PeerTimeout; -1 and "" if one does not apply."""

    kind: str
    waiter: int
    text: str
    flag: str = ""
    peer: int = -1
    tile: int = -1
    chunk: int = -1
    epoch: int = -1
    expected: int = -1
    found: int = -1

    def error(self, prefix: str = "") -> CometError:
        """The exception for it, a MismatchError or a PeerTimeout."""
        if self.kind == "mismatch":
            return MismatchError(prefix + self.text)
        error = PeerTimeout(prefix + self.text)
        for name in ("flag", *_WAIT_FIELDS):
            setattr(error, name, getattr(self, name))
        return error

    def for_peers(self) -> Failure:
        """The same with a text for other ranks: "rank 3" in place of "this rank"."""
        text = self.text.replace("this rank", f"rank {self.waiter}")
        return dataclasses.replace(self, text=text)

    def numbered_from(self, first_rank: int) -> Failure:
        """The same with the numbers of ranks raised: those of a node become those of all nodes."""
        if not first_rank:
            return self
        text = re.sub(r"\brank (\d+)", lambda m: f"rank {int(m[1]) + first_rank}", self.text)
        raised = {name: getattr(self, name) + first_rank for name in ("waiter", "peer")}
        raised = {name: rank for name, rank in raised.items() if rank >= first_rank}
        return dataclasses.replace(self, text=text, **raised)

    def write(self, record: np.void, generation: int) -> None:
        """Write the record. The generation, which makes it valid, is written last."""
        record["kind"] = KINDS.index(self.kind)
        record["flag"] = FLAGS.index(self.flag)
        for name in _WAIT_FIELDS:
            record[name] = getattr(self, name)
        text = self.text.encode()[:_TEXT_BYTES]
        record["text"] = text.decode(errors="ignore").encode()
        record["generation"] = generation

    @staticmethod
    def read(record: np.void) -> Failure:
        return Failure(
            kind=KINDS[int(record["kind"])],
            flag=FLAGS[int(record["flag"])],
            text=bytes(record["text"]).decode(errors="replace"),
            **{name: int(record[name]) for name in _WAIT_FIELDS},
        )


def failure_of(rank: int, error: BaseException, where: str, tile: int, epoch: int) -> Failure:
    """The Failure of a rank that raised `error`; `where`: " in ..." or ""."""
    if isinstance(error, CometError) and type(error) is not CometError:
        text = str(error)  # its text already names the rank
    elif isinstance(error, Exception):
        text = f"rank {rank} raised {type(error).__name__}{where}: {error}"
    else:  # SystemExit or KeyboardInterrupt, which the interrupted step has not caused
        detail = f": {error}" if str(error) else ""
        text = f"rank {rank} exited ({type(error).__name__}{detail})"
    return Failure("raised", rank, text, peer=rank, tile=tile, epoch=epoch)


def different_calls(epoch: int, rank: int, node: int) -> Failure:
    """The Failure of a rank whose call is not that of the same ranks on other nodes."""
    text = (
        f"ranks made different calls in epoch {epoch}: rank {rank}, on node {node}, and those of "
        f"the same place on other nodes"
    )
    return Failure("mismatch", rank, text, epoch=epoch)


def recorded(records: np.ndarray, generation: int, rank: int) -> Failure:
    """The most informative record of a generation, in the order of KINDS; of equal ones `rank`'s
    own."""
    failures = [
        Failure.read(record) for record in records if int(record["generation"]) >= generation
    ] or [Failure("timeout", rank, "a rank stopped the world without a reason")]
    return min(failures, key=lambda f: (KINDS.index(f.kind), f.waiter != rank, f.waiter))


@dataclasses.dataclass(frozen=True)
class WaitTarget:
    """The condition of a wait: `flag`, which rank `peer` sets, reaches `expected`."""

    flag: str
    peer: int
    expected: int
    epoch: int = -1
    tile: int = -1
    chunk: int = -1

    def expired(self, waiter: int, found: int, timeout_sec: float) -> Failure:
        """The Failure of a wait whose deadline has passed."""
        units = {"partials_ready": "token block", "plan_step": "step"}
        units |= dict.fromkeys(("rail_tokens", "rail_partials"), "part")
        unit = units.get(self.flag, "tile")
        where = "" if self.tile < 0 else f"[{unit} {self.tile}"
        where += "" if self.tile < 0 else f", chunk {self.chunk}]" if self.chunk >= 0 else "]"
        who = "itself" if self.peer == waiter else f"rank {self.peer}"
        when = "" if self.epoch < 0 else f" in epoch {self.epoch}"
        text = (
            f"rank {waiter} waited {timeout_sec:g} s for {self.flag}{where} from {who}{when}: "
            f"expected >= {self.expected}, found {found}; {SLOW}"
        )
        return self._failure(waiter, found, text)

    def lost(self, waiter: int, found: int, reason: str) -> Failure:
        """The Failure of a wait whose peer will never signal; `reason`: why."""
        return self._failure(waiter, found, f"{reason} ({self.flag} from rank {self.peer})")

    def _failure(self, waiter: int, found: int, text: str) -> Failure:
        return Failure(
            kind="timeout",
            waiter=waiter,
            text=text,
            flag=self.flag,
            peer=self.peer,
            tile=self.tile,
            chunk=self.chunk,
            epoch=self.epoch,
            expected=self.expected,
            found=found,
        )
