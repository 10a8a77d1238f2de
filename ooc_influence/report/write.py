"""A report: one folder of pages that opens from disk, written from stores alone; tokens' shares need the model too.

Top lists, self-influence and group sums come from the public calls. Queries are written in files of
:data:`QUERIES_A_FILE`, each with the examples that its lists name, so that a page loads only what it shows and memory
holds one file.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np
import numpy.typing as npt

from ooc_influence._version import __version__
from ooc_influence.curvature import Curvature, resolve_curvature
from ooc_influence.errors import InputError, StaleCurvatureError, counted, warn
from ooc_influence.influence import GroupInfluence, TopInfluential, group_influence, self_influence, top_influential
from ooc_influence.options import DampingMode, ReportOptions, takes
from ooc_influence.progress import Progress, optional_library
from ooc_influence.report.examples import Corpus, Examples, ImageFolder
from ooc_influence.report.facts import curvature_states, dimension_curve, layer_facts, resolved_eigenvalues, store_facts
from ooc_influence.report.folder import LISTED_A_FILE, PageFolder, QueryList, replaceable_files
from ooc_influence.report.lexical import lexical_ranks, texts_of
from ooc_influence.report.tokens import TokenPages, documents_of, load_model
from ooc_influence.store import GradientStore, PathLike, as_store

if TYPE_CHECKING:
    from ooc_influence.hf import Loaded

QUERIES_A_FILE = 20
SUSPECTS_A_FILE = 500
_FEW = 200  # values of a column that is grouped by unasked
_GROUPED = ("label", "source")
_STRONGEST = 12  # groups shown with a query


_SCORING = ("damping_mode", "device", "workers", "memory", "progress")


@dataclass(frozen=True)
class Settings:
    """The settings of scores, see :func:`top_influential`: ``scoring`` of every call, ``normalize`` not of all."""

    curvature: Any
    damping: Any
    top: int
    normalize: Any
    scoring: dict[str, Any]

    @classmethod
    def of(cls, options: ReportOptions) -> Settings:
        """Return the settings among a report's options."""
        scoring = {name: options[name] for name in _SCORING}  # type: ignore[literal-required]
        return cls(options["curvature"], options["damping"], options["top"], options["normalize"], scoring)

    @property
    def mode(self) -> Any:
        """``relative`` or ``absolute``."""
        return self.scoring.get("damping_mode", "relative")

    @property
    def progress(self) -> bool | None:
        """Whether to show progress lines."""
        return self.scoring.get("progress")

    def both(self) -> dict[str, Any]:
        """Return the arguments that all calls share."""
        return {"curvature": self.curvature, "damping": self.damping, **self.scoring}

    def find_top(self, query: Any, train: GradientStore, **more: Any) -> TopInfluential:
        """Return top lists with these settings."""
        return top_influential(query, train, top=self.top, normalize=self.normalize, **self.both(), **more)


