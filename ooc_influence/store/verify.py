"""Finding damage: every committed chunk against its commit record, and the parts of a store that no record covers.

Of each chunk: its files exist and have the right length, the crc32c over its rows in every per-row array is that of the
record, and no number is NaN or Inf. Of the rest (mask, basis, column scale, tombstones, curvatures, steps of an
optimiser): their own checksums hold. No example id occurs twice. Memory does not grow with the rows.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ooc_influence.errors import InputError, OocInfluenceError
from ooc_influence.memory import MemoryBudget, MemoryModel, ProblemSize
from ooc_influence.parallel import (
    Stripe,
    check_workers,
    cores,
    cut_stripes,
    run_stripes,
    slots_per_process,
    worker_memory,
)
from ooc_influence.progress import Progress, tick
from ooc_influence.store import commits, paths
from ooc_influence.store.arrays import open_group
from ooc_influence.store.claim import make_claim
from ooc_influence.store.commits import Committer
from ooc_influence.store.layout import ROW_ARRAYS, Layout
from ooc_influence.store.paths import array_store, is_local
from ooc_influence.store.reader import IDS_AT_ONCE, ask_for_chunk, repeated_ids
from ooc_influence.store.step_log import FOLDER, StepLog
from ooc_influence.store.view import StoreView

Parts = list[npt.NDArray[Any]]
logger = logging.getLogger("ooc_influence")


class Damage(NamedTuple):
    """What is wrong, and with which rows.

    Attributes
    ----------
    start, stop : int or None
        The rows; None where it is a part of the store that is not rows.
    reason : str
        What is wrong.
    """

    start: int | None
    stop: int | None
    reason: str


def verify_memory(layout: Layout, size: ProblemSize) -> MemoryModel:
    """Return the memory model of checking a store."""
    ids = min(size.rows, IDS_AT_ONCE) * 8 * 5 if layout.ids else 0  # hashes and rows, joined and sorted
    small = 2 * layout.group_rows * 8 * (2 + len(layout.row_arrays))  # the small values of two chunks' rows
    per_worker = size.reading_bytes + small + 2**20
    return MemoryModel("verify", ids, per_worker, 0, size.workers, min_rows=1, max_rows=1, advice="smaller chunks")


def verify_store(
    store: StoreView, *, repair: bool, workers: int | None, memory: int | str | None, progress: bool | None
) -> list[Damage]:
    """Check a store, and discard its damaged chunks if asked; see :meth:`GradientStore.verify`."""
    size = store.layout.chunk_rows
    slots = cores() if workers is None and check_workers(None) == 1 else check_workers(workers)
    committed = replace(store.problem_size(slots_per_process(slots)), rows=store.committed)
    MemoryBudget.of(worker_memory(memory)).plan(verify_memory(store.layout, committed))
    chunks = np.flatnonzero(store.records)
    damage = [Damage(*rows, reason) for rows, reason in store.damaged_records]
    with Progress("verify", int(commits.rows_in(store.records).sum()), progress) as bar:
        stripes = cut_stripes(0, len(chunks), 1, slots) if len(chunks) else []
        for part in run_stripes(_check_stripe, stripes, bar, store, slots=slots):
            damage += part
    damage.sort(key=lambda each: each.start or 0)
    if repair and damage:
        _discard(store, [each.start // size for each in damage if each.start is not None])
    repeated = [Damage(None, None, reason) for reason in repeated_ids(store)]
    return damage + list(_check_parts(store)) + repeated


def _check_stripe(stripe: Stripe, key: str, store: StoreView) -> list[Damage]:
    """Check the committed chunks of a stripe, counted along the chunks that are committed."""
    chunks = np.flatnonzero(store.records)[stripe.start : stripe.stop].tolist()
    damage = []
    with ThreadPoolExecutor(1) as thread:
        pending = thread.submit(_read_chunk, store, chunks[0], chunks[1:2])
        for number, chunk in enumerate(chunks):
            parts = pending.result()
            if number + 1 < len(chunks):
                pending = thread.submit(_read_chunk, store, chunks[number + 1], chunks[number + 2 : number + 3])
            record = int(store.records[chunk])
            start = chunk * store.layout.chunk_rows
            reason = parts if isinstance(parts, str) else _check_chunk(store, parts, record)
            if reason:
                damage.append(Damage(start, start + (record >> 32), reason))
            tick(key, record >> 32)
    return damage


def _read_chunk(store: StoreView, chunk: int, following: list[int]) -> Parts | str:
    """Return a chunk's rows in every per-row array, in checksum order; or what was wrong with reading them."""
    layout = store.layout
    start = chunk * layout.chunk_rows
    stop = start + (int(store.records[chunk]) >> 32)
    try:
        if is_local(store.path) and layout.codec is None:
            for number in following:
                ask_for_chunk(store, number)
        parts = [store.read("gradients", slice(start, stop), slice(0, layout.encoding.columns))]
        return parts + [store.read(name, slice(start, stop)) for name in layout.row_arrays]
    except Exception as error:  # whatever a codec makes of damaged bytes
        return str(error) or type(error).__name__


