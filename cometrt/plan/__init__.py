"""The plan of an exchange: row placement, tile orders, and what each rank pulls and pushes."""

from cometrt.plan.config import TileConfig
from cometrt.plan.tables import Plan, PlanShape

__all__ = ["Plan", "PlanShape", "TileConfig"]
