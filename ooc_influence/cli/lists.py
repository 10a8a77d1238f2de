"""The commands that list rows: each query's strongest, of whole models or by module."""

from __future__ import annotations

import contextlib
import sys
from functools import partial
from itertools import zip_longest
from typing import Any

import click

from ooc_influence.cli import options, pairs
from ooc_influence.cli.help import SCORING, SectionedCommand
from ooc_influence.errors import InputError, counted
from ooc_influence.options import ScoreOptions, TopOptions

_reranking = options.several(
    click.option("--rerank", type=click.IntRange(min=1), metavar="N",
                 help="Compute the gradients of each query's N strongest rows again, and order them by exact scores."),
    click.option("--model", type=options.PATH, metavar="DIR|ID", help="With --rerank: the stores' model."),
    click.option("--data", type=options.PATH, metavar="FILE",
                 help="The documents of TRAIN: also show where a search for the query's words (BM25) has each row's "
                 "document. With --rerank and --model, by default where they were."),
    click.option("--query-data", type=options.PATH, metavar="FILE",
                 help="The documents of QUERY, with --data or --rerank. Default: where they were."),
    click.option("--recipe", type=options.PATH, metavar="FILE.py:FUNCTION",
                 help="With --rerank: the stores' recipe, in place of model and documents."),
    options.loading,
)  # fmt: skip
_RERANKING = ("rerank", "data", "query_data", "model", "recipe", *options.LOADING)


@click.command(
    cls=SectionedCommand, sections=SCORING,
    first=("count", "output", "curvature", "damping", "normalize", "data", "rerank", "model", "sketch", "also"),
)  # fmt: skip
@pairs.both
@click.option("--top", "count", type=int, default=10, show_default=True, help="How many of each.")
@options.table
@options.flags(TopOptions)
@pairs.pairing
@_reranking
def top(query: str, train: str, count: int, output: str | None, as_json: bool, **settings: Any) -> None:
    """Show each query's strongest proponents and opponents among the rows of TRAIN.

    With --rerank, in the order of exact scores: whole gradients of the strongest rows are computed again, with the
    model and the data that the stores were made of.
    """
    from ooc_influence import top_influential
    from ooc_influence.report import check_table, describe_scoring, describe_search, list_blocks, write_table

    target = None if output is None else check_table(output)
    again = {name: settings.pop(name) for name in _RERANKING}
    needless = [name for name in _RERANKING[3:] if options.given([name])]
    if again["rerank"] is None and needless:
        raise InputError("expected --rerank with a model or a recipe; received these alone: stored rows need neither")
    pair = pairs.paired(query, train, settings)
    lists = top_influential(**pair, top=count) if again["rerank"] is None else _reranked(pair, count, again)
    ranks = None if again["data"] is None else _lexical_ranks(lists, pair, again)
    if target is not None:
        write_table(target, list_blocks(lists, pairs.first(pair["train"]), again["data"]))

    def text() -> str:
        ends = [describe_scoring(lists.settings), describe_search(lists.search)]
        return "\n\n".join([_by_damping(lists, partial(_list_text, count, ranks)), "\n".join(filter(None, ends))])

    options.print_result(as_json, _with_ranks(lists.to_dict(), ranks), text)


def _reranked(pair: dict[str, Any], count: int, settings: dict[str, Any]) -> Any:
    """Return lists by exact scores, with the samples that both stores recorded or that are named."""
    from ooc_influence import rerank
    from ooc_influence.extract import choose_split, load_recipe, running

    if isinstance(pair["train"], list):
        raise InputError("expected --rerank or --also; received both: lists of one checkpoint's rows are ranked again")
    if (settings["model"] is None) == (settings["recipe"] is None):
        raise InputError("expected --model or --recipe with --rerank, to compute gradients with; received both or none")
    stores = options.open_train(pair["query"], None, "0"), pair["train"]
    with contextlib.redirect_stdout(sys.stderr), running(settings["recipe"]):
        if settings["recipe"] is not None:
            recipe = load_recipe(settings["recipe"])
            names = [(store.attrs.get("origin") or {}).get("split") for store in stores]
            model, loss = recipe.model, recipe.per_sample_loss
            samples: Any = tuple(choose_split(recipe, name).batches for name in names)
        else:
            from ooc_influence import hf

            loaded = hf.load(settings["model"], device=pair["device"], **options.pop_loading(settings))
            data = (settings["query_data"], settings["data"])
            jobs = [hf.job_of(store, loaded, path) for store, path in zip(stores, data, strict=True)]
            model, loss, samples = loaded.model, jobs[1].per_sample_loss, tuple(job.batches for job in jobs)
        more: Any = {name: value for name, value in pair.items() if name not in ("query", "train")}
        return rerank(*stores, model, loss, samples, settings["rerank"], count, **more)


