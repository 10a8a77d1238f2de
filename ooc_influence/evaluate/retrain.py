"""Retraining on subsets of the training rows, run by run, each finished run kept: the ground truth of attribution.

A run trains a model on some rows and measures it. Runs are independent: they can be spread over processes, killed and
resumed, and every run's numbers depend on its rows and its seed only. In their folder, ``settings.json`` holds what all
have in common; ``run-00007.npz`` what run 7 measured, how long it took, and a digest of its rows and seed.
"""

from __future__ import annotations

import hashlib
import logging
import multiprocessing
import os
import pickle
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import numpy.typing as npt
from threadpoolctl import threadpool_limits

from ooc_influence.checkpoint import ResumableOutput
from ooc_influence.errors import InputError, MismatchError, RunFailedError, StoreFormatError
from ooc_influence.fingerprint import check_same
from ooc_influence.options import RetrainOptions, takes
from ooc_influence.parallel import cores
from ooc_influence.progress import Progress

logger = logging.getLogger("ooc_influence")
Rows = npt.NDArray[np.bool_]
Subsets = npt.NDArray[np.bool_] | Sequence[npt.NDArray[np.bool_]]
_FORMAT = 1


@dataclass(frozen=True, eq=False)
class Runs:
    """What retraining runs measured.

    Attributes
    ----------
    subsets : (m, n) bool, or a sequence of m rows (n,)
        The rows each run was trained on.
    outcomes : (m, q) float64
        What was measured; NaN for runs that are missing. (m, 0) while there are none.
    seconds : (m,) float64
        What each run took; NaN for runs that are missing.
    """

    subsets: Subsets
    outcomes: npt.NDArray[np.float64]
    seconds: npt.NDArray[np.float64]

    @property
    def missing(self) -> list[int]:
        """The runs that are not finished."""
        return [int(run) for run in np.flatnonzero(np.isnan(self.seconds))]

    def table(self) -> list[tuple[str, int, str]]:
        """Return lines ``(state, number of runs, which)``, the missing ones last; runs as ranges (``"3, 7-12"``)."""
        missing = self.missing
        done = sorted(set(range(len(self.subsets))) - set(missing))
        return [(state, len(runs), ranges(runs)) for state, runs in (("finished", done), ("missing", missing)) if runs]

    def __repr__(self) -> str:
        lines = "; ".join(f"{number} {state}: {which}" for state, number, which in self.table())
        return f"<Runs of {self.outcomes.shape[1]} outcomes, {lines}>"


class RunFolder(ResumableOutput):
    """A folder of finished runs.

    Parameters
    ----------
    folder : str or Path
        Where; made if it is not there.
    settings : mapping
        What all runs have in common, JSON values.
    """

    def __init__(self, folder: str | Path, settings: Mapping[str, Any]) -> None:
        try:
            super().__init__(Path(folder), {"format": _FORMAT, **settings})
        except TypeError as error:
            raise InputError(f"expected settings of JSON values; received {settings!r}: {error}") from error
        if Path(folder).is_file():
            raise InputError(f"expected a folder for runs at {self.path}; received a file: choose another")
        self.begin()
        kept = self.kept_settings
        if kept is None:
            raise StoreFormatError(
                f"expected the settings of runs in {self.path}/settings.json; received something else: choose another "
                "folder"
            )
        names = sorted(kept.keys() | self.settings.keys())
        recorded, received = ({name: values.get(name) for name in names} for values in (kept, self.settings))
        check_same(f"the runs in {self.path}", recorded, received, "give the same, or another folder")

    def read(self, run: int, digest: str) -> tuple[npt.NDArray[np.float64], float] | None:
        """Return what a finished run measured, (q,), and its seconds; None where it is missing or cannot be read."""
        arrays = self.get(_name(run))
        if arrays is None or not {"digest", "outcome", "seconds"} <= arrays.keys():
            return None
        check_same(
            f"run {run} in {self.path}", {"rows and seed": str(arrays["digest"])}, {"rows and seed": digest},
            "give the same subsets and seeds, or another folder",
        )  # fmt: skip
        return arrays["outcome"], float(arrays["seconds"])

    def write(self, run: int, digest: str, outcome: npt.NDArray[np.float64], seconds: float) -> None:
        """Write what a run measured, (q,): durable when this returns."""
        self.put(_name(run), {"outcome": outcome, "digest": np.array(digest), "seconds": np.array(seconds)})

    def collect(self, subsets: Subsets, seeds: Sequence[int]) -> Runs:
        """Return what is finished of the runs on ``subsets``, which must be of these subsets and seeds."""
        runs = [self.read(run, run_digest(subsets[run], seeds[run])) for run in range(len(subsets))]
        widths = {len(run[0]) for run in runs if run is not None}
        if len(widths) > 1:
            raise MismatchError(
                f"expected as many outcomes of every run; received {sorted(widths)} in {self.path}: measure the same "
                "rows after every run, in another folder"
            )
        outcomes = np.full((len(runs), max(widths, default=0)), np.nan)
        seconds = np.full(len(runs), np.nan)
        for number, run in enumerate(runs):
            if run is not None:
                outcomes[number], seconds[number] = run
        return Runs(subsets, outcomes, seconds)


