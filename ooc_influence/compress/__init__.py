"""Compressors: what is kept of a gradient."""

from ooc_influence.compress.dropout import Dropout
from ooc_influence.compress.eigenbasis import Eigenbasis, fit_eigenbasis
from ooc_influence.compress.gaussian import Gaussian
from ooc_influence.store import PilotMoments

Compressor = Dropout | Gaussian

__all__ = ["Compressor", "Dropout", "Eigenbasis", "Gaussian", "PilotMoments", "fit_eigenbasis"]
