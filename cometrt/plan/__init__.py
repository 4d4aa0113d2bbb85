"""Routing and tile reordering: who computes what, in which order, and where rows go."""

from cometrt.plan.config import TileConfig
from cometrt.plan.tables import Plan, PlanShape

__all__ = ["Plan", "PlanShape", "TileConfig"]