def _by_damping(lists: Any, text: Any) -> str:
    if lists.dampings is None:
        return str(text(lists))
    levels = (lists.at(number) for number in range(lists.dampings))
    return "\n\n".join(f"damping {level.damping}\n\n{text(level)}" for level in levels)


def _lexical_ranks(lists: Any, pair: dict[str, Any], settings: dict[str, Any]) -> Any:
    """Return the BM25 ranks of the rows in lists, query by query, by row."""
    from ooc_influence.report import Corpus, ranks_of_lists

    if isinstance(pair["train"], list) or pair["average_queries"] is not False:
        raise InputError("expected single queries of one checkpoint with --data; received means of them")
    query = options.open_train(pair["query"], None, "0")
    asked = settings["query_data"] or (query.attrs.get("origin") or {}).get("data")
    if asked is None:
        raise InputError(f"expected --query-data with --data; received none, and {query.path} records no documents")
    corpora = Corpus.of(asked), Corpus.of(settings["data"])
    return ranks_of_lists(lists, query, pair["train"], *corpora, pair["progress"])


def _with_ranks(facts: Any, ranks: Any) -> Any:
    """Return the JSON of lists with the BM25 rank of each entry."""
    if ranks is not None:
        for level in facts.get("by_damping", [facts]):
            for number, query in enumerate(level["queries"]):
                for entry in (*query["proponents"], *query["opponents"]):
                    entry["bm25_rank"] = ranks[number].get(entry["row"])
    return facts


def _list_text(count: int, ranks: Any, lists: Any) -> str:
    from ooc_influence.report import table

    parts = []
    for number, name in enumerate(lists.query_ids.tolist()):
        ranked = lists.of_query(number)
        of_query = None if ranks is None else ranks[number]
        sides = [_shown(getattr(lists, side), number, entries, of_query) for side, entries in ranked.items()]
        header = ("score", *(("stored",) if lists.proponents.stored is not None else ()), *(("BM25",) if ranks else ()))
        pairs = zip_longest(*sides, fillvalue=("",) * (1 + len(header)))
        lines = [table(("proponent", *header, "opponent", *header), [left + right for left, right in pairs])]
        short = [
            f"only {counted(len(entries), kind[:-1])}" if entries else f"no {kind}"
            for kind, entries in ranked.items()
            if len(entries) < count
        ]
        if short:
            lines.append(f"{', '.join(short)}: no other row has a score of that sign")
        outside = lists.outside_share[number]
        title = f"query {name}" + (f" ({outside:.0%} outside the training spectrum)" if outside >= 0.005 else "")
        parts.append("\n".join([title, *(["dropped"] if (lists.proponents.rows[number] < 0).all() else lines)]))
    return "\n\n".join(parts)


def _shown(ranking: Any, number: int, entries: list[Any], ranks: Any) -> list[tuple[Any, ...]]:
    """Return a list's ids and scores, with those of stored rows where it was ranked again, and with BM25's ranks."""
    shown = [entry[1:] for entry in entries]
    rows = [entry[0] for entry in entries]
    stored = ranking.stored_scores(number)
    if stored is not None:
        shown = [(*line, stored[row]) for line, row in zip(shown, rows, strict=True)]
    if ranks is not None:
        shown = [(*line, ranks.get(row) or "no word") for line, row in zip(shown, rows, strict=True)]
    return shown


@click.command(
    cls=SectionedCommand, sections=SCORING,
    first=("count", "out", "curvature", "damping", "normalize"),
)  # fmt: skip
@pairs.both
@click.option("--top", "count", type=int, help="How many of each, by module.")
@click.option("--out", type=options.PATH, metavar="PATH",
              help="Write the Zarr array (modules, queries, rows) there instead of listing rows.")  # fmt: skip
@options.flags(ScoreOptions)
@pairs.pairing
def modules(query: str, train: str, count: int | None, out: str | None, as_json: bool, **settings: Any) -> None:
    """Show or write the part of each score that each module contributes; the parts add up to the score."""
    from ooc_influence import module_influence
    from ooc_influence.report import describe_scoring

    influence: Any = module_influence(**pairs.paired(query, train, settings), top=count, out=out)
    if out is not None:
        pairs.print_scores(influence, out, as_json)
        return
    assert count is not None  # the call refuses neither
    text = partial(_list_text, count, None)

    def lines() -> str:
        parts = [f"module {name}\n\n{_by_damping(lists, text)}" for name, lists in influence.items()]
        return "\n\n".join([*parts, *{describe_scoring(lists.settings) for lists in influence.values()}])

    options.print_result(as_json, {name: lists.to_dict() for name, lists in influence.items()}, lines)
