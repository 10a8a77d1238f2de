"""Where a fit goes: what is there already, what became of its rows since, what is written down about them."""

from __future__ import annotations

import contextlib
import logging
import time
from typing import Any

from ooc_influence.curvature.curvature import Curvature
from ooc_influence.curvature.damping import DEFAULT_DAMPING
from ooc_influence.curvature.files import check_replaceable, curvature_path
from ooc_influence.curvature.rows import ChosenRows
from ooc_influence.curvature.staleness import Change
from ooc_influence.errors import (
    CurvatureNotFoundError,
    InputError,
    StaleCurvatureError,
    StoreDamagedError,
    StoreExistsError,
    warn,
)
from ooc_influence.store import GradientStore, PathLike, StorePath, parse_path

logger = logging.getLogger("ooc_influence")
_EVERY_ROW = {"kind": "range", "start": 0, "stop": None}
_NEAR_ROWS, _NEAR_COLUMNS = 0.95, 0.9  # of m or k: a d(λ) beyond that is worth a warning


def fit_attributes(chosen: ChosenRows, rows: int, trace: float) -> dict[str, Any]:
    """Return what a curvature records about the rows it was fitted on."""
    store = chosen.store
    return {
        "mask_digest": store.columns_digest,
        "model": store.model_fingerprint,
        "store_id": store.identity,
        "store_rows": store.n,
        "rows_digest": chosen.rows_digest,
        "rows": rows,
        "d": store.k,
        "trace": trace,
        "damping": DEFAULT_DAMPING,
        "weights": chosen.record(),
    }


def warn_if_unfinished(train: GradientStore) -> None:
    """Warn where rows are missing between those that were extracted."""
    planned = train.layout.planned_rows or train.committed
    if train.n < planned:
        warn(f"{train.path} holds {train.n} of {planned} rows without a gap: the fit covers those")


def fit_target(train: GradientStore, name: str, out: PathLike | None) -> StorePath:
    """Return where a store's curvature is to be saved.

    Raises
    ------
    StoreExistsError
        If something else than a curvature is there.
    InputError
        If the store has no rows.
    """
    target = parse_path(out) if out is not None else curvature_path(train, name)
    check_replaceable(target)
    if not train.n:
        raise InputError(f"expected a store with committed rows; received {train.path} with none: extract first")
    return target


def fitted(target: StorePath, train: GradientStore) -> Curvature | None:
    """Return this store's curvature at ``target``, if there is one."""
    try:
        found = Curvature.open(target)
    except (CurvatureNotFoundError, StaleCurvatureError):
        return None
    with contextlib.suppress(StaleCurvatureError):
        found.check(train)
    if found.attrs["store_id"] != train.identity:
        raise StoreExistsError(
            f"expected a curvature of {train.path} or nothing at {target}; received one of another store: choose "
            "another path, or refit to replace it"
        )
    return found


def what_changed(found: Curvature, chosen: ChosenRows, kind: str) -> Change | None:
    """Return what became of a curvature's rows; None where it has to be fitted anew."""
    count = min(chosen.count, int(found.attrs.get("count", chosen.count)))
    same = (
        found.kind == kind
        and found.attrs.get("selection", _EVERY_ROW) == chosen.selection
        and (found.attrs.get("weights") or {}) == chosen.part(0, count).record()
    )
    if not same:
        logger.info("%s was fitted with other rows, weights, blocks or a rank: fitting anew", found.path)
        return None
    change = found.change(chosen.store, chosen)
    if change.refit:
        logger.info("%s: %s since it was fitted: fitting anew", found.path, change.refit)
        return None
    return change


def reopen(path: StorePath) -> Curvature:
    """Open what was just written, and warn of its effective dimension."""
    for _ in range(10):  # another fit may be replacing this one at this moment: theirs is as good
        with contextlib.suppress(CurvatureNotFoundError, StaleCurvatureError, StoreDamagedError, FileNotFoundError):
            found = Curvature.open(path)
            warn_of_dimension(found)
            return found
        time.sleep(0.01)
    return Curvature.open(path)


def warn_of_dimension(found: Curvature) -> None:
    """Warn where the default damping leaves nearly as many directions as there are rows or columns."""
    if found.trace <= 0 or found.kind == "diagonal":  # which has full rank however few the rows
        return
    dimension = found.least_dimension(found.damping_value())
    if dimension > _NEAR_ROWS * found.rows:
        near, advice = f"the {found.rows} rows it was fitted on", "more rows, or more damping, would say more"
    elif dimension > _NEAR_COLUMNS * found.d:
        near, advice = f"the {found.d} stored columns", "more columns, or more damping, would say more"
    else:
        return
    warn(
        f"{found.path} has an effective dimension of {dimension:.1f} at the default damping, close to {near}: {advice}"
    )