def _check_chunk(store: StoreView, parts: Parts, record: int) -> str | None:
    if len(parts[0]) != record >> 32:
        return f"expected {record >> 32} rows; received {len(parts[0])}: the array's metadata say it ends there"
    if commits.checksum(parts) != commits.crc_of(record):
        return "the checksum differs from the commit record"
    bad = store.layout.encoding.nonfinite_rows(parts[0])
    for values in parts[1 : 1 + len(ROW_ARRAYS)]:
        bad |= ~np.isfinite(values)
    return f"{int(bad.sum())} rows with NaN or Inf" if bad.any() else None


def _discard(store: StoreView, chunks: list[int]) -> None:
    """Set the records of damaged chunks to "not written"."""
    layout = store.layout
    claim = make_claim(store.path, 0, layout.planned_rows)
    try:
        records = store.records.copy()
        committer = Committer(array_store(store.path), layout, records, claim)
        for chunk in chunks:
            records[chunk : chunk + 1] = 0
        damaged = {rows[0] // layout.group_rows for rows, _ in store.damaged_records}
        for group in sorted(damaged | {chunk // layout.group_chunks for chunk in chunks}):
            committer.rewrite_records(group)
        committer.files.sync_folders()
    finally:
        claim.release()


def _check_parts(store: StoreView) -> Iterator[Damage]:
    """Check what no commit record covers, by reading all of it."""
    for what, read in (
        ("mask", lambda: store.mask),
        ("basis", lambda: _read_basis(store)),
        ("column_scale", lambda: store.column_scale),
        ("dropped", lambda: _read_dropped(store)),
        ("optimizer", lambda: _read_steps(store)),
    ):
        try:
            read()
        except (OocInfluenceError, ValueError, KeyError, TypeError) as error:
            yield Damage(None, None, f"{what}: {error}")
    for name in paths.names(store.path / "curvature"):
        if not name.startswith(".") and name != "zarr.json":
            yield from _check_curvature(store, name)


def _read_basis(store: StoreView) -> None:
    try:
        _ = store.reduction
    except InputError as error:  # it belongs to another store, which is not read unasked
        logger.warning("the basis is not verified: %s", error)


def _read_dropped(store: StoreView) -> None:
    for group in sorted(store.dropped_groups()):
        start = group * store.layout.group_rows
        store.read("dropped", slice(start, start + store.layout.group_rows))


def _read_steps(store: StoreView) -> None:
    if paths.exists(store.path / FOLDER):
        log = StepLog(store.path)
        for number in range(len(log)):
            log.record(number)


def _check_curvature(store: StoreView, name: str) -> Iterator[Damage]:
    path = store.path / "curvature" / name
    try:
        names = [array for array in paths.names(path) if array != "zarr.json"]
        files = array_store(path, read_only=True, chunk_bytes={})
        group = open_group(files, "r")
        for array_name in names:
            array: Any = group[array_name]
            for start in range(0, array.shape[0], array.chunks[0]):
                array[start : start + array.chunks[0]]
    except (OocInfluenceError, ValueError, KeyError, TypeError, OSError) as error:
        yield Damage(None, None, f"curvature {name}: {error}: fit it again")
