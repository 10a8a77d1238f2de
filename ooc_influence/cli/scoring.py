"""The commands that fit a curvature and score train rows with it: results as text or JSON, in a file, or as pages."""

from __future__ import annotations

import contextlib
import signal
import sys
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import click

from ooc_influence.cli import options
from ooc_influence.errors import InputError, counted, writing
from ooc_influence.options import (
    DocumentOptions,
    FisherOptions,
    ListOptions,
    LoadingOptions,
    ReportOptions,
    ScoreOptions,
    SelectOptions,
    SelfInfluenceOptions,
    TopOptions,
)

_pair = options.several(click.argument("query", type=options.PATH), click.argument("train", type=options.PATH))
_pairing = options.several(
    click.option("--also", nargs=2, multiple=True, type=options.PATH, metavar="QUERY TRAIN",
                 help="Another checkpoint's stores of the same rows; scores are averaged. May be repeated."),
    options.dot,
    click.option("--average-by", metavar="COLUMN", help="One query for each value of a column of QUERY."),
    options.where,
)  # fmt: skip


def _parse_rows(_: click.Context, __: click.Parameter, value: str | None) -> slice | None:
    """Return A:B as a slice; either may be missing."""
    if value is None:
        return None
    first, colon, last = value.partition(":")
    try:
        if not colon:
            raise ValueError
        return slice(int(first) if first else None, int(last) if last else None)
    except ValueError:
        raise click.BadParameter(f"expected A:B; received {value}") from None


@click.command()
@click.argument("train", type=options.PATH)
@click.option("--method", type=click.Choice(["auto", "primal", "dual", "kronecker"]), default="auto",
              show_default=True,
              help="primal: the Fisher matrix; dual: the rows' Gram matrix, for fewer rows than columns; kronecker: "
              "second moments in a Kronecker basis; auto: what suits TRAIN and costs least.")  # fmt: skip
@options.flags(FisherOptions, rows={"callback": _parse_rows})
@options.where
def fisher(train: str, cache: str | None, cache_size: str, as_json: bool, **settings: Any) -> None:
    """Fit the curvature of TRAIN, by its Fisher matrix or what replaces it, and save it there."""
    from ooc_influence import fit_curvature

    store = options.open_train(train, cache, cache_size)
    curvature = fit_curvature(store, progress=True, **settings)
    options.print_result(as_json, curvature.facts(), lambda: _told(curvature))


def _told(curvature: Any) -> str:
    """Return a curvature in words: what it is, and where none was needed."""
    if curvature.kind != "kronecker":
        return repr(curvature)
    return f"{curvature!r}\nThe basis has such a curvature without any fit: --curvature kronecker."


@click.command()
@_pair
@click.option("--out", required=True, type=options.PATH, metavar="PATH",
              help="The Zarr array (queries, rows) to write, or to continue.")  # fmt: skip
@options.table
@options.flags(ScoreOptions)
@_pairing
def score(query: str, train: str, out: str, output: str | None, as_json: bool, **settings: Any) -> None:
    """Write the influence of every row of TRAIN on every query of QUERY to a Zarr array.

    Chunks that are written stay: the same command continues with those that are missing.
    """
    from ooc_influence import influence_scores

    pair = _paired(query, train, settings)
    target = None if output is None else _pairs_table(output, query, pair)
    scores: Any = influence_scores(**pair, out=out)
    if target is not None:
        from ooc_influence.report import write_scores_table

        write_scores_table(target, scores, options.open_train(query, None, "0"), _first(pair["train"]))
    _print_scores(scores, out, as_json)


def _pairs_table(output: str, query: str, pair: dict[str, Any]) -> Path:
    """Return where to write scores as lines, checked: that there are not too many."""
    from ooc_influence.influence import parse_groups
    from ooc_influence.report import check_pairs, check_table

    if isinstance(pair["damping"], list):
        raise InputError("expected one --damping with --output; received several: leave --output out, or give one")
    average, store = pair["average_queries"], options.open_train(query, None, "0")
    queries = store.n if average is False else 1 if average is True else len(parse_groups(average, store).names)
    check_pairs(queries, _first(pair["train"]).n)
    return check_table(output)


