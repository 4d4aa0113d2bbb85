"""Worlds: who the ranks are, how they meet, and the memory their peers can reach."""

from cometrt.world.base import World
from cometrt.world.mpi import connect
from cometrt.world.threads import spawn

__all__ = ["World", "connect", "spawn"]
