"""From a fine-tuned model and two sets of documents to an answer: every step of the library in one call that resumes.

The folder of a run holds its settings (``run.yaml``, which ``ooc-influence trace`` takes), the two stores, the lists
(``answers.jsonl``) and the pages. A step whose result is there is not done again; whether it still belongs to the model
and the documents is checked as ever.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Unpack

import numpy as np

from ooc_influence import hf
from ooc_influence.compress import DefaultDropout, RowBudget
from ooc_influence.corpus import open_documents
from ooc_influence.curvature import fit_curvature
from ooc_influence.errors import InputError, StoreNotFoundError, counted, writing
from ooc_influence.extract import ModelSetup, measure_speed, parse_device
from ooc_influence.influence import TopInfluential
from ooc_influence.memory import format_bytes
from ooc_influence.options import (
    FieldOptions,
    LoadingOptions,
    ReportOptions,
    TraceOptions,
    complete,
    definitions,
    select,
    takes,
)
from ooc_influence.progress import LONG, announce, duration, optional_library
from ooc_influence.report import Corpus, Examples, ImageFolder, Report, Settings, open_report, save_report
from ooc_influence.store import Encoding, GradientStore, parse_representation
from ooc_influence.tracing.settings import claim_folder, source_name

_LARGE = 10 * 2**30  # bytes of a run that is confirmed before it starts
_PILOT_PASSES, _PILOT_SAMPLES = 1, 256  # of the Kronecker basis: factors; rows of the second pass are kept
_FORMS = tuple(name for name in definitions(FieldOptions) if name not in ("id", "keep", "chat", "turns"))
_DTYPE = "float16"  # of rows, where no size of them is asked for


class Step(NamedTuple):
    """A step of a run: what it does, and about how many seconds it takes; 0 where its result is there, or is quick."""

    what: str
    seconds: float
    run: Callable[[], None]


@dataclass(frozen=True, eq=False)
class Trace:
    """The result of a run.

    Attributes
    ----------
    folder : Path
        Where everything is.
    train, queries : GradientStore
        The stores.
    lists : TopInfluential
        Each query's proponents and opponents.
    page : Path
        The file to open.
    """

    folder: Path
    train: GradientStore
    queries: GradientStore
    lists: TopInfluential
    page: Path


@takes(TraceOptions)
def trace(
    model: str | Path | hf.Loaded,
    data: Any,
    queries: Any,
    out: str | Path,
    *,
    confirm: Callable[[str], bool] | None = None,
    **options: Unpack[TraceOptions],
) -> Trace:
    """Find which documents of a corpus a language model's answers come from, and write pages about it.

    The rows of both sets are extracted, the curvature fitted where one is needed, lists made, and pages written. The
    same call continues an interrupted one. The stores stay for the other calls.

    Parameters
    ----------
    model : str, path or Loaded
        A folder or hub id, of a model or a PEFT adapter; or what :func:`ooc_influence.hf.load` returned.
    data, queries : path or object
        The documents the model was trained on, and the answers to be explained, as for
        :func:`ooc_influence.hf.extract`. Fields that are not named are found by their usual names: ``messages``;
        ``prompt`` and ``completion``; ``text``.
    out : path
        The folder of the run.
    confirm : callable str -> bool, optional
        Asked before work of more than ten minutes or ten gigabytes, with what it will take; False ends the run.
    **options : TraceOptions
        See :mod:`ooc_influence.options`.

    Returns
    -------
    Trace

    Raises
    ------
    InputError
        For fields that are not there, or a run that was not confirmed.
    StoreExistsError
        If ``out`` holds a run with other settings, or something else.
    MissingExtraError
        Without the extras ``hf`` and ``report``.
    OocInfluenceError
        See :func:`ooc_influence.hf.extract` and :func:`ooc_influence.report.write_report`.

    Examples
    --------
    >>> found = ooc.trace("my-model", "corpus.jsonl", "answers.jsonl", "run")  # doctest: +SKIP
    >>> found.lists.of_query(0)["proponents"][0]  # row, id, score  # doctest: +SKIP
    """
    optional_library("jinja2", "pages")
    folder = Path(out)
    sources = {"model": model, "data": data, "queries": queries}
    settings = {name: source_name(source) for name, source in sources.items()} | dict(options)
    claim_folder(folder, settings)
    run = _Run(model, data, queries, folder, options)
    run.say(f"loading {settings['model'] or 'the model'}")
    steps = run.steps()
    total, disk = sum(step.seconds for step in steps), run.disk
    run.say(f"about {duration(total)} in all; stores of about {format_bytes(disk)} in {folder}")
    if confirm is not None and (total > LONG or disk > _LARGE):
        work = f"about {duration(total)} and {format_bytes(disk)}"
        if not confirm(work):
            raise InputError(
                f"expected a yes to a run of {work}; received no: confirm it (--yes), or use fewer documents "
                "(--documents)"
            )
    for number, step in enumerate(steps, start=1):
        ahead = f", about {duration(step.seconds)}" if step.seconds else ""
        run.say(f"{number}/{len(steps)} {step.what}{ahead}")
        step.run()
    return run.result()


def find_fields(columns: Mapping[str, Sequence[str]], asked: FieldOptions) -> dict[str, dict[str, Any]]:
    """Return the fields of the documents of each side, which have some columns: those that are named and there.

    A side that lacks a field of the form that is named has the usual one (:func:`ooc_influence.hf.extract`).

    Raises
    ------
    InputError
        If a field that is named is in neither.
    """
    values: Mapping[str, Any] = asked
    named = {name: values[name] for name in _FORMS if values.get(name) is not None}
    for name, field in [*named.items(), *((("id", values["id"]),) if values.get("id") else ())]:
        if not any(field in present for present in columns.values()):
            received = "; ".join(f"{side} with {', '.join(present)}" for side, present in columns.items())
            raise InputError(
                f"expected {name}={field!r} to be a field of the data or of the queries; received {received}"
            )
    found = {}
    for side, present in columns.items():
        form: dict[str, Any] = named if all(field in present for field in named.values()) else {}
        rest = {name: value for name, value in values.items() if name not in _FORMS}
        rest["keep"] = tuple(name for name in values.get("keep", ()) if name in present)
        rest["id"] = rest.get("id") if rest.get("id") in present else None
        found[side] = rest | form
    return found


def store_bytes(counts: Sequence[int], entries: int, loss_kind: str | None, budget: RowBudget | None) -> int:
    """Return the bytes of the rows of a train and a query store, of a model with some entries."""
    make = budget or DefaultDropout().sized(counts[0], _DTYPE, loss_kind)
    kept = make(entries)
    columns = kept.reduce.r if kept.reduce else kept.k
    dtypes = (_DTYPE if budget is None else budget.dtype), _DTYPE
    sizes = [Encoding.of(parse_representation(dtype), columns).row_bytes for dtype in dtypes]
    return sum(count * size for count, size in zip(counts, sizes, strict=True))


class _Run:
    """The steps of a run, with what they share."""

    def __init__(self, model: Any, data: Any, queries: Any, folder: Path, options: TraceOptions) -> None:
        self._model, self._sources, self._folder = model, {"data": data, "queries": queries}, folder
        self._options = options

    def say(self, text: str) -> None:
        """Tell what happens."""
        announce(text, self._options["progress"])

    @cached_property
    def _loaded(self) -> hf.Loaded:
        if isinstance(self._model, hf.Loaded):
            return self._model
        device, how = self._options["device"], select(LoadingOptions, self._options)
        name = None if device is None else str(device)
        return hf.load(self._model, dtype=self._options["model_dtype"], device=name, **how)

    @cached_property
    def _jobs(self) -> dict[str, hf.Job]:
        return {side: hf.prepare(self._loaded, source, **self._how(side)) for side, source in self._sources.items()}

    @cached_property
    def _fields(self) -> dict[str, dict[str, Any]]:
        documents = {side: open_documents(source, **self._opening(side)) for side, source in self._sources.items()}
        columns = {side: each.column_names for side, each in documents.items()}
        return find_fields(columns, select(FieldOptions, self._options))

    def _opening(self, side: str) -> dict[str, Any]:
        """Return how a side's documents are opened: options are those of the data."""
        if side == "queries":
            return {}
        asked: Any = self._options
        opening = {name: asked[name] for name in ("split", "config", "streaming")}
        return opening | ({"first": asked["documents"]} if asked["streaming"] else {})

    def _how(self, side: str) -> dict[str, Any]:
        """Return how the documents of a side are read."""
        asked: Any = self._options
        names = ["max_length", "tokens", "batch_size", "reduction", "on_missing", "progress"]
        names += ["split", "config", "streaming", "documents"] if side == "data" else []
        return {name: asked[name] for name in names} | self._fields[side]

    def _path(self, side: str) -> Path:
        return self._folder / ("train.zarr" if side == "data" else "queries.zarr")

    def _finished(self, side: str) -> GradientStore | None:
        """Return a side's store, if all of its rows are there."""
        try:
            store = GradientStore.open(self._path(side))
        except StoreNotFoundError:
            return None
        return store if store.n == len(self._jobs[side].samples) else None

    @property
    def _row_budget(self) -> RowBudget | None:
        size = self._options["row_bytes"]
        return None if size is None else RowBudget(size)

    @property
    def disk(self) -> int:
        """About how many bytes the stores take."""
        train = self._jobs["data"]
        entries = sum(each.numel() for each in train.model.parameters())  # at most: of an adapter, fewer are kept
        counts = [len(job.samples) for job in self._jobs.values()]
        return store_bytes(counts, entries, train.loss_kind, self._row_budget)

    def steps(self) -> list[Step]:
        """Return the steps, with the time that each takes."""
        train, n, q = self._jobs["data"], *(len(job.samples) for job in self._jobs.values())
        queries = counted(q, "query", "queries")
        second = 0.0  # of a token: nothing needs the model where all rows are there, and no tokens are asked for
        if self._token_rows or not all(map(self._finished, self._jobs)):
            self.say(f"{counted(n, 'training row')} and {queries}; a first batch shows how long they take")
            setup = ModelSetup(train.model, train.per_sample_loss, parse_device(train.model, None))
            second = measure_speed(setup, train.batches)
        tokens = {side: float(job.samples.lengths.sum()) for side, job in self._jobs.items()}
        pilot = _PILOT_PASSES * min(1.0, _PILOT_SAMPLES / n) if train.loss_kind.startswith("token") else 0.0
        passages = 2 * min(self._token_rows, n)
        by_token = q * passages * tokens["data"] / n + tokens["queries"] if passages else 0.0
        shares = f"; shares of tokens in {passages} passages for each query" if passages else ""
        return [
            self._extraction(
                "data", f"gradients of {counted(n, 'training row')}", tokens["data"] * (1 + pilot) * second
            ),
            self._extraction("queries", f"gradients of {queries}", tokens["queries"] * second),
            Step("curvature", 0.0, self._fit),
            Step(f"lists and pages{shares}", by_token * second, self._write),
        ]

    @property
    def _token_rows(self) -> int:
        losses = self._jobs["data"].per_sample_loss  # of other ones, tokens have no shares
        return self._options["token_rows"] if isinstance(losses, hf.CausalLoss) else 0

    def _extraction(self, side: str, what: str, seconds: float) -> Step:
        done = self._finished(side)
        if done is not None:  # that it is of this model and these documents is checked all the same
            what, seconds = f"{what}: there, in {done.path}", 0.0
        return Step(what, seconds, lambda: self._extract(side))

    def _extract(self, side: str) -> None:
        how, budget = self._how(side), self._row_budget
        if side == "queries":
            how["like"] = self._path("data")
        elif budget is not None:
            how |= {"compressor": budget, "dtype": budget.dtype}
        hf.extract(self._loaded, self._sources[side], self._path(side), memory=self._options["memory"], **how)

    def _fit(self) -> None:
        train = GradientStore.open(self._path("data"))
        if not train.mask.has_basis:
            fit_curvature(train, memory=self._options["memory"], progress=self._options["progress"])

    @cached_property
    def _asked(self) -> ReportOptions:
        """What the report is asked for; the lists in ``answers.jsonl`` are its own."""
        names = ("memory", "progress", "damping", "top")
        asked = {name: value for name, value in self._options.items() if name in names}
        return complete(ReportOptions, {**asked, "title": self._folder.name, "token_rows": self._token_rows})

    @cached_property
    def _report(self) -> Report:
        return open_report(self._path("data"), self._path("queries"), Settings.of(self._asked))

    @property
    def _lists(self) -> TopInfluential:
        lists = self._report.top
        assert lists is not None  # there are queries
        return lists

    @property
    def _stores(self) -> tuple[GradientStore, GradientStore]:
        return GradientStore.open(self._path("data")), GradientStore.open(self._path("queries"))

    def _corpus(self, side: str) -> Corpus:
        return Corpus(self._sources[side], split=self._options["split"] if side == "data" else None)

    def _write(self) -> None:
        self._write_answers()
        documents = self._corpus("data"), self._corpus("queries")
        model = self._loaded if self._token_rows else None
        save_report(self._report, self._folder / "page", documents, self._asked, model)

    def _write_answers(self) -> None:
        """Write each query's lists as a line of JSON, with the texts of queries and of listed rows."""
        path, lists = self._folder / "answers.jsonl", self._lists
        rows = np.concatenate([ranking.rows.ravel() for ranking in (lists.proponents, lists.opponents)])
        train, queries = self._stores
        pictures = ImageFolder(self._folder, "none")  # nothing is drawn
        shown = Examples(train, self._corpus("data"), np.unique(rows[rows >= 0]), pictures)
        asked = Examples(queries, self._corpus("queries"), np.arange(queries.n), pictures)
        with writing(f"to write lists to {path}"), path.open("w", encoding="utf-8") as file:
            for number, entry in enumerate(lists.to_dict()["queries"]):
                listed = [each for side in ("proponents", "opponents") for each in entry[side]]
                texts = shown.describe(np.array([each["row"] for each in listed], np.int64))
                for each, example in zip(listed, texts, strict=True):
                    each["text"] = example["text"]
                question = asked.describe(np.array([number]))[0]["text"]
                file.write(json.dumps({"text": question, **entry}, ensure_ascii=False) + "\n")

    def result(self) -> Trace:
        """Return what the run made."""
        return Trace(self._folder, *self._stores, self._lists, self._folder / "page" / "index.html")