def _first(stores: Any) -> Any:
    """Return the store, or the first of several checkpoints' stores, which have the same rows."""
    return stores[0] if isinstance(stores, list) else stores


def _print_scores(scores: Any, out: str, as_json: bool) -> None:
    sizes = dict(zip(scores.attrs["dims"], scores.shape, strict=True))
    facts = {"scores": out, "queries": sizes["query"], "rows": sizes["train"], "damping": scores.attrs["damping"]}
    facts |= {"normalize": scores.attrs["normalize"], "outside_share": scores.attrs["outside_share"]}
    facts |= {"modules": scores.attrs["modules"]} if "module" in sizes else {}
    more = "".join(f"{sizes[name]} {label} x " for name, label in (("damping", "dampings"), ("module", "modules"))
                   if name in sizes)  # fmt: skip
    size = f"{counted(sizes['query'], 'query', 'queries')} x {counted(sizes['train'], 'row')}"
    scale = scores.attrs.get("scale_factor")
    size += "" if scale is None else f", {scores.dtype}, times {scale:g}"
    facts |= {"dtype": str(scores.dtype), "scale_factor": scale}
    from ooc_influence.report import describe_scoring

    settings = {name: scores.attrs[name] for name in ("curvature", "damping")}
    settings |= {"damping_mode": "absolute", "normalize": scores.attrs["normalize"] or "none"}
    settings |= {"minus": scores.attrs["minus"]} if "minus" in scores.attrs else {}
    options.print_result(as_json, facts, lambda: f"{out}: {more}{size}\n{describe_scoring(settings)}")


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
    options.flags(LoadingOptions, without=("task", "allow_pickle")),
    options.flags(DocumentOptions, only=("model_dtype",)),
)  # fmt: skip
_LOADING = ("adapter", "tokenizer", "revision", "trust_remote_code")
_RERANKING = ("rerank", "data", "query_data", "model", "recipe", "model_dtype", *_LOADING)


@click.command()
@_pair
@click.option("--top", "count", type=int, default=10, show_default=True, help="How many of each.")
@options.table
@options.flags(TopOptions)
@_pairing
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
    pair = _paired(query, train, settings)
    lists = top_influential(**pair, top=count) if again["rerank"] is None else _reranked(pair, count, again)
    ranks = None if again["data"] is None else _lexical_ranks(lists, pair, again)
    if target is not None:
        write_table(target, list_blocks(lists, _first(pair["train"]), again["data"]))

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

            loading = {name: settings[name] for name in _LOADING}
            loaded = hf.load(settings["model"], dtype=settings["model_dtype"], device=pair["device"], **loading)
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


@click.command("self-influence")
@click.argument("train", type=options.PATH)
@click.option("--also", multiple=True, type=options.PATH, metavar="TRAIN",
              help="Another checkpoint's store; values are averaged.")  # fmt: skip
@click.option("--top", "count", type=click.IntRange(min=1), default=20, show_default=True,
              help="How many rows to show.")  # fmt: skip
