"""Extraction: the torch models' side. Taps on layers, sampled per-sample gradients, the loop that fills a store."""

from ooc_influence.extract.batching import Batching, BudgetBatches
from ooc_influence.extract.initialise import init_store, row_types
from ooc_influence.extract.loop import extract_gradients
from ooc_influence.extract.losses import cross_entropy, token_cross_entropy
from ooc_influence.extract.metric import AdamMetric
from ooc_influence.extract.recipe import Recipe, Split
from ooc_influence.extract.shards import extract_shards

__all__ = [
    "AdamMetric", "Batching", "BudgetBatches", "Recipe", "Split", "cross_entropy", "extract_gradients",
    "extract_shards", "init_store", "row_types", "token_cross_entropy",
]  # fmt: skip
