"""Recipes: a model, its loss and its data as a Python function returns them; extracted by shards on a Dask cluster.

Tasks of a cluster carry names and paths. A first one makes the store; then every shard is a writer of its own, as if
started by hand (``extract --shard i/N``). A worker runs one shard at a time: if all workers have the resource ``shard``
(``dask worker --resources "shard=1"``), Dask ensures it, otherwise the tasks of a worker wait for each other. A shard
whose worker died resumes from its last commit on another.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import sys
import sysconfig
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from ooc_influence.errors import ClusterError, InputError, OocInfluenceError, StoreBusyError, StoreNotFoundError
from ooc_influence.extract.data import Batches, RowChoice, RowSource
from ooc_influence.extract.extraction import extract_gradients, init_store, row_types
from ooc_influence.extract.metric import AdamMetric
from ooc_influence.parallel import ambient_client, check_workers
from ooc_influence.progress import Progress, check_cancelled
from ooc_influence.store import GradientStore, PathLike, StorePath, parse_path


@dataclass(frozen=True)
class Split:
    """Named data: batches, and the ids and columns of their rows.

    Attributes
    ----------
    batches : iterable or callable
        As for :func:`extract_gradients`.
    ids, columns
        As for :func:`extract_gradients`.
    """

    batches: Batches
    ids: RowSource | None = None
    columns: Mapping[str, RowSource] | None = None


@dataclass(frozen=True)
class Recipe:
    """A model, its per-sample loss and its data, as returned by the function named by ``--recipe``.

    Attributes
    ----------
    model : torch.nn.Module
        The trained model.
    per_sample_loss : callable (model, batch) -> (b,) tensor
        Its loss.
    splits : mapping of str to Split or batches
        The data, by name (``"train"``, ``"test"``).
    loss_kind : str, optional
        As for :func:`extract_gradients`.
    query : callable (str) -> batch, optional
        Makes a batch, of one sample or several, of a new query that is typed or pasted (``serve``).
    """

    model: Any
    per_sample_loss: Any
    splits: Mapping[str, Split | Batches]
    loss_kind: str | None = None
    query: Any = None

    def split(self, name: str) -> Split:
        """Return a split by name."""
        split = self.splits[name]
        return split if isinstance(split, Split) else Split(split)


_PACKAGE = f"{Path(__file__).parents[1]}{os.sep}"


def call_function(name: str, flag: str, what: str) -> Any:
    """Return what ``path.py:function`` or ``module:function`` returns; ``flag`` named it, and it is ``what``."""
    source, colon, function_name = name.rpartition(":")
    if not colon or not source or not function_name:
        raise InputError(f"expected {flag} path.py:function or module:function; received {name!r}")
    try:
        module = _load_file(Path(source)) if source.endswith(".py") else _load_module(source)
        function = getattr(module, function_name, None)
        if not callable(function):
            raise InputError(f"expected a function {function_name!r} in {source}; received none: check the name")
        return function()
    except InputError:
        raise
    except (Exception, SystemExit) as error:
        raise InputError(_failed(name, error, traceback.extract_tb(error.__traceback__)[-1], what)) from error


def load_recipe(name: str) -> Recipe:
    """Return the recipe of ``path.py:function`` or ``module:function``; anything else is refused."""
    result = call_function(name, "--recipe", "the recipe")
    if isinstance(result, tuple) and len(result) == 3:
        result = Recipe(*result)
    if not isinstance(result, Recipe):
        raise InputError(
            f"expected {name} to return (model, per_sample_loss, splits) or a Recipe; received {type(result).__name__}"
        )
    named = isinstance(result.splits, Mapping) and all(isinstance(key, str) for key in result.splits)
    if not named or not result.splits:
        raise InputError(
            f"expected the splits of {name} as a mapping of name to batches; received {result.splits!r:.80}"
        )
    if not isinstance(result.model, nn.Module) or not callable(result.per_sample_loss):
        raise InputError(
            f"expected {name} to return a torch.nn.Module and a loss function; received "
            f"{type(result.model).__name__} and {type(result.per_sample_loss).__name__}"
        )
    return result


@contextlib.contextmanager
def running(name: str | None) -> Iterator[None]:
    """Turn an exception of a recipe's own code (its loss, model or data) into an InputError that names the line.

    Other errors pass unchanged, as do all errors without a recipe.
    """
    try:
        yield
    except OocInfluenceError:
        raise
    except Exception as error:
        frame = None if name is None else _own_frame(error)
        if frame is None:
            raise
        raise InputError(_failed(name, error, frame)) from error


def _own_frame(error: Exception) -> traceback.FrameSummary | None:
    """Return the user's line that an error comes from, directly or through Python's library or installed packages.

    None for an error of this package, even if the user's code called it.
    """
    libraries = tuple({sysconfig.get_paths()[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")})
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if frame.filename.startswith(_PACKAGE):
            return None
        if not frame.filename.startswith((*libraries, "<")):
            return frame
    return None


def _failed(
    name: str | None, error: BaseException, frame: traceback.FrameSummary, what: str = "the recipe"
) -> str:  # fmt: skip
    return (
        f"expected {what} {name} to run; received {type(error).__name__}: {error} "
        f"(at {frame.filename}:{frame.lineno}): fix {what}"
    )


def _load_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise InputError(f"expected a Python file {path}; received no such file")
    taken = path.stem in sys.modules or importlib.util.find_spec(path.stem) is not None
    name = f"recipe_{path.stem}" if taken else path.stem  # datasets.py must not hide the library of that name
    sys.path.insert(0, str(path.resolve().parent))  # the recipe may import its neighbours
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _load_module(name: str) -> ModuleType:
    sys.path.insert(0, str(Path.cwd()))
    return importlib.import_module(name)


def choose_split(recipe: Recipe, name: str | None) -> Split:
    """Return the split called ``name``, or the only one."""
    names = ", ".join(recipe.splits)
    if name is None and len(recipe.splits) > 1:
        raise InputError(f"expected --split, one of {names}; received none")
    if name is not None and name not in recipe.splits:
        raise InputError(f"expected --split to be one of {names}; received {name!r}")
    return recipe.split(name or next(iter(recipe.splits)))


RESOURCE = "shard"
_PATIENCE = 180.0  # seconds to wait for a dead writer's claim to expire
_POLL = 2.0  # seconds between queries of the shards' progress
_INIT_OPTIONS = (
    "compressor", "like", "modules", "fallback", "dtype", "storage", "check_model", "check_gradients", "metric",
    "device", "memory", "origin", "labels", "label_seed", "draws", "sample",
    "checkpoints", "keep_factors",
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

    The same call resumes an interrupted one.

    Parameters
    ----------
    recipe : str
        ``path.py:function`` or ``module:function``, as for ``--recipe``: workers import it, so they must see the file.
    store : path
        The store to write; workers must see it.
    split : str, optional
        Which split, of a recipe that has several.
    shards : int, optional
        How many writers divide the store; by default one per worker.
    rows : int, optional
        Rows of the whole store; by default as many as the split has, if that is known.
    progress : bool, optional
        Show a progress line; silent by default.
    **options
        ``compressor``, ``like``, ``modules``, ``fallback``, ``dtype``, ``device``, ``storage``, ``metric`` (a path),
        ``memory``, ``on_nonfinite``, ``batching``, ``origin``, ``labels``, ``label_seed``, ``draws``, ``sample``,
        ``checkpoints`` (paths), ``keep_factors``, ``check_model`` and ``check_gradients`` of :func:`extract_gradients`.

    Returns
    -------
    GradientStore
        Open for reading; (n, k).

    Raises
    ------
    InputError
        For an invalid recipe or invalid options, or a cluster without workers.
    ClusterError
        If the cluster's workers die repeatedly.
    OocInfluenceError
        See :func:`extract_gradients`.
    """
    source, _, function = recipe.rpartition(":")
    name = f"{Path(source).absolute()}:{function}" if source.endswith(".py") else recipe
    path, options = parse_path(store), by_path(options)
    init = partial(_init_recipe, name, split, path, rows, {k: options[k] for k in _INIT_OPTIONS if k in options})
    return run_shards(path, init, partial(_extract_recipe, name, split, path, options), shards, progress)