@click.option("--out", type=click.Path(dir_okay=False), help="Write all values to this .npy file.")
@options.table
@options.flags(SelfInfluenceOptions)
@options.dot
@options.where
def self_influence_command(
    train: str,
    also: tuple[str, ...],
    count: int,
    out: str | None,
    output: str | None,
    as_json: bool,
    **settings: Any,
) -> None:
    """Show the rows of TRAIN with the largest self-influence: candidates for wrong labels."""
    import numpy as np

    from ooc_influence.influence import ScoreRequest, self_scores
    from ooc_influence.options import complete, select
    from ooc_influence.report import check_table, describe_scoring, table
    from ooc_influence.store import check_writable

    target = None if output is None else check_table(output)
    if out is not None:
        check_writable(Path(out), missing_folders=False)
    arguments = _arguments((train, *also), settings)
    asked = complete(SelfInfluenceOptions, select(SelfInfluenceOptions, arguments))
    scoring = ScoreRequest.open(None, arguments["train"], asked)
    values = self_scores(scoring, asked)
    if out is not None:
        with writing(f"to write {out}"), Path(out).open("wb") as file:
            np.save(file, values)
    store = _first(arguments["train"])
    levels, orders = [], []
    for level in np.atleast_2d(values):
        order = np.argsort(np.where(np.isnan(level), np.inf, -level), kind="stable")[:count]
        order = order[~np.isnan(level[order])]
        orders.append(order)
        columns = (order.tolist(), store.ids(order).tolist(), level[order].tolist())
        lines = zip(*columns, strict=True)
        levels.append([{"row": row, "id": name, "self_influence": value} for row, name, value in lines])
    if target is not None:
        _write_self_influence(target, store, orders, np.atleast_2d(values), arguments["damping"])
    tables = [table(("row", "id", "self-influence"), [tuple(row.values()) for row in rows]) for rows in levels]
    facts: dict[str, Any] = {"n": store.n, "rows": levels[0], "settings": scoring.settings}
    if values.ndim == 2:
        facts = {"n": store.n, "damping": arguments["damping"], "by_damping": levels, "settings": scoring.settings}
        tables = [f"damping {value}\n\n{text}" for value, text in zip(arguments["damping"], tables, strict=True)]
    options.print_result(as_json, facts, lambda: "\n\n".join([*tables, describe_scoring(scoring.settings)]))


def _write_self_influence(target: Path, store: Any, orders: list[Any], values: Any, dampings: Any) -> None:
    """Write the rows listed to a table, those of one damping after the other."""
    import numpy as np

    from ooc_influence.report import RowTable, row_blocks, write_table

    rows = RowTable(store, None, np.concatenate(orders))
    several = isinstance(dampings, list)

    def blocks() -> Any:
        for number, (order, level) in enumerate(zip(orders, values, strict=True)):
            more = {"damping": np.full(len(order), dampings[number])} if several else {}
            yield from row_blocks(rows, order, {"self_influence": level[order], **more})

    write_table(target, blocks())


@click.command()
@_pair
@click.option("--by", required=True, metavar="COLUMN", help="The column of TRAIN whose values are groups, or 'id'.")
@click.option("--top", "count", type=click.IntRange(min=1), default=20, show_default=True,
              help="How many groups of each query to show, largest sums first.")  # fmt: skip
@options.table
@options.flags(ListOptions)
@_pairing
def groups(
    query: str, train: str, by: str, count: int, output: str | None, as_json: bool, **settings: Any
) -> None:  # fmt: skip
    """Show the influence of groups of rows of TRAIN (labels, sources, documents) on each query: sums and means."""
    import numpy as np

    from ooc_influence import group_influence
    from ooc_influence.report import check_table, describe_scoring, group_blocks, table, write_table

    target = None if output is None else check_table(output)
    influence = group_influence(**_paired(query, train, settings), by=by)
    if target is not None:
        write_table(target, group_blocks(influence))

    def text() -> str:
        parts = []
        several = influence.sums.ndim == 3
        for level, sums in enumerate(influence.sums if several else influence.sums[None]):
            means = influence.means[level] if several else influence.means
            title = f"damping {influence.damping[level]}, " if several else ""
            for number, name in enumerate(influence.query_ids.tolist()):
                order = np.argsort(-sums[number], kind="stable")[:count]
                columns = (influence.names[order], influence.counts[order], sums[number][order], means[number][order])
                lines = list(zip(*columns, strict=True))
                parts.append(f"{title}query {name}\n{table((by, 'rows', 'sum', 'mean'), lines)}")
        return "\n\n".join([*parts, describe_scoring(influence.settings)])

    options.print_result(as_json, influence.to_dict(), text)


@click.command()
@_pair
@click.option("--top", "count", type=int, help="How many of each, by module.")
@click.option("--out", type=options.PATH, metavar="PATH",
              help="Instead: the Zarr array (modules, queries, rows) to write.")  # fmt: skip
