"""How many candidates a sketch must name: measured once for each setting that scores depend on, and kept beside it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from ooc_influence.errors import writing
from ooc_influence.influence.engine import Floats
from ooc_influence.influence.heap import NO_ROW, Numbers
from ooc_influence.influence.norms import SavedNorms
from ooc_influence.store import NewFolder, StorePath, array_store, create_array, exists, open_group

_SPARE = 1.25  # times as many candidates as the measured queries need: others may need more
_FACTS = "ooc_influence_recall"
_CHUNK = 2**17  # norms


@dataclass(frozen=True, eq=False)
class Recall:
    """The ranks in lists of a sketch that the best rows of some queries have.

    Attributes
    ----------
    ranks : (2, L, m, T) int64
        Of proponents and opponents, for every λ and query, by exact scores, best first: from 0; ``longest`` for a row
        that is not among the candidates, -1 where a list is shorter.
    longest : int
        Candidates of the lists that were looked at.
    measured : str
        What the queries were.
    """

    ranks: Numbers
    longest: int
    measured: str

    def of(self, candidates: int, top: int) -> float:
        """Return the share of the best ``top`` rows that are among the first candidates, for the λ that has least."""
        return min(float((ranks < candidates).mean()) if len(ranks) else 1.0 for ranks in self._by_damping(top))

    def candidates(self, top: int, wanted: float) -> int:
        """Return how many candidates hold the share ``wanted`` of the best ``top`` rows, with some to spare."""
        levels = [np.sort(ranks) for ranks in self._by_damping(top)]
        needed = [int(ranks[max(0, math.ceil(wanted * len(ranks)) - 1)]) + 1 for ranks in levels if len(ranks)]
        return min(self.longest, max(top, math.ceil(_SPARE * max(needed, default=0))))

    def _by_damping(self, top: int) -> list[Numbers]:
        levels = (self.ranks[:, level, :, :top].ravel() for level in range(self.ranks.shape[1]))
        return [ranks[ranks >= 0] for ranks in levels]


def list_ranks(best: Numbers, candidates: Numbers) -> Numbers:
    """Return the rank of each of some best rows (T,) among candidates (c,); see :class:`Recall`."""
    order = np.argsort(candidates)
    found = np.minimum(np.searchsorted(candidates[order], best), len(candidates) - 1)
    ranks = np.where(candidates[order[found]] == best, order[found], len(candidates))
    return np.where(best == NO_ROW, -1, ranks)


def keep_recall(path: StorePath, digest: str, recall: Recall) -> None:
    """Write what was measured to ``path``, in place of what is there."""
    facts = {"digest": digest, "longest": recall.longest, "measured": recall.measured}

    def make(group: Any) -> None:
        create_array(group, "ranks", recall.ranks.shape, recall.ranks.shape, "int64", codec="crc32c")[...] = (
            recall.ranks
        )

    _write(path, facts, make)


def kept_recall(path: StorePath, digest: str) -> Recall | None:
    """Return what was measured before, of the same rows at the same settings; None where there is nothing."""
    group = _read(path, digest)
    if group is None:
        return None
    facts = group.attrs[_FACTS]
    return Recall(np.asarray(group["ranks"][...]), facts["longest"], facts["measured"])


def keep_norms(path: StorePath, digest: str, squares: Floats) -> SavedNorms:
    """Write rows' squared norms, (L, n) or (n,), to ``path``, in place of what is there."""
    squares = np.atleast_2d(squares)

    def make(group: Any) -> None:
        chunks = (len(squares), min(_CHUNK, squares.shape[1]))
        create_array(group, "squares", squares.shape, chunks, "float32", codec="crc32c")[...] = squares

    _write(path, {"digest": digest}, make)
    return SavedNorms(path / "squares", digest)


def kept_norms(path: StorePath, digest: str) -> SavedNorms | None:
    """Return where squared norms are, of the same rows at the same settings; None where they are not."""
    return None if _read(path, digest) is None else SavedNorms(path / "squares", digest)


def _write(path: StorePath, facts: dict[str, Any], make: Any) -> None:
    how = writing(f"to keep what was measured in {path}", ", or use a sketch that can be written to")
    with how, NewFolder(path, replace=True) as folder:
        group = open_group(folder.arrays, "w")
        make(group)
        group.attrs[_FACTS] = facts
        folder.publish()


def _read(path: StorePath, digest: str) -> Any:
    if not exists(path / "zarr.json"):
        return None
    group = open_group(array_store(path, read_only=True), "r")
    facts: Any = group.attrs.get(_FACTS)
    return group if facts is not None and facts["digest"] == digest else None
