"""Writing a store's rows again in another representation, or under another mask: as signs, for example."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self, Unpack

import numpy as np

from ooc_influence.compress.change_of_basis import ChangeOfBasis
from ooc_influence.errors import StoreNotFoundError
from ooc_influence.fingerprint import check_same
from ooc_influence.linalg import KeptNorms, storage_scale
from ooc_influence.options import RewriteOptions, takes
from ooc_influence.progress import Progress
from ooc_influence.store import (
    GradientStore,
    PathLike,
    Representation,
    Storage,
    StorePath,
    as_store,
    check_finished,
    check_free,
    check_second_moments,
    copy_tombstones,
    create_like,
    parse_path,
    parse_representation,
)

_BLOCK_BYTES = 2**25  # of float32 rows at a time


@takes(RewriteOptions)
def rewrite_store(store: GradientStore | PathLike, out: PathLike, **options: Unpack[RewriteOptions]) -> GradientStore:
    """Write the rows of a store in another representation to a new store, or resume.

    Losses, norms, ids, columns and tombstones carry over; row numbers stay. Rows of signs in a Kronecker basis are
    divided by its whitening, and have their self-influence beside them, as :func:`extract_gradients` makes them. With
    ``like``, rows of all entries are turned into its entries first: those of a Kronecker basis that did not exist when
    the rows were computed, for example. It takes products with each layer's eigenvectors, and no model.

    Parameters
    ----------
    store : GradientStore or path
        (n, k), finished, of any representation but signs.
    out : path
        The store to make, (n, k), with the k of ``like`` where it is given.
    **options : RewriteOptions
        See :mod:`ooc_influence.options`.

    Returns
    -------
    GradientStore
        Open for reading.

    Raises
    ------
    InputError
        For a store that is not finished, or whose rows are signs; with ``like``, if rows are reduced, or do not have
        all entries of their layers.
    MismatchError
        If ``out`` is a store of something else, or ``like`` one of other layers.
    StoreExistsError
        If something else is at ``out``.

    Examples
    --------
    Rows of all entries, from a training; queries in the basis that its end has; the rows, turned into it::

        extract_gradients(model, loss, queries, "queries", compressor=Dropout(65536, basis="kronecker"), pilot=train)
        rewrite_store("rows", "signs", like="queries")
        top_influential("queries", "signs", curvature="kronecker")
    """
    source, path = as_store(store), parse_path(out)
    check_second_moments(source)
    check_finished(source)
    new = _New.of(source, parse_representation(options["dtype"]), options["like"])
    target = new.open(path, options["storage"])
    copy_tombstones(source, target)
    step = max(1, _BLOCK_BYTES // (4 * max(source.k, target.k)))
    with target, Progress("rewrite", source.n, options["progress"]) as bar:
        start = target.writer(0, target.layout.planned_rows).next_row
        bar.advance(start)
        for low in range(start, source.n, step):
            high = min(source.n, low + step)
            new.append(target, low, high)
            bar.advance(high - low)
    written = GradientStore.open(path, "a")
    copy_tombstones(source, written)
    if source.layout.planned_rows is None:
        written.plan_rows(None)
    return GradientStore.open(path)


@dataclass(frozen=True, eq=False)
class _New:
    """What is made of a store's rows.

    Attributes
    ----------
    source : GradientStore
        The rows.
    reference : GradientStore
        The store whose mask and compressor the new one has: often the source.
    dtype : str
        The representation.
    turn : ChangeOfBasis or None
        What makes rows under that mask of the source's.
    kept : KeptNorms
        What is stored beside rows.
    """

    source: GradientStore
    reference: GradientStore
    dtype: Representation
    turn: ChangeOfBasis | None
    kept: KeptNorms

    @classmethod
    def of(cls, source: GradientStore, dtype: Representation, like: GradientStore | PathLike | None) -> Self:
        reference = source if like is None else as_store(like)
        kept = KeptNorms.of(dtype, reference.mask, reference.attrs, reduced=source.is_reduced)
        return cls(source, reference, dtype, None if reference is source else ChangeOfBasis(source, reference), kept)

    @property
    def record(self) -> dict[str, Any]:
        """What the store records about what it is made of, for the next run to check."""
        like = {} if self.turn is None else {"like": self.reference.mask.digest}
        return {"source": self.source.identity, **like}

    @property
    def _inherited(self) -> dict[str, Any]:
        """Attributes of the mask, where it is not the source's."""
        names = () if self.turn is None else ("compressor", "covered", "metric")
        return {name: self.reference.attrs.get(name) for name in names}

    def open(self, path: StorePath, storage: Storage | None) -> GradientStore:
        """Open the store of an earlier run, or make an empty one."""
        source, reference = self.source, self.reference
        try:
            target = GradientStore.open(path, "a")
        except StoreNotFoundError:
            check_free(path, "a store or nothing")
            return create_like(
                source, path, [str(source.path)], dtype=self.dtype, mask=reference.mask,
                storage=storage or Storage(codec=source.layout.codec), planned_rows=source.n,
                column_scale=storage_scale(self.dtype, reference.mask, source.reduction, reference.attrs),
                columns=source.layout.columns | dict.fromkeys(self.kept.weights, "float64"),
                attributes={"rewritten": self.record, **self._inherited},
            )  # fmt: skip
        expected = {"rewriting": target.attrs.get("rewritten"), "dtype": target.layout.dtype}
        received = {"rewriting": self.record, "dtype": self.dtype}
        check_same(f"the store at {path}", expected, received, "rewrite to another path, or remove the store")
        if target.n < source.n != target.layout.planned_rows:
            target.plan_rows(source.n)
        return target

    def append(self, target: GradientStore, low: int, high: int) -> None:
        """Append rows of the source."""
        source = self.source
        rows = source.rows(low, high)
        if self.turn is not None:
            rows = self.turn(rows)
        columns = {name: source.small(f"columns/{name}", low, high) for name in source.layout.columns}
        target.append(
            rows,
            loss=source.small("loss", low, high),
            grad_norm=source.small("grad_norm", low, high),
            ids=np.asarray(source.small("example_id", low, high)) if source.layout.ids else None,
            columns=columns | self.kept.columns(rows),
        )
