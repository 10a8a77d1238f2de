"""Extraction on a Dask cluster: one task a shard, each loading the model on its worker.

Tasks carry names and paths. A first one makes the store; then every shard is a writer of its own, as if started by hand
(``extract --shard i/N``). A worker runs one shard at a time: where all workers have the resource ``shard``
(``dask worker --resources "shard=1"``), Dask sees to it, elsewhere tasks of a worker wait for each other. A shard whose
worker died goes on from its last commit on another.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from ooc_influence.errors import ClusterError, InputError, StoreBusyError, StoreNotFoundError
from ooc_influence.extract.initialise import init_store, row_types
from ooc_influence.extract.loop import extract_gradients
from ooc_influence.extract.metric import AdamMetric
from ooc_influence.extract.recipe import choose_split, load_recipe
from ooc_influence.parallel import ambient_client, check_workers
from ooc_influence.progress import Progress, check_cancelled
from ooc_influence.store import GradientStore, PathLike, StorePath, parse_path

RESOURCE = "shard"
_PATIENCE = 180.0  # seconds to wait for a dead writer's claim to run out
_POLL = 2.0  # seconds between looks at how far the shards are
_INIT_OPTIONS = (
    "compressor", "like", "modules", "fallback", "dtype", "storage", "check_model", "check_gradients", "metric",
    "device", "memory", "origin",
)  # fmt: skip
_busy = threading.Lock()


def extract_shards(
    recipe: str,
    store: PathLike,
    *,
    split: str | None = None,
    shards: int | None = None,
    rows: int | None = None,
    progress: bool | None = None,
    **options: Any,
) -> GradientStore:
    """Extract a recipe's gradients on the ambient Dask cluster, or shard by shard in this process without one.

    The same call goes on where an interrupted one was.

    Parameters
    ----------
    recipe : str
        ``path.py:function`` or ``module:function``, as for ``--recipe``: workers import it, so they must see the file.
    store : path
        The store to write; workers must see it.
    split : str, optional
        Which split, of a recipe that has several.
    shards : int, optional
        How many writers divide the store; default one a worker. A shard is what is done again least when a worker dies.
    rows : int, optional
        Rows of the whole store; default as many as the split has, where that is known.
    progress : bool, optional
        Show a progress line; silent by default.
    **options
        ``compressor``, ``like``, ``modules``, ``fallback``, ``dtype``, ``device``, ``storage``, ``metric`` (a path),
        ``memory``, ``on_nonfinite``, ``batching``, ``origin``, ``check_model`` and ``check_gradients`` of
        :func:`extract_gradients`.

    Returns
    -------
    GradientStore
        Open for reading; (n, k).

    Raises
    ------
    InputError
        For a recipe or options that cannot be used so, or a cluster without workers.
    ClusterError
        If the cluster's workers die again and again.
    OocInfluenceError
        See :func:`extract_gradients`.
    """
    name, place = _absolute(recipe), parse_path(store)
    options = by_path(options)
    init = {key: options[key] for key in _INIT_OPTIONS if key in options}
    return run_shards(
        place,
        partial(_init_recipe, name, split, place, rows, init),
        partial(_extract_recipe, name, split, place, options),
        shards,
        progress,
    )


def by_path(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options whose paths hold in any folder.

    Raises
    ------
    InputError
        For an optimiser's state as an object: workers load it.
    """
    found = dict(options)
    for name in ("like", "metric"):
        if isinstance(found.get(name), (str, Path)):
            found[name] = parse_path(found[name])
    if isinstance(found.get("metric"), AdamMetric):
        raise InputError("expected the path of Adam's state as metric= of shards; received an AdamMetric")
    return found


