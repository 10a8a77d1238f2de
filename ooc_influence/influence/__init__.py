"""Influence: scores, top-k, self-influence: store against store, never the model again."""

from ooc_influence.influence.groups import GroupInfluence, group_influence
from ooc_influence.influence.scores import influence_scores, module_influence
from ooc_influence.influence.self_scores import self_influence
from ooc_influence.influence.topk import Ranking, TopInfluential, top_influential

__all__ = [
    "GroupInfluence", "Ranking", "TopInfluential", "group_influence", "influence_scores", "module_influence",
    "self_influence", "top_influential",
]  # fmt: skip
