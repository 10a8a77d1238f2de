"""Sketches: a small store beside a wide one, of the same rows, that finds candidates for lists.

A sketch holds each row's coordinates in the largest directions of the rows' eigenbasis
(:mod:`ooc_influence.compress.reduce`), as whole numbers. A query that is preconditioned in the wide columns becomes one
of the sketch by :func:`query_turn`, so that curvature, damping and unit are those of the wide store, whatever they are.
"""

from __future__ import annotations

import logging

import numpy as np

from ooc_influence.compress.eigenbasis import has_residuals
from ooc_influence.compress.reduce import Job, orthonormal, turn, write_reduced
from ooc_influence.compress.residuals import query_factors
from ooc_influence.errors import InputError, MismatchError
from ooc_influence.linalg import Floats, LayerMoments, Matrix
from ooc_influence.options import ReduceOptions
from ooc_influence.store import GradientStore, PathLike, as_store, check_finished

logger = logging.getLogger("ooc_influence")
SKETCH_DIMS = 256


def write_sketch(train: GradientStore | PathLike, out: PathLike, r: int, options: ReduceOptions) -> GradientStore:
    """Write a sketch of ``r`` numbers a row, or resume, or add the rows that were appended; open it.

    ``options`` are complete; of them, ``like``, ``rotate`` and ``weights`` are not asked for. Errors are those of
    :func:`reduce_store`, but for rows of signs, which can be sketched.
    """
    source = as_store(train)
    check_finished(source)
    reduction = source.attrs.get("reduction")
    if reduction is not None and reduction["name"] != "eigenbasis":
        raise InputError(
            f"expected a store of kept entries, or reduced to an eigenbasis, to sketch; received {source.path}, whose "
            f"reduction is {reduction['name']}: its lists are found without a sketch"
        )
    if not 1 <= r <= source.k:
        raise InputError(f"expected 1 <= r <= {source.k}, the numbers of a row in {source.path}; received {r}")
    job = Job(source, None, r, options["rows"], None, source.is_reduced, sketch=True)
    sketch = write_reduced(job, out, options)
    if not has_residuals(sketch):
        logger.info(
            "%s has no norms of what it leaves out of each row, and lists by it cannot be proven complete: "
            "for that, make a sketch at another path, or remove this one first", sketch.path,
        )  # fmt: skip
    return sketch


def check_sketch(sketch: GradientStore, train: GradientStore) -> None:
    """Check that a store holds the rows of ``train``, reduced, and all of them.

    Raises
    ------
    MismatchError
        If not.
    """
    record = sketch.attrs.get("reduced") or {}
    if record.get("source") != train.identity:
        raise MismatchError(
            f"expected a sketch of {train.path}; received {sketch.path}, made of another store: make one with "
            f"'ooc-influence sketch {train.path}'"
        )
    if sketch.n != train.n:
        raise MismatchError(
            f"expected a sketch of all {train.n} rows of {train.path}; received {sketch.path}, of {sketch.n}: run "
            f"'ooc-influence sketch {train.path} {sketch.path}' again, which adds those that are missing"
        )


def query_turn(sketch: GradientStore, train: GradientStore) -> Floats:
    """Return the matrix (k, r) that turns preconditioned queries of ``train`` to those of its sketch.

    With whitened rows D⁻¹g ≈ V z, a product qᵀg is about (Vᵀ D q)ᵀ z.
    """
    if train.is_reduced:
        return turn(train, sketch)
    vectors = orthonormal(sketch)
    damping = sketch.attrs["reduction"].get("whitened")
    if damping is None:
        return vectors
    return np.asarray(vectors * LayerMoments.of(train.mask).scale(damping)[:, None], np.float32)


def residual_factors(
    sketch: GradientStore, train: GradientStore, turn: Floats, queries: Floats, norm_units: float
) -> Matrix:
    """Return E of preconditioned queries (q, k) of a sketch (:func:`ooc_influence.compress.residuals.query_factors`).

    ``turn`` is :func:`query_turn`, by which queries become the sketch's.
    """
    damping = None if train.is_reduced else sketch.attrs["reduction"].get("whitened")
    whitening = None if damping is None else LayerMoments.of(train.mask).scale(damping)
    return query_factors(queries, queries @ turn, turn, whitening, sketch.column_scale, norm_units)
