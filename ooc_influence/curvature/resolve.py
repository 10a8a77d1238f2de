"""Which curvature a call means: an object, a name in the train store, a path, or the usual one."""

from __future__ import annotations

import logging

from ooc_influence.curvature.curvature import Curvature, complete_attributes, curvature_path, fit_command
from ooc_influence.curvature.kronecker import PRIOR, KroneckerPrior, has_prior
from ooc_influence.curvature.trajectory import find_effects
from ooc_influence.errors import CurvatureNotFoundError, InputError, StaleCurvatureError
from ooc_influence.store import GradientStore, PathLike, parse_path

logger = logging.getLogger("ooc_influence")


def resolve_curvature(train: GradientStore, curvature: Curvature | PathLike | None) -> Curvature:
    """Return the curvature a call means, checked against the train store.

    Parameters
    ----------
    train : GradientStore
        The store it is for.
    curvature : Curvature, str, path or None
        An object; a name in the store; ``"kronecker"``, what a mask in a Kronecker basis brings along; a path of a
        curvature group; None for ``"default"`` or ``"gram"``, as :func:`fit_curvature` names them: the one that is of
        the rows as they are. Where both are, and of the same rows and weights, the one that takes less memory to score
        with; else ``"default"``; where there is neither, that of the Kronecker basis.

    Raises
    ------
    CurvatureNotFoundError
        If there is none.
    MismatchError, StaleCurvatureError
        See :meth:`Curvature.check`.
    """
    if curvature is None:
        return _usual_curvature(train)
    if not isinstance(curvature, Curvature):
        text = str(curvature)
        if (text == PRIOR or parse_path(curvature) == curvature_path(train, PRIOR)) and has_prior(train):
            return KroneckerPrior(train)
        paths = ([] if "/" in text else [curvature_path(train, text)]) + [parse_path(curvature)]
        path = next((path for path in paths if complete_attributes(path) is not None), None)
        if path is None:
            if find_effects(train, curvature) is not None:
                raise InputError(
                    f"expected a curvature to multiply gradients by; received {text!r}, which is of effects of rows: "
                    "it is for scores, top lists, groups and self-influence"
                )
            raise _not_found(train, text)
        curvature = Curvature.open(path)
    curvature.check(train)
    return curvature


def _usual_curvature(train: GradientStore) -> Curvature:
    """Return the curvature that scores take where none is named."""
    current, stale = [], None
    for name in ("default", "gram"):
        path = curvature_path(train, name)
        if complete_attributes(path) is None:
            continue
        curvature = Curvature.open(path)
        try:
            curvature.check(train)
        except StaleCurvatureError as error:
            stale = stale or error
        else:
            current.append(curvature)
    if not current and stale is None and has_prior(train):
        return KroneckerPrior(train)
    if not current:
        raise stale or _not_found(train, "default")
    if stale is not None:
        logger.info("scoring with %s, since another curvature is stale: %s", current[0].path, stale)
    if len(current) > 1 and current[1].equals(current[0]):
        return min(current, key=lambda curvature: curvature.working_bytes(1, 1))
    return current[0]


def _not_found(train: GradientStore, name: str) -> CurvatureNotFoundError:
    path = parse_path(name) if "/" in name else curvature_path(train, name)
    call = {"default": "", "gram": ", method='dual'"}.get(
        name, f", out={name!r}" if "/" in name else f", name={name!r}"
    )
    return CurvatureNotFoundError(
        f"expected a fitted curvature {name!r} in {train.path}; received none: run "
        f"fit_curvature({str(train.path)!r}{call}) or '{fit_command(train, path)}'"
    )
