"""What each collected row did to the final weights, to first order: rows times their step's derivative.

A sample's weight in the batch of step s changes the optimiser's gradient, and through its state all later steps. The
derivative of the final weights is carried backwards through the recorded steps, entry by entry, as the chain rule says
(:mod:`.unrolled`); first-order, with the gradients of later steps held, it is what TracIn (arXiv 2002.08484) sums for
SGD, and arXiv 2605.18814 for AdamW. With ``between``, later gradients follow the weights by a diagonal curvature, one
for each segment of the training, as in SOURCE (:mod:`.segments`), which averages the gradients of a segment too.

Effects are the rows of a store of their own, so that scores are plain products of queries with them.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from typing import Any, Unpack

import numpy as np
import numpy.typing as npt

from ooc_influence.curvature.curvature import complete_attributes
from ooc_influence.curvature.segments import Segments, fit_segments
from ooc_influence.curvature.unrolled import Unrolled
from ooc_influence.errors import InputError, StaleCurvatureError, StoreFormatError, StoreNotFoundError, writing
from ooc_influence.fingerprint import check_same
from ooc_influence.options import TrajectoryOptions, takes
from ooc_influence.progress import Progress
from ooc_influence.store import (
    WEIGHT,
    GradientStore,
    PathLike,
    StepLog,
    Storage,
    StorePath,
    as_store,
    check_finished,
    copy_tombstones,
    create_like,
    exists,
    parse_path,
    parse_representation,
    remove_tree,
)

TRAJECTORY = "trajectory"  # the folder in a store, and the attribute of a store of effects
OWN_EFFECT = "own_effect"  # the column with what a row did to its own loss
_BLOCK_BYTES = 2**25  # of float32 rows at a time
_DTYPES = ("float16", "bfloat16", "float32")

Numbers = npt.NDArray[np.int64]
Scales = npt.NDArray[np.float64]


@takes(TrajectoryOptions)
def fit_trajectory(store: GradientStore | PathLike, **options: Unpack[TrajectoryOptions]) -> GradientStore:
    """Write the effect of each row that was collected on the final weights, or resume.

    With :math:`g_i` the gradient of a sample in the batch of step s, its effect is -dθ/dw ∘ g_i, entry by entry: dθ/dw
    the derivative of the final weights with respect to the gradient that the optimiser saw, times the sample's weight
    in the batch's loss and the factor of clipping, which is held. A query's score on it, ``curvature="trajectory"``, is
    by how much the query's loss at the end is lower for each unit of the sample's loss counted once more in that step.

    Parameters
    ----------
    store : GradientStore or path
        (n, k), finished, of :func:`collect` with ``optimizer=``.
    **options : TrajectoryOptions
        See :mod:`ooc_influence.options`.

    Returns
    -------
    GradientStore
        The effects, (n, k), in the folder ``trajectory`` of the store. Losses, ids, columns and tombstones carry over.

    Raises
    ------
    InputError
        For a store without an optimiser's steps, rows of steps that have none, or a curvature that it does not have.
    MismatchError
        If ``out`` is a store of something else.
    StoreDamagedError
        If the recorded steps are damaged.
    """
    source = as_store(store)
    check_finished(source)
    log = StepLog(source.path)
    if WEIGHT not in source.layout.columns:
        raise InputError(
            f"expected a column {WEIGHT!r} in {source.path}, as collect(optimizer=...) writes; received none: "
            "collect again"
        )
    path = source.path / TRAJECTORY if options["out"] is None else parse_path(options["out"])
    steps = _Steps.of(source, log)
    facts = {
        "of": source.identity, "rows": source.rows_digest(), "records": len(log),
        "between": options["between"], "segments": options["segments"],
    }  # fmt: skip
    target = _begun(source, path, facts, options)
    if target is None or target.n < source.n:
        between = fit_segments(source, log.steps, options["between"], options["segments"])  # refused before others go
        target = target or _create(source, path, facts, options)
        copy_tombstones(source, target)
        with tempfile.TemporaryFile() as file, target:
            multipliers = _Multipliers(file, source.k, steps.numbers)
            multipliers.fill(log, between, options["progress"])
            _fill(source, target, steps, multipliers, options["progress"])
    written = GradientStore.open(path, "a")
    copy_tombstones(source, written)
    return GradientStore.open(path)


class _Steps:
    """The steps that rows are of.

    Attributes
    ----------
    numbers : (s,) int64
        Records of steps that have rows, rising.
    """

    def __init__(self, source: GradientStore, log: StepLog, numbers: Numbers) -> None:
        self._source, self._log, self.numbers = source, log, numbers

    @classmethod
    def of(cls, source: GradientStore, log: StepLog) -> _Steps:
        """Return those of a store's live rows."""
        steps: Numbers = np.empty(0, np.int64)
        for start in range(0, source.n, source.layout.group_rows):
            part = start, min(source.n, start + source.layout.group_rows)
            live = ~source.small("dropped", *part)
            steps = np.union1d(steps, source.small("columns/step", *part)[live])
        if len(steps) and steps[-1] > log.steps[-1]:
            raise InputError(
                f"expected a step of the optimiser for the rows of {source.path} up to step {steps[-1]}; received "
                f"records up to {log.steps[-1]}: continue the interrupted training, or drop the rows after it"
            )
        numbers = np.searchsorted(log.steps, steps)
        return cls(source, log, numbers[log.steps[numbers] == steps])  # a step that was skipped moved nothing

    def at(self, start: int, stop: int) -> Numbers:
        """Return the record of each row's step; -1 where the optimiser made none."""
        steps = self._source.small("columns/step", start, stop)
        numbers = np.minimum(np.searchsorted(self._log.steps, steps), len(self._log) - 1)
        return np.where(self._log.steps[numbers] == steps, numbers, -1)


