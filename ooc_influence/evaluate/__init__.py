"""Measures of how well influence does what it is used for."""

from ooc_influence.evaluate.mislabel import auc, recall_at

__all__ = ["auc", "recall_at"]
