"""Interchange: rows and scores exported to NumPy, Parquet and FAISS; rows of other tools imported to stores."""

from ooc_influence.interchange.export import export_rows, export_scores, find_scores
from ooc_influence.interchange.imported import import_rows
from ooc_influence.interchange.masks import MaskDescription, describe_mask

__all__ = ["MaskDescription", "describe_mask", "export_rows", "export_scores", "find_scores", "import_rows"]