class Report:
    """The contents of a page about one train store, and perhaps queries, computed when they are first used."""

    def __init__(self, train: GradientStore, query: GradientStore | None, settings: Settings) -> None:
        self.train, self.query, self.settings = train, query, settings
        self.curvature: Curvature | None = None
        if settings.curvature is not False:
            self.curvature = resolve_curvature(train, settings.curvature)

    def kept_settings(self) -> Settings:
        """Return the settings with the curvature that is open, which keeps what it read.

        Once another fit has replaced it, that one is opened.
        """
        if self.curvature is None:
            return self.settings
        try:
            self.curvature.check_fit()
        except StaleCurvatureError:
            self.curvature = resolve_curvature(self.train, self.settings.curvature)
        return replace(self.settings, curvature=self.curvature)

    @cached_property
    def self_influence(self) -> npt.NDArray[np.float32]:
        """(n,), see :func:`ooc_influence.self_influence`."""
        return self_influence(self.train, **self.settings.both())

    @cached_property
    def top(self) -> TopInfluential | None:
        """Lists of the queries."""
        return None if self.query is None else self.settings.find_top(self.query, self.train)

    def groups(self, by: str) -> GroupInfluence:
        """Return the queries' sums over the groups of a column."""
        assert self.query is not None
        return group_influence(self.query, self.train, by, normalize=self.settings.normalize, **self.settings.both())

    def grouped_by(self, asked: Sequence[str] | None) -> list[str]:
        """Return the columns to sum by: those asked for, or label and source where they have few values."""
        if self.query is None:
            return []
        if asked is not None:
            return list(asked)
        columns = [name for name in _GROUPED if name in self.train.layout.columns]
        return [name for name in columns if len(np.unique(self.train.column(name))) <= _FEW]

    def suspects(self, count: int) -> npt.NDArray[np.int64]:
        """Return the rows of largest self-influence and of largest loss, ``count`` of each, without dropped ones."""
        live = np.isfinite(self.self_influence)
        rows = []
        for values in (self.self_influence, self.train.loss):
            order = np.argsort(np.where(live, -values, np.inf), kind="stable")[: min(count, int(live.sum()))]
            rows.append(order)
        return np.unique(np.concatenate(rows)).astype(np.int64)

    def entry(self, top: TopInfluential, number: int) -> dict[str, Any]:
        """Return a query's lists in a page's form: [row, score] each, up to where the sign of scores changes."""
        lists = {side: [[row, score] for row, _, score in ranked] for side, ranked in top.of_query(number).items()}
        return {"number": number, "outside": float(top.outside_share[number]), **lists}

    def lexical_ranks(
        self, shown: Examples, queries: Sequence[str], top: TopInfluential
    ) -> list[Mapping[int, int | None]] | None:
        """Return the BM25 ranks of the rows in lists, query by query; None where there are no texts."""
        if not any(queries) or not shown.documents:
            return None
        both = np.concatenate([top.proponents.rows, top.opponents.rows], axis=1)
        return lexical_ranks(queries, shown, [np.unique(own[own >= 0]) for own in both], self.settings.progress)

    def tokens(
        self, query: GradientStore, top: TopInfluential, loaded: Loaded, data: tuple[Any, Any], options: ReportOptions
    ) -> TokenPages:
        """Return what shows queries token by token; their own progress lines are in the pages' one."""
        scoring = {**self.settings.scoring, "progress": None}
        curvature = self.kept_settings().curvature if self.curvature is not None else None
        return TokenPages.open(
            (query, self.train), top, loaded, data, curvature, options["token_rows"], scoring,
        )  # fmt: skip

    def examples(self, shown: Examples, rows: Any) -> dict[int, dict[str, Any]]:
        """Return train examples by row, with their self-influence."""
        distinct = np.unique(np.asarray(rows, np.int64))
        entries = shown.describe(distinct)
        return {entry["row"]: entry | {"self": float(self.self_influence[entry["row"]])} for entry in entries}


@takes(ReportOptions)
def write_report(
    store: GradientStore | PathLike,
    out: str | Path,
    queries: GradientStore | PathLike | None = None,
    *,
    data: Corpus | str | Path | None = None,
    query_data: Corpus | str | Path | None = None,
    model: Loaded | str | Path | None = None,
    **options: Unpack[ReportOptions],
) -> Path:
    """Write a folder of pages about a store and its influence on queries; ``index.html`` opens from disk.

    Parameters
    ----------
    store : GradientStore or path
        Train rows, with a curvature.
    out : path
        The folder to write. An earlier report there is replaced, its own files alone; anything else is refused.
    queries : GradientStore or path, optional
        Whose proponents and opponents to show.
    data, query_data : Corpus or path, optional
        Where the texts or images of train rows and of queries are; without, ids alone are shown.
    model : hf.Loaded, str or path, optional
        The language model that the stores were extracted with: texts are shown token by token, with each token's share
        of the score (:func:`ooc_influence.token_influence`), which takes a pass over every row shown so. Finished
        queries are kept in a hidden folder beside ``out``: the same call, interrupted or killed, continues from them.
    **options : ReportOptions
        See :mod:`ooc_influence.options`; one curvature and one damping.

    Returns
    -------
    Path
        The folder.

    Raises
    ------
    InputError
        For several dampings, examples that cannot be read, or examples, groups or tokens of queries without
        ``queries``.
    MismatchError
        If records do not belong to the rows, or the model is not the stores'.
    StoreExistsError
        If something else is at ``out``.
    MissingExtraError
        Without the extra ``report``.
    OocInfluenceError
        See :func:`top_influential`.
    """
    replaceable_files(Path(out).resolve())
    examples = check_queries(queries, query_data, options["by"], model)
    report = open_report(store, queries, Settings.of(options))
    save_report(report, out, (Corpus.of(data), examples), options, model)
    return Path(out)


