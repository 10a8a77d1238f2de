"""Where the rows of a training go: into a store, blocks of one that several processes write, or averages."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ooc_influence.errors import InputError, StoreNotFoundError
from ooc_influence.extract.averages import Averages
from ooc_influence.extract.data import RowMetadata
from ooc_influence.extract.packing import SignPacker
from ooc_influence.extract.passes import PendingTransfer
from ooc_influence.extract.pilot import remove_pilot
from ooc_influence.extract.ranks import Ranks, open_sink
from ooc_influence.extract.sink import Sink, StorePlan, open_existing
from ooc_influence.options import CollectOptions
from ooc_influence.store import GradientStore, PathLike


class CollectedRows:
    """The rows of a training, on disk.

    Parameters
    ----------
    path, plan, options
        The store, what is in it, and what was asked for.
    ranks : Ranks or None
        This process among those that train together.
    averages : Averages or None
        The averages that rows are added to, if they are.
    """

    def __init__(
        self, path: PathLike, plan: StorePlan, options: CollectOptions, ranks: Ranks | None, averages: Averages | None
    ) -> None:  # fmt: skip
        self.path, self.plan = path, plan
        self._options, self._ranks, self._averages = options, ranks, averages
        self._metadata: RowMetadata | None = None
        self._sink: Sink | None = None
        self._packer: SignPacker | None = None

    @property
    def reserved(self) -> tuple[str, ...]:
        """Names of columns that are made here."""
        return () if self._averages is None else ("rows",)

    def open(self, sources: Mapping[str, Callable[[Any], Any]], device: torch.device) -> None:
        """Take rows until :meth:`close`, whose columns are found in batches by ``sources``."""
        self._metadata, self._device = RowMetadata.of(None, sources), device
        if self._averages is not None:
            self._averages.open()
        self._open()

    def close(self) -> None:
        """Let others write. Not a context: the end of a generator would wait for the disk where garbage is freed."""
        self._close()
        if self._averages is not None:
            self._averages.close()

    def _open(self) -> None:
        latest = self.path if self._averages is None else self._averages.latest
        with suppress(StoreNotFoundError):  # the weights have changed since the store was made
            model = {"model": dict(GradientStore.open(latest).attrs["model"])}
            self.plan = replace(self.plan, attributes=self.plan.attributes | model)
            open_existing(latest, self.plan)
        path = self.path if self._averages is None else self._averages.journal
        assert self._metadata is not None
        self._sink = open_sink(path, self.plan, self._metadata, self._ranks, self._options["on_nonfinite"])
        self._packer = self._sink.packer(self._device)

    def _close(self) -> None:
        sink, self._sink = self._sink, None
        if sink is not None:
            sink.close()

    @property
    def sink(self) -> Sink:
        """What writes; of open rows only."""
        if self._sink is None:
            raise InputError("expected a step inside the collector's context; received one outside: use 'with'")
        return self._sink

    def check_step(self, ids: list[Any]) -> None:
        """Check that rows of these ids may be collected now."""
        if self._averages is not None:
            self._averages.check_step(ids)

    def take(
        self, batch: Any, losses: npt.NDArray[np.float32] | None, rows: Tensor, norms: Tensor
    ) -> None:  # fmt: skip
        """Append a batch's rows (b, columns) with their norms (b,) and, where they are known, losses (b,)."""
        self._note_losses(losses is not None)
        values = rows.new_zeros(len(rows)) if losses is None else torch.from_numpy(losses)
        computed = PendingTransfer.of(self._packer, values, rows, norms).result()
        self.sink.take(batch, self.sink.next_row, computed)

    def _note_losses(self, there: bool) -> None:
        """Check that either all rows or none have a loss, and record which: weights of rows need them."""
        store = self.sink.store
        facts = (self.plan.attributes if store is None else store.attrs)["collected"]
        if facts.get("losses", there) != there:
            expected, received = ("losses" if each else "no losses" for each in (not there, there))
            raise InputError(
                f"expected {expected} of this step, as of those before; received {received}: call Step.record in every "
                "step, or in none"
            )
        if store is None:
            facts["losses"] = there

    @property
    def made(self) -> bool:
        """Whether there is a store yet."""
        return self._sink is not None and self._sink.store is not None

    def fold(self) -> None:
        """Add the rows since the last time to the averages.

        Raises
        ------
        InputError
            Where there are none.
        """
        if self._averages is None:
            raise InputError("expected averages to fold rows into; received a collector of single rows: average=True")
        with self._reopening():
            self._averages.fold(self._options["storage"], self._options["progress"])

    @contextmanager
    def _reopening(self) -> Iterator[None]:
        """Close what writes meanwhile."""
        self._close()
        try:
            yield
        finally:
            self._open()

    def state(self) -> dict[str, Any]:
        """Commit what was taken, and return what belongs into a checkpoint."""
        rows = self.sink.commit()
        return {"rows": rows} | ({} if self._averages is None else self._averages.state(rows))

    def restore(self, state: Mapping[str, Any]) -> None:
        """Drop what was taken after a checkpoint."""
        rows = state["rows"]
        if self._averages is not None:
            with self._reopening():
                rows = self._averages.restore(state)
        self.sink.drop_from(rows)

    def finish(self, model: Mapping[str, Any]) -> None:
        """Finish the store: from now on it is of the trained model."""
        if self._ranks is None or self._ranks.index == 0:
            remove_pilot(self.path if self._averages is None else self._averages.first)
        if self._averages is None:
            self.sink.finish(model=model)
            return
        self.fold()
        self._close()
        self._averages.publish(model)