class _Multipliers:
    """What rows of each step are multiplied by, in a file: (s, k) float32."""

    def __init__(self, file: Any, k: int, numbers: Numbers) -> None:
        self._file, self._k, self._numbers = file, k, numbers

    def fill(self, log: StepLog, between: Segments | None, progress: bool | None) -> None:
        """Compute all, from the last step to the first, in memory of O(k) beside ``between``."""
        unrolled = Unrolled(log.columns, between)
        wanted = len(self._numbers) - 1
        with Progress("steps", len(log), progress) as bar, writing("to temporary files", ""):
            for number, (record, held) in zip(range(len(log) - 1, -1, -1), log.backwards(), strict=True):
                multiplier = unrolled.step(record, held)
                if wanted >= 0 and self._numbers[wanted] == number:
                    self._file.seek(wanted * self._k * 4)
                    self._file.write((multiplier * record.factor).astype("<f4").data)
                    wanted -= 1
                bar.advance(1)
            self._file.flush()

    def read(self, number: int) -> npt.NDArray[np.float32]:
        """Return those of a record, (k,)."""
        self._file.seek(int(np.searchsorted(self._numbers, number)) * self._k * 4)
        return np.frombuffer(self._file.read(self._k * 4), "<f4")


def _begun(
    source: GradientStore, path: StorePath, facts: dict[str, Any], options: TrajectoryOptions
) -> GradientStore | None:
    """Return the store that an earlier call of the same kind began; None where there is none, or one to be replaced."""
    dtype = parse_representation(options["dtype"])
    if dtype not in _DTYPES:
        raise InputError(f"expected dtype {', '.join(_DTYPES)} for effects; received {dtype!r}: rewrite them later")
    if path == source.path:
        raise InputError(f"expected a path apart from the rows'; received {path}")
    try:
        target = GradientStore.open(path, "a")
    except StoreNotFoundError:
        return None
    recorded = {**(target.attrs.get(TRAJECTORY) or {}), "dtype": target.layout.dtype}
    asked = {**facts, "dtype": dtype}
    if all(recorded.get(name) == value for name, value in asked.items()) and not options["refit"]:
        return target
    if options["out"] is not None:
        of = {"of": recorded.get("of")}
        check_same(f"the store at {path}", of, {"of": facts["of"]}, "choose another path, or remove it")
    return None


