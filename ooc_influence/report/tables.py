"""Results as tables in files: a line a row, with its id, its columns and its text; and files of rows to act on.

A table is written block by block, under a temporary name until it is whole: memory holds a block.
"""

from __future__ import annotations

import csv
import glob
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from ooc_influence.corpus import local_path, open_records
from ooc_influence.errors import InputError, MismatchError, writing
from ooc_influence.influence import GroupInfluence, Selection, TopInfluential
from ooc_influence.progress import optional_library
from ooc_influence.report.examples import Corpus, Examples, ImageFolder
from ooc_influence.store import GradientStore, check_writable, replacing

Numbers = npt.NDArray[np.int64]
Block = Mapping[str, Any]  # values by column: arrays, or lists of texts
TABLES = (".parquet", ".csv", ".jsonl")
PAIRS = 10**8  # scores that a table holds at most: each is a line
_BLOCK = 8192  # lines at a time, with their texts
_PAIRS_AT_ONCE = 2**16


def check_table(path: str | Path) -> Path:
    """Check, before long work, that a table can be written to a path.

    Raises
    ------
    InputError
        If it is of no kind that can be written, or its folder cannot be written to.
    MissingExtraError
        For ``.parquet`` without pyarrow.
    """
    path = Path(path)
    if path.suffix.lower() not in TABLES:
        raise InputError(f"expected a table to write as {', '.join(TABLES)}; received {path}")
    if path.suffix.lower() == ".parquet":
        optional_library("pyarrow.parquet", "Parquet files")
    check_writable(path, missing_folders=False)
    return path


def write_table(path: Path, blocks: Iterable[Block], facts: Mapping[str, Any] | None = None) -> int:
    """Write blocks of lines, values by column, as one table; return how many lines it has.

    The first block, which may be empty, says which columns there are. Values (b, k) are lists of k numbers, in Parquet
    only, as are ``facts``: JSON values, written as the file's metadata ``ooc_influence``.

    Raises
    ------
    StoreWriteError
        If the disk refuses the file.
    """
    kinds = {".csv": _csv, ".jsonl": _jsonl, ".parquet": _Parquet}
    count = 0
    with ExitStack() as stack:
        stack.enter_context(writing(f"to write the table to {path}"))
        temporary = stack.enter_context(replacing(path))
        write = stack.enter_context(kinds[path.suffix.lower()](temporary))
        if facts is not None:
            write.facts = facts
        for block in blocks:
            write(block)
            count += len(next(iter(block.values())))
    return count


def _lines(block: Block) -> Iterator[tuple[Any, ...]]:
    return zip(*(_plain(values) for values in block.values()), strict=True)


def _plain(values: Any) -> list[Any]:
    return values.tolist() if isinstance(values, np.ndarray) else list(values)


@contextmanager
def _csv(path: Path) -> Iterator[Any]:
    with path.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file:
        writer, begun = csv.writer(file, lineterminator="\n"), False

        def write(block: Block) -> None:
            nonlocal begun
            if not begun:
                writer.writerow(list(block))
                begun = True
            writer.writerows(_lines(block))

        yield write


@contextmanager
def _jsonl(path: Path) -> Iterator[Any]:
    with path.open("w", encoding="utf-8", errors="backslashreplace") as file:

        def write(block: Block) -> None:
            names = list(block)
            for line in _lines(block):
                values = (None if value != value else value for value in line)  # NaN
                file.write(json.dumps(dict(zip(names, values, strict=True)), ensure_ascii=False) + "\n")

        yield write


class _Parquet(AbstractContextManager["_Parquet"]):
    """A Parquet file; a block is a row group.

    Attributes
    ----------
    facts : mapping
        Written as the file's metadata, where there are any.
    """

    def __init__(self, path: Path) -> None:
        self.facts: Mapping[str, Any] = {}
        self._arrow = optional_library("pyarrow", "Parquet files")
        self._parquet = optional_library("pyarrow.parquet", "Parquet files")
        self._path, self._writer = path, cast(Any, None)

    def __call__(self, block: Block) -> None:
        arrays = {name: self._array(values) for name, values in block.items()}
        if self._writer is None:
            metadata = {"ooc_influence": json.dumps(dict(self.facts))} if self.facts else None
            schema = self._arrow.schema([(name, array.type) for name, array in arrays.items()], metadata)
            lists = [name for name, values in block.items() if np.ndim(values) == 2]
            self._writer = self._parquet.ParquetWriter(str(self._path), schema, **_list_settings(list(block), lists))
        schema = self._writer.schema
        columns = [array.cast(kind) for array, kind in zip(arrays.values(), schema.types, strict=True)]
        self._writer.write_table(self._arrow.Table.from_arrays(columns, schema=schema))

    def _array(self, values: Any) -> Any:
        if isinstance(values, np.ndarray) and values.ndim == 2:
            return self._arrow.FixedSizeListArray.from_arrays(self._arrow.array(values.reshape(-1)), values.shape[1])
        if isinstance(values, np.ndarray) and values.dtype.kind in "iufb":
            return self._arrow.array(values)
        texts = [None if value is None else str(value).encode("utf-8", "backslashreplace").decode() for value in values]
        return self._arrow.array(texts, self._arrow.string())

    def __exit__(self, *error: object) -> None:
        if self._writer is not None:
            self._writer.close()


