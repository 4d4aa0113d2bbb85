"""Tracers that disturb a rank: late, jittery, stalled or raising in the middle of a call."""

from __future__ import annotations

import contextlib
import random
import threading
import time


class Disturbed:
    """Calls ``disturb(role, name, tile)`` at the start of every span."""

    def __init__(self, disturb):
        self._disturb = disturb

    @contextlib.contextmanager
    def span(self, role, name, tile=-1, **_):
        self._disturb(role, name, tile)
        yield


def slow(seconds: float) -> Disturbed:
    """Sleeps at each piece of work."""
    return Disturbed(lambda role, name, tile: time.sleep(seconds))


def jitter(seed: int, seconds: float) -> Disturbed:
    """Sleeps up to `seconds` at random; both roles' threads share the generator."""
    rng, lock = random.Random(seed), threading.Lock()

    def disturb(role, name, tile):
        with lock:
            pause = rng.random() * seconds * (rng.random() < 0.3)
        time.sleep(pause)

    return Disturbed(disturb)


def at(wanted: str, action, *, tile: int | None = None, always: bool = False) -> Disturbed:
    """Runs `action` when a span of that name (and tile) begins: once, or always."""
    done = []

    def disturb(role, name, t):
        if name == wanted and (tile is None or t == tile) and (always or not done):
            done.append(True)
            action()

    return Disturbed(disturb)
