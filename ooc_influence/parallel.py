"""Striped Dask tasks: one task for each worker slot, which loops over its own contiguous rows.

A task carries paths, row numbers and small arrays and folds its rows into one result; only that result travels, and
sums are added in a tree. Without a ``dask.distributed`` client they run here: in one slot with all BLAS threads by
default, since that is the fastest way to use one node and holds one accumulator; in several by Dask's scheduler of
threads, which is loaded only then: loading Dask takes about as long as a query of a small store. With a client they run
on its workers, which share the cores of their host; a task whose worker dies runs again on another, and an interrupted
call cancels the tasks it started.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from ooc_influence.errors import ClusterError, InputError
from ooc_influence.memory import DEFAULT_SHARE, cpu_share
from ooc_influence.process import blas_limit, limit_blas
from ooc_influence.progress import TOPIC, Progress, show

SENT_ONCE = 2**20  # bytes: an array at least as large is sent to a cluster's workers once, not with every task


def cores() -> int:
    """Return the cores this process may use: those it is bound to, or fewer where a control group limits its time.

    A fraction of a core is not counted: threads that wait for each other would wait for the one that is out of time.
    ``dask.system.CPU_COUNT`` rounds it up, and does not look at the groups above this process's own.
    """
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share = cpu_share()
    return bound if share is None else max(1, min(bound, int(share)))


def blas_threads(tasks: int) -> Any:
    """Return a context in which ``tasks`` concurrent BLAS calls share the cores: one thread pool at a time."""
    return limit_blas(max(1, cores() // max(1, tasks)))


class _Sharers:
    """Tasks of schedulers other than ours that run in this process."""

    def __init__(self) -> None:
        self._lock, self._running, self._most = threading.Lock(), 0, 1

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        with contextlib.ExitStack() as limits:
            with self._lock:  # until it is set: the later of two tasks sets less
                if not self._running:
                    self._most = min(cores(), blas_limit() or cores())  # a Dask worker's process may be limited to one
                self._running += 1
                limits.callback(self._leave)
                limits.enter_context(limit_blas(max(1, min(self._most, cores() // self._running))))
            yield

    def _leave(self) -> None:
        with self._lock:
            self._running -= 1


sharing_blas = _Sharers()  # a context: a task's BLAS calls share the cores with those of other tasks in this process

_task = threading.local()  # the threads that the task running in this one may use


def task_threads() -> int:
    """Return how many threads of its own a task that was run with ``own_threads`` may use."""
    return int(getattr(_task, "threads", 1))


def _sharing(function: Callable[..., Any], tasks: int, own_threads: bool, *args: Any) -> Any:
    """Run a task that shares the cores with others: through the BLAS's threads, or its own with a BLAS of one thread.

    On a Dask worker, the BLAS may be limited to one thread however many cores the host has.
    """
    before, threads = task_threads(), max(1, cores() // max(1, tasks))
    _task.threads = threads if own_threads else 1
    try:
        with limit_blas(1 if own_threads else threads):
            return function(*args)
    finally:
        _task.threads = before


@dataclass(frozen=True)
class Stripe:
    """Rows ``start`` to ``stop``; ``start`` is on the block grid."""

    start: int
    stop: int


def ambient_client() -> Any:
    """Return the ``dask.distributed`` client that is open in this thread or process; None where none is."""
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


def _sent_once(arg: Any) -> Any:
    """Make a large array a task's result, which is sent to a cluster's workers once, not with every task.

    Unlike data that a client scatters, Dask computes it again where the workers that have it die.
    """
    if not isinstance(arg, np.ndarray) or arg.nbytes < SENT_ONCE:
        return arg
    from dask.delayed import delayed

    return delayed(_same, pure=False, traverse=False)(arg)


def _same(value: Any) -> Any:
    return value


def _slots_on_a_host(client: Any) -> int:
    """Return how many tasks the fullest host of a cluster runs at once: they share its cores."""
    slots: dict[str, int] = {}
    for worker in client.scheduler_info(-1)["workers"].values():
        host = str(worker.get("host"))
        slots[host] = slots.get(host, 0) + int(worker["nthreads"])
    return max(slots.values(), default=1)


def check_workers(workers: int | None) -> int:
    """Return the number of worker slots: as requested, or those of the ambient Dask cluster, or one."""
    if workers is not None:
        if workers < 1:
            raise InputError(f"expected workers >= 1; received {workers}")
        return workers
    client = ambient_client()
    if client is None:
        return 1
    slots = sum(client.nthreads().values())
    if not slots:
        raise InputError("expected a Dask cluster with workers; received one without: start a worker, then run again")
    return int(slots)


def slots_per_process(slots: int) -> int:
    """Return how many of the slots share one process's memory: all of them here, a worker's threads on a cluster."""
    client = ambient_client()
    if client is None:
        return slots
    return min(slots, max(client.nthreads().values(), default=1))


def worker_memory(memory: int | str | None) -> int | str | None:
    """Return the budget of a process that runs tasks: as given; on a cluster, by default half of a worker's limit."""
    client = ambient_client()
    if memory is not None or client is None:
        return memory
    limits = [int(worker.get("memory_limit") or 0) for worker in client.scheduler_info(-1)["workers"].values()]
    least = min(limits, default=0)
    return int(least * DEFAULT_SHARE) if least else None


