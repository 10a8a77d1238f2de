"""The Gram side, for fewer rows than columns: K = A Aᵀ (m, m) with A = diag(√w) G, and F = AᵀA/m by K's eigenvectors.

With K = U diag(m e) Uᵀ, F's eigenvectors are V = AᵀU diag(m e)^(-1/2), (k, r), and Woodbury's identity
(F + λI)⁻¹ = (1/λ)[I − Aᵀ(AAᵀ + mλI)⁻¹A] becomes (1/λ)[I − V diag(e/(e + λ)) Vᵀ]: any λ, without the rows. The group
holds ``eigenvalues`` (r,) and ``eigenvectors`` (k, r) in float64. Rows, K and V are held in memory while it is fitted.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ooc_influence.curvature.changes import RowRecord
from ooc_influence.curvature.curvature import Curvature, Matrix, share_outside
from ooc_influence.curvature.damping import spectrum_floor
from ooc_influence.curvature.rows import ChosenRows, choose_rows
from ooc_influence.curvature.saved import write_curvature, write_long
from ooc_influence.curvature.target import fit_attributes, fit_target, fitted, reopen, what_changed
from ooc_influence.curvature.unfinished import write_slabs
from ooc_influence.errors import InputError, NonFiniteError
from ooc_influence.linalg import Weighting, symmetric_eigen
from ooc_influence.linalg.device import outer_product, parse_device
from ooc_influence.memory import Need, block_limit, plan_block_rows
from ooc_influence.progress import Progress
from ooc_influence.store import GradientStore, PathLike

logger = logging.getLogger("ooc_influence")
_FLOOR = 1e-10  # of the largest eigenvalue: below it K's are rounding
_PANEL = 1024  # columns brought to float64 at a time


class GramCurvature(Curvature, kinds=("gram",)):
    """A curvature of fewer rows than columns: eigenvectors are kept where F has an eigenvalue at all."""

    _vectors: Matrix | None = None

    @property
    def eigenvectors(self) -> Matrix:
        """V, (d, r), one eigenvector a column (read on first use)."""
        if self._vectors is None:
            self._vectors = self._read("eigenvectors")
            self.check_fit()
        return self._vectors

    def fisher(self) -> Matrix:
        """Return F, (d, d), made of its spectrum."""
        return np.asarray((self.eigenvectors * self.eigenvalues) @ self.eigenvectors.T)

    def precondition(self, gradients: npt.NDArray[Any], values: Sequence[float]) -> Matrix:
        """See :meth:`Curvature.precondition`."""
        whole = np.asarray(gradients, np.float64)
        rotated = whole @ self.eigenvectors
        result = np.empty((len(values), *whole.shape))
        for out, value in zip(result, values, strict=True):
            np.matmul(rotated * (self.eigenvalues / (self.eigenvalues + value)), self.eigenvectors.T, out=out)
            np.subtract(whole, out, out=out)
            out /= value
        return result

    def working_bytes(self, queries: int, values: int) -> int:
        """See :meth:`Curvature.working_bytes`."""
        r = len(self.eigenvalues)
        return 8 * self.d * r + 8 * queries * (self.d * (1 + values) + 2 * r)

    def self_influence(self, gradients: npt.NDArray[np.float32], values: Sequence[float]) -> npt.NDArray[np.float32]:
        """See :meth:`Curvature.self_influence`."""
        result = np.empty((len(values), len(gradients)), np.float32)
        for start in range(0, len(gradients), _PANEL):  # float64: most of a norm may lie in the span
            part = gradients[start : start + _PANEL].astype(np.float64)
            squares, total = np.square(part @ self.eigenvectors), np.square(part).sum(1)
            for out, value in zip(result, values, strict=True):
                out[start : start + _PANEL] = (
                    total - squares @ (self.eigenvalues / (self.eigenvalues + value))
                ) / value
        return result

    def self_working_bytes(self, values: int) -> int:
        """See :meth:`Curvature.self_working_bytes`."""
        r = len(self.eigenvalues)
        return 8 * self.d * r + 8 * _PANEL * (2 * self.d + 2 * r) + 8 * values * r

    def outside_share(self, gradients: npt.NDArray[Any]) -> Matrix:
        """See :meth:`Curvature.outside_share`."""
        whole = np.asarray(gradients, np.float64)
        span = self.eigenvalues > spectrum_floor(self.eigenvalues, len(self.eigenvalues))
        inside = np.square(whole @ self.eigenvectors[:, span]).sum(1)
        return share_outside(inside, whole)


def choose_side(rows: int, k: int) -> str:
    """Return which side is cheaper: ``"gram"`` for fewer rows than columns, else ``"fisher"``."""
    return "gram" if rows < k else "fisher"


def gram_need(rows: int, k: int, reading: int = 0, small: int = 0) -> Need:
    """Return what :func:`fit_gram` needs, in bytes: the rows, their eigenvectors, K and its decomposition."""
    return Need(
        stage=f"gram for {rows} rows of k={k}",
        fixed=4 * rows * k + 32 * rows * rows + 8 * rows * k + 8 * rows * _PANEL + small,
        per_worker=reading,
        per_row=4 * k,
        max_rows=block_limit(k),
        advice="fit_fisher (24 k² bytes), or fewer rows",
    )


def fit_gram(
    store: GradientStore | PathLike,
    *,
    name: str = "gram",
    out: PathLike | None = None,
    refit: bool = False,
    rows: Any = None,
    sample: int | None = None,
    seed: int = 0,
    weights: Weighting | npt.ArrayLike | None = None,
    force_weights: bool = False,
    device: str | None = None,
    memory: int | str | None = None,
    progress: bool | None = None,
) -> Curvature:
    """Compute the curvature of a store by its Gram matrix, and save it there as ``curvature/<name>``.

    The same curvature as :func:`fit_fisher`'s, for less where there are fewer rows than columns. Once rows were
    appended or dropped it is fitted anew.

    Parameters
    ----------
    store, name, out, refit, rows, sample, seed, weights, force_weights, memory, progress
        As for :func:`fit_fisher`.
    device : str, optional
        Multiply the rows there, such as ``"cuda"``; by default NumPy's BLAS.

    Returns
    -------
    Curvature
        Eigenvalues (r,), r at most the number of rows.

    Raises
    ------
    InputError, MemoryBudgetError, StoreExistsError, StoreDamagedError
        As for :func:`fit_fisher`.
    """
    train = store if isinstance(store, GradientStore) else GradientStore.open(store)
    target, device = fit_target(train, name, out), parse_device(device)
    chosen = choose_rows(train, rows, sample, seed, weights, force_weights=force_weights)
    found = None if refit else fitted(target, train)
    change = None if found is None else what_changed(found, chosen, "gram")
    if found is not None and change is not None and change.nothing:
        logger.info("%s is up to date", target)
        return found
    need = gram_need(chosen.count, train.k, train.reading_bytes, chosen.small_bytes)
    block_rows = plan_block_rows(need, memory)
    began = time.monotonic()
    record, digest = RowRecord.of(chosen), train.rows_digest()
    with Progress("gram", chosen.count, progress) as bar:
        factor, live, clipped = _read(chosen, block_rows, bar)
    if not live:
        raise InputError(f"expected a store with live rows; received {train.path} whose rows are all dropped")
    gram = _gram(factor) if device is None else outer_product(factor, _PANEL, device)
    trace = float(np.trace(gram)) / live
    if not np.isfinite(trace):
        raise NonFiniteError("expected a finite Gram matrix; received NaN or Inf: scale the loss", [])
    attributes = fit_attributes(chosen, digest, live, trace) | record.facts() | {"kind": "gram", "clipped": clipped}

    def write(group: Any) -> Mapping[str, Any]:
        for array, values in record.arrays().items():
            write_long(group, array, values)
        values, turn = symmetric_eigen(gram)
        r = max(1, int((values > _FLOOR * values[0]).sum()))
        scale = np.sqrt(np.where(values[:r] > 0, values[:r], np.inf))
        vectors = np.empty((train.k, r))
        for low in range(0, train.k, _PANEL):
            panel = factor[:, low : low + _PANEL].astype(np.float64)
            vectors[low : low + _PANEL] = (panel.T @ turn[:, :r]) / scale
        write_long(group, "eigenvalues", values[:r] / live)
        write_slabs(group, "eigenvectors", vectors)
        return {"seconds": time.monotonic() - began}

    write_curvature(target, attributes, write)
    return reopen(target)


def _read(chosen: ChosenRows, block_rows: int, bar: Progress) -> tuple[npt.NDArray[np.float32], int, int]:
    """Return A, (m, k), with its live rows and those of a clipped loss."""
    factor = np.empty((chosen.count, chosen.store.k), np.float32)
    live = clipped = 0
    for block in chosen.blocks(0, chosen.count, block_rows):
        factor[block.start : block.stop] = block.rows
        live, clipped = live + block.live, clipped + block.clipped
        bar.advance(block.stop - block.start)
    return factor, live, clipped


def _gram(factor: npt.NDArray[np.float32]) -> Matrix:
    """Return A Aᵀ in float64."""
    total = np.zeros((len(factor), len(factor)))
    for low in range(0, factor.shape[1], _PANEL):
        panel = factor[:, low : low + _PANEL].astype(np.float64)
        total += panel @ panel.T
    return total
