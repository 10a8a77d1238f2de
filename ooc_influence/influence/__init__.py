"""Influence: scores, top-k, self-influence: store against store, never the model again."""

from ooc_influence.influence.scores import influence_scores
from ooc_influence.influence.self_influence import self_influence
from ooc_influence.influence.top import Ranking, TopInfluential, top_influential

__all__ = ["Ranking", "TopInfluential", "influence_scores", "self_influence", "top_influential"]
