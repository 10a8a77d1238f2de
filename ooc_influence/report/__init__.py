"""Showing results: text for a terminal, facts of a store."""

from ooc_influence.report.facts import curvature_states, describe, layer_facts, store_facts
from ooc_influence.report.terminal import draw_images, table

__all__ = ["curvature_states", "describe", "draw_images", "layer_facts", "store_facts", "table"]
