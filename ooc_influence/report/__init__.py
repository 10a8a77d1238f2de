"""Showing results: text for a terminal."""

from ooc_influence.report.terminal import draw_images, table

__all__ = ["draw_images", "table"]