def _name(run: int) -> str:
    return f"run-{run:05d}"


def run_digest(rows: Rows, seed: int) -> str:
    """Return what tells a run from others: SHA-256 of its rows and its seed."""
    return hashlib.sha256(np.packbits(rows).tobytes() + f" {len(rows)} {seed}".encode()).hexdigest()


def ranges(numbers: Sequence[int]) -> str:
    """Return ascending whole numbers as text, runs of them as ranges: ``"3, 7-12"``."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1] = [parts[-1][0], number]
        else:
            parts.append([number])
    return ", ".join("-".join(map(str, part)) for part in parts)


Train = Callable[[npt.NDArray[np.int64]], Any]
Measure = Callable[[Any], npt.ArrayLike]


def random_subsets(n: int, m: int, share: float = 0.5, seed: int = 0) -> npt.NDArray[np.bool_]:
    """Return ``m`` random subsets of ``n`` rows, all of one size (Ilyas et al. 2022, arXiv 2202.00622).

    Subset j depends on n, the size, the seed and j only: more of them leave the first ones as they are.

    Parameters
    ----------
    n, m : int
        Rows, and subsets.
    share : float
        Share of the rows in each, in (0, 1); rounded to whole rows.
    seed : int
        Seed of the choice.

    Returns
    -------
    (m, n) bool

    Raises
    ------
    InputError
        For fewer than one subset, a share outside (0, 1), or one that leaves no row in or none out.
    """
    size = round(share * n) if 0 < share < 1 else 0
    if m < 1 or not 0 < size < n:
        raise InputError(f"expected m >= 1 subsets with some of n rows, not all; received m={m}, n={n}, share={share}")
    subsets = np.zeros((m, n), bool)
    for number, subset in enumerate(subsets):
        generator = np.random.Generator(np.random.PCG64([seed, number]))
        subset[generator.choice(n, size, replace=False, shuffle=False)] = True
    return subsets


@takes(RetrainOptions)
def retrain(
    train: Train,
    measure: Measure,
    subsets: Subsets,
    folder: str | Path,
    *,
    seeds: Sequence[int] | None = None,
    **options: Unpack[RetrainOptions],
) -> Runs:
    """Train a model on each subset and measure it, or resume where an earlier call was stopped.

    Before a run the global generators of Python, NumPy and (where it is loaded) PyTorch are seeded with the run's seed;
    afterwards their state is restored. What ``train`` draws from them depends neither on the order of the runs nor on
    workers or interruptions.

    Parameters
    ----------
    train : callable (indices) -> model
        Trains on the rows ``indices``, (size,) int64, ascending.
    measure : callable (model) -> (q,) array
        Measures a model on q rows; larger = better fit (minus a loss, a margin, the logarithm of a probability).
    subsets : (m, n) bool, or a sequence of m rows (n,) bool
        The rows to train on, run by run.
    folder : path
        A local folder, made if it is not there. A run that finishes is kept there before the next one starts.
    seeds : sequence of int, optional
        A seed a run; default its number. Equal seeds for runs that are compared leave less noise in the difference.
    **options : RetrainOptions
        See :mod:`ooc_influence.options`.

    Returns
    -------
    Runs
        ``outcomes`` (m, q), none of them missing.

    Raises
    ------
    InputError
        For subsets that are empty or of different lengths, seeds that do not match, functions that cannot be sent.
    MismatchError
        If the folder holds runs of other settings, subsets or seeds.
    RunFailedError
        If a run raises, measures anything but (q,) finite numbers, or processes die and no run finishes. What is
        finished is kept.
    StoreWriteError
        If the disk refuses.
    """
    run_folder, seeds = _open(subsets, folder, options["settings"], seeds)
    workers = options["workers"]
    if workers < 1:
        raise InputError(f"expected workers >= 1; received {workers}")
    missing = run_folder.collect(subsets, seeds).missing
    task = _Task(train, measure, run_folder)
    with Progress("retrain", len(subsets), options["progress"], unit="run") as bar:
        bar.advance(len(subsets) - len(missing))
        if workers > 1 and missing:
            _run_in_processes(task, missing, subsets, seeds, workers, bar)
        else:
            for run in missing:
                task(run, subsets[run], seeds[run])
                bar.advance(1)
    return run_folder.collect(subsets, seeds)


def finished_runs(
    subsets: Subsets,
    folder: str | Path,
    *,
    settings: Mapping[str, Any] | None = None,
    seeds: Sequence[int] | None = None,
) -> Runs:
    """Return the runs of :func:`retrain` that are finished in a folder, without doing any.

    Parameters
    ----------
    subsets, folder, settings, seeds
        As for :func:`retrain`.

    Raises
    ------
    InputError, MismatchError, StoreWriteError
        As for :func:`retrain`.
    """
    run_folder, seeds = _open(subsets, folder, settings, seeds)
    return run_folder.collect(subsets, seeds)


def _open(
    subsets: Subsets, folder: str | Path, settings: Mapping[str, Any] | None, seeds: Sequence[int] | None
) -> tuple[RunFolder, Sequence[int]]:
    """Check subsets and seeds and open the folder."""
    lengths = set()
    for run, rows in enumerate(subsets):
        if np.ndim(rows) != 1 or np.asarray(rows).dtype != bool or not np.any(rows):
            raise InputError(
                f"expected subsets (m, n) bool, some rows in each; received {np.shape(rows)} "
                f"{np.asarray(rows).dtype} with {np.count_nonzero(rows)} rows as subset {run}"
            )
        lengths.add(len(rows))
    if len(lengths) != 1:
        raise InputError(f"expected subsets (m, n) of the same n rows; received lengths {sorted(lengths)}")
    seeds = range(len(subsets)) if seeds is None else [int(seed) for seed in seeds]
    if len(seeds) != len(subsets) or min(seeds) < 0 or max(seeds) >= 2**32:
        raise InputError(f"expected {len(subsets)} seeds, one a subset, from 0 to 2**32 - 1; received {len(seeds)}")
    return RunFolder(folder, {"rows": lengths.pop(), "settings": dict(settings or {})}), seeds


@dataclass(frozen=True)
class _Task:
    """One run: train, measure, keep."""

    train: Train
    measure: Measure
    folder: RunFolder

    def __call__(self, run: int, rows: npt.NDArray[np.bool_], seed: int) -> None:
        start = time.perf_counter()
        try:
            with seeded(seed):
                outcome = np.asarray(self.measure(self.train(np.flatnonzero(rows))), np.float64)
        except Exception as error:
            raise RunFailedError(
                f"expected run {run} to train and measure; received {type(error).__name__}: {error}: fix "
                f"that and call again; finished runs are kept in {self.folder.path}"
            ) from error
        if outcome.ndim != 1 or not len(outcome) or not np.isfinite(outcome).all():
            raise RunFailedError(
                f"expected run {run} to measure (q,) finite numbers; received {outcome.shape} with "
                f"{int((~np.isfinite(outcome)).sum())} that are not: return one number a "
                f"query; finished runs are kept in {self.folder.path}"
            )
        self.folder.write(run, run_digest(rows, seed), outcome, time.perf_counter() - start)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the global generators of Python, NumPy and, where it is loaded, PyTorch; restore their state afterwards."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    torch: Any = sys.modules.get("torch")
    devices = range(torch.cuda.device_count()) if torch else ()
    with torch.random.fork_rng(devices=devices) if torch else nullcontext():
        random.seed(seed)
        np.random.seed(seed)
        if torch:
            torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)


def _run_in_processes(
    task: _Task, missing: list[int], subsets: Subsets, seeds: Sequence[int], workers: int, bar: Progress
) -> None:
    """Do the runs in worker processes; where one dies, start again with what is left, as long as runs finish."""
    try:
        payload = pickle.dumps(task)
    except Exception as error:  # pickle raises whatever it meets
        raise InputError(
            "expected train and measure that can be sent to other processes, functions of a module, for workers > 1; "
            f"received {type(error).__name__}: {error}: use workers=1"
        ) from error
    while missing:
        try:
            _run_in_pool(payload, missing, subsets, seeds, min(workers, len(missing)), bar)
            return
        except BrokenProcessPool as error:
            left = task.folder.collect(subsets, seeds).missing
            if len(left) == len(missing):
                raise RunFailedError(
                    f"expected runs {ranges(left)} to finish; received a worker process that ended (out of memory? "
                    f"what it said is above): finished runs are kept in {task.folder.path}"
                ) from error
            missing = left


def _run_in_pool(
    payload: bytes, missing: Sequence[int], subsets: Subsets, seeds: Sequence[int], workers: int, bar: Progress
) -> None:
    context = multiprocessing.get_context("spawn")
    alive, ours = context.Pipe(duplex=False)
    pool = ProcessPoolExecutor(workers, context, _serve, (alive, payload, max(1, cores() // workers)))
    runs, pending = iter(missing), set[Future[None]]()
    try:
        while True:
            for run in runs:
                pending.add(pool.submit(_work, run, subsets[run], seeds[run]))
                if len(pending) > workers:  # one waits; subsets may be made as they are asked for
                    break
            if not pending:
                break
            done, pending = wait(pending, return_when=FIRST_COMPLETED)
            for future in done:
                future.result()
                bar.advance(1)
    except BaseException:
        ours.close()  # what still runs ends here
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        ours.close()
        alive.close()


_task: _Task


def _serve(alive: Connection, payload: bytes, threads: int) -> None:
    """Make this process a worker: with its share of the cores, and ending when the process that started it does."""
    global _task
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    threading.Thread(target=_end_with, args=(alive,), daemon=True).start()
    _task = pickle.loads(payload)
    threadpool_limits(threads)
    torch: Any = sys.modules.get("torch")
    if torch:
        torch.set_num_threads(threads)


def _end_with(alive: Connection) -> None:
    try:
        alive.recv_bytes()
    except (EOFError, OSError):
        os._exit(1)


def _work(run: int, rows: npt.NDArray[np.bool_], seed: int) -> None:
    _task(run, rows, seed)