def _list_settings(names: Sequence[str], lists: Sequence[str]) -> dict[str, Any]:
    """Return how a Parquet file with columns of lists is written: their numbers repeat too rarely to be compressed."""
    if not lists:
        return {}
    others = [name for name in names if name not in lists]
    return {"compression": "none", "use_dictionary": others or False, "write_statistics": others or False}


def write_scores_table(path: Path, scores: Any, query: GradientStore, train: GradientStore) -> int:
    """Write scores in a Zarr array (q, n), as :func:`influence_scores` made it, as lines; return how many."""
    averaged = scores.attrs["averaged"]
    names = query.ids() if averaged is None else np.array(averaged)
    return write_table(path, score_blocks(scores, names, train))


class RowTable:
    """The lines of some train rows: what is known of a row beside the result.

    Parameters
    ----------
    store : GradientStore
        The train rows.
    corpus : Corpus or path, optional
        Their documents; default where the store was made from, without texts where that is not there any more.
    rows : (m,) int64
        All rows that will be asked for.
    """

    def __init__(self, store: GradientStore, corpus: Corpus | str | Path | None, rows: Numbers) -> None:
        self._store = store
        self._shown: Examples | None = None
        found = recorded_corpus(store) if corpus is None else Corpus.of(corpus)
        if found.path is not None:
            self._shown = Examples(store, found, np.unique(rows[rows >= 0]), ImageFolder(Path(), "none"))

    def block(self, rows: Numbers, **values: Any) -> Block:
        """Return lines of rows: row, id, the values given, loss, the store's columns, and text where it is known."""
        store = self._store
        block: dict[str, Any] = {"row": rows, "id": store.ids(rows), **values}
        block["loss"] = np.asarray(store.values("loss", rows), np.float32)
        for name, kind in store.layout.columns.items():
            column = store.values(f"columns/{name}", rows) if len(rows) or kind == "str" else np.empty(0, kind)
            block[f"column_{name}" if name in block or name == "text" else name] = column
        if self._shown is not None:
            block["text"] = self._shown.passages(rows)
        return block


def recorded_corpus(store: GradientStore) -> Corpus:
    """Return where the documents of a store's rows were when it was made; without a path, where none are there now."""
    origin = store.attrs.get("origin") or {}
    path = origin.get("data")
    if path is None or not (local_path(path).exists() or glob.glob(path, recursive=True)):  # noqa: PTH207
        return Corpus()
    return Corpus(path, split=origin.get("split"))


def row_blocks(table: RowTable, rows: Numbers, values: Mapping[str, npt.NDArray[Any]]) -> Iterator[Block]:
    """Yield the lines of rows (m,) with values (m,), block by block."""
    for low in range(0, max(1, len(rows)), _BLOCK):
        part = slice(low, low + _BLOCK)
        yield table.block(rows[part], **{name: column[part] for name, column in values.items()})


def list_blocks(
    lists: TopInfluential, train: GradientStore, corpus: Corpus | str | Path | None = None
) -> Iterator[Block]:
    """Yield the lines of top lists: query, query_id, side and rank of every row in one, its score, and what it is."""
    levels = [lists] if lists.dampings is None else [lists.at(number) for number in range(lists.dampings)]
    rankings = [(level, side, getattr(level, side)) for level in levels for side in ("proponents", "opponents")]
    table = RowTable(train, corpus, np.concatenate([ranking.rows.ravel() for _, _, ranking in rankings]))
    for level, side, ranking in rankings:
        queries, places = np.nonzero(ranking.rows >= 0)
        damping = str(level.damping) if np.ndim(level.damping) else level.damping
        values: dict[str, npt.NDArray[Any]] = {
            "query": queries, "query_id": lists.query_ids[queries], "side": np.full(len(queries), side),
            "rank": places + 1, "score": ranking.scores[queries, places],
        }  # fmt: skip
        if ranking.stored is not None:
            values["stored_score"] = ranking.stored[queries, places]
        values["damping"] = np.full(len(queries), np.nan if damping is None else damping)
        yield from row_blocks(table, ranking.rows[queries, places], values)


