"""What every curvature is to those who use it: F = (1/m) Σ w g gᵀ of some rows, undamped, and products with F⁻¹.

Several kinds keep F in several forms (:mod:`.spectral`, :mod:`.gram`); all of them answer for any λ at
no further cost, are opened from a path, and pickle as that path and the id of the fit.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from ooc_influence.curvature.damping import damping_value
from ooc_influence.curvature.files import READABLE, complete_attributes, curvature_path
from ooc_influence.curvature.rows import ChosenRows
from ooc_influence.curvature.staleness import Change, RowRecord
from ooc_influence.errors import CurvatureNotFoundError, InputError, StaleCurvatureError
from ooc_influence.fingerprint import check_same
from ooc_influence.options import DampingMode
from ooc_influence.progress import html_table, optional_library
from ooc_influence.store import (
    GradientStore,
    PathLike,
    StorePath,
    array_store,
    exists,
    open_group,
    parse_path,
    read_array,
)

Matrix = npt.NDArray[np.float64]
logger = logging.getLogger("ooc_influence")


class Curvature(ABC):
    """The curvature of some rows of a store.

    Use :func:`fit_curvature`, :func:`fit_fisher` or :func:`fit_gram` to make one and :meth:`open` to read one back.

    Attributes
    ----------
    path : Path
        Its Zarr group.
    eigenvalues : (r,) float64
        The undamped spectrum of F, largest first, as far as it is known.
    trace : float
        tr(F).
    rows : int
        Live rows used, m in F = (1/m) Σ w g gᵀ.
    damping : float
        The relative damping used where a call gives none.
    d : int
        Side of F: the stored numbers a row.
    """

    kinds: ClassVar[dict[str, type[Curvature]]] = {}
    eigenvalues: Matrix

    def __init__(self, path: StorePath, attributes: Mapping[str, Any]) -> None:
        self.path = path
        self._attrs = dict(attributes)
        self.trace = float(attributes["trace"])
        self.rows = int(attributes["rows"])
        self.damping = float(attributes["damping"])
        self._load()
        self.check_fit()

    def __init_subclass__(cls, kinds: Sequence[str] = ()) -> None:
        for kind in kinds:
            Curvature.kinds[kind] = cls

    @classmethod
    def open(cls, path: PathLike, fit: str | None = None) -> Curvature:
        """Read a curvature from its group's path.

        Raises
        ------
        CurvatureNotFoundError
            If there is none, or one that was never finished.
        InputError
            If it is of a newer format.
        StaleCurvatureError
            If it is another fit than the one asked for.
        """
        place = parse_path(path)
        attributes = complete_attributes(place)
        if attributes is None:
            raise CurvatureNotFoundError(
                f"expected a finished curvature at {place}; received none: run fit_curvature or 'ooc-influence fisher'"
            )
        kind = attributes.get("kind", "whole")
        if attributes["format"] not in READABLE or kind not in Curvature.kinds:
            raise InputError(
                f"expected a curvature of format {READABLE[-1]} or before at {place}; received "
                f"{attributes['format']}, of kind {kind!r}: upgrade ooc_influence"
            )
        found = Curvature.kinds[kind](place, attributes)
        if fit is not None:
            found.check_fit(fit)
        return found

    def _load(self) -> None:
        """Read what is small."""
        self.eigenvalues = self._read("eigenvalues")

    def _read(self, name: str) -> npt.NDArray[Any]:
        return read_array(open_group(array_store(self.path, read_only=True, chunk_bytes={}), "r"), name)

    def check_fit(self, fit: str | None = None) -> None:
        """Check that what is on disk is still the fit this object was opened on: another one may replace it.

        Raises
        ------
        StaleCurvatureError
            If it is not.
        """
        found = (complete_attributes(self.path) or {}).get("fit") if fit is None else fit
        if found is not None and found != self._attrs["fit"]:
            raise StaleCurvatureError(
                f"expected the curvature {self.path} as it was when it was opened; received a newer fit: open it again"
            )

    def __reduce__(self) -> tuple[Any, ...]:
        return Curvature.open, (self.path, self._attrs["fit"])

    def __dask_tokenize__(self) -> str:
        return str(self._attrs["fit"])

    @property
    def d(self) -> int:
        """Side of F: the stored numbers a row."""
        return int(self._attrs.get("d", len(self.eigenvalues)))

    @property
    def kind(self) -> str:
        """``whole``, ``module``, ``diagonal``, ``top`` or ``gram``."""
        return str(self._attrs.get("kind", "whole"))

    @property
    def attrs(self) -> Mapping[str, Any]:
        """What was recorded: rows used, their digest, the store's identity, the mask's digest, weights."""
        return self._attrs

    @abstractmethod
    def fisher(self) -> Matrix:
        """Return F, (d, d).

        Raises
        ------
        InputError
            If this kind does not keep it.
        """

    def damping_value(self, damping: float | None = None, mode: DampingMode = "relative") -> float:
        """Return λ for a damping; None takes the recorded default (and is relative).

        Raises
        ------
        InputError, SingularFisherError
            See :func:`ooc_influence.curvature.damping.damping_value`.
        """
        return damping_value(self.eigenvalues, self.d, self.trace, self._factor(damping, mode), mode)

    def _factor(self, damping: float | None, mode: DampingMode) -> float:
        if damping is None and mode == "absolute":
            raise InputError("expected a damping with damping_mode='absolute'; received none: the default is relative")
        return self.damping if damping is None else damping

    def effective_dimension(self, value: float) -> float:
        """Return d(λ) = Σ e/(e + λ), the number of directions the damping leaves, at λ = ``value``."""
        return dimension(self.eigenvalues, value)

    def least_dimension(self, value: float) -> float:
        """Return what d(λ) is at least, where it is not known exactly."""
        return self.effective_dimension(value)

    def lambdas(self, value: float) -> tuple[float, ...]:
        """Return all that a λ of :meth:`damping_value` holds: one number, or one for each block of F."""
        return (float(value),)

    @abstractmethod
    def precondition(self, gradients: npt.NDArray[Any], values: Sequence[float]) -> Matrix:
        """Return (F + λI)⁻¹ g for each row and each λ of ``values``, (L, q, d) float64.

        ``values`` are what :meth:`damping_value` returned, passed on as they are: a kind may know more of them.
        """

    @abstractmethod
    def working_bytes(self, queries: int, values: int) -> int:
        """Return what :meth:`precondition` holds for so many rows and λ, its result included, in bytes."""

    @abstractmethod
    def self_influence(self, gradients: npt.NDArray[np.float32], values: Sequence[float]) -> npt.NDArray[np.float32]:
        """Return gᵀ (F + λI)⁻¹ g for each λ of ``values`` and each row, (L, b) float32."""

    @abstractmethod
    def self_working_bytes(self, values: int) -> int:
        """Return what :meth:`self_influence` holds for so many λ whatever the rows, its result apart, in bytes."""

    @abstractmethod
    def outside_share(self, gradients: npt.NDArray[Any]) -> Matrix:
        """Return the share of each row's squared norm outside the span of F's eigenvectors, (q,); 0 for a zero row."""

    def check(self, train: GradientStore) -> None:
        """Check that this curvature may be used for ``train``.

        Raises
        ------
        MismatchError
            If it was fitted under another mask.
        StaleCurvatureError
            If it was fitted on this store when its rows were others.
        """
        check_same(
            train.path, train.fingerprints,
            {"mask and basis": self._attrs["mask_digest"], "model": self._attrs["model"]},
            "run fit_curvature or 'ooc-influence fisher' on this store", other=self.path,
        )  # fmt: skip
        if self._attrs["store_id"] == train.identity and not self.change(train).nothing:
            raise StaleCurvatureError(
                f"expected a curvature of the {train.n} rows of {train.path}; received {self.path}, fitted when it "
                f"held {self._attrs['store_rows']} (or before rows were dropped): run fit_curvature again, or "
                f"'{_command(train, self.path)}'"
            )

    def change(self, train: GradientStore, chosen: ChosenRows | None = None) -> Change:
        """Return how its rows have changed in the store it was fitted on, or by the time a new fit chose them."""
        digest = train.rows_digest() if chosen is None else chosen.rows_digest
        if self._attrs["format"] == 1 or chosen is None:
            if self._attrs["rows_digest"] == digest:
                return Change()
            if self._attrs["format"] == 1:
                return Change(refit="rows changed")
        record = self.row_record()
        if record.live != self.rows:  # as fits wrote it that read the marks of dropped rows as they went along
            return Change(refit=f"{self.rows} of {record.live} live rows were summed")
        return record.change(train, chosen)

    def equals(self, other: Curvature) -> bool:
        """Return whether two whole curvatures of one store, by F or the Gram matrix, are the same F to rounding."""
        facts = ("store_id", "rows_digest", "selection", "weights", "rows")
        same = all(self._attrs.get(name) == other.attrs.get(name) for name in facts)
        return same and {self.kind, other.kind} <= {"whole", "gram"}

    def row_record(self) -> RowRecord:
        """Return what it remembers of its rows (from format 2 on)."""
        kept = [name for name in ("records", "dropped", "numbers") if exists(self.path / name)]
        return RowRecord.load(self._attrs, {name: self._read(name) for name in kept})

    def facts(self) -> dict[str, Any]:
        """Return what there is to know of it: JSON values."""
        value = self.damping * self.trace / self.d
        known = {
            "curvature": str(self.path),
            "kind": self.kind,
            "k": self.d,
            "rows": self.rows,
            "trace": self.trace,
            "largest_eigenvalue": float(self.eigenvalues.max(initial=0.0)),
            "smallest_eigenvalue": float(self.eigenvalues.min(initial=np.inf)) if len(self.eigenvalues) else 0.0,
            "default_damping": value,
            "effective_dimension": self.effective_dimension(self.damping_value()) if self.trace > 0 else 0.0,
        }
        named = ("weights", "clipped", "selection", "sampling_error", "seconds")
        return known | {name: self._attrs[name] for name in named if self._attrs.get(name)}

    def __repr__(self) -> str:
        facts = self.facts()
        kind = "" if self.kind == "whole" else f" {self.kind}"
        extra = f" sampling error={facts['sampling_error']:.3g}" if "sampling_error" in facts else ""
        extra += f" rank={facts['rank']} left out={facts['left_out']:.2%}" if "rank" in facts else ""
        weights = f" weights={facts['weights']['name']}" if "weights" in facts else ""
        return (
            f"<Curvature{kind} {str(self.path)!r} d={self.d} rows={self.rows}{weights} trace={self.trace:.4g} "
            f"d(λ={facts['default_damping']:.3g})={facts['effective_dimension']:.1f}{extra}>"
        )

    def _repr_html_(self) -> str:
        lines = [(name.replace("_", " "), value) for name, value in self.facts().items() if name != "curvature"]
        return html_table(f"Curvature {self.path}", None, lines)

    def to_pandas(self) -> Any:
        """Return the spectrum as a DataFrame: eigenvalue, and the share of the trace up to it.

        Raises
        ------
        MissingExtraError
            Without pandas.
        """
        pandas = optional_library("pandas", "tables")
        shares = np.cumsum(self.eigenvalues) / self.trace if self.trace else np.zeros(len(self.eigenvalues))
        return pandas.DataFrame({"eigenvalue": self.eigenvalues, "cumulative_share": shares})


def share_outside(inside: Matrix, gradients: Matrix) -> Matrix:
    """Return 1 − ``inside``/‖g‖² for rows whose squared norm within a span is ``inside``, (q,); 0 for a zero row."""
    total = np.square(gradients).sum(1)
    return np.where(total > 0, np.clip(1 - inside / np.where(total > 0, total, 1), 0, 1), 0.0)


def dimension(eigenvalues: Matrix, value: float) -> float:
    """Return Σ e/(e + λ) over positive eigenvalues."""
    kept = eigenvalues[eigenvalues > 0]
    return float((kept / (kept + value)).sum())


def resolve_curvature(train: GradientStore, curvature: Curvature | PathLike | None) -> Curvature:
    """Return the curvature a call means, checked against the train store.

    Parameters
    ----------
    train : GradientStore
        The store it is for.
    curvature : Curvature, str, path or None
        An object; a name in the store; a path of a curvature group; None for ``"default"`` or ``"gram"``, as
        :func:`fit_curvature` names them: the one that is of the rows as they are. Where both are, and of the same rows
        and weights, the one that takes less memory to score with; else ``"default"``.

    Raises
    ------
    CurvatureNotFoundError
        If there is none.
    MismatchError, StaleCurvatureError
        See :meth:`Curvature.check`.
    """
    if curvature is None:
        return _usual_curvature(train)
    if isinstance(curvature, Curvature):
        found = curvature
    else:
        text = str(curvature)
        places = [parse_path(curvature)]
        if "/" not in text:
            places.insert(0, curvature_path(train, text))
        path = next((place for place in places if complete_attributes(place) is not None), None)
        if path is None:
            raise _not_found(train, text)
        found = Curvature.open(path)
    found.check(train)
    return found


def _usual_curvature(train: GradientStore) -> Curvature:
    """Return the curvature that scores take where none is named."""
    found, stale = [], None
    for name in ("default", "gram"):
        path = curvature_path(train, name)
        if complete_attributes(path) is None:
            continue
        own = Curvature.open(path)
        try:
            own.check(train)
        except StaleCurvatureError as error:
            stale = stale or error
        else:
            found.append(own)
    if not found:
        raise stale or _not_found(train, "default")
    if stale is not None:
        logger.info("scoring with %s, since another curvature is stale: %s", found[0].path, stale)
    if len(found) > 1 and found[1].equals(found[0]):
        return min(found, key=lambda own: own.working_bytes(1, 1))
    return found[0]


def _not_found(train: GradientStore, name: str) -> CurvatureNotFoundError:
    place = parse_path(name) if "/" in name else curvature_path(train, name)
    call = {"default": "", "gram": ", method='dual'"}.get(
        name, f", out={name!r}" if "/" in name else f", name={name!r}"
    )
    return CurvatureNotFoundError(
        f"expected a fitted curvature {name!r} in {train.path}; received none: run "
        f"fit_curvature({str(train.path)!r}{call}) or '{_command(train, place)}'"
    )


def _command(train: GradientStore, place: StorePath) -> str:
    """Return the command that fits a curvature of a store at a place."""
    how = f" --out {place}"
    if place.parent == train.path / "curvature":
        how = {"default": "", "gram": " --method dual"}.get(place.name, f" --name {place.name}")
    return f"ooc-influence fisher {train.path}{how}"