@options.flags(ScoreOptions)
@_pairing
def modules(query: str, train: str, count: int | None, out: str | None, as_json: bool, **settings: Any) -> None:
    """Show or write the part of each score that each module contributes; the parts add up to the score."""
    from ooc_influence import module_influence
    from ooc_influence.report import describe_scoring

    influence: Any = module_influence(**_paired(query, train, settings), top=count, out=out)
    if out is not None:
        _print_scores(influence, out, as_json)
        return
    assert count is not None  # the call refuses neither
    text = partial(_list_text, count, None)

    def lines() -> str:
        parts = [f"module {name}\n\n{_by_damping(lists, text)}" for name, lists in influence.items()]
        return "\n\n".join([*parts, *{describe_scoring(lists.settings) for lists in influence.values()}])

    options.print_result(as_json, {name: lists.to_dict() for name, lists in influence.items()}, lines)


@click.command()
@click.argument("train", type=options.PATH)
@click.option("--queries", "query", required=True, type=options.PATH, metavar="Q",
              help="Query store of the targets: of a validation set, not the test set.")  # fmt: skip
@click.option("--keep", required=True, metavar="SHARE|N",
              help="How much of TRAIN to keep: 10%, 0.1 or a number of rows (or documents).")  # fmt: skip
@click.option("--out", required=True, type=options.PATH, metavar="FILE",
              help="What to write: the rows' documents (.jsonl, .parquet), or their ids (.txt).")  # fmt: skip
@click.option("--data", type=options.PATH, metavar="FILE",
              help="The documents of TRAIN. Default: those it was made from.")  # fmt: skip
@click.option("--query-data", type=options.PATH, metavar="FILE", help="The same of the targets.")
@click.option("--id", "id_field", metavar="FIELD",
              help="Field of --data with the ids that TRAIN has. Default: as extracted, or 'id'.")  # fmt: skip
@click.option("--quota", multiple=True, metavar="COLUMN[:VALUE]=SHARE",
              help="Share of what is kept that a value of a column of TRAIN may have, each or this one; "
              "COLUMN=proportional: as much as of TRAIN. May be repeated, for values of one column.")  # fmt: skip
@click.option("--by", multiple=True, metavar="COLUMN",
              help="Count what is kept by this column; may be repeated. Default: source and label.")  # fmt: skip
@click.option("--no-controls", is_flag=True,
              help="Do not write a random and a BM25 choice of the same size beside it.")  # fmt: skip
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the random choice.")
@options.table
@options.flags(SelectOptions)
@click.option("--also", nargs=2, multiple=True, type=options.PATH, metavar="QUERY TRAIN",
              help="Another checkpoint's stores of the same rows; scores are averaged. May be repeated.")  # fmt: skip
@options.dot
@options.where
def select(
    train: str, query: str, keep: str, out: str, output: str | None, as_json: bool, **settings: Any
) -> None:  # fmt: skip
    """Choose the rows of TRAIN to keep for some targets, and write the documents they were made from.

    Documents are copied as they are, in their order. Beside them: as many chosen at random, and by BM25.
    """
    from ooc_influence import select_rows
    from ooc_influence.report import (
        Corpus,
        check_kind,
        check_table,
        selection_blocks,
        selection_counts,
        write_selection,
        write_table,
    )

    check_kind(Path(out))
    target = None if output is None else check_table(output)
    also, by, seed = settings.pop("also"), settings.pop("by"), settings.pop("seed")
    data, query_data, id_field = (settings.pop(name) for name in ("data", "query_data", "id_field"))
    seed = None if settings.pop("no_controls") else seed
    if id_field is not None and data is None:
        raise InputError("expected --data with --id; received none: it names a field of these documents")
    settings["quotas"] = _parse_quotas(settings.pop("quota"))
    arguments = _arguments((train, *(pair[1] for pair in also)), settings)
    first = _first(arguments["train"])
    if arguments["unit"] is None and first.layout.columns.get("document") == "int64":
        arguments["unit"] = "document"
    queries = [query, *(pair[0] for pair in also)] if also else query
    selection = select_rows(queries, keep=keep, **arguments)
    targets = options.open_train(query, None, "0")
    corpus = None if data is None else Corpus(data, id=id_field)
    written = write_selection(
        selection, targets, first, out, data=corpus,
        query_data=query_data, seed=seed, progress=arguments["progress"],
    )  # fmt: skip
    if target is not None:
        write_table(target, selection_blocks(selection, first, corpus))
    others = {name: control.rows for name, control in written.controls.items()}
    facts = {
        "out": out, "kept": len(selection.rows), "candidates": len(selection.candidates.rows),
        "kept_rows": int(selection.kept.sum()), "documents": written.documents,
        "controls": {name: str(control.path) for name, control in written.controls.items()},
        "missing": written.missing, "by": selection_counts(selection, first, by or None, others),
        "settings": selection.settings,
    }  # fmt: skip
    options.print_result(as_json, facts, lambda: _selection_text(facts))


