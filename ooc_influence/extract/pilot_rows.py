"""Rows that a pilot has computed, kept beside the store until the pass over all samples stores them.

The pass that measures Λ in a Kronecker basis computes the rows of its samples, and they are those that the store will
hold: :class:`RowKeeper` writes them, a part for some batches, among what the pilot has summed, and :class:`KnownRows`
reads them by sample number.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor
from zarr.errors import BaseZarrError

from ooc_influence.checkpoint import ResumableOutput, read_facts
from ooc_influence.extract.data import Numbers
from ooc_influence.memory import BLOCK_BYTES
from ooc_influence.store import Mask, StorePath, array_store, chunk_rows, create_array, open_group, remove_tree

logger = logging.getLogger("ooc_influence")
Floats = npt.NDArray[np.float32]
LARGEST = 2**32  # bytes of rows that are kept: of later batches none are
_KIND, _ROWS = "rows-", "rows"
_CHUNK_BYTES = 2**20  # of a few rows, which are read one by one


def gathered_digest(mask: Mask) -> str:
    """Return a digest of all that rows under a mask depend on: not Λ, which is measured from them."""
    unmeasured = (
        each
        if each.basis is None
        else replace(each, basis=replace(each.basis, second_moment=np.zeros(0), mean_moment=0.0))
        for each in mask.modules
    )
    return Mask(tuple(unmeasured)).digest


class RowKeeper:
    """Writes the rows of a pass's batches, before the sums that include them.

    A part has the number of its first batch, so that a resumed pass knows which parts are older than its sums.

    Parameters
    ----------
    output : ResumableOutput
        Where; its settings identify the model, the labels and the compressor.
    mask : Mask
        That rows are gathered by.
    rows : callable -> (b, k) float32 tensor
        Returns the rows of the last batch.
    """

    def __init__(self, output: ResumableOutput, mask: Mask, rows: Callable[[], Tensor]) -> None:
        self._output, self._rows = output, rows
        self._digest, self._row_bytes = gathered_digest(mask), 4 * mask.k
        self._kept = 0  # rows, of this run and those before
        self._first = self._next = 0  # batches that wait to be written
        self._waiting: list[tuple[Numbers, Floats, Floats]] = []

    def begin(self, batches: int) -> None:
        """Remove the parts that are not among the first ``batches`` batches of the pass, which begins after these."""
        for name, path in self._output.groups(_KIND).items():
            if int(name.removeprefix(_KIND)) >= batches:
                remove_tree(path)
            else:
                self._kept += len(read_facts(path)["numbers"])
        self._first = self._next = batches

    def add(self, numbers: Numbers | None, losses: Tensor, *, finite: bool) -> None:
        """Take the rows of the next batch; those that are not finite, or of unknown samples, are not kept."""
        self._next += 1
        known = numbers is not None and len(numbers) == len(losses) and finite and bool(losses.isfinite().all())
        if numbers is None or not known or (self._kept + len(losses)) * self._row_bytes > LARGEST:
            return
        self._kept += len(losses)
        self._waiting.append((numbers, losses.float().cpu().numpy(), self._rows().cpu().numpy()))
        if sum(rows.nbytes for _, _, rows in self._waiting) >= BLOCK_BYTES:
            self.write()

    def write(self) -> None:
        """Write the rows that wait, as a part."""
        if self._waiting:
            numbers, losses, rows = map(_joined, zip(*self._waiting, strict=True))
            chunks = (chunk_rows(rows.shape, _CHUNK_BYTES // 4), rows.shape[1])

            def put(group: Any) -> None:
                # a chunk that is missing reads as NaN, which no row that is kept holds
                create_array(group, _ROWS, rows.shape, chunks, np.float32, fill=np.nan, codec="crc32c")[...] = rows

            facts = {"digest": self._digest, "numbers": numbers.tolist(), "losses": losses.tolist()}
            self._output.put_group(f"{_KIND}{self._first}", self._next, facts, put)
        self._first, self._waiting = self._next, []


def _joined(arrays: Sequence[npt.NDArray[Any]]) -> npt.NDArray[Any]:
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


class KnownRows:
    """Rows of some samples, before any reduction, by sample number.

    Attributes
    ----------
    numbers : (m,) int64
        Of the samples, ascending.
    """

    def __init__(self, output: ResumableOutput | None = None, mask: Mask | None = None) -> None:
        """Find the rows gathered by ``mask`` in an output; none by default, or in one of other settings."""
        parts: list[StorePath] = []
        numbers, losses, places = [np.zeros(0, np.int64)], [np.zeros(0, np.float32)], [np.zeros((0, 2), np.int64)]
        if output is not None and mask is not None and output.kept_settings == output.settings:
            groups, digest = output.groups(_KIND), gathered_digest(mask)
            for name in sorted(groups, key=lambda each: int(each.removeprefix(_KIND))):
                facts = read_facts(groups[name])
                if facts["digest"] == digest:
                    count = len(facts["numbers"])
                    numbers.append(np.array(facts["numbers"], np.int64))
                    losses.append(np.array(facts["losses"], np.float32))
                    places.append(np.stack([np.full(count, len(parts)), np.arange(count)], axis=1))
                    parts.append(groups[name])
        self.numbers, first = np.unique(np.concatenate(numbers), return_index=True)
        self._losses, self._places = np.concatenate(losses)[first], np.concatenate(places)[first]
        self._parts = parts

    def covers(self, numbers: Numbers) -> bool:
        """Whether the rows of all these samples are known."""
        return len(numbers) > 0 and bool(np.isin(numbers, self.numbers).all())

    def losses(self, numbers: Numbers) -> Floats:
        """Return the losses of known samples, (b,)."""
        return self._losses[np.searchsorted(self.numbers, numbers)]

    def rows(self, numbers: Numbers) -> Floats | None:
        """Return the rows of known samples, (b, k); None, with a warning, where one cannot be read."""
        arrays: dict[int, Any] = {}
        found = []
        try:
            for part, place in self._places[np.searchsorted(self.numbers, numbers)].tolist():
                if part not in arrays:
                    arrays[part] = open_group(array_store(self._parts[part], read_only=True), "r")[_ROWS]
                found.append(np.asarray(arrays[part][place]))
                if not np.isfinite(found[-1]).all():
                    raise ValueError(f"a part of row {place} of {self._parts[part]} is missing")
        except (OSError, ValueError, KeyError, BaseZarrError) as error:
            logger.warning("rows of the pilot cannot be read (%s): they are computed again", error)
            return None
        return np.stack(found)


def same_losses(found: Tensor, kept: npt.ArrayLike) -> bool:
    """Whether losses (b,) are those kept: of the same data, model and loss."""
    losses, expected = found.detach().double().cpu().numpy(), np.asarray(kept, np.float64)
    return losses.shape == expected.shape and np.allclose(losses, expected, rtol=1e-2, atol=1e-6, equal_nan=True)
