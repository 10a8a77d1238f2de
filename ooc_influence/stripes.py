"""Striped Dask tasks: one task a worker slot, each looping over its own contiguous rows.

A task carries paths, row numbers and small arrays, folds its rows into one result, and only that result travels; sums
go up a tree. Without a ``dask.distributed`` client the local scheduler runs them: one slot with all BLAS threads by
default, since that is the fastest way to use one node and holds one accumulator.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from dask.base import compute
from dask.delayed import delayed
from threadpoolctl import threadpool_limits

from ooc_influence.errors import InputError
from ooc_influence.progress import Progress


def cores() -> int:
    """Return the cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def blas_threads(tasks: int) -> Any:
    """Return a context in which ``tasks`` concurrent BLAS calls share the cores: one thread pool at a time."""
    return threadpool_limits(max(1, cores() // max(1, tasks)), user_api="blas")


@dataclass(frozen=True)
class Stripe:
    """Rows ``start`` to ``stop``; ``start`` lies on the block grid."""

    start: int
    stop: int


def _ambient_client() -> Any:
    default_client = getattr(sys.modules.get("distributed"), "default_client", None)
    if default_client is None:  # not imported, or by another thread at this moment
        return None
    try:
        return default_client()
    except ValueError:
        return None


def in_worker() -> bool:
    """Return whether this is a task on a worker of a Dask cluster."""
    try:
        return "distributed" in sys.modules and sys.modules["distributed"].get_worker() is not None
    except (ValueError, AttributeError):  # not on a worker, or distributed half imported
        return False


def _place(arg: Any) -> Any:
    """Send a large array to a cluster's workers once, not with every task."""
    client = _ambient_client()
    if client is None or not isinstance(arg, np.ndarray) or arg.nbytes < 2**20:
        return arg
    return client.scatter(arg, broadcast=True)


def check_workers(workers: int | None) -> int:
    """Return the number of worker slots: as asked, or those of the ambient Dask cluster, or one.

    Raises
    ------
    InputError
        If ``workers`` is below one, or a cluster without workers was given.
    """
    if workers is not None:
        if workers < 1:
            raise InputError(f"expected workers >= 1; received {workers}")
        return workers
    client = _ambient_client()
    if client is None:
        return 1
    slots = sum(client.nthreads().values())
    if not slots:
        raise InputError("expected a Dask cluster with workers; received one without: start a worker, then run again")
    return int(slots)


def slots_per_process(slots: int) -> int:
    """Return how many of the slots share one process's memory: all of them here, a worker's threads on a cluster."""
    client = _ambient_client()
    if client is None:
        return slots
    return min(slots, max(client.nthreads().values(), default=1))


def cut_stripes(start: int, stop: int, block_rows: int, count: int) -> list[Stripe]:
    """Cut rows ``start`` to ``stop`` into at most ``count`` stripes of whole blocks of the grid from row 0."""
    first, last = start // block_rows, -(-stop // block_rows)
    count = max(1, min(count, last - first))
    edges = [first + (last - first) * number // count for number in range(count + 1)]
    return [Stripe(max(start, low * block_rows), min(stop, high * block_rows)) for low, high in pairwise(edges)]


def tree_sum(parts: Sequence[Any], add: Callable[[Any, Any], Any]) -> Any:
    """Return one delayed value: ``parts`` added pairwise, in an order that depends on their number only.

    ``add`` must not change its arguments: a task may run again where a worker died.
    """
    level = list(parts)
    combine = delayed(add, pure=False)
    while len(level) > 1:
        pairs = [combine(left, right) for left, right in zip(level[::2], level[1::2], strict=False)]
        level = pairs + level[len(level) // 2 * 2 :]
    return level[0]


def _check_reach(args: Sequence[Any]) -> None:
    """Check that workers in other processes can see what the tasks read and write."""
    client = _ambient_client()
    if client is None or all(worker.startswith("inproc://") for worker in client.scheduler_info(-1)["workers"]):
        return
    for arg in args:
        path = getattr(arg, "path", arg)
        if getattr(path, "protocol", "") == "memory":
            raise InputError(
                f"expected a place that the cluster's workers can see; received {path}, which is in this process only: "
                "use a folder or an object store, or close the cluster's client"
            )


def run_stripes(
    function: Callable[..., Any],
    stripes: Sequence[Stripe],
    progress: Progress,
    *args: Any,
    slots: int,
    reduce: Callable[[Any, Any], Any] | None = None,
) -> Any:
    """Run ``function(stripe, progress_key, *args)`` for every stripe.

    Returns
    -------
    list, or one value
        The results in order, or their tree sum by ``reduce``.
    """
    _check_reach(args)
    task = delayed(function, pure=False, traverse=False)
    args = tuple(_place(arg) for arg in args)
    parts = [task(stripe, progress.key, *args) for stripe in stripes]
    tasks = [tree_sum(parts, reduce)] if reduce is not None else parts
    results = _compute(tasks, progress, slots)
    return results[0] if reduce is not None else list(results)


def _compute(tasks: list[Any], progress: Progress, slots: int) -> Any:
    client = _ambient_client()
    if client is not None:
        client.subscribe_topic(progress.key, lambda event: progress.advance(event[1]))
        try:
            return [future.result() for future in client.compute(tasks, optimize_graph=False)]
        finally:
            client.unsubscribe_topic(progress.key)
    if slots == 1:
        with blas_threads(1):
            return compute(*tasks, scheduler="synchronous", optimize_graph=False)
    with blas_threads(slots), ThreadPoolExecutor(slots) as pool:  # leaving it waits for tasks that are running
        try:
            return compute(*tasks, scheduler="threads", pool=pool, num_workers=slots, optimize_graph=False)
        except BaseException:
            progress.stop()
            pool.shutdown(wait=True, cancel_futures=True)
            raise
