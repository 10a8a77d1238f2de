"""How commands show their help: options in sections, the most used first; commands by what they are for, in sentences.

A long command names the options that most calls need, which come first, and the sections that the others fall into.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import click

Sections = Mapping[str, Sequence[str]]

_FIELDS = (
    "text", "prompt", "completion", "messages", "chat", "turns", "tools", "chosen", "rejected", "advantage",
    "input_ids", "input_labels", "doc_ids", "label", "id", "keep",
)  # fmt: skip
_LOADING = ("task", "adapter", "tokenizer", "revision", "trust_remote_code", "allow_pickle", "model_dtype")
_CLUSTER = ("scheduler", "scheduler_file")

EXTRACTION: Sections = {
    "Model": ("recipe_name", "model", *_LOADING, "modules", "fallback", "checkpoints", "adam", "check_model"),
    "Documents": ("data", "queries", "split", "config", "streaming", "documents", "sample", "on_missing"),
    "Fields of documents": _FIELDS,
    "Loss": ("reduction", "preference", "beta", "reference", "labels", "label_seed", "draws", "output", "weights",
             "sign_seed"),
    "Compression": ("like", "compressor", "row_bytes", "k", "basis", "basis_damping", "damping_scope", "sampling",
                    "dims", "pilot", "basis_weights", "rank_out", "rank_in", "nonzeros", "seed", "dtype", "codec",
                    "keep_factors"),
    "Answer": ("damping", "top", "token_rows"),
    "Batches and memory": ("max_length", "tokens", "batch_size", "device", "memory"),
    "Checks": ("rows", "dampings", "check_gradients", "on_nonfinite"),
    "Several processes": ("shards", "shard", *_CLUSTER),
}  # fmt: skip
SCORING: Sections = {
    "Result": ("out", "output", "count", "top", "suspects", "bm25", "title", "seed", "no_controls"),
    "Queries and rows": ("query", "queries", "keep", "also", "rows", "average_queries", "average_by", "minus", "by",
                         "tasks", "unit", "quota", "redundancy", "drop"),
    "Scores": ("curvature", "damping", "damping_mode", "dot", "normalize", "combine", "scores_dtype"),
    "Search": ("sketch", "recall", "prove", "product", "rerank", "resume"),
    "Model": ("model", "recipe", "typed", *_LOADING, "token_rows"),
    "Documents": ("data", "query_data", "text", "label", "source", "id", "id_field", "image", "images",
                  "query_images"),
    "Server": ("host", "port", "no_token"),
    "Machine": ("device", "workers", "memory", *_CLUSTER, "cache", "cache_size"),
}  # fmt: skip
VERIFICATION: Sections = {
    "Runs": ("controls", "processes"),
    "Training": ("data", "query_data", *_LOADING, "rank", "alpha", "targets", "learning_rate", "batch_size"),
    "Scores": SCORING["Scores"],
    "Machine": ("device", "workers", "memory"),
}

COMMANDS: Sections = {
    "From model to answer": ("trace", "demo"),
    "Gradients": ("extract", "init", "check", "plan"),
    "Influence": ("fisher", "trajectory", "top", "score", "self-influence", "groups", "modules", "select",
                  "verify-influence"),
    "Pages": ("report", "serve"),
    "Stores": ("info", "ids", "verify", "drop", "compact", "merge", "reduce", "sketch", "rewrite", "average",
               "upgrade"),
    "Other programs": ("export", "import"),
    "Clusters": ("cluster-script",),
}  # fmt: skip
_MOST_USED, _OTHER = "Most used", "Other options"


class SectionedCommand(click.Command):
    """A command whose help has sections.

    Parameters
    ----------
    first : sequence of str
        The options, by the names of their parameters, that come first.
    sections : mapping of str to sequence of str
        The other ones by section. Options in none come last.
    """

    def __init__(self, *arguments: Any, first: Sequence[str] = (), sections: Sections, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.first, self.sections = first, sections

    def parts(self, ctx: click.Context) -> Iterator[tuple[str, list[click.Option]]]:
        """Yield the sections that have options, with these."""
        left = {each.name: each for each in self.get_params(ctx) if isinstance(each, click.Option)}
        for title, names in {_MOST_USED: self.first, **self.sections, _OTHER: tuple(left)}.items():
            present = [left.pop(name) for name in names if name in left]
            if present:
                yield title, present

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the sections."""
        for title, options in self.parts(ctx):
            with formatter.section(title):
                formatter.write_dl([record for each in options if (record := each.get_help_record(ctx))])


class SectionedGroup(click.Group):
    """The commands by what they are for, each with the whole first sentence of its help."""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the sections."""
        left = dict(self.commands)
        for title, names in {**COMMANDS, "Other commands": tuple(left)}.items():
            lines = [(name, left.pop(name).get_short_help_str(limit=1000)) for name in names if name in left]
            if lines:
                with formatter.section(title):
                    formatter.write_dl(lines)