def _parse_quotas(quotas: tuple[str, ...]) -> Any:
    """Return COLUMN=SHARE and COLUMN:VALUE=SHARE as the library takes them."""
    found: dict[str, Any] = {}
    for text in quotas:
        name, equals, share = text.rpartition("=")
        column, colon, value = name.partition(":")
        if not equals or not column or not share or (colon and not value):
            raise InputError(f"expected --quota COLUMN=SHARE or COLUMN:VALUE=SHARE; received {text!r}")
        if column in found and not (colon and isinstance(found[column], dict)):
            raise InputError(f"expected one --quota of all values of {column}, or one for each; received {text!r} too")
        if colon:
            found.setdefault(column, {})[value] = share
        else:
            found[column] = share
    return found or None


def _selection_text(facts: dict[str, Any]) -> str:
    from ooc_influence.report import describe_scoring, table

    unit = facts["settings"]["unit"]
    what = {None: "rows", "document": "documents"}.get(unit, f"values of {unit!r}")
    lines = [f"{facts['out']}: {facts['kept']} of {facts['candidates']} {what}"]
    if unit is not None:
        lines[0] += f", {counted(facts['kept_rows'], 'row')} of the store"
    lines += [f"{path}: as many, {name}" for name, path in facts["controls"].items()]
    lines += [f"no {name} choice: {reason}" for name, reason in facts["missing"].items()]
    parts = ["\n".join(lines)]
    for column, entries in facts["by"].items():
        names = [name for name in entries[0] if name != "value"] if entries else []
        rows = [(str(entry["value"]), *(f"{entry[name]:.1%}" if name == "share" else entry[name] for name in names))
                for entry in entries]  # fmt: skip
        parts.append(table((column, *names), rows))
    return "\n\n".join([*parts, describe_scoring(facts["settings"])])


