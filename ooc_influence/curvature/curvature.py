"""A fitted curvature: F = V diag(e) Vᵀ, undamped, saved beside the rows it was fitted on.

In F's eigenbasis everything is a scaled dot product: with z = Vᵀg, a score is Σ_j z_qj z_ij / (e_j + λ), for any λ at
no further cost. The group holds ``fisher`` (d, d), ``eigenvalues`` (d,), ``eigenvectors`` (d, d; columns), all
float64, and as attributes the rows used and a digest of their commit records. The mark ``complete`` is written last.
"""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from ooc_influence._version import __version__
from ooc_influence.curvature.damping import DEFAULT_DAMPING, DampingMode, damping_value
from ooc_influence.errors import (
    CurvatureNotFoundError,
    InputError,
    MismatchError,
    NonFiniteError,
    StaleCurvatureError,
    StoreDamagedError,
    StoreExistsError,
    StoreWriteError,
)
from ooc_influence.linalg import symmetric_eigen
from ooc_influence.store import (
    CHUNK_TARGET,
    GradientStore,
    NewFolder,
    PathLike,
    StorePath,
    array_store,
    create_array,
    exists,
    is_file,
    names,
    open_group,
    parse_path,
    read_array,
    square_chunks,
)

Matrix = npt.NDArray[np.float64]
_ATTRIBUTES = "ooc_influence_curvature"
_FORMAT = 1
_SELF_BYTES = 32 * 2**20  # of rotated rows held at a time by self-influence
_SLAB_BYTES = 2 * CHUNK_TARGET  # a chunk of the eigenvectors and its copy