def save_report(
    report: Report,
    out: str | Path,
    documents: tuple[Corpus, Corpus],
    options: ReportOptions,
    model: Loaded | str | Path | None = None,
) -> None:
    """Write an open report, with the documents of train rows and of queries; see :func:`write_report`."""
    loaded = load_model(model, report.train) if model is not None and options["token_rows"] else None
    with PageFolder(Path(out)) as folder:
        write_pages(report, folder, *documents, options, loaded=loaded)


def check_queries(
    queries: Any, query_data: Corpus | str | Path | None, by: Sequence[str] | None, model: Any = None
) -> Corpus:
    """Return where the examples of the queries are, after checking that nothing of queries is named without any."""
    examples = Corpus.of(query_data)
    options = {"--query-data": examples.path, "--query-images": examples.images, "--by": by or None, "--model": model}
    named = [name for name, value in options.items() if value is not None]
    if queries is None and named:
        raise InputError(f"expected queries (--queries) with {' and '.join(named)}; received none: name their store")
    return examples


def open_report(
    store: GradientStore | PathLike, queries: GradientStore | PathLike | None, settings: Settings
) -> Report:
    """Return the report of stores; see :func:`write_report`."""
    damping = settings.damping
    if np.ndim(damping if damping is not None else 0.0) or isinstance(store, (list, tuple)):
        raise InputError("expected one store and one damping for a report; received several: write one for each")
    optional_library("jinja2", "pages")
    return Report(as_store(store), None if queries is None else as_store(queries), settings)


def write_pages(
    report: Report,
    folder: PageFolder,
    data: Corpus,
    query_data: Corpus,
    options: ReportOptions,
    *,
    ask: dict[str, Any] | None = None,
    loaded: Loaded | None = None,
) -> None:
    """Write everything of a page into its folder.

    ``ask`` describes the model that a live page puts queries to; ``loaded`` is one that tells queries' tokens apart.
    """
    train, query, top = report.train, report.query, report.top
    chosen = report.suspects(options["suspects"])
    lists = [] if top is None else [getattr(top, side).rows.ravel() for side in ("proponents", "opponents")]
    needed = np.unique(np.concatenate([chosen, *lists]))
    sums = {name: report.groups(name) for name in report.grouped_by(options["by"])}
    albums = [ImageFolder(folder.path, "train"), ImageFolder(folder.path, "queries")]
    texts = 0
    shown = Examples(train, data, needed[needed >= 0], albums[0])
    if query is not None and top is not None:
        asked = Examples(query, query_data, np.arange(query.n), albums[1])
        ranks = report.lexical_ranks(shown, texts_of(asked, query.n), top) if options["bm25"] else None
        tokens = None
        if loaded is not None:
            places = documents_of(query_data), documents_of(data)
            tokens = report.tokens(query, top, loaded, places, options).kept(folder)
        texts = _write_queries(folder, Entries(report, top, shown, asked, sums, ranks, tokens))
    for first in range(0, max(1, len(chosen)), SUSPECTS_A_FILE):
        part = report.examples(shown, chosen[first : first + SUSPECTS_A_FILE])
        folder.write_data(f"suspects-{first // SUSPECTS_A_FILE}", list(part.values()))
    unreadable = sum(pictures.unreadable for pictures in albums)
    if unreadable:
        warn(
            f"not shown: {counted(unreadable, 'image')} that cannot be read, are not below the folder of the data, or "
            "are too large: the pages say which"
        )
    name = options["title"] or Path(str(train.path)).name
    folder.write_data("index", _index(report, chosen, sums, name) | {"ask": ask, "texts": texts})
    folder.write_page(name, live=ask is not None)


