"""A selection as files: the user's own documents of the rows chosen, in their order, and controls of the same size.

Controls are what a selection by influence has to beat: rows chosen at random, and by a search for the targets' words
(BM25), both under the same quotas. They are written beside it: ``kept.random.jsonl`` and ``kept.bm25.jsonl`` for
``kept.jsonl``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ooc_influence.corpus import Bm25, Documents
from ooc_influence.errors import InputError, writing
from ooc_influence.influence import Selection, parse_groups
from ooc_influence.progress import Progress
from ooc_influence.report.examples import Corpus, Examples, ImageFolder
from ooc_influence.report.lexical import texts_of
from ooc_influence.report.tables import recorded_corpus
from ooc_influence.store import GradientStore, check_writable, replacing

Numbers = npt.NDArray[np.int64]
KINDS = (".jsonl", ".ndjson", ".parquet", ".txt")
_CHECKED = 64  # rows whose texts are compared with those extracted
_AT_ONCE = 8192  # rows whose documents are looked up
_BLOCK = 512  # documents scored at a time
_USUAL = ("source", "label")
_VALUES = 20  # of a column that is counted by, the most frequent ones


class Control(NamedTuple):
    """Rows chosen without influence, (m,) row numbers, and the file of their documents."""

    path: Path
    rows: Numbers


class SelectionFiles(NamedTuple):
    """Result of :func:`write_selection`.

    Attributes
    ----------
    path : Path
        The file of the selection.
    documents : int
        The documents in it; 0 where ids are written and no documents are known.
    controls : mapping of str to Control
        By name.
    missing : mapping of str to str
        Why a control was not made, by name.
    """

    path: Path
    documents: int
    controls: Mapping[str, Control]
    missing: Mapping[str, str]


def write_selection(
    selection: Selection,
    query: GradientStore,
    train: GradientStore,
    out: str | Path,
    *,
    data: Corpus | str | Path | None = None,
    query_data: Corpus | str | Path | None = None,
    seed: int | None = 0,
    progress: bool | None = None,
) -> SelectionFiles:
    """Write the documents of the rows chosen, and controls of the same size beside them.

    Parameters
    ----------
    selection : Selection
        Of these stores, by :func:`select_rows`. Where a document has several rows, with ``unit="document"``.
    query, train : GradientStore
        The targets and the train rows.
    out : path
        ``.jsonl`` or ``.ndjson``: the documents, as lines of JSON; those of a file of such lines as they are in it,
        byte for byte. ``.parquet``: records of Parquet files or of a ``datasets`` folder. ``.txt``: the ids of the
        rows, one a line, row numbers where the store has none. In the order of the data. A file there is replaced.
    data, query_data : Corpus or path, optional
        The documents of the train rows, and of the targets; default where the stores were made from.
    seed : int or None
        Of the random control; None: write no controls.
    progress : bool, optional
        Show progress lines; silent by default.

    Returns
    -------
    SelectionFiles
        What was written.

    Raises
    ------
    InputError
        If ``out`` is of another kind, the documents cannot be read or are not known, or several rows are of one.
    MismatchError
        If they are not the documents of the store's rows.
    StoreWriteError
        If the disk refuses the files.
    """
    path = Path(out)
    check_kind(path)
    writer = _Writer.of(selection, train, path, _corpus_of(train, data))
    documents = writer.write(selection.rows, path)
    controls: dict[str, Control] = {}
    missing: dict[str, str] = {}
    if seed is not None:
        of_random = np.random.default_rng(seed).random(len(selection.candidates.rows))
        of_words = writer.lexical_scores(query, _corpus_of(query, query_data), progress)
        for name, scores in (("random", of_random), ("bm25", of_words)):
            if isinstance(scores, str):
                missing[name] = scores
                continue
            control = Control(path.with_suffix(f".{name}{path.suffix}"), selection.alike(scores))
            writer.write(control.rows, control.path)
            controls[name] = control
    return SelectionFiles(path, documents, controls, missing)


def check_kind(path: Path) -> None:
    """Check, before long work, that a selection can be written to a path.

    Raises
    ------
    InputError
        If it is of no kind that can be written, or its folder cannot be written to.
    """
    if path.suffix.lower() not in KINDS:
        raise InputError(f"expected a file to write as {', '.join(KINDS)} (.txt: ids); received {path}")
    check_writable(path, missing_folders=False)


def _corpus_of(store: GradientStore, data: Corpus | str | Path | None) -> Corpus:
    return recorded_corpus(store) if data is None else Corpus.of(data)


class _Writer:
    """Writes rows of a selection as documents, or as ids."""

    def __init__(self, selection: Selection, train: GradientStore, shown: Examples | None) -> None:
        self._selection, self._train, self._shown = selection, train, shown

    @classmethod
    def of(cls, selection: Selection, train: GradientStore, out: Path, corpus: Corpus) -> _Writer:
        if corpus.path is None:
            if out.suffix.lower() != ".txt":
                path = (train.attrs.get("origin") or {}).get("data")
                where = "records none" if path is None else f"records {path}, where there are none"
                raise InputError(
                    f"expected the documents that rows of {train.path} were made from, to write them; received none, "
                    f"and the store {where}: name them (--data), or a .txt file for the ids of rows"
                )
            return cls(selection, train, None)
        rows = selection.candidates.rows
        shown = Examples(train, corpus, rows, ImageFolder(Path(), "none"))
        shown.describe(np.sort(selection.rows)[:_CHECKED])  # which compares texts with those extracted
        return cls(selection, train, shown)

    def write(self, rows: Numbers, path: Path) -> int:
        """Write the documents of rows, and of others of their units, or their ids; return how many documents."""
        every = np.flatnonzero(self._selection.with_units(rows))
        numbers = np.empty(0, np.int64) if self._shown is None else np.unique(self._numbers(every))
        if self._shown is not None and self._selection.units is None and len(numbers) < len(rows):
            raise InputError(
                f"expected one row of each document to write; received {len(rows)} rows of {len(numbers)}: select with "
                "unit='document' (--unit document)"
            )
        with writing(f"to write the selection to {path}"), replacing(path) as temporary:
            if path.suffix.lower() == ".txt":
                self._write_ids(every, temporary)
            else:
                assert self._shown is not None
                _copy(self._shown.opened, numbers, path.suffix.lower(), temporary)
        return len(numbers)

    def _write_ids(self, rows: Numbers, path: Path) -> None:
        with path.open("w", encoding="utf-8") as file:
            for low in range(0, len(rows), _AT_ONCE):
                file.writelines(f"{name}\n" for name in self._train.ids(rows[low : low + _AT_ONCE]).tolist())

    def _numbers(self, rows: Numbers) -> Numbers:
        """Return the documents of rows, (m,); InputError where one has none."""
        assert self._shown is not None
        numbers = np.empty(len(rows), np.int64)
        for low in range(0, len(rows), _AT_ONCE):
            part = rows[low : low + _AT_ONCE]
            found = self._shown.document_numbers(part)
            if None in found:
                row = int(part[found.index(None)])
                raise InputError(
                    f"expected a document for each row of {self._train.path}; received none for row {row}: give the "
                    "file the store was made from (--data)"
                )
            numbers[low : low + len(part)] = [number for number in found if number is not None]
        return numbers

    def lexical_scores(
        self, query: GradientStore, corpus: Corpus, progress: bool | None
    ) -> npt.NDArray[np.float64] | str:
        """Return candidates' BM25 scores, the highest over tasks of the mean of its targets; or why there are none."""
        if self._shown is None:
            return f"no documents of {self._train.path} to search (--data)"
        if corpus.path is None:
            return f"no documents of {query.path} to search for (--query-data)"
        live = np.flatnonzero(~query.dropped) if query.has_dropped else np.arange(query.n)
        asked = Examples(query, corpus, np.arange(query.n), ImageFolder(Path(), "none"))
        texts = texts_of(asked, query.n)
        tasks = self._selection.settings["tasks"]
        codes = np.zeros(query.n, np.int64) if tasks is None else parse_groups(tasks, query).codes
        found = Bm25([texts[row] for row in live.tolist()])
        means = _task_means(codes[live])
        scores = np.empty(self._shown.documents)
        with Progress("bm25", 2 * len(scores), progress, unit="document") as bar:
            found.count(_counting(self._shown.texts(), bar))
            for low, block in _blocks(_counting(self._shown.texts(), bar)):
                scores[low : low + len(block)] = (means @ found.scores(block)).max(axis=0)
        return scores[self._numbers(self._selection.candidates.rows)]