def _paired(query: str, train: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a library call that the options of a command stand for."""
    also, column, minus = settings.pop("also"), settings.pop("average_by"), settings.pop("minus")
    if settings["average_queries"] and column is not None:
        raise InputError("expected --average-queries or --average-by; received both")
    queries = [query, *(pair[0] for pair in also)] if also else query
    arguments = _arguments((train, *(pair[1] for pair in also)), settings)
    controls = None if not minus else (list(minus) if len(minus) > 1 else minus[0])
    averaged = {} if column is None else {"average_queries": column}
    return {"query": queries, **arguments, "minus": controls} | averaged


def _arguments(trains: tuple[str, ...], settings: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments that train stores and the options of every scoring command stand for."""
    cache, size = settings.pop("cache"), settings.pop("cache_size")
    stores = [options.open_train(path, cache, size) for path in trains]
    curvature, damping, rows = settings["curvature"], settings["damping"], settings["rows"]
    if settings.pop("dot"):
        if curvature:
            raise InputError("expected --dot or --curvature; received both")
        curvature = (False,)
    for name, values in (("--curvature", curvature), ("--rows", rows)):
        if len(values) > 1 and len(values) != len(trains):
            raise InputError(f"expected {name} once for each of {len(trains)} checkpoints; received {len(values)}")
    trained_on = [_read_rows(path) for path in rows]
    several = len(trains) > 1
    if several and len(trained_on) == 1:
        raise InputError(f"expected --rows once for each of {len(trains)} checkpoints ('all': all); received 1")
    return settings | {
        "train": stores if several else stores[0],
        "curvature": None if not curvature else (list(curvature) if len(curvature) > 1 else curvature[0]),
        "damping": None if not damping else (list(damping) if len(damping) > 1 else damping[0]),
        "rows": None if not trained_on else (trained_on if several else trained_on[0]),
        "progress": True,
    }


def _read_rows(path: str) -> Any:
    import numpy as np

    if path == "all":
        return None
    try:
        return np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise InputError(f"expected row numbers or a mask in a .npy file; received {path}: {error}") from error


_FIELDS = ("text", "label", "source", "id", "image")
_pages = options.several(
    click.option("--queries", type=options.PATH, metavar="Q",
                 help="Query store whose proponents and opponents to show."),
    click.option("--data", type=options.PATH, metavar="FILE",
                 help="Where the texts of STORE's rows are: .jsonl, .csv, .tsv, .parquet, .json, .txt (or .gz, .zst "
                 "of these), 'dir/*.jsonl', a datasets folder."),
    click.option("--query-data", type=options.PATH, metavar="FILE", help="The same of the queries."),
    click.option("--text", metavar="FIELD", help="Field with the text. Default: as extracted; text; prompt and "
                 "completion; messages."),
    click.option("--label", metavar="FIELD", help="Field with the label. Default: the column or field 'label'."),
    click.option("--source", metavar="FIELD", help="Field with the source. Default: the column or field 'source'."),
    click.option("--id", metavar="FIELD", help="Field with the ids that the store has. Default: as extracted, or "
                 "'id'."),
    click.option("--image", metavar="FIELD", help="Field with an image's path, below the folder of the data file."),
    click.option("--images", type=options.PATH, metavar="FILE.npy",
                 help="Instead: images of STORE's rows, (n, h, w) or (n, h, w, c)."),
    click.option("--query-images", type=options.PATH, metavar="FILE.npy", help="The same of the queries."),
    options.flags(
        ReportOptions, without=("device",),
        curvature={"multiple": False, "help": "Curvature to use. Default: 'default' in STORE."},
        damping={"multiple": False, "help": "Damping factor. Default: the curvature's (0.1, relative)."},
    ),
    options.dot, options.where,
)  # fmt: skip


_loading = options.several(
    options.flags(LoadingOptions, without=("task", "allow_pickle")),
    options.flags(DocumentOptions, only=("model_dtype",)),
    click.option("--device", help="Where the model runs, such as cuda. Default: the CPU."),
)  # fmt: skip


def _pop_loading(settings: dict[str, Any]) -> dict[str, Any]:
    """Take from options how a model is loaded."""
    loading = {name: settings.pop(name) for name in (*_LOADING, "device")}
    return loading | {"dtype": settings.pop("model_dtype")}


@click.command()
@click.argument("store", type=options.PATH)
@click.option("-o", "--out", required=True, type=options.PATH, metavar="DIR",
              help="The folder to write; an earlier report is replaced.")  # fmt: skip
@click.option("--model", type=options.PATH, metavar="DIR|ID",
              help="Show texts token by token, with each token's share of the score, by this Hugging Face language "
              "model: the one that STORE was made with.")  # fmt: skip
@_loading
@_pages
def report(store: str, out: str, as_json: bool, **settings: Any) -> None:
    """Write pages about STORE to a folder that opens from disk: examples, label errors, spectrum, groups.

    Open DIR/index.html in a browser; nothing is loaded from anywhere else.
    """
    from ooc_influence.report import write_report

    model, loading = settings.pop("model"), _pop_loading(settings)
    arguments = _report_arguments(store, settings)
    if model is None and (named := options.given([*_LOADING, "model_dtype", "device", "token_rows"])):
        flags = " and ".join(f"--{name.replace('_', '-')}" for name in named)
        raise InputError(f"expected --model with {flags}; received none: name the model that STORE was made with")
    if model is not None and arguments["queries"] is not None and settings["token_rows"]:
        from ooc_influence import hf

        model = hf.load(model, **loading)
    folder = write_report(out=out, model=model, **arguments)
    facts = {"report": str(folder), "open": str(folder / "index.html")}
    options.print_result(as_json, facts, lambda: f"open {facts['open']}")


@click.command()
@click.argument("store", type=options.PATH)
@click.option("--model", type=options.PATH, metavar="DIR|ID",
              help="Take new queries with this Hugging Face model, the one STORE was made with.")  # fmt: skip
@click.option("--recipe", type=options.PATH, metavar="FILE.py:FUNCTION",
              help="Take them with a recipe that has query=.")  # fmt: skip
@click.option("--typed", type=click.Choice(["text", "prompt", "chat"]), default="text", show_default=True,
              help="What is typed, with --model: running text, or a prompt and a completion (chat: through the "
              "tokenizer's template).")  # fmt: skip
@_loading
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; others than this machine's "
              "own let the network in.")  # fmt: skip