@dataclass(frozen=True)
class Entries:
    """What the pages of queries are made of."""

    report: Report
    top: TopInfluential
    shown: Examples
    asked: Examples
    sums: dict[str, GroupInfluence]
    ranks: Sequence[Mapping[int, int | None]] | None
    tokens: TokenPages | None

    def of(self, number: int, example: dict[str, Any]) -> dict[str, Any]:
        """Return a query in its page's form."""
        entry = example | self.report.entry(self.top, number)
        entry["bm25"] = None if self.ranks is None else self.ranks[number]
        entry["groups"] = {name: _strongest(groups, number) for name, groups in self.sums.items()}
        if self.tokens is not None:
            entry["tokens"] = self.tokens.of_query(number)
        return entry


def _write_queries(folder: PageFolder, entries: Entries) -> int:
    """Write the queries and their list; return the number of files of texts that are too long for the list."""
    report, n = entries.report, entries.asked.store.n
    listing = QueryList(folder)
    with Progress("pages", n, report.settings.progress, unit="query") as bar:
        for first in range(0, n, QUERIES_A_FILE):
            numbers = range(first, min(n, first + QUERIES_A_FILE))
            written = []
            for number, example in zip(numbers, entries.asked.describe(np.array(numbers)), strict=True):
                written.append(entries.of(number, example))
                listing.add(written[-1])
                bar.advance(1)
            rows = [row for entry in written for side in ("proponents", "opponents") for row, _ in entry[side]]
            folder.write_data(
                f"queries-{first // QUERIES_A_FILE}",
                {"queries": written, "examples": report.examples(entries.shown, rows)},
            )
    return listing.finish()


def _strongest(groups: GroupInfluence, number: int) -> list[list[Any]]:
    """Return the groups that weigh most in a query's scores: name, sum, rows."""
    sums = groups.sums[number]
    order = np.argsort(-np.nan_to_num(np.abs(sums)), kind="stable")[:_STRONGEST]
    return [[str(groups.names[index]), float(sums[index]), int(groups.counts[index])] for index in order]


def _index(
    report: Report, suspects: npt.NDArray[np.int64], sums: dict[str, GroupInfluence], title: str
) -> dict[str, Any]:
    train, query, settings, top = report.train, report.query, report.settings, report.top
    spectrum, damping = None, settings.damping
    if report.curvature is not None:
        if damping is None and top is not None and report.curvature.takes_damping:
            damping = report.curvature.list_damping
        spectrum = _spectrum(report.curvature, damping, settings.mode)
    labels = np.unique(train.column("label")).tolist() if "label" in train.layout.columns else []
    return {
        "title": title,
        "store": str(train.path),
        "identity": train.identity,
        "rows": train.n,
        "version": __version__,
        "written": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "queries": None if query is None else {"store": str(query.path), "count": query.n},
        "sizes": {"queries": QUERIES_A_FILE, "list": LISTED_A_FILE, "suspects": SUSPECTS_A_FILE},
        "settings": {
            "lambda": None if spectrum is None else spectrum["lambda"],
            "damping": damping,
            "normalize": settings.normalize if top is None else top.settings["normalize"],
            "curvature": None if report.curvature is None else str(report.curvature.path),
            "top": settings.top,
        },
        "suspects": len(suspects),
        "labels": [str(label) for label in labels[:_FEW]],
        "outside": None if top is None else _median(top.outside_share),
        "spectrum": spectrum,
        "histograms": [
            _histogram("self-influence", report.self_influence),
            _histogram("loss", train.loss),
            _histogram("gradient norm", train.grad_norm),
        ],
        "groups": [_heat_map(by, groups, query) for by, groups in sums.items() if query is not None],
        "facts": store_facts(train),
        "layers": layer_facts(train),
        "curvatures": curvature_states(train),
    }


def _median(values: npt.NDArray[np.float64]) -> float | None:
    return float(np.nanmedian(values)) if np.isfinite(values).any() else None


_BINS = 48
_POINTS = 600  # of a spectrum
_GROUPS = 40  # columns of a heat map; the others are added up
_QUERIES = 200  # its rows
_OTHERS = "(others)"


