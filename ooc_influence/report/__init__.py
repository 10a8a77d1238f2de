"""Showing results: facts of a store, text for a terminal, pages to look at, figures (:mod:`.plot`)."""

from ooc_influence.report.examples import Corpus, Examples, ImageFolder
from ooc_influence.report.facts import (
    Decision,
    curvature_states,
    describe,
    describe_scoring,
    describe_search,
    draw_images,
    layer_facts,
    read_decisions,
    store_facts,
    table,
)
from ooc_influence.report.lexical import ranks_of_lists
from ooc_influence.report.selection import SelectionFiles, check_kind, selection_counts, write_selection
from ooc_influence.report.tables import (
    RowTable,
    check_pairs,
    check_table,
    group_blocks,
    list_blocks,
    read_rows,
    row_blocks,
    selection_blocks,
    write_scores_table,
    write_table,
)
from ooc_influence.report.write import Report, Settings, open_report, save_report, write_report

__all__ = [
    "Corpus", "Decision", "Examples", "ImageFolder", "Report", "RowTable", "SelectionFiles", "Settings",
    "check_kind", "check_pairs", "check_table", "curvature_states", "describe", "describe_scoring",
    "describe_search", "draw_images", "group_blocks", "layer_facts", "list_blocks", "open_report", "ranks_of_lists",
    "read_decisions", "read_rows", "row_blocks", "save_report", "selection_blocks", "selection_counts",
    "store_facts", "table", "write_report", "write_scores_table", "write_selection", "write_table",
]  # fmt: skip
