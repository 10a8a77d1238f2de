"""Extraction: the torch models' side. Taps on layers, sampled per-sample gradients, the loop that fills a store."""

from ooc_influence.extract.data import Batching, BudgetBatches
from ooc_influence.extract.extraction import extract_gradients, init_store, row_types
from ooc_influence.extract.losses import cross_entropy, token_cross_entropy
from ooc_influence.extract.metric import AdamMetric
from ooc_influence.extract.recipe import Recipe, Split, extract_shards

__all__ = [
    "AdamMetric", "Batching", "BudgetBatches", "Recipe", "Split", "cross_entropy", "extract_gradients",
    "extract_shards", "init_store", "row_types", "token_cross_entropy",
]  # fmt: skip
