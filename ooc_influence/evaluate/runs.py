"""Retraining runs on disk: a local folder with one file a finished run, whole and durable or not there.

``settings.json`` holds what all runs have in common; ``run-00007.npz`` what run 7 measured, how long it took, and a
digest of the rows and the seed it was trained with, so that a folder is never resumed for other subsets.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ooc_influence.checkpoint import ResumableOutput
from ooc_influence.errors import InputError, MismatchError, StoreFormatError
from ooc_influence.fingerprint import check_same

logger = logging.getLogger("ooc_influence")
Rows = npt.NDArray[np.bool_]
Subsets = npt.NDArray[np.bool_] | Sequence[npt.NDArray[np.bool_]]
_FORMAT = 1


@dataclass(frozen=True, eq=False)
class Runs:
    """What retraining runs measured.

    Attributes
    ----------
    subsets : (m, n) bool, or a sequence of m rows (n,)
        The rows each run was trained on.
    outcomes : (m, q) float64
        What was measured; NaN for runs that are missing. (m, 0) while there are none.
    seconds : (m,) float64
        What each run took; NaN for runs that are missing.
    """

    subsets: Subsets
    outcomes: npt.NDArray[np.float64]
    seconds: npt.NDArray[np.float64]

    @property
    def missing(self) -> list[int]:
        """The runs that are not finished."""
        return [int(run) for run in np.flatnonzero(np.isnan(self.seconds))]

    def table(self) -> list[tuple[str, int, str]]:
        """Return lines ``(state, number of runs, which)``, the missing ones last; runs as ranges (``"3, 7-12"``)."""
        missing = self.missing
        done = sorted(set(range(len(self.subsets))) - set(missing))
        return [(state, len(runs), ranges(runs)) for state, runs in (("finished", done), ("missing", missing)) if runs]

    def __repr__(self) -> str:
        lines = "; ".join(f"{number} {state}: {which}" for state, number, which in self.table())
        return f"<Runs of {self.outcomes.shape[1]} outcomes, {lines}>"


class RunFolder(ResumableOutput):
    """A folder of finished runs.

    Parameters
    ----------
    folder : str or Path
        Where; made if it is not there.
    settings : mapping
        What all runs have in common, JSON values.
    """

    def __init__(self, folder: str | Path, settings: Mapping[str, Any]) -> None:
        try:
            super().__init__(Path(folder), {"format": _FORMAT, **settings})
        except TypeError as error:
            raise InputError(f"expected settings of JSON values; received {settings!r}: {error}") from error
        if Path(folder).is_file():
            raise InputError(f"expected a folder for runs at {self.path}; received a file: choose another")
        self.begin()
        kept = self.kept_settings
        if kept is None:
            raise StoreFormatError(
                f"expected the settings of runs in {self.path}/settings.json; received something else: choose another "
                "folder"
            )
        names = sorted(kept.keys() | self.settings.keys())
        recorded, received = ({name: values.get(name) for name in names} for values in (kept, self.settings))
        check_same(f"the runs in {self.path}", recorded, received, "give the same, or another folder")

    def read(self, run: int, digest: str) -> tuple[npt.NDArray[np.float64], float] | None:
        """Return what a finished run measured, (q,), and its seconds; None where it is missing or cannot be read."""
        arrays = self.get(_name(run))
        if arrays is None or not {"digest", "outcome", "seconds"} <= arrays.keys():
            return None
        check_same(
            f"run {run} in {self.path}", {"rows and seed": str(arrays["digest"])}, {"rows and seed": digest},
            "give the same subsets and seeds, or another folder",
        )  # fmt: skip
        return arrays["outcome"], float(arrays["seconds"])

    def write(self, run: int, digest: str, outcome: npt.NDArray[np.float64], seconds: float) -> None:
        """Write what a run measured, (q,): durable when this returns."""
        self.put(_name(run), {"outcome": outcome, "digest": np.array(digest), "seconds": np.array(seconds)})

    def collect(self, subsets: Subsets, seeds: Sequence[int]) -> Runs:
        """Return what is finished of the runs on ``subsets``, which must be of these subsets and seeds."""
        runs = [self.read(run, run_digest(subsets[run], seeds[run])) for run in range(len(subsets))]
        widths = {len(run[0]) for run in runs if run is not None}
        if len(widths) > 1:
            raise MismatchError(
                f"expected as many outcomes of every run; received {sorted(widths)} in {self.path}: measure the same "
                "rows after every run, in another folder"
            )
        outcomes = np.full((len(runs), max(widths, default=0)), np.nan)
        seconds = np.full(len(runs), np.nan)
        for number, run in enumerate(runs):
            if run is not None:
                outcomes[number], seconds[number] = run
        return Runs(subsets, outcomes, seconds)


def _name(run: int) -> str:
    return f"run-{run:05d}"


def run_digest(rows: Rows, seed: int) -> str:
    """Return what tells a run from others: SHA-256 of its rows and its seed."""
    return hashlib.sha256(np.packbits(rows).tobytes() + f" {len(rows)} {seed}".encode()).hexdigest()


def ranges(numbers: Sequence[int]) -> str:
    """Return ascending whole numbers as text, runs of them as ranges: ``"3, 7-12"``."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1] = [parts[-1][0], number]
        else:
            parts.append([number])
    return ", ".join("-".join(map(str, part)) for part in parts)
