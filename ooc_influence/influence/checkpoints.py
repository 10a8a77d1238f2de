"""A query store, a train store and a curvature that belong together, once or for several checkpoints of a model.

Scores over several checkpoints are means: of one training run's (TracIn, arXiv 2002.08484) or of models trained apart
(TRAK, arXiv 2303.14186). All of them have the same queries and train rows, in the same order. A checkpoint that was
trained on part of the rows scores those only: a row's score is the mean over the checkpoints that saw it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from ooc_influence.curvature import (
    OWN_EFFECT,
    TRAJECTORY,
    Curvature,
    KroneckerPrior,
    find_effects,
    has_prior,
    resolve_curvature,
)
from ooc_influence.errors import InputError, MismatchError, warn
from ooc_influence.fingerprint import check_same
from ooc_influence.influence.norms import ColumnNorms, RowNorms
from ooc_influence.linalg import check_one_label, kept_dampings, row_errors, whitening_damping
from ooc_influence.options import Combine, DampingMode
from ooc_influence.store import GradientStore, PathLike, as_store, check_has_rows

Store = GradientStore | PathLike
Stores = Store | Sequence[Store]
AnyCurvature = Curvature | PathLike | Literal[False] | None
Dampings = float | Sequence[float] | None
Marks = npt.NDArray[np.bool_]
_TEXT = "text_digest"  # a column of what documents say, whatever their ids


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """Checked stores of one model, their curvature and λ.

    Attributes
    ----------
    query : GradientStore or None
        (q, k), under the train store's mask and of its model; None where rows are scored on themselves.
    train : GradientStore
        (n, k).
    curvature : Curvature or None
        F's spectrum; None for plain dot products.
    values : tuple of float
        λ itself, one for each damping; (0.0,) without a curvature.
    lambdas : (L, B) float64
        λ of each block of the curvature.
    """

    query: GradientStore | None
    train: GradientStore
    curvature: Curvature | None
    values: tuple[float, ...]
    lambdas: npt.NDArray[np.float64]

    @classmethod
    def open(
        cls,
        query: Store | None,
        train: Store,
        curvature: AnyCurvature,
        damping: Dampings,
        mode: DampingMode,
        lists: bool,
    ) -> Checkpoint:
        """Open what is a path and check that all of it belongs together: masks, models, rows and the curvature.

        ``lists`` says which default damping is meant: that of lists, or of scores.
        """
        rows = open_store(train)
        queries = None if query is None else open_store(query)
        if queries is not None:
            _check_like(rows, queries)
        effects = find_effects(rows, curvature)
        if curvature is False or effects is not None:
            if damping is not None:
                without = "without a curvature" if effects is None else "with curvature='trajectory'"
                raise InputError(f"expected no damping {without}; received {damping}: leave it out")
            return cls(queries, rows if effects is None else effects, None, (0.0,), np.zeros((1, 1)))
        fitted = resolve_curvature(rows, curvature)
        if damping is not None and mode == "relative" and fitted.kind == "kronecker":
            _warn_far(rows, damping)
        if damping is None and lists and mode == "relative" and fitted.takes_damping:
            damping = fitted.list_damping
        each = damping if isinstance(damping, Sequence) else [damping]
        values = tuple(fitted.damping_value(value, mode) for value in each)
        return cls(queries, rows, fitted, values, fitted.lambdas(each, mode))

    @property
    def has_effects(self) -> bool:
        """Whether the train store's rows are effects on the final weights, which scores are plain products with."""
        return TRAJECTORY in self.train.attrs

    @property
    def curvature_name(self) -> str | None:
        """The path of the curvature, or of the effects; None for neither."""
        if self.curvature is not None:
            return str(self.curvature.path)
        return str(self.train.path) if self.has_effects else None

    @property
    def norms(self) -> RowNorms | None:
        """Where the train store keeps its rows' self-influence at each λ; None where it does not."""
        if self.has_effects:
            return ColumnNorms((OWN_EFFECT,))
        kept = kept_dampings(self.train.layout.columns)
        if self.train.layout.dtype != "sign" or not kept or self.curvature is None or not has_prior(self.train):
            return None
        prior = KroneckerPrior(self.train)
        if self.curvature.attrs["fit"] != prior.attrs["fit"]:
            return None
        levels = {name: prior.lambdas(damping)[0] for damping, name in kept.items()}
        found = [
            next((name for name, level in levels.items() if np.allclose(level, own, rtol=1e-6, atol=0)), None)
            for own in self.lambdas
        ]
        names = tuple(name for name in found if name is not None)
        return ColumnNorms(names) if len(names) == len(found) else None

    @property
    def identity(self) -> list[Any]:
        """What the scores depend on, as JSON values: the rows of both stores, the fit, λ."""
        stores = [store for store in (self.query, self.train) if store is not None]
        rows = [[store.identity, store.rows_digest()] for store in stores]
        if self.curvature is None:
            return [rows, None, list(self.values)]
        return [rows, self.curvature.__dask_tokenize__(), self.lambdas.tolist()]