def by_path(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options with absolute paths, for workers to load; what is given as objects is refused."""
    if isinstance(options.get("metric"), AdamMetric):
        raise InputError("expected the path of Adam's state as metric= of shards; received an AdamMetric")
    paths = {
        name: parse_path(options[name]) for name in ("like", "metric") if isinstance(options.get(name), (str, Path))
    }
    checkpoints = options.get("checkpoints")
    if isinstance(checkpoints, (str, Path)):
        checkpoints = [checkpoints]
    if checkpoints:
        if not all(isinstance(each, (str, Path)) for each in checkpoints):
            raise InputError("expected the paths of checkpoints= of shards; received objects: workers load them")
        checkpoints = [str(Path(each).absolute()) for each in checkpoints]
    return {**options, **paths, "checkpoints": checkpoints}


def loaded(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options with the metric loaded from its path."""
    metric = options.get("metric")
    return {**options, "metric": metric if metric is None else AdamMetric(metric)}


def _init_recipe(name: str, split: str | None, store: StorePath, rows: int | None, options: dict[str, Any]) -> None:
    recipe = load_recipe(name)
    data = choose_split(recipe, split)
    choice = RowChoice(options.get("sample"), options.get("draws", 1))
    count, ids, columns = row_types(data.batches, data.ids, data.columns, choice)
    rows = count if rows is None else rows
    if rows is None:
        raise InputError(
            "expected the rows of the whole store, which the split does not state; received none: make the store with "
            "ooc-influence init --rows N first, or give rows="
        )
    init_store(
        recipe.model, store, rows, ids=ids, columns=columns, loss_kind=recipe.loss_kind,
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
    """Make a store with ``init()`` unless it exists, and fill it with ``extract(shard=(i, N))``, on the cluster."""
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
        raise InputError(f"expected a path that the cluster's workers can see; received {store}: use a folder or s3://")
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
            "logs; committed rows stay, run again to resume"
        ) from error
    finally:
        client.cancel(futures, force=True)  # nothing is left to cancel after a success
    return GradientStore.open(store)


def _make(store: StorePath, init: Callable[[], Any]) -> None:
    try:
        if GradientStore.open(store).layout.planned_rows is not None:
            return
    except StoreNotFoundError:
        pass
    init()


def _run_shard(extract: Callable[..., Any], shard: tuple[int, int]) -> None:
    """Run one shard, alone in this process; wait for the claim of a writer that has died to expire."""
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
