"""The lexical rank of proponents: where a search for a query's words, by BM25, has the same documents.

Influence is for what words do not tell. Where both agree, a search would have done; where they do not, the scores say
something of their own, or are wrong.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ooc_influence.corpus import Bm25
from ooc_influence.influence import TopInfluential
from ooc_influence.progress import Progress
from ooc_influence.report.examples import Corpus, Examples, ImageFolder
from ooc_influence.store import GradientStore

Rows = npt.NDArray[np.int64]
_AT_ONCE = 256  # queries whose texts are looked up


def ranks_of_lists(
    top: TopInfluential, query: GradientStore, train: GradientStore, query_data: Corpus, data: Corpus,
    progress: bool | None = None,
) -> list[Mapping[int, int | None]]:  # fmt: skip
    """Return :func:`lexical_ranks` of all rows in lists, of queries and documents in files.

    Raises
    ------
    InputError, MismatchError
        If their records cannot be read, or are not those of the stores' rows.
    """
    rows = np.concatenate([top.proponents.rows, top.opponents.rows], axis=-1)
    own = [np.unique(each[each >= 0]) for each in np.moveaxis(rows, -2, 0)]
    pictures = ImageFolder(Path(), "none")  # nothing is drawn
    shown = Examples(train, data, np.unique(np.concatenate(own)), pictures)
    asked = Examples(query, query_data, np.arange(query.n), pictures)
    return lexical_ranks(texts_of(asked, query.n), shown, own, progress)


def texts_of(asked: Examples, count: int) -> list[str]:
    """Return the texts of the first rows of a store; empty where one has none."""
    parts = (np.arange(first, min(count, first + _AT_ONCE)) for first in range(0, count, _AT_ONCE))
    return [entry["text"] or "" for part in parts for entry in asked.describe(part)]


def lexical_ranks(
    queries: Sequence[str], shown: Examples, rows: Sequence[Rows], progress: bool | None = None
) -> list[Mapping[int, int | None]]:
    """Return the BM25 rank of the documents of some rows among all documents, query by query, by row.

    Parameters
    ----------
    queries : sequence of str
        Their texts.
    shown : Examples
        The rows' documents, which are read twice from the first to the last.
    rows : sequence of (c,) int64
        For each query, rows of its lists.
    progress : bool, optional
        Show a progress line; silent by default.

    Returns
    -------
    list of mapping
        None for a document without any word of the query, or a row without a document.
    """
    numbers = [shown.document_numbers(np.asarray(own, np.int64)) for own in rows]
    texts = {number: shown.text_of(number) for own in numbers for number in own if number is not None}
    found = Bm25(queries)
    with Progress("bm25", 2 * shown.documents, progress, unit="document") as bar:

        def every() -> Iterator[str]:
            for text in shown.texts():
                yield text
                bar.advance(1)

        found.count(every())
        ordered = sorted(texts)
        scores = found.scores([texts[number] for number in ordered])
        places = {number: place for place, number in enumerate(ordered)}
        chosen = [
            np.array([0.0 if number is None else scores[query, places[number]] for number in own])
            for query, own in enumerate(numbers)
        ]  # fmt: skip
        ranks = found.ranks(every(), chosen)
    return [
        {int(row): int(rank) if score > 0 else None for row, rank, score in zip(own, of_query, values, strict=True)}
        for own, of_query, values in zip(rows, ranks, chosen, strict=True)
    ]  # fmt: skip