_NEAR = (1 / 128, 1024)  # times the damping that signs were taken at: in between, little is lost


def _warn_far(train: GradientStore, damping: float | Sequence[float]) -> None:
    """Warn of dampings far from the one that the entries of sign rows were divided by before their signs were taken."""
    if train.layout.dtype != "sign" or not train.mask.has_basis or train.is_reduced:
        return
    own = whitening_damping(train.attrs)
    far = [each for each in np.atleast_1d(damping).tolist() if not _NEAR[0] * own <= each <= _NEAR[1] * own]
    if far:
        warn(
            f"the signs in {train.path} are of entries whitened at the relative damping {own:g}: at "
            f"{', '.join(f'{each:g}' for each in far)} they say less (measured: 9 % less LDS than numbers of the same "
            "entries at a hundredth of it, 20 % at a thousandth, 4 % at its own)"
        )


def open_checkpoints(
    query: Stores | None,
    train: Stores,
    curvature: AnyCurvature | Sequence[AnyCurvature],
    damping: Dampings,
    mode: DampingMode,
    lists: bool,
) -> tuple[Checkpoint, ...]:
    """Open one checkpoint, or several from lists of one length, whose rows must be the same."""
    damping = _parse_damping(damping)
    trains = _listed(train)
    queries: list[Any] = [None] * len(trains) if query is None else _listed(query)
    curvatures: list[Any] = (
        list(curvature) if isinstance(curvature, (list, tuple)) else [curvature] * len(trains)  # one name for all
    )
    if not trains or not len(trains) == len(queries) == len(curvatures):
        raise InputError(
            "expected a query store, a train store and a curvature for each checkpoint; received "
            f"{len(queries)}, {len(trains)} and {len(curvatures)}"
        )
    checkpoints = [
        Checkpoint.open(*each, damping, mode, lists) for each in zip(queries, trains, curvatures, strict=True)
    ]
    first = checkpoints[0]
    for other in checkpoints[1:]:
        _check_same_rows(first.train, other.train)
        if first.query is not None and other.query is not None:
            _check_same_rows(first.query, other.query)
    return tuple(checkpoints)


def open_controls(minus: Stores, checkpoints: Sequence[Checkpoint]) -> list[GradientStore]:
    """Return the store of controls of each checkpoint, whose rows are those of its train store's mask and model.

    Raises
    ------
    InputError, MismatchError
        For another number of stores than checkpoints, stores without rows, or of another mask or model.
    """
    stores = [open_store(store) for store in _listed(minus)]
    if len(stores) != len(checkpoints):
        raise InputError(
            f"expected a store of controls (--minus) for each of {len(checkpoints)} checkpoints; received {len(stores)}"
        )
    for store, checkpoint in zip(stores, checkpoints, strict=True):
        _check_like(checkpoint.train, store)
    return stores


def _check_like(train: GradientStore, queries: GradientStore) -> None:
    check_same(
        train.path, train.fingerprints, queries.fingerprints,
        "extract the queries with like= (--like) the train store, with its model", other=queries.path,
    )  # fmt: skip


def _listed(stores: Stores) -> list[Store]:
    return list(stores) if isinstance(stores, (list, tuple)) else [stores]  # type: ignore[list-item]


def _parse_damping(damping: Dampings) -> Dampings:
    if damping is None or isinstance(damping, (int, float)):
        return damping
    values: npt.NDArray[Any] = np.asarray(damping)
    if values.ndim > 1 or values.dtype.kind not in "iuf" or not values.size:
        raise InputError(f"expected damping as a number or a list of numbers; received {damping!r}")
    return [float(value) for value in values] if values.ndim else float(values)


