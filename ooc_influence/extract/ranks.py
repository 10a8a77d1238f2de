"""Rows of a training in several processes: each writes its own into one store, whose number of rows nobody knows yet.

Rows are divided into blocks. Process r of N writes blocks r, r + N, r + 2N, ... under a claim of its own, so that
nothing but the plan is shared; whoever reaches its end extends it. Processes of one training take as many steps as each
other, so that readers, who see rows up to the first gap, are at most a block of each process behind. At the end each
process fills its last block with tombstones as far as other rows follow it, and the plan is cut there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from typing_extensions import override

from ooc_influence.errors import InputError, MismatchError, OocInfluenceError
from ooc_influence.extract.data import Batching, RowMetadata, Shard
from ooc_influence.extract.sink import Computed, Sink, StorePlan, open_existing
from ooc_influence.options import OnNonFinite
from ooc_influence.store import GradientStore, PathLike, Storage, mark_dropped

_BLOCK_ROWS = 256  # of a block, at most, where the caller has not chosen the chunks
_AHEAD = 32  # blocks of each process that the plan is extended by
NO_STEP = -1  # the step of a row that fills a block


@dataclass(frozen=True)
class Ranks:
    """A process among those that train together."""

    index: int
    count: int

    @classmethod
    def current(cls) -> Ranks | None:
        """Return what ``torch.distributed`` was initialised with; None for a training in one process."""
        import torch.distributed as dist

        if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
            return None
        return cls(dist.get_rank(), dist.get_world_size())

    def gather(self, value: Any) -> list[Any]:
        """Return the value of each process; all of them have to make this call."""
        import torch.distributed as dist

        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value)
        return values

    def from_first(self, make: Callable[[], Any]) -> Any:
        """Return what the first process makes, or raise its error; all of them have to make this call."""
        import torch.distributed as dist

        made: list[Any] = [None, None]
        if self.index == 0:
            try:
                made[0] = make()
            except OocInfluenceError as error:
                made[1] = error
        dist.broadcast_object_list(made, src=0)
        if made[1] is not None:
            raise made[1]
        return made[0]

    def check_same(self, path: PathLike) -> None:
        """Refuse processes that write different stores."""
        paths = sorted(set(self.gather(str(path))))
        if len(paths) > 1:
            raise InputError(
                f"expected one store for all {self.count} processes of a training; received {', '.join(paths)}: give "
                "each process the same path"
            )


class RankSink(Sink):
    """One process's blocks of a store; ``start`` to ``stop`` is the block being filled."""

    def __init__(
        self, path: PathLike, plan: StorePlan, metadata: RowMetadata, ranks: Ranks, on_nonfinite: OnNonFinite
    ) -> None:  # fmt: skip
        self._ranks = ranks
        chunk_rows, group_chunks = _blocks(plan).sizes(plan.k, plan.dtype)
        self._block = chunk_rows * group_chunks
        super().__init__(path, plan, metadata, Batching(), Shard(ranks.index, ranks.count), None, on_nonfinite)

    @override
    def _begin(self) -> None:
        self._enter_block(0)

    def _enter_block(self, number: int) -> None:
        """Set the range to this process's block of a number."""
        self.start = (number * self._ranks.count + self._ranks.index) * self._block
        self.stop = self.start + self._block

    @property
    def _left(self) -> int:
        """The rows that the block lacks."""
        return self.start + self._block - self.next_row

    @property
    @override
    def _planned(self) -> int:
        return _AHEAD * self._ranks.count * self._block

    @override
    def _storage(self, rows: int | None) -> Storage:
        return _blocks(self.plan)

    @override
    def _claim(self, store: GradientStore) -> None:
        """Claim the process's blocks, and begin with the first that is not full."""
        check_processes(store, self._ranks.count)
        self._block = store.layout.group_rows
        self._enter_block(self._full_blocks(store))
        self._make_room(store)
        store.turns_writer(self._ranks.index, self._ranks.count, self.start)
        self._restore_uncommitted(store)

    def _full_blocks(self, store: GradientStore) -> int:
        chunks = store.layout.group_chunks
        rows = np.concatenate([store.committed_rows, np.zeros(-len(store.committed_rows) % chunks, np.int64)])
        filled = rows.reshape(-1, chunks).sum(1)[self._ranks.index :: self._ranks.count]
        short = np.flatnonzero(filled < self._block)
        return int(short[0]) if short.size else len(filled)

    def _make_room(self, store: GradientStore) -> None:
        """Extend the plan if the block is beyond it."""
        stop = self.start + self._block
        if stop > (store.layout.planned_rows or 0):
            rounds = -(-stop // (self._block * self._ranks.count)) + _AHEAD
            store.extend(rounds * self._block * self._ranks.count)

    def _next_block(self) -> None:
        assert self.store is not None
        self._enter_block(self.start // (self._block * self._ranks.count) + 1)
        self._make_room(self.store)
        self.store.writer().move_to(self.start, self.start + self._block)

    @property
    def _own_next(self) -> int:
        """How many rows this process has appended."""
        blocks = self.start // (self._block * self._ranks.count)
        return blocks * self._block + self.next_row - self.start

    @override
    def take(self, batch: Mapping[str, list[Any]], row: int, computed: Computed) -> None:
        """Append the rows of a batch, all of which are this process's."""
        first, count = 0, len(computed.losses)
        while first < count:
            if not self._left:
                self._next_block()
            last = min(count, first + self._left)
            part = {name: values[first:last] for name, values in batch.items()}
            super().take(part, self.next_row, computed.part(first, last))
            first = last

    @override
    def verified(self, facts: Mapping[str, Any]) -> None:
        if self.store is None:
            super().verified(facts)
            return
        with self.store.changing():
            super().verified(facts)

    @override
    def commit(self) -> Any:
        """Commit what was appended; return how many rows each process has. All of them have to make this call."""
        super().commit()
        return self._ranks.gather(self._own_next)

    @override
    def drop_from(self, rows: Any) -> None:
        if not isinstance(rows, list) or len(rows) != self._ranks.count:
            raise MismatchError(
                f"expected the state of a training in {self._ranks.count} processes; received {rows!r} rows: continue "
                "in as many processes as the checkpoint was saved by"
            )
        saved, present = rows[self._ranks.index], self._own_next
        if present < saved:
            raise self._too_few(saved, present)
        if present > saved:
            assert self.store is not None
            self.store.flush()
            blocks, inside = np.divmod(np.arange(saved, present), self._block)
            numbers = (blocks * self._ranks.count + self._ranks.index) * self._block + inside
            mark_dropped(self.store.path, self.store.layout, numbers)
            self.store.reload()

    @override
    def finish(self, **attributes: Any) -> None:
        """Fill the gaps between the processes' rows, cut the plan there, record attributes; all have to call this."""
        end = max(self._ranks.gather(0 if self.store is None else self._end))
        if end:
            self._fill_to(end)
        self._ranks.gather(None)  # all gaps are filled
        if end and self._ranks.index == 0:
            assert self.store is not None
            self.store.record(**attributes)
            self.store.plan_rows(end)
        self._ranks.gather(None)  # nobody sees a store that is not finished

    @property
    def _end(self) -> int:
        """The row behind the last one of this process; 0 without one."""
        if self.next_row > self.start:
            return self.next_row
        return max(0, self.start - (self._ranks.count - 1) * self._block)

    def _fill_to(self, end: int) -> None:
        """Append tombstones to this process's blocks as far as they are before ``end``, and release the claim."""
        if self.store is None:  # it has taken no row
            self.store = open_existing(self._path, self.plan)
            assert self.store is not None
            self._claim(self.store)
        while self.next_row < end:
            self._append_tombstones(min(self._left, end - self.next_row))
            if not self._left:
                self._next_block()
        self.store.close()

    def _append_tombstones(self, count: int) -> None:
        assert self.store is not None
        columns = {
            name: np.full(count, "", object) if kind == "str" else np.zeros(count, kind)
            for name, kind in self.store.layout.columns.items()
        }
        columns["step"] = np.full(count, NO_STEP)
        for first in range(0, count, self.store.layout.chunk_rows):
            rows = min(self.store.layout.chunk_rows, count - first)
            self.store.append(
                np.zeros((rows, self.store.k), np.float32),
                loss=np.zeros(rows),
                columns={name: values[:rows] for name, values in columns.items()},
                dropped=np.ones(rows, bool),
            )


def _blocks(plan: StorePlan) -> Storage:
    """Return the chunks of a new store: the caller's, or blocks so small that few tombstones fill them."""
    rows, _ = plan.storage.sizes(plan.k, plan.dtype)
    if plan.storage.chunk_rows is None:
        rows = min(rows, _BLOCK_ROWS)
    return replace(plan.storage, chunk_rows=rows, group_chunks=plan.storage.group_chunks or 1)


def check_processes(store: GradientStore, count: int) -> None:
    """Refuse to continue a training in other than the number of processes that a store has rows of."""
    recorded = (store.attrs.get("collected") or {}).get("processes", 1)
    if recorded != count:
        raise MismatchError(
            f"expected a training in {recorded} processes, as the one that {store.path} has rows of; received one in "
            f"{count}: continue it in as many, or collect to another path"
        )


def open_sink(
    path: PathLike, plan: StorePlan, metadata: RowMetadata, ranks: Ranks | None, on_nonfinite: OnNonFinite
) -> Sink:  # fmt: skip
    """Return what stores the rows of a training, in one process or in several."""
    if ranks is not None:
        ranks.check_same(path)
        return RankSink(path, plan, metadata, ranks, on_nonfinite)
    sink = Sink(path, plan, metadata, Batching(), None, None, on_nonfinite)
    if sink.store is not None:
        try:
            check_processes(sink.store, 1)
        except MismatchError:
            sink.close()
            raise
    return sink