def selection_blocks(
    selection: Selection, train: GradientStore, corpus: Corpus | str | Path | None = None
) -> Iterator[Block]:
    """Yield the lines of the rows chosen, in the order they were chosen: score, gain and task."""
    values = {"score": selection.scores, "gain": selection.gains, "task": selection.tasks}
    yield from row_blocks(RowTable(train, corpus, selection.rows), selection.rows, values)


def group_blocks(influence: GroupInfluence) -> Iterator[Block]:
    """Yield the lines of sums over groups: query, query_id, group, rows, sum, mean and damping; a block a query."""
    several = influence.sums.ndim == 3
    sums, means = (part if several else part[None] for part in (influence.sums, influence.means))
    size = len(influence.names)
    for level, (of_level, mean) in enumerate(zip(sums, means, strict=True)):
        damping = influence.damping[level] if several else influence.damping
        for number in range(len(of_level)):
            yield {
                "query": np.full(size, number), "query_id": np.repeat(influence.query_ids[number : number + 1], size),
                "group": influence.names, "rows": influence.counts, "sum": of_level[number], "mean": mean[number],
                "damping": np.full(size, str(damping) if np.ndim(damping) else damping),
            }  # fmt: skip


def check_pairs(queries: int, rows: int) -> None:
    """Check that there are not more scores than a table holds.

    Raises
    ------
    InputError
        If there are.
    """
    if queries * rows > PAIRS:
        raise InputError(
            f"expected at most {PAIRS:,} scores to write as lines of a table; received {queries:,} x {rows:,}: average "
            "the queries (--average-queries), or read the array (--out)"
        )


def score_blocks(scores: Any, query_ids: npt.NDArray[Any], train: GradientStore) -> Iterator[Block]:
    """Yield the lines of scores in a Zarr array (q, n): query, query_id, row, id, score; rows without one left out."""
    q, n = scores.shape
    scale = np.float32(scores.attrs.get("scale_factor") or 1)
    step = max(1, _PAIRS_AT_ONCE // q)
    for low in range(0, n, step):
        part = np.asarray(scores[:, low : low + step], np.float32) * scale
        numbers, queries = np.nonzero(~np.isnan(part.T))
        rows = low + numbers
        ids = train.ids(np.arange(low, low + part.shape[1]))
        yield {
            "query": queries, "query_id": query_ids[queries], "row": rows, "id": ids[numbers],
            "score": part[queries, numbers],
        }  # fmt: skip


def read_rows(path: str | Path, store: GradientStore) -> Numbers:
    """Return the rows that a file names, ascending.

    A table names them by ``row``, which is compared with ``id``, or by ``id``; a ``.txt`` file by an id a line, or by
    row numbers where the store has no ids.

    Raises
    ------
    InputError
        If it cannot be read, names no row, or one that is not there.
    MismatchError
        If a row has another id in the store: the file is of another one.
    """
    found: list[Numbers] = []
    records = open_records(path)
    text = Path(path).suffix.lower() == ".txt"
    while some := list(islice(records, _BLOCK)):
        named = [{"id": record["text"]} for record in some] if text else some
        found.append(_rows_of(named, path, store))
    if not found:
        raise InputError(f"expected rows in {path}; received none")
    return np.unique(np.concatenate(found))


def _rows_of(records: Sequence[Mapping[str, Any]], path: str | Path, store: GradientStore) -> Numbers:
    by_row, by_id = ([record.get(name) for record in records] for name in ("row", "id"))
    if None not in by_row:
        try:
            rows = np.array([int(value) for value in by_row if value is not None], np.int64)
        except ValueError as error:
            raise InputError(f"expected row numbers in the column 'row' of {path}; received {error}") from error
        if not 0 <= rows.min() <= rows.max() < store.n:
            raise MismatchError(
                f"expected rows from 0 to {store.n - 1} of {store.path} in {path}; received {int(rows.min())} to "
                f"{int(rows.max())}: give the file of this store"
            )
        names = store.ids(rows).tolist()
        wrong = next((n for n, name in enumerate(names) if by_id[n] is not None and str(by_id[n]) != str(name)), None)
        if wrong is not None:
            raise MismatchError(
                f"expected row {rows[wrong]} of {store.path} to be {by_id[wrong]!r}, as in {path}; received "
                f"{str(names[wrong])!r}: give the file of this store"
            )
        return rows
    if None in by_id:
        raise InputError(f"expected a column 'row' or 'id' in {path}; received {', '.join(map(str, records[0]))}")
    rows = store.find([str(value) if store.layout.ids == "str" else _number(value, path) for value in by_id])
    missing = [by_id[index] for index in np.flatnonzero(rows < 0)[:5].tolist()]
    if missing:
        raise InputError(f"expected ids of {store.path} in {path}; received {missing}, which no row has")
    return rows


def _number(value: Any, path: str | Path) -> int:
    try:
        return int(value)
    except ValueError as error:
        raise InputError(f"expected ids that are whole numbers in {path}; received {error}") from error
