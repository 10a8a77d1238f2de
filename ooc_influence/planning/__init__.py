"""Planning: what every stage will take, before a byte is written."""

from ooc_influence.planning.plan import Plan, plan
from ooc_influence.planning.rates import Rates
from ooc_influence.planning.stages import Stage

__all__ = ["Plan", "Rates", "Stage", "plan"]