def _create(source: GradientStore, path: StorePath, facts: dict[str, Any], options: TrajectoryOptions) -> GradientStore:
    """Make an empty store, in place of effects of another kind."""
    with contextlib.suppress(StoreNotFoundError):  # anything else that is there stays, and is refused
        GradientStore.open(path)
        remove_tree(path)
    return create_like(
        source, path, [str(source.path)], dtype=parse_representation(options["dtype"]), planned_rows=source.n,
        column_scale=None, storage=options["storage"] or Storage(codec=source.layout.codec),
        columns=source.layout.columns | {OWN_EFFECT: "float64"}, attributes={TRAJECTORY: facts},
    )  # fmt: skip


def _fill(
    source: GradientStore, target: GradientStore, steps: _Steps, multipliers: _Multipliers, progress: bool | None
) -> None:
    size = max(1, _BLOCK_BYTES // (8 * source.k))
    with Progress("effects", source.n, progress) as bar:
        start = target.writer(0, target.layout.planned_rows).next_row
        bar.advance(start)
        for low in range(start, source.n, size):
            high = min(source.n, low + size)
            rows = source.rows(low, high)
            effects = _effects(rows, steps.at(low, high), source.small(f"columns/{WEIGHT}", low, high), multipliers)
            columns = {name: source.small(f"columns/{name}", low, high) for name in source.layout.columns}
            target.append(
                effects,
                loss=source.small("loss", low, high),
                ids=np.asarray(source.small("example_id", low, high)) if source.layout.ids else None,
                columns=columns | {OWN_EFFECT: np.einsum("nk,nk->n", rows, effects, dtype=np.float64)},
            )
            bar.advance(high - low)


def _effects(
    rows: npt.NDArray[np.float32], numbers: Numbers, weights: Scales, multipliers: _Multipliers
) -> npt.NDArray[np.float32]:
    """Return rows times the multipliers of their steps and their weights."""
    effects = np.zeros_like(rows)
    for number, chosen in _same(numbers):
        if number >= 0:
            effects[chosen] = rows[chosen] * multipliers.read(number) * weights[chosen, None].astype(np.float32)
    return effects


def _same(numbers: Numbers) -> Iterator[tuple[int, Numbers]]:
    """Yield each distinct number with the indices that have it."""
    order = np.argsort(numbers, kind="stable")
    distinct, first = np.unique(numbers[order], return_index=True)
    yield from zip(distinct.tolist(), np.split(order, first[1:]), strict=True)


def find_effects(train: GradientStore, curvature: Any) -> GradientStore | None:
    """Return the store of effects that a call's curvature means; None where it means another.

    Parameters
    ----------
    train : GradientStore
        The store of rows, or of their effects itself.
    curvature : object
        ``"trajectory"``, or a path of a store of effects.

    Raises
    ------
    InputError
        For ``"trajectory"`` of a store without effects, or another curvature of a store of effects.
    StaleCurvatureError
        If rows were added or dropped since.
    """
    if TRAJECTORY in train.attrs:
        if curvature in (None, False, TRAJECTORY) or str(curvature) == str(train.path):
            return train
        raise InputError(
            f"expected curvature='trajectory' for {train.path}, whose rows are effects on the final weights; received "
            f"{curvature}: score the rows they were made from with it"
        )
    if not isinstance(curvature, str) and not hasattr(curvature, "parent"):
        return None
    path = train.path / TRAJECTORY if str(curvature) == TRAJECTORY else parse_path(curvature)
    if str(curvature) != TRAJECTORY and (not exists(path) or complete_attributes(path) is not None):
        return None
    try:
        effects = GradientStore.open(path)
    except (StoreNotFoundError, StoreFormatError):
        if str(curvature) != TRAJECTORY:
            return None
        raise InputError(
            f"expected the effects of a training's rows in {train.path}; received none: run "
            f"fit_trajectory({str(train.path)!r})"
        ) from None
    facts = effects.attrs.get(TRAJECTORY)
    if facts is None:
        return None
    if effects.n < train.n or facts["of"] != train.identity or facts["rows"] != train.rows_digest():
        raise StaleCurvatureError(
            f"expected the effects of the {train.n} rows of {train.path}; received {path}, of other rows or not "
            "finished: run fit_trajectory again"
        )
    return effects