def cut_stripes(start: int, stop: int, block_rows: int, count: int) -> list[Stripe]:
    """Cut rows ``start`` to ``stop`` into at most ``count`` stripes of whole blocks of the grid from row 0."""
    first, last = start // block_rows, -(-stop // block_rows)
    count = max(1, min(count, last - first))
    edges = [first + (last - first) * number // count for number in range(count + 1)]
    return [Stripe(max(start, low * block_rows), min(stop, high * block_rows)) for low, high in pairwise(edges)]


def cut_ranges(
    ranges: Sequence[tuple[int, int]], block_rows: int, count: int, most_rows: int | None = None
) -> list[Stripe]:
    """Cut some ranges of rows into about ``count`` stripes in all, or more where these have more than ``most_rows``."""
    total = sum(stop - start for start, stop in ranges)
    stripes = []
    for start, stop in ranges:
        rows = stop - start
        least = 1 if most_rows is None else -(-rows // most_rows)
        stripes += cut_stripes(start, stop, block_rows, max(least, round(count * rows / total)))
    return stripes


def subtract_ranges(ranges: Sequence[tuple[int, int]], removed: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return what remains of some ranges without others."""
    remaining = list(ranges)
    for low, high in removed:
        remaining = [part for a, b in remaining for part in ((a, min(b, low)), (max(a, high), b)) if part[0] < part[1]]
    return remaining


def tree_sum(parts: Sequence[Any], add: Callable[[Any, Any], Any]) -> Any:
    """Return one delayed value: ``parts`` added pairwise, in an order that depends on their number only.

    ``add`` must not change its arguments: a task may run again where a worker died.
    """
    from dask.delayed import delayed

    level = list(parts)
    combine = delayed(add, pure=False)
    while len(level) > 1:
        pairs = [combine(left, right) for left, right in zip(level[::2], level[1::2], strict=False)]
        level = pairs + level[len(level) // 2 * 2 :]
    return level[0]


def _check_reach(args: Sequence[Any]) -> None:
    """Check that workers in other processes can see what the tasks read and write."""
    client = ambient_client()
    if client is None or all(worker.startswith("inproc://") for worker in client.scheduler_info(-1)["workers"]):
        return
    for path in [path for arg in args for path in getattr(arg, "paths", [getattr(arg, "path", arg)])]:
        if getattr(path, "protocol", "") == "memory":
            raise InputError(
                f"expected a path that the cluster's workers can see; received {path}, which is in this process only: "
                "use a folder or an object store, or close the cluster's client"
            )


def run_stripes(
    function: Callable[..., Any],
    stripes: Sequence[Stripe],
    progress: Progress,
    *args: Any,
    slots: int,
    reduce: Callable[[Any, Any], Any] | None = None,
    on_result: Callable[[Stripe, Any], None] | None = None,
    own_threads: bool = False,
) -> Any:
    """Run ``function(stripe, progress_key, *args)`` for every stripe.

    Parameters
    ----------
    function, stripes, progress, *args
        What to run.
    slots : int
        Tasks at once, on this machine.
    reduce : callable, optional
        Adds two results without changing them; the sum is returned.
    on_result : callable, optional
        Called with every stripe and its result, in this process and one at a time, as they come; nothing is returned.
    own_threads : bool
        The function uses :func:`task_threads` threads itself; the BLAS then has one.

    Returns
    -------
    list, or one value
        The results in order, or their tree sum by ``reduce``.

    Raises
    ------
    ClusterError
        If a task's workers died repeatedly.
    """
    client = ambient_client()
    _check_reach(args)
    if client is None:
        function, sharing = function if on_result is None else _calling(function, on_result), slots
    else:
        args, sharing = tuple(_sent_once(arg) for arg in args), _slots_on_a_host(client)
    calls = [(function, sharing, own_threads, stripe, progress.key, *args) for stripe in stripes]
    with contextlib.ExitStack() as limits:
        if client is None:  # once, not for each of many tasks
            limits.enter_context(limit_blas(1 if own_threads else max(1, cores() // slots)))
        if client is None and slots == 1:
            results = (_sharing(*call) for call in calls)
            return list(results) if reduce is None else _tree_sum_in_turn(results, reduce)
        from dask.delayed import delayed

        task = delayed(_sharing, pure=False, traverse=False)
        parts = [task(*call) for call in calls]
        tasks = [tree_sum(parts, reduce)] if reduce is not None else parts
        if client is None:
            done = _compute(tasks, progress, slots)
        else:
            done = _compute_on_cluster(client, tasks, on_result and (on_result, stripes))
        return done[0] if reduce is not None else list(done)


def _tree_sum_in_turn(parts: Iterable[Any], add: Callable[[Any, Any], Any]) -> Any:
    """Return what :func:`tree_sum` would be of parts that come one after the other, by the same sums.

    Of n parts, at most log₂ n + 1 partial sums are held: each of a power of two of them, the largest first.
    """
    sums: list[tuple[int, Any]] = []
    for total in parts:
        count = 1
        while sums and sums[-1][0] == count:
            total = add(sums.pop()[1], total)
            count *= 2
        sums.append((count, total))
    _, total = sums.pop()
    while sums:
        total = add(sums.pop()[1], total)
    return total


def _calling(function: Callable[..., Any], on_result: Callable[[Stripe, Any], None]) -> Callable[..., None]:
    """Return ``function`` with its result passed to ``on_result``, one at a time."""
    guard = threading.Lock()

    def call(stripe: Stripe, *args: Any) -> None:
        result = function(stripe, *args)
        with guard:
            on_result(stripe, result)

    return call


def _compute(tasks: list[Any], progress: Progress, slots: int) -> Any:
    from dask.base import compute
    from dask.threaded import get as get_threaded  # not its name: looking that up loads distributed

    with ThreadPoolExecutor(slots) as pool:  # leaving it waits for tasks that are running
        try:
            return compute(*tasks, scheduler=get_threaded, pool=pool, num_workers=slots, optimize_graph=False)
        except BaseException:
            progress.stop()
            pool.shutdown(wait=True, cancel_futures=True)
            raise


_watching: dict[str, int] = {}  # runs that a client shows the progress of
_watching_lock = threading.Lock()


def _watch(client: Any) -> None:
    """Show the progress that this client's tasks report: all runs have one topic, which the scheduler keeps."""
    with _watching_lock:
        _watching[client.id] = _watching.get(client.id, 0) + 1
        if _watching[client.id] == 1:
            client.subscribe_topic(TOPIC, lambda event: show(*event[1]))


def _unwatch(client: Any) -> None:
    with _watching_lock:
        _watching[client.id] -= 1
        if not _watching[client.id]:
            del _watching[client.id]
            client.unsubscribe_topic(TOPIC)


def _compute_on_cluster(client: Any, tasks: list[Any], on_result: Any) -> list[Any]:
    from dask import config
    from distributed import CancelledError, as_completed
    from distributed.scheduler import KilledWorker

    _watch(client)
    with config.set({"distributed.admin.large-graph-warning-threshold": "1 PB"}):  # large arrays are there once
        futures = client.compute(tasks, optimize_graph=False)
    try:
        if on_result is None:
            return [future.result() for future in futures]
        call, stripes = on_result
        stripe_of = {future.key: stripe for future, stripe in zip(futures, stripes, strict=True)}
        for future in as_completed(futures):
            call(stripe_of[future.key], future.result())
            future.release()
        return []
    except BaseException as error:
        client.cancel(futures, force=True)  # running tasks notice at their next tick
        if isinstance(error, KilledWorker):
            raise ClusterError(
                f"expected workers that stay alive; received several that died with one task ({error.task}): see their "
                "logs; workers out of memory need a smaller --memory or fewer threads"
            ) from error
        if isinstance(error, CancelledError):
            raise ClusterError(
                f"expected the cluster to stay; received: {error}: is its scheduler alive? Then run again"
            ) from error
        raise
    finally:
        _unwatch(client)
