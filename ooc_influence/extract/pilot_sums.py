"""What passes over a pilot's batches sum, and keeping it beside the store to be made, so that a killed run resumes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from ooc_influence.checkpoint import ResumableOutput, read_facts
from ooc_influence.extract.layers import Use
from ooc_influence.extract.pilot_rows import RowKeeper, same_losses
from ooc_influence.store import Mask, array_store, chunk_rows, create_array, open_group

Arrays = Mapping[str, npt.NDArray[Any]]
_LOSSES = "losses"
_CHUNK_NUMBERS = 2**21  # at most, or those of a row


class PilotSums(Protocol):
    """What a pass over the pilot's batches sums.

    Attributes
    ----------
    samples : int
        Of the batches that count.
    """

    samples: int

    def receiver(self, b: int) -> Callable[[Use, Any, Any], None]:
        """Return the receiver of a batch of ``b`` samples, without what an earlier attempt at it added."""
        ...

    def finish_batch(self, b: int) -> bool:
        """Add the sums of a batch of ``b`` samples; return False, without adding them, if they are not finite."""
        ...

    @property
    def identity(self) -> Any:
        """What is summed, as JSON values: sums of another are of no use."""
        ...

    def state(self) -> tuple[Any, Arrays]:
        """Return the sums so far: JSON values, and arrays."""
        ...

    def restore(self, facts: Any, arrays: Arrays) -> None:
        """Take what :meth:`state` returned in place of the sums so far."""
        ...


@dataclass
class Position:
    """How far a pass is.

    Attributes
    ----------
    batches, seen, skipped : int
        Batches finished, the samples in them, and those of them with NaN or Inf.
    losses : list of float
        Of the last batch.
    """

    batches: int = 0
    seen: int = 0
    skipped: int = 0
    losses: list[float] | None = None

    def add(self, losses: torch.Tensor, *, finite: bool) -> None:
        """Count a batch, by its losses (b,)."""
        self.batches += 1
        self.seen += len(losses)
        self.skipped += 0 if finite else len(losses)
        self.losses = losses.detach().double().tolist()

    def has(self, losses: torch.Tensor) -> bool:
        """Whether these are the losses of the last batch: of the same data, model and loss."""
        return same_losses(losses, self.losses or ())


class PilotParts:
    """Sums of a pilot's passes in a folder, by the pass's name; without a folder, none are kept."""

    def __init__(self, output: ResumableOutput) -> None:
        self._output = output
        self._clock = output.clock()

    def rows_of(self, mask: Mask, rows: Callable[[], torch.Tensor]) -> RowKeeper | None:
        """Return what keeps the rows of a pass under a mask; None without a folder."""
        return None if self._output.path is None else RowKeeper(self._output, mask, rows)

    def save_if_due(self, name: str, position: Position, sums: PilotSums, rows: RowKeeper | None = None) -> None:
        """Write the sums so far, after the rows that are kept of them, if the last were written some time ago."""

        def save() -> None:
            if rows is not None:
                rows.write()
            self.save(name, position, sums)

        if self._clock.due():
            self._clock.run(save)

    def save(self, name: str, position: Position, sums: PilotSums) -> None:
        """Write the sums so far."""
        if self._output.path is None:
            return
        facts, arrays = sums.state()
        arrays = {**arrays, _LOSSES: np.array(position.losses or (), np.float64)}

        def write(group: Any) -> None:
            for key, values in arrays.items():
                chunks = (chunk_rows(values.shape, _CHUNK_NUMBERS), *values.shape[1:])
                array = create_array(group, key, values.shape, chunks, values.dtype, codec="crc32c")
                array[...] = values

        done = {"batches": position.batches, "seen": position.seen, "skipped": position.skipped}
        whole = {"position": done, "samples": sums.samples, "identity": sums.identity, "sums": facts}
        self._output.put_group(_part(name), position.batches, whole, write)

    def resume(self, name: str, sums: PilotSums) -> Position:
        """Restore the sums of a pass, if some were kept, and return how far it was."""
        path = self._output.groups().get(_part(name))
        facts = None if path is None else read_facts(path)
        if path is None or facts is None or facts["identity"] != sums.identity:
            return Position()
        group = open_group(array_store(path, read_only=True), "r")
        arrays = {key: np.asarray(values[...]) for key, values in group.arrays()}
        losses = arrays.pop(_LOSSES).tolist()  # which may be NaN: not in JSON
        sums.restore(facts["sums"], arrays)
        sums.samples = facts["samples"]
        return Position(**facts["position"], losses=losses)


def _part(name: str) -> str:
    return name.replace(" ", "-").replace("/", "-of-")