@click.option("--port", type=click.IntRange(0, 65535), default=0, help="Default: a free one.")
@click.option("--no-token", is_flag=True, help="Let anybody ask who reaches the port.")
@_pages
def serve(store: str, host: str, port: int, no_token: bool, as_json: bool, **settings: Any) -> None:
    """Serve pages about STORE on this machine, and take new queries. Ctrl-C ends it.

    A query typed or pasted is extracted as the rows of STORE were; its proponents come from STORE.
    """
    from ooc_influence.report.server import live_report
    from ooc_influence.report.server import serve as run

    loading = _pop_loading(settings)
    model = _query_model(settings.pop("model"), settings.pop("recipe"), settings.pop("typed"), loading)

    def started(url: str) -> None:
        options.print_result(as_json, {"url": url}, lambda: f"open {url} (Ctrl-C ends it)")
        sys.stdout.flush()

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    arguments = _report_arguments(store, settings)
    with live_report(model=model, listen=(host, port), token=not no_token, **arguments) as server:
        run(server, started)
    click.echo("stopped", err=True)


def _query_model(name: str | None, recipe: str | None, typed: str, loading: dict[str, Any]) -> Any:
    from ooc_influence.report.live_query import HuggingFaceModel, RecipeModel

    if name is not None and recipe is not None:
        raise InputError("expected --model or --recipe; received both")
    if name is not None:
        return HuggingFaceModel(name, typed, **loading)
    if recipe is None:
        return None
    from ooc_influence.extract import load_recipe

    with contextlib.redirect_stdout(sys.stderr):  # what the user's code prints must not end up in our output
        return RecipeModel(load_recipe(recipe), recipe)


def _report_arguments(store: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a report that options stand for."""
    from ooc_influence.report import Corpus

    if settings.pop("dot"):
        if settings["curvature"] is not None:
            raise InputError("expected --dot or --curvature; received both")
        settings["curvature"] = False
    train = options.open_train(store, settings.pop("cache"), settings.pop("cache_size"))
    fields = {name: settings.pop(name) for name in _FIELDS}
    data, images = settings.pop("data"), settings.pop("images")
    query_data, query_images = settings.pop("query_data"), settings.pop("query_images")
    if data is None and query_data is None and any(fields.values()):
        raise InputError("expected --data or --query-data with the names of fields; received neither")
    data_fields = query_fields = fields
    if data is not None and query_data is not None:  # queries may have fewer fields, or others
        data_fields, query_fields = _fields_of(data, fields), _fields_of(query_data, fields)
        # a field that neither has is refused where it is looked for
        data_fields |= {name: field for name, field in fields.items() if name not in query_fields}
    return settings | {
        "store": train,
        "data": Corpus(data, images=images, **(data_fields if data else {})),
        "query_data": Corpus(query_data, images=query_images, **(query_fields if query_data else {})),
        "by": list(settings["by"]) or None,
        "progress": True,
    }


def _fields_of(path: str, fields: dict[str, Any]) -> dict[str, Any]:
    """Return those of the fields that a file's documents have."""
    from ooc_influence.corpus import open_documents

    names = open_documents(path).column_names
    return {name: field for name, field in fields.items() if field in names}
