"""Influence: scores, top-k, self-influence: store against store, never the model again."""

from ooc_influence.influence.costs import (
    CheckpointMemory,
    ScoringMemory,
    TileMemory,
    written_tiles,
)
from ooc_influence.influence.engine import parse_groups
from ooc_influence.influence.groups import GroupInfluence, group_influence
from ooc_influence.influence.lists import top_tiles
from ooc_influence.influence.ranking import Ranking, TopInfluential
from ooc_influence.influence.request import ScoreRequest
from ooc_influence.influence.scores import influence_scores, module_influence, scores_of_rows
from ooc_influence.influence.select import Selection, select_rows
from ooc_influence.influence.self_scores import self_influence, self_scores
from ooc_influence.influence.sketch import sketch_store
from ooc_influence.influence.topk import find_top, top_influential
from ooc_influence.influence.unit_rows import rows_in_unit

__all__ = [
    "CheckpointMemory", "GroupInfluence", "Ranking", "ScoreRequest", "ScoringMemory", "Selection", "TileMemory",
    "TopInfluential", "find_top", "group_influence", "influence_scores", "module_influence", "parse_groups",
    "rows_in_unit", "scores_of_rows", "select_rows", "self_influence", "self_scores", "sketch_store",
    "top_influential", "top_tiles", "written_tiles",
]  # fmt: skip
