"""Worlds: ranks, their collectives and waits, and the memory that they share."""

from cometrt.world.base import World
from cometrt.world.connection import connect
from cometrt.world.threads import spawn

__all__ = ["World", "connect", "spawn"]
