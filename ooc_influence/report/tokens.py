"""The tokens of queries and of the rows listed for them as values of a page: pieces of text with their shares.

Pieces are what a reader can see: tokens that are parts of one character are one piece, and so are neighbours that have
no share (a prompt, a template, padding). Of a text that is too long for a page, the part that weighs most is kept.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ooc_influence._version import __version__
from ooc_influence.checkpoint import ResumableOutput
from ooc_influence.curvature import Curvature
from ooc_influence.influence import TopInfluential
from ooc_influence.report.examples import TEXT_LIMIT, Corpus
from ooc_influence.report.folder import PageFolder
from ooc_influence.store import GradientStore

if TYPE_CHECKING:
    from ooc_influence.hf import Loaded
    from ooc_influence.influence.tokens import Shares

_SHOWN = {"query": 1200, "row": 420}  # characters of a text that a page shows at first
_DIGITS = 4  # of a share

Piece = tuple[str, float]


def token_pieces(texts: Sequence[str], shares: npt.ArrayLike, shown: int) -> dict[str, Any]:
    """Return the tokens of a text in a page's form.

    Parameters
    ----------
    texts : sequence of str
        What each token adds to the text; empty for parts of a character that a later token completes.
    shares : (t,) array
        Their shares of a score.
    shown : int
        Characters that a page shows at first.

    Returns
    -------
    dict
        ``pieces``: [text, share] each; ``first``: the first of them, and the one after the last, to show at first;
        ``before`` and ``after``: characters left out at the two ends; ``left_out``: the share of what is left out.
    """
    whole = list(_characters(texts, np.asarray(shares, np.float64).tolist()))
    lengths = np.array([len(text) for text, _ in whole], np.int64)
    weights = np.abs([share for _, share in whole])
    start, stop = _strongest_part(lengths, weights, TEXT_LIMIT)
    low, high = (start + edge for edge in _strongest_part(lengths[start:stop], weights[start:stop], shown))
    parts = [_joined(whole[first:last]) for first, last in ((start, low), (low, high), (high, stop))]
    return {
        "pieces": [[text, float(f"{share:.{_DIGITS}g}")] for part in parts for text, share in part],
        "first": [len(parts[0]), len(parts[0]) + len(parts[1])],
        "before": int(lengths[:start].sum()),
        "after": int(lengths[stop:].sum()),
        "left_out": sum(share for _, share in whole[:start] + whole[stop:]),
    }


def _characters(texts: Sequence[str], shares: Sequence[float]) -> Iterator[Piece]:
    """Yield tokens, those without a text of their own with the next one that has some, or at the end by themselves."""
    waiting, pending = 0.0, False
    for text, share in zip(texts, shares, strict=True):
        waiting, pending = waiting + share, True
        if text:
            yield text, waiting
            waiting, pending = 0.0, False
    if pending:
        yield "", waiting


def _joined(tokens: Sequence[Piece]) -> list[Piece]:
    """Return tokens with each run of those without a share as one."""
    runs: list[tuple[list[str], float]] = []
    for text, share in tokens:
        if runs and share == 0 and runs[-1][1] == 0:
            runs[-1][0].append(text)
        else:
            runs.append(([text], share))
    return [("".join(texts), share) for texts, share in runs]


def _strongest_part(
    lengths: npt.NDArray[np.int64], weights: npt.NDArray[np.float64], limit: int
) -> tuple[int, int]:  # fmt: skip
    """Return the part [start, stop) of at most ``limit`` characters, or one token, that weighs most; the first such."""
    n = len(lengths)
    if int(lengths.sum()) <= limit:
        return 0, n
    ends, sums = (np.concatenate([[0], np.cumsum(values)]) for values in (lengths, weights))
    stops = np.searchsorted(ends, ends[:-1] + limit, side="right") - 1
    stops = np.maximum(stops, np.arange(1, n + 1))
    start = int(np.argmax(sums[stops] - sums[:-1]))
    return start, int(stops[start])


@dataclass(frozen=True)
class TokenPages:
    """The tokens of queries in a page's form: of one query at a time, so that memory holds those of one.

    ``parts`` keeps those of finished queries.
    """

    shares: Shares
    parts: ResumableOutput = field(default_factory=ResumableOutput)

    @classmethod
    def open(
        cls, stores: tuple[GradientStore, GradientStore], top: TopInfluential, loaded: Loaded, data: tuple[Any, Any],
        curvature: Curvature | None, count: int, scoring: Mapping[str, Any],
    ) -> TokenPages:  # fmt: skip
        """Open what computes the tokens of each query, and of the ``count`` first rows of each of its lists.

        ``stores`` are the queries' and the rows', ``data`` their documents, None where the store recorded them;
        ``curvature`` is the one of the lists, open already; ``scoring`` are options of the call.

        Raises
        ------
        OocInfluenceError
            See :func:`ooc_influence.token_influence`.
        """
        from ooc_influence.influence.tokens import open_shares

        lists = replace(top, proponents=top.proponents.first(count), opponents=top.opponents.first(count))
        if curvature is not None:
            lists = replace(lists, settings={**lists.settings, "curvature": curvature})
        options: Any = {name: scoring[name] for name in ("memory", "progress") if name in scoring}
        return cls(open_shares(*stores, loaded, data=data, lists=lists, **options))

    def kept(self, folder: PageFolder) -> TokenPages:
        """Return the same, with parts that the folder keeps until its page is published."""
        return replace(self, parts=folder.keep_parts({"digest": self.shares.digest, "version": __version__}))

    def of_query(self, number: int) -> dict[str, Any] | None:
        """Return ``query``, a query's tokens, and ``rows``, by row (as text) those of its lists; None without lists."""
        name = f"tokens-{number}-{number + 1}"
        part = self.parts.get(name)
        if part is not None:
            read: dict[str, Any] | None = json.loads(part["json"].tobytes())
            return read
        found = self._compute(number)
        self.parts.put(name, {"json": np.frombuffer(json.dumps(found).encode(), np.uint8)})
        return found

    def _compute(self, number: int) -> dict[str, Any] | None:
        (found,) = self.shares.of([number])
        if not len(found.rows) or found.texts is None or found.query_text is None:
            return None
        rows = zip(found.rows.tolist(), found.texts, found.tokens, strict=True)
        return {
            "query": token_pieces(found.query_text, found.query_tokens, _SHOWN["query"]),
            "rows": {str(row): token_pieces(texts, shares, _SHOWN["row"]) for row, texts, shares in rows},
        }


def load_model(model: Loaded | str | Path, train: GradientStore) -> Loaded:
    """Return a loaded language model after checking that ``train`` was made with it.

    Raises
    ------
    MismatchError
        If it was not.
    MissingExtraError
        Without the extra ``hf``.
    """
    from ooc_influence.extract import check_model
    from ooc_influence.hf import Loaded, load

    loaded = model if isinstance(model, Loaded) else load(model)
    check_model(
        train, loaded.model,
        "name the model that the store was extracted with (and its --adapter, --revision, --model-dtype)",
    )  # fmt: skip
    return loaded


def documents_of(corpus: Corpus) -> str | Path | None:
    """Return where the documents are that rows were made of; None for where their store recorded them.

    A file whose records are matched by an id may have others, in another order.
    """
    return corpus.path if corpus.id is None else None