class Curvature:
    """The Fisher matrix of a store's rows, factorised.

    Use :func:`fit_fisher` to make one and :meth:`open` to read one back.

    Attributes
    ----------
    path : Path
        Its Zarr group.
    eigenvalues : (d,) float64
        The undamped spectrum, largest first.
    trace : float
        tr(F).
    rows : int
        Live rows used, m in F = (1/m) Σ g gᵀ.
    damping : float
        The relative damping used where a call gives none.
    """

    def __init__(self, path: PathLike, fit: str | None = None) -> None:
        self.path = parse_path(path)
        attrs = _complete_attributes(self.path)
        if attrs is None:
            raise CurvatureNotFoundError(f"expected a finished curvature at {self.path}; received none: run fit_fisher")
        if attrs["format"] != _FORMAT:
            raise InputError(f"expected curvature format {_FORMAT} at {self.path}; received {attrs['format']}: upgrade")
        self._attrs = attrs
        self._check_fit(fit)
        self.eigenvalues: Matrix = self._read("eigenvalues")
        self.trace = float(attrs["trace"])
        self.rows = int(attrs["rows"])
        self.damping = float(attrs["damping"])

    @classmethod
    def open(cls, path: PathLike) -> Self:
        """Read a curvature from its group's path.

        Raises
        ------
        CurvatureNotFoundError
            If there is none, or one that was never finished.
        """
        return cls(path)

    def _read(self, name: str) -> Matrix:
        found = read_array(open_group(array_store(self.path, read_only=True, chunk_bytes={}), "r"), name)
        self._check_fit((_complete_attributes(self.path) or {}).get("fit"))
        return found

    def _check_fit(self, fit: str | None) -> None:
        """Check that what is on disk is still the fit this object was opened on: another one may replace it."""
        if fit is not None and fit != self._attrs["fit"]:
            raise StaleCurvatureError(
                f"expected the curvature {self.path} as it was when it was opened; received a newer fit: open it again"
            )

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.path, self._attrs["fit"])

    def __dask_tokenize__(self) -> str:
        return str(self._attrs["fit"])

    @property
    def d(self) -> int:
        """Side of F: the stored numbers a row."""
        return len(self.eigenvalues)

    @property
    def attrs(self) -> Mapping[str, Any]:
        """What was recorded: rows used, their digest, the store's identity, the mask's digest."""
        return self._attrs

    @cached_property
    def eigenvectors(self) -> Matrix:
        """V, (d, d), one eigenvector a column in the order of ``eigenvalues`` (read on first use)."""
        return self._read("eigenvectors")

    def fisher(self) -> Matrix:
        """Return F, (d, d), read from disk."""
        return self._read("fisher")

    def damping_value(self, damping: float | None = None, mode: DampingMode = "relative") -> float:
        """Return λ for a damping; None takes the recorded default (and is relative).

        Raises
        ------
        InputError, SingularFisherError
            See :func:`ooc_influence.curvature.damping.damping_value`.
        """
        if damping is None and mode == "absolute":
            raise InputError("expected a damping with damping_mode='absolute'; received none: the default is relative")
        damping = self.damping if damping is None else damping
        return damping_value(self.eigenvalues, self.trace, damping, mode)

    def effective_dimension(self, value: float) -> float:
        """Return d(λ) = Σ e/(e + λ), the number of directions the damping leaves, at λ = ``value``."""
        kept = self.eigenvalues[self.eigenvalues > 0]
        return float((kept / (kept + value)).sum())

    def precondition(self, gradients: npt.NDArray[Any], values: Sequence[float]) -> Matrix:
        """Return (F + λI)⁻¹ g for each row and each λ of ``values``, (L, q, d) float64.

        ``values`` are what :meth:`damping_value` returned, passed on as they are: a kind may know more of them.
        """
        rotated = np.asarray(gradients, np.float64) @ self.eigenvectors
        result = np.empty((len(values), *rotated.shape))
        damped = np.empty_like(rotated)
        for number, value in enumerate(values):
            np.divide(rotated, self.eigenvalues + value, out=damped)
            np.matmul(damped, self.eigenvectors.T, out=result[number])
        return result

    def working_bytes(self, queries: int, values: int) -> int:
        """Return what :meth:`precondition` holds for so many rows and λ, its result included, in bytes."""
        return 8 * self.d**2 + 8 * self.d * queries * (3 + values)

    @cached_property
    def _rotation(self) -> npt.NDArray[np.float32]:
        """V in float32, read a slab at a time."""
        array: Any = open_group(array_store(self.path, read_only=True, chunk_bytes={}), "r")["eigenvectors"]
        found = np.empty(array.shape, np.float32)
        for start in range(0, self.d, array.chunks[0]):
            found[start : start + array.chunks[0]] = array[start : start + array.chunks[0]]
        self._check_fit((_complete_attributes(self.path) or {}).get("fit"))
        return found

    def self_influence(self, gradients: npt.NDArray[np.float32], values: Sequence[float]) -> npt.NDArray[np.float32]:
        """Return gᵀ (F + λI)⁻¹ g for each λ of ``values`` and each row, (L, b) float32: one GEMM for all λ."""
        weights = (1 / (self.eigenvalues[:, None] + np.asarray(values))).astype(np.float32)
        result = np.empty((len(values), len(gradients)), np.float32)
        step = self._self_rows
        turned = np.empty((min(step, len(gradients)), self.d), np.float32)
        for start in range(0, len(gradients), step):
            part = gradients[start : start + step]
            squares = np.matmul(part, self._rotation, out=turned[: len(part)])
            np.square(squares, out=squares)
            result[:, start : start + step] = (squares @ weights).T
        return result

    @property
    def _self_rows(self) -> int:
        return max(64, _SELF_BYTES // (4 * max(1, self.d)))

    def self_working_bytes(self, values: int) -> int:
        """Return what :meth:`self_influence` holds for so many λ whatever the rows, its result apart, in bytes."""
        return 4 * self.d**2 + 4 * (self._self_rows + values) * self.d + _SLAB_BYTES

    def outside_share(self, gradients: npt.NDArray[Any]) -> Matrix:
        """Return the share of each row's squared norm outside the span of F's eigenvectors, (q,); 0 for a zero row."""
        whole = np.asarray(gradients, np.float64)
        span = self.eigenvalues > self.eigenvalues.max(initial=0.0) * len(self.eigenvalues) * np.finfo(np.float32).eps
        total = np.square(whole).sum(1)
        inside = np.square(whole @ self.eigenvectors[:, span]).sum(1)
        return np.where(total > 0, np.clip(1 - inside / np.where(total > 0, total, 1), 0, 1), 0.0)

    def check(self, train: GradientStore) -> None:
        """Check that this curvature may be used for ``train``.

        Raises
        ------
        MismatchError
            If it was fitted under another mask.
        StaleCurvatureError
            If it was fitted on this store when it held other rows.
        """
        if self._attrs["mask_digest"] != train.columns_digest:
            raise MismatchError(
                f"expected a curvature fitted under the mask (and basis) of {train.path}; received {self.path}, fitted "
                "under another: run fit_fisher on this store"
            )
        model = train.attrs.get("model", {}).get("fingerprint")
        if self._attrs["model"] != model:
            raise MismatchError(
                f"expected a curvature of the model that {train.path} was made with; received {self.path}, of another "
                "model: run fit_fisher on a store of this model"
            )
        fitted_here = self._attrs["store_id"] == train.identity
        if fitted_here and self._attrs["rows_digest"] != train.rows_digest():
            raise StaleCurvatureError(
                f"expected a curvature of the {train.n} rows of {train.path}; received {self.path}, fitted when it "
                f"held {self._attrs['store_rows']} (or before rows were dropped): run fit_fisher again"
            )

    def __repr__(self) -> str:
        value = self.damping * self.trace / self.d
        return (
            f"<Curvature {str(self.path)!r} d={self.d} rows={self.rows} trace={self.trace:.4g} "
            f"d(λ={value:.3g})={self.effective_dimension(value):.1f}>"
        )


def save_curvature(path: StorePath, fisher: Matrix, attributes: Mapping[str, Any]) -> Curvature:
    """Write F to ``path``, factorise it (it is overwritten), write its spectrum, and open the result.

    A curvature at ``path`` is replaced once all of the new one is written.

    Raises
    ------
    NonFiniteError
        If F is not finite: rows too large for float32 sums.
    StoreWriteError
        If the folder cannot be written.
    """
    if not np.isfinite(attributes["trace"]):
        raise NonFiniteError(
            "expected a finite Fisher matrix; received NaN or Inf: gradients beyond 1e18 overflow, scale the loss", []
        )
    side = len(fisher)
    try:
        with NewFolder(path, replace=True) as folder:
            group = open_group(folder.arrays, "w")
            _write_square(group, "fisher", fisher)
            eigenvalues, eigenvectors = symmetric_eigen(fisher)
            create_array(group, "eigenvalues", (side,), (side,), "float64", check=True)[...] = eigenvalues
            _write_square(group, "eigenvectors", eigenvectors)
            marks = {"format": _FORMAT, "version": __version__, "fit": uuid.uuid4().hex, "complete": True}
            group.attrs[_ATTRIBUTES] = dict(attributes) | marks
            folder.publish()
    except OSError as error:
        raise StoreWriteError(
            f"expected to write the curvature to {path}; received: {error}: make room, or give another place with out="
        ) from error
    for _ in range(10):  # another fit may be replacing this one at this moment: theirs is as good
        with contextlib.suppress(CurvatureNotFoundError, StaleCurvatureError, StoreDamagedError):
            return Curvature(path)
    return Curvature(path)


def check_replaceable(path: StorePath) -> None:
    """Check that only a curvature, or nothing, is at ``path``.

    Raises
    ------
    StoreExistsError
        If something else is there.
    """
    for _ in range(10):  # another fit may be replacing one at this moment
        empty = not exists(path) or (not is_file(path) and not names(path))
        if empty or _attributes(path) is not None:
            break
    else:
        raise StoreExistsError(
            f"expected a curvature or nothing at {path}; received something else: choose another path"
        )


def _write_square(group: Any, name: str, matrix: Matrix) -> None:
    chunks = square_chunks(len(matrix), 8)
    target = create_array(group, name, matrix.shape, chunks, "float64", check=True)
    for start in range(0, len(matrix), chunks[0]):
        target[start : start + chunks[0]] = matrix[start : start + chunks[0]]


def _complete_attributes(path: StorePath) -> dict[str, Any] | None:
    found = _attributes(path)
    return found if found and found.get("complete") else None


def _attributes(path: StorePath) -> dict[str, Any] | None:
    if not is_file(path / "zarr.json"):
        return None
    try:
        found = dict(open_group(array_store(path, read_only=True), "r").attrs).get(_ATTRIBUTES)
    except (ValueError, TypeError, OSError):  # a damaged zarr.json, or a folder being replaced
        return None
    return found if isinstance(found, dict) else None


def curvature_path(train: GradientStore, name: str) -> StorePath:
    """Return where a store keeps the curvature ``name``.

    Raises
    ------
    InputError
        If the name could leave the store's folder.
    """
    if not name or name.startswith(".") or "/" in name or "\\" in name:
        raise InputError(f"expected a curvature name without slashes; received {name!r}")
    return train.path / "curvature" / name


def resolve_curvature(train: GradientStore, curvature: Curvature | PathLike | None) -> Curvature:
    """Return the curvature a call means, checked against the train store.

    Parameters
    ----------
    train : GradientStore
        The store it is for.
    curvature : Curvature, str, path or None
        An object; a name in the store; a path of a curvature group; None for ``"default"``.

    Raises
    ------
    CurvatureNotFoundError
        If there is none.
    MismatchError, StaleCurvatureError
        See :meth:`Curvature.check`.
    """
    if isinstance(curvature, Curvature):
        found = curvature
    else:
        text = "default" if curvature is None else str(curvature)
        places = [parse_path(curvature)] if curvature is not None else []
        if "/" not in text:
            places.insert(0, curvature_path(train, text))
        path = next((place for place in places if _complete_attributes(place) is not None), None)
        if path is None:
            raise CurvatureNotFoundError(
                f"expected a fitted curvature {text!r} in {train.path}; received none: run "
                f"fit_fisher({str(train.path)!r}) or 'ooc-influence fisher {train.path}'"
            )
        found = Curvature(path)
    found.check(train)
    return found


def fit_attributes(store: GradientStore, digest: str, rows: int, trace: float) -> dict[str, Any]:
    """Return what a curvature records about the rows it was fitted on."""
    return {
        "mask_digest": store.columns_digest,
        "model": store.attrs.get("model", {}).get("fingerprint"),
        "store_id": store.identity,
        "store_rows": store.n,
        "rows_digest": digest,
        "rows": rows,
        "trace": trace,
        "damping": DEFAULT_DAMPING,
        "weights": None,
        "blocks": None,
    }
