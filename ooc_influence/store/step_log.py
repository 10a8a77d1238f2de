"""What an optimiser did at each step of a training, beside the rows that were collected in it.

Records are appended to the folder ``optimizer`` of a store: in files of some megabytes, each written whole and durably,
named by the number of its first record, and NumPy archives whose members have checksums. What does not change from step
to step is in ``columns.npz``. Nothing is ever written over, so that a training which continues from a checkpoint
removes the files written after it.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from ooc_influence.errors import InputError, StoreDamagedError
from ooc_influence.fingerprint import array_digest, check_same
from ooc_influence.store import paths
from ooc_influence.store.paths import StorePath

FOLDER = "optimizer"
WEIGHT = "weight"  # the column of rows with what each sample's loss was multiplied by in its batch's
SCALARS = 7  # see StepRecord
_COLUMNS = "columns.npz"
_SUFFIX = ".npz"
_SEGMENT_BYTES = 2**23

Floats = npt.NDArray[np.float32]
Scalars = npt.NDArray[np.float64]
Arrays = Mapping[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class StepRecord:
    """One step of an optimiser.

    Attributes
    ----------
    step : int
        The number of the training step, as rows have it.
    factor : float
        By what the optimiser's gradient had been multiplied since the backward pass: clipping, the loss scale undone.
    total : float
        The sum of the samples' weights in the loss of the step.
    scalars : (P, SCALARS) float64
        Of each parameter the learning rate, the decoupled weight decay, the weight decay that is added to the gradient,
        then of Adam β₁, β₂, ε and the count of its steps; of SGD momentum, dampening, whether it is Nesterov's, and 1
        at the first step, else 2. The last is 0 for a parameter that had no gradient and was left as it was.
    vectors : (3, k) float32, or None
        Of Adam after the step: first and second moments at the kept entries, and the gradient that they received.
    """

    step: int
    factor: float
    total: float
    scalars: Scalars
    vectors: Floats | None


@dataclass(frozen=True)
class LoggedColumns:
    """What is the same at each step.

    Attributes
    ----------
    facts : mapping
        JSON values: the optimiser's name, its ``algorithm`` (``"adam"`` or ``"sgd"``), how often vectors are recorded.
    owner : (k,) int32
        The number of the parameter that each column of the rows belongs to; -1 for none that the optimiser has.
    """

    facts: Mapping[str, Any]
    owner: npt.NDArray[np.int32]


class StepLogWriter:
    """Appends records of steps to a store.

    Parameters
    ----------
    store : StorePath
        The store's folder, which need not be there before the first :meth:`flush`.
    columns : LoggedColumns
        What is the same at each step.
    """

    def __init__(self, store: StorePath, columns: LoggedColumns) -> None:
        self._folder, self._columns = store / FOLDER, columns
        self._waiting: list[StepRecord] = []
        self._started = False
        self._flushed, self.last_step = _end(self._folder)
        if self._flushed:
            self._check_same()

    def __len__(self) -> int:
        return self._flushed + len(self._waiting)

    def _check_same(self) -> None:
        there = _read_columns(self._folder)
        check_same(
            f"the optimiser's records in {self._folder}",
            {**there.facts, "columns' parameters": array_digest(there.owner)},
            {**self._columns.facts, "columns' parameters": array_digest(self._columns.owner)},
            "continue with the same optimiser and settings, or collect to another path",
        )  # fmt: skip
        self._started = True

    @property
    def full(self) -> bool:
        """Whether what waits to be written is a file of its own."""
        vectors = (record.vectors for record in self._waiting)
        return sum(each.nbytes for each in vectors if each is not None) >= _SEGMENT_BYTES or len(self._waiting) >= 4096

    def append(self, record: StepRecord) -> None:
        """Add a record, whose step is larger than all before.

        Raises
        ------
        InputError
            If it is not.
        """
        if self.last_step is not None and record.step <= self.last_step:
            raise InputError(
                f"expected a step of the collector for each step of the optimiser; received step {record.step} again "
                f"after {self.last_step}: put each step's backward passes into collector.step(...), and, where a "
                "training continues, load the collector's state (load_state_dict)"
            )
        self._waiting.append(record)
        self.last_step = record.step

    def flush(self) -> None:
        """Write what waits, durably."""
        if not self._waiting:
            return
        paths.make_folder(self._folder)
        if not self._started:
            facts = np.frombuffer(json.dumps(dict(self._columns.facts)).encode(), np.uint8)
            paths.write_bytes(self._folder / _COLUMNS, _packed({"facts": facts, "owner": self._columns.owner}))
            self._started = True
        paths.write_bytes(self._folder / _name(self._flushed), _packed(_segment(self._waiting)))
        self._flushed += len(self._waiting)
        self._waiting.clear()

    def truncate(self, records: int) -> None:
        """Remove records from number ``records`` on: what was written after a checkpoint.

        Raises
        ------
        StoreDamagedError
            If that is inside a file, or there are fewer.
        """
        self._waiting.clear()
        for first in reversed(_firsts(self._folder)):
            if first >= records:
                paths.remove_file(self._folder / _name(first))
        self._flushed, self.last_step = _end(self._folder)
        if self._flushed != records:
            raise StoreDamagedError(
                f"expected {records} steps of the optimiser in {self._folder}, as when the checkpoint was saved; "
                f"received {self._flushed}: continue from another checkpoint, or collect to another path"
            )


class StepLog:
    """The records of a store's steps, read file by file.

    Attributes
    ----------
    steps : (m,) int64
        The steps' numbers, rising.
    columns : LoggedColumns
        What is the same at each step.

    Raises
    ------
    InputError
        If the store has none.
    StoreDamagedError
        If files are missing or damaged.
    """

    def __init__(self, store: StorePath) -> None:
        self._folder = store / FOLDER
        self._firsts = _firsts(self._folder)
        if not self._firsts:
            raise InputError(
                f"expected the optimiser's steps beside the rows in {store}; received none: collect the rows with "
                "ooc.collect(..., optimizer=the optimiser); compacted, merged and rewritten stores have none"
            )
        self.columns = _read_columns(self._folder)
        small = [self._part(first, "steps", "recorded") for first in self._firsts]
        self.steps = np.concatenate([each["steps"] for each in small])
        recorded = np.concatenate([each["recorded"] for each in small])
        ends = [*self._firsts[1:], len(self.steps)]
        if self._firsts[0] or any(
            len(each["steps"]) != end - first for each, first, end in zip(small, self._firsts, ends, strict=True)
        ):
            raise StoreDamagedError(
                f"expected the optimiser's steps in {self._folder} without a gap; received some: restore the folder "
                "from a backup, or collect again"
            )
        self._held = np.maximum.accumulate(np.where(recorded, np.arange(len(recorded)), 0))
        self._file = lru_cache(2)(self._read)  # that of a record, and of the vectors that it takes

    def __len__(self) -> int:
        return len(self.steps)

    def _part(self, first: int, *members: str) -> dict[str, npt.NDArray[Any]]:
        return _unpacked(self._folder / _name(first), members)

    def _read(self, first: int) -> dict[str, npt.NDArray[Any]]:
        return _unpacked(self._folder / _name(first))

    def record(self, number: int) -> StepRecord:
        """Return a record; its vectors are None where none were recorded at that step."""
        first = self._firsts[int(np.searchsorted(self._firsts, number, side="right")) - 1]
        arrays, index = self._file(first), number - first
        units = int(arrays["units"][:index].sum())
        distinct = arrays["scalars"][units : units + int(arrays["units"][index])]
        vectors = None
        if arrays["recorded"][index]:
            vectors = arrays["vectors"][int(arrays["recorded"][:index].sum())]
        return StepRecord(
            int(arrays["steps"][index]), float(arrays["factors"][index]), float(arrays["totals"][index]),
            distinct[arrays["unit_of"][index]], vectors,
        )  # fmt: skip

    def backwards(self) -> Iterator[tuple[StepRecord, StepRecord]]:
        """Yield each record from the last, and the one whose vectors hold there: itself, or the last before."""
        for number in range(len(self) - 1, -1, -1):
            record, held = self.record(number), int(self._held[number])
            yield record, record if held == number else self.record(held)


def _name(first: int) -> str:
    return f"{first:012d}{_SUFFIX}"


def _firsts(folder: StorePath) -> list[int]:
    """Return the numbers of the first records of the files in a folder, rising."""
    stems = [name.removesuffix(_SUFFIX) for name in paths.names(folder) if name.endswith(_SUFFIX)]
    return sorted(int(stem) for stem in stems if stem.isdigit())


def _end(folder: StorePath) -> tuple[int, int | None]:
    """Return how many records a folder has, and the last one's step."""
    firsts = _firsts(folder)
    if not firsts:
        return 0, None
    steps = _unpacked(folder / _name(firsts[-1]), ("steps",))["steps"]
    return firsts[-1] + len(steps), int(steps[-1])