def _spectrum(curvature: Curvature, damping: float | None, mode: DampingMode) -> dict[str, Any]:
    """Return eigenvalues above rounding by number, thinned evenly in the logarithm, and d(λ) at many dampings.

    ``damping`` is the one that scores were computed with, by default the curvature's own.
    """
    chosen, lambdas = curvature.damping_value(damping, mode), curvature.lambdas(damping, mode)
    values = resolved_eigenvalues(curvature)
    indices = np.arange(len(values))
    if len(values) > _POINTS:
        indices = np.unique(np.geomspace(1, len(values), _POINTS).round().astype(np.int64)) - 1
    return {
        "facts": curvature.facts(),
        "numbers": (indices + 1).tolist(),
        "eigenvalues": values[indices].tolist(),
        "positive": len(values),
        "d": curvature.d,
        "trace": curvature.trace,
        "mean": sum(block.trace for block in curvature.blocks) / sum(block.dimension for block in curvature.blocks),
        "curve": dimension_curve(curvature, chosen) if curvature.trace > 0 else [],
        "lambda": chosen,
        "damping": (curvature.damping if damping is None else damping) if mode == "relative" else None,
        "dimension": curvature.effective_dimension(lambdas[0]) if chosen > 0 else float(len(values)),
    }


def _histogram(name: str, values: npt.NDArray[Any]) -> dict[str, Any]:
    """Return counts in bins, even in the logarithm where positive values span much; zeros and NaN are told apart."""
    numbers = np.asarray(values, np.float64)
    finite = numbers[np.isfinite(numbers)]
    positive = finite[finite > 0]
    log = len(positive) > 0 and not (finite < 0).any() and positive.max() > 50 * max(np.median(positive), 1e-300)
    log = bool(log or (len(positive) > 0 and positive.max() > 1e3 * positive.min() and len(positive) == len(finite)))
    drawn = positive if log else finite
    if not len(drawn):
        edges, counts = np.array([0.0, 1.0]), np.array([0])
    elif drawn.min() == drawn.max():
        edges, counts = np.array([drawn.min() - 0.5, drawn.min() + 0.5]), np.array([len(drawn)])
    else:
        low, high = drawn.min(), drawn.max()
        edges = np.geomspace(low, high, _BINS + 1) if log else np.linspace(low, high, _BINS + 1)
        edges[0], edges[-1] = low, high  # to rounding they are not
        counts = np.histogram(drawn, edges)[0]
    quantiles = np.quantile(finite, [0, 0.05, 0.5, 0.95, 1]).tolist() if len(finite) else []
    return {
        "name": name,
        "edges": edges.tolist(),
        "counts": counts.tolist(),
        "log": log,
        "zeros": int((finite == 0).sum()) if log else 0,
        "missing": int(len(numbers) - len(finite)),
        "quantiles": quantiles,
    }


def _heat_map(by: str, groups: GroupInfluence, query: GradientStore) -> dict[str, Any]:
    """Return sums by group as a table.

    Its lines are means over the queries of each value of the same column, or else of their label or source; where they
    have none of these, the first queries. Groups beyond the strongest are added up.
    """
    sums, counts, names = groups.sums, groups.counts, [str(name) for name in groups.names.tolist()]
    column = next((name for name in (by, "label", "source") if name in query.layout.columns), None)
    lines, labels = sums, [str(name) for name in groups.query_ids.tolist()]
    if column is not None:
        values, codes = np.unique(query.column(column), return_inverse=True)
        live = ~np.isnan(sums).any(1)
        kept = np.unique(codes[live])
        lines = np.array([sums[live & (codes == code)].mean(0) for code in kept]).reshape(len(kept), len(names))
        labels = [str(value) for value in values[kept].tolist()]
    shown = lines[:_QUERIES]
    if len(names) > _GROUPS:
        strong = np.argsort(-np.nan_to_num(np.abs(shown)).sum(0), kind="stable")
        first, rest = np.sort(strong[: _GROUPS - 1]), strong[_GROUPS - 1 :]
        shown = np.concatenate([shown[:, first], shown[:, rest].sum(1, keepdims=True)], axis=1)
        counts = np.concatenate([counts[first], counts[rest].sum(keepdims=True)])
        names = [names[index] for index in first] + [_OTHERS]
    return {
        "by": by,
        "queries_by": column,
        "groups": names,
        "counts": counts.tolist(),
        "queries": labels[:_QUERIES],
        "left_out": max(0, len(labels) - _QUERIES),
        "sums": shown.tolist(),
    }
