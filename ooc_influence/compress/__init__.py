"""Compressors: what is kept of a gradient."""

from ooc_influence.compress.dropout import Dropout

__all__ = ["Dropout"]