def _read_columns(folder: StorePath) -> LoggedColumns:
    arrays = _unpacked(folder / _COLUMNS)
    return LoggedColumns(json.loads(arrays["facts"].tobytes()), arrays["owner"])


def _segment(records: list[StepRecord]) -> dict[str, npt.NDArray[Any]]:
    """Return records as arrays; parameters mostly have the same scalars, of which distinct ones are kept."""
    distinct = [np.unique(record.scalars, axis=0, return_inverse=True) for record in records]
    vectors = [record.vectors for record in records if record.vectors is not None]
    return {
        "steps": np.array([record.step for record in records], np.int64),
        "factors": np.array([record.factor for record in records]),
        "totals": np.array([record.total for record in records]),
        "units": np.array([len(rows) for rows, _ in distinct]),
        "scalars": np.concatenate([rows for rows, _ in distinct]),
        "unit_of": np.array([inverse.reshape(-1) for _, inverse in distinct], np.uint16),
        "recorded": np.array([record.vectors is not None for record in records]),
        "vectors": np.stack(vectors) if vectors else np.empty((0, 3, 0), np.float32),
    }


def _packed(arrays: Arrays) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    return buffer.getvalue()


def _unpacked(path: StorePath, members: tuple[str, ...] | None = None) -> dict[str, npt.NDArray[Any]]:
    """Return the arrays in a file, whose checksums are checked as they are read."""
    try:
        source: Any = str(path)
        if not paths.is_local(path):
            source = io.BytesIO(paths.read_bytes(path) or b"")
        with np.load(source, allow_pickle=False) as archive:
            return {name: archive[name] for name in members or archive.files}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise StoreDamagedError(
            f"expected the optimiser's steps in {path}; received a damaged file ({error}): restore it from a backup, "
            "or collect again"
        ) from error