def _check_same_rows(first: GradientStore, other: GradientStore) -> None:
    """Check that two stores hold the same examples, as far as their ids and columns show."""
    if first.identity == other.identity:
        return
    different = "numbers" if first.n != other.n else _first_difference(first, other)
    if different is not None:
        raise MismatchError(
            f"expected the same rows in every checkpoint's store; received {first.path} ({first.n} rows) and "
            f"{other.path} ({other.n} rows), whose {different} differ: extract them from the same data in one order"
        )


def _first_difference(first: GradientStore, other: GradientStore) -> str | None:
    """Return which value of the rows of two stores differs; None if none does that both keep."""
    if (first.layout.ids is None) != (other.layout.ids is None):
        return "ids"
    kept = [name for name in first.layout.columns if name in other.layout.columns]
    compared = [name for name in kept if name == _TEXT]
    if first.layout.ids is None and not compared:  # numbers with a fraction may be a model's own
        compared = [name for name in kept if "float" not in first.layout.columns[name] + other.layout.columns[name]]
    arrays = {f"columns/{name}": f"values of {name!r}" for name in compared}
    if first.layout.ids is not None:
        arrays = {"example_id": "ids"} | arrays
    if not arrays:
        warn(
            f"the rows of {first.path} and {other.path} are taken for the same examples, in one order, because there "
            f"are {first.n} of each: extract with ids (ids=, --id) to have it checked"
        )
    step = first.layout.group_rows
    for start in range(0, first.n, step):
        part = start, min(first.n, start + step)
        for name, shown in arrays.items():
            if not np.array_equal(first.small(name, *part), other.small(name, *part)):
                return shown
    return None


def parse_marks(rows: Any, several: bool, checkpoints: int, n: int) -> Marks | None:
    """Return which rows each checkpoint was trained on, (C, n) bool; None for all of them.

    Parameters
    ----------
    rows : None, (m,) int or (n,) bool; where there are ``several`` checkpoints, a list with one of these for each
        Row numbers, or a mark for every row; None for all.
    several : bool
        Whether checkpoints were given as lists.
    checkpoints, n : int
        How many checkpoints and train rows there are.
    """
    if rows is None:
        return None
    each = list(rows) if several else [rows]
    if len(each) != checkpoints:
        raise InputError(f"expected rows= with an entry for each of {checkpoints} checkpoints; received {len(each)}")
    marks = np.ones((checkpoints, n), bool)
    for mark, chosen in zip(marks, each, strict=True):
        if chosen is None:
            continue
        values: npt.NDArray[Any] = np.asarray(chosen)
        if values.dtype == bool and values.shape == (n,):
            mark[:] = values
        elif values.ndim == 1 and values.dtype.kind in "iu" and values.size and 0 <= values.min() <= values.max() < n:
            mark[:] = False
            mark[values] = True
        else:
            raise InputError(
                f"expected rows as numbers in [0, {n}) or {n} marks; received {values.dtype} {values.shape}"
            )
    return marks


def open_store(store: Store) -> GradientStore:
    """Return an open store, which must have rows."""
    opened = as_store(store)
    check_has_rows(opened)
    return opened


_COMBINATIONS: tuple[Combine, ...] = get_args(Combine)


def parse_combine(combine: str, checkpoints: Sequence[Checkpoint], normalize: str | None) -> Combine:
    """Return how checkpoints are combined, checked against their losses and the scores' unit."""
    name = next((name for name in _COMBINATIONS if name == combine), None)
    if name is None:
        raise InputError(f"expected combine {', '.join(map(repr, _COMBINATIONS))}; received {combine!r}")
    if name == "mean":
        return name
    if normalize is not None:
        raise InputError(
            f"expected combine={combine!r} without normalize; received {normalize!r}: leave one of them out"
        )
    stores = [store for checkpoint in checkpoints for store in (checkpoint.query, checkpoint.train)]
    for store in (store for store in stores if store is not None):
        check_one_label(store.attrs, f"combine={combine!r}", f" in {store.path}")
    return name


def margin_factors(stores: Sequence[GradientStore], start: int, stop: int) -> npt.NDArray[np.float64]:
    """Return what turns each checkpoint's rows ``start`` to ``stop`` to margins, times the mean error, (C, b)."""
    errors = np.stack([row_errors(store.small("loss", start, stop)) for store in stores])
    return np.asarray(errors.mean(0) / errors)
