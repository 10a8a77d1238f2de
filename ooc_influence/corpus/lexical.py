"""Okapi BM25 over documents that are read one after the other and never held (Robertson and Zaragoza 2009).

Libraries keep an index of all words of all documents. Here only the words of some queries are counted, in one pass over
the documents; another ranks what the caller names. Memory holds the queries' words and a block of documents.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

Floats = npt.NDArray[np.float64]
_WORD = re.compile(r"\w+")
_BLOCK = 512  # documents at a time
K1, B = 1.2, 0.75


def words(text: str) -> list[str]:
    """Return a text's words, in lower case."""
    return _WORD.findall(text.lower())


class Bm25:
    """Scores of documents for some queries.

    A query's words count once each; a word that ``count`` met in no document counts for nothing.

    Parameters
    ----------
    queries : sequence of str
        Their texts.
    """

    def __init__(self, queries: Sequence[str]) -> None:
        asked = [sorted(set(words(text))) for text in queries]
        self._terms = {word: number for number, word in enumerate(sorted({word for own in asked for word in own}))}
        self._asked = _sparse([Counter(self._terms[word] for word in own) for own in asked], len(self._terms))
        self._holding = np.zeros(len(self._terms))
        self._words = self.documents = 0

    def count(self, texts: Iterable[str]) -> None:
        """Count the documents that hold each word, and their lengths: of all documents, before anything is scored."""
        for text in texts:
            found, length = self._counts(text)
            self._holding[list(found)] += 1
            self._words += length
            self.documents += 1

    def _counts(self, text: str) -> tuple[Counter[int], int]:
        found = words(text)
        return Counter(self._terms[word] for word in found if word in self._terms), len(found)

    def scores(self, texts: Sequence[str]) -> Floats:
        """Return the scores of documents, (q, m)."""
        counted = [self._counts(text) for text in texts]
        tf = _sparse([found for found, _ in counted], len(self._terms))
        lengths = np.array([length for _, length in counted], np.float64)
        mean = self._words / max(1, self.documents) or 1.0
        base = np.repeat(K1 * (1 - B + B * lengths / mean), np.diff(tf.indptr))
        rare = np.log1p((self.documents - self._holding + 0.5) / (self._holding + 0.5))
        tf.data = np.where(self._holding > 0, rare, 0)[tf.indices] * tf.data * (K1 + 1) / (tf.data + base)
        return np.asarray((self._asked @ tf.T).toarray())

    def ranks(self, texts: Iterable[str], chosen: Sequence[Floats]) -> list[npt.NDArray[np.int64]]:
        """Return the ranks of scores among those of all documents, from 1; of equal ones the best.

        Parameters
        ----------
        texts : iterable of str
            All documents, as they were counted.
        chosen : sequence of (c,) float64
            For each query, the scores to rank.
        """
        orders = [np.argsort(values, kind="stable") for values in chosen]
        ordered = [values[order] for values, order in zip(chosen, orders, strict=True)]
        higher = [np.zeros(len(values) + 1, np.int64) for values in chosen]
        for block in _blocks(texts):
            for values, row, counts in zip(ordered, self.scores(block), higher, strict=True):
                counts += np.bincount(np.searchsorted(values, row - _ROUNDING * np.abs(row)), minlength=len(counts))
        found = []
        for order, counts in zip(orders, higher, strict=True):
            ranks = np.empty(len(order), np.int64)
            ranks[order] = 1 + counts[::-1].cumsum()[::-1][1:]  # documents whose score is above
            found.append(ranks)
        return found


_ROUNDING = 1e-9  # relative: a document's score is not above itself where it was summed in another order


def _blocks(texts: Iterable[str]) -> Iterator[list[str]]:
    rest = iter(texts)
    while block := list(islice(rest, _BLOCK)):
        yield block


def _sparse(counts: Sequence[Counter[int]], width: int) -> csr_matrix:
    from scipy.sparse import csr_matrix

    ends = np.cumsum([0, *(len(each) for each in counts)])
    indices = np.array([term for each in counts for term in each], np.int64)
    values = np.array([value for each in counts for value in each.values()], np.float64)
    return csr_matrix((values, indices, ends), shape=(len(counts), width))


def bm25(queries: Sequence[str], texts: Sequence[str]) -> Floats:
    """Return BM25 scores of texts for queries, (q, n) float64."""
    found = Bm25(queries)
    found.count(texts)
    return np.concatenate([np.zeros((len(queries), 0)), *map(found.scores, _blocks(texts))], axis=1)
