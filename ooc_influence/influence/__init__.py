"""Influence: scores, top-k, self-influence: store against store, never the model again."""

from ooc_influence.influence.groups import GroupInfluence, group_influence
from ooc_influence.influence.request import LEFT_ROWS
from ooc_influence.influence.scores import influence_scores, module_influence
from ooc_influence.influence.self_scores import self_influence, self_memory
from ooc_influence.influence.tiles import TileMemory, pass_need
from ooc_influence.influence.topk import Ranking, TopInfluential, top_costs, top_influential

__all__ = [
    "LEFT_ROWS", "GroupInfluence", "Ranking", "TileMemory", "TopInfluential", "group_influence", "influence_scores",
    "module_influence", "pass_need", "self_influence", "self_memory", "top_costs", "top_influential",
]  # fmt: skip