def loaded(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options with what is given by its path loaded."""
    metric = options.get("metric")
    return {**options, "metric": metric if metric is None else AdamMetric(metric)}


def _absolute(recipe: str) -> str:
    place, colon, function = recipe.rpartition(":")
    return f"{Path(place).absolute()}{colon}{function}" if place.endswith(".py") else recipe


def _init_recipe(name: str, split: str | None, store: StorePath, rows: int | None, options: dict[str, Any]) -> None:
    recipe = load_recipe(name)
    data = choose_split(recipe, split)
    known, ids, columns = row_types(data.batches, data.ids, data.columns)
    wanted = known if rows is None else rows
    if wanted is None:
        raise InputError(
            "expected the rows of the whole store, which the split does not tell; received none: make the store with "
            "ooc-influence init --rows N first, or give rows="
        )
    init_store(
        recipe.model, store, wanted, ids=ids, columns=columns, loss_kind=recipe.loss_kind,
        per_sample_loss=recipe.per_sample_loss, pilot=data.batches, **loaded(options),
    )  # fmt: skip


def _extract_recipe(
    name: str, split: str | None, store: StorePath, options: dict[str, Any], *, shard: tuple[int, int]
) -> None:
    recipe = load_recipe(name)
    data = choose_split(recipe, split)
    extract_gradients(
        recipe.model, recipe.per_sample_loss, data.batches, store, ids=data.ids, columns=data.columns,
        loss_kind=recipe.loss_kind, shard=shard, **loaded(options),
    )  # fmt: skip


def run_shards(
    store: StorePath, init: Callable[[], Any], extract: Callable[..., Any], shards: int | None, progress: bool | None
) -> GradientStore:
    """Make a store with ``init()`` unless it is there, and fill it with ``extract(shard=(i, N))``, on the cluster.

    Raises
    ------
    InputError, ClusterError
        See :func:`extract_shards`.
    """
    if shards is not None and shards < 1:
        raise InputError(f"expected shards >= 1; received {shards}")
    client = ambient_client()
    if client is None:
        _make(store, init)
        for index in range(shards or 1):
            extract(shard=(index, shards or 1))
        return GradientStore.open(store)
    from distributed.scheduler import KilledWorker

    check_workers(None)
    if getattr(store, "protocol", "") == "memory":
        raise InputError(
            f"expected a place that the cluster's workers can see; received {store}: use a folder or s3://"
        )
    workers = client.scheduler_info(-1)["workers"].values()
    limited = all(RESOURCE in worker.get("resources", {}) for worker in workers)
    resources = {RESOURCE: 1} if limited else None
    count = shards or len(workers)
    futures = [client.submit(_make, store, init, pure=False, resources=resources)]
    try:
        futures[0].result()
        futures += [
            client.submit(_run_shard, extract, (index, count), pure=False, resources=resources)
            for index in range(count)
        ]
        _follow(store, futures[1:], progress)
    except KilledWorker as error:
        raise ClusterError(
            f"expected workers that stay alive; received several that died with one shard ({error.task}): see their "
            "logs; what is committed stays, run again to go on"
        ) from error
    finally:
        client.cancel(futures, force=True)  # where all went well, nothing is left to cancel
    return GradientStore.open(store)


def _make(store: StorePath, init: Callable[[], Any]) -> None:
    try:
        if GradientStore.open(store).layout.planned_rows is not None:
            return
    except StoreNotFoundError:
        pass
    init()


def _run_shard(extract: Callable[..., Any], shard: tuple[int, int]) -> None:
    """Run one shard, alone in this process; wait for the claim of a writer that has died meanwhile."""
    while not _busy.acquire(timeout=1):
        check_cancelled()
    try:
        end = time.monotonic() + _PATIENCE
        while True:
            try:
                extract(shard=shard)
            except StoreBusyError:
                if time.monotonic() > end:
                    raise
                check_cancelled()
                time.sleep(_POLL)
            else:
                return
    finally:
        _busy.release()


def _follow(store: StorePath, futures: list[Any], progress: bool | None) -> None:
    """Wait for all shards, showing the rows that are committed."""
    from distributed import wait

    opened = GradientStore.open(store)
    with Progress("extract", opened.layout.planned_rows, progress) as bar:
        shown, left = 0, set(futures)
        while left:
            try:
                done = wait(left, timeout=_POLL, return_when="FIRST_COMPLETED").done
            except TimeoutError:
                done = set()
            for future in done:
                future.result()
            left -= done
            opened.reload()
            bar.advance(opened.committed - shown)
            shown = opened.committed