def _copy(documents: Documents, numbers: Numbers, suffix: str, path: Path) -> None:
    if suffix == ".parquet":
        documents.write_parquet(numbers, path)
        return
    with path.open("wb") as file:
        file.writelines(documents.lines(numbers))


def _task_means(codes: Numbers) -> npt.NDArray[np.float64]:
    """Return what makes means of each task's queries of values (q, ·), (T, q)."""
    member = codes == np.unique(codes)[:, None]
    return np.asarray(member / member.sum(axis=1, keepdims=True))


def _counting(texts: Iterator[str], bar: Progress) -> Iterator[str]:
    for text in texts:
        yield text
        bar.advance(1)


def _blocks(texts: Iterator[str]) -> Iterator[tuple[int, list[str]]]:
    low = 0
    while block := list(islice(texts, _BLOCK)):
        yield low, block
        low += len(block)


def selection_counts(
    selection: Selection,
    train: GradientStore,
    by: Sequence[str] | None = None,
    others: Mapping[str, Numbers] | None = None,
) -> dict[str, list[dict[str, Any]]]:
    """Return what was chosen of each value of columns, the most frequent values first.

    Parameters
    ----------
    selection : Selection
        Of this store.
    train : GradientStore
        The train rows.
    by : sequence of str, optional
        Columns; default ``source`` and ``label``, where the store has them.
    others : mapping of str to (m,) int64, optional
        Rows of other choices to count as well, by name.

    Returns
    -------
    dict of list
        By column, an entry a value: ``value``, how many ``candidates`` have it (rows, or units by the row of their
        score), ``kept`` ones, their ``share`` of all that are kept, the mean ``score`` of the candidates, and how many
        each other choice has.

    Raises
    ------
    InputError
        If there is no such column.
    """
    columns = [name for name in _USUAL if name in train.layout.columns] if by is None else by
    candidates = selection.candidates.rows
    scores = selection.row_scores[candidates].astype(np.float64)
    choices = {"kept": selection.rows} | dict(others or {})
    found = {}
    for column in columns:
        names, codes = parse_groups(column, train)
        size, total = len(names), len(selection.rows)
        present = np.bincount(codes[candidates], minlength=size)
        counts = {name: np.bincount(codes[rows], minlength=size).tolist() for name, rows in choices.items()}
        sums = np.bincount(codes[candidates], scores, size)
        order = [index for index in np.argsort(-present, kind="stable").tolist() if present[index]][:_VALUES]
        values = names.tolist()
        found[column] = [
            {"value": values[index], "candidates": int(present[index]), "kept": counts["kept"][index],
             "share": counts["kept"][index] / total, "score": float(sums[index] / present[index]),
             **{name: counts[name][index] for name in choices if name != "kept"}}
            for index in order
        ]  # fmt: skip
    return found
