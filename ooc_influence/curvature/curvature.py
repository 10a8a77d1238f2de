"""The curvature of some rows, F = (1/m) Σ w g gᵀ: its spectrum, undamped, on disk, and products with F⁻¹.

On disk it is a Zarr group whose attributes say what it is of, and whether it is finished. A fit is written beside its
path and renamed (on an object store: its root's metadata is put last); one that replaces another does so at once.
Readers open it from a path, and pickle it as that path and the id of the fit.

The group holds, all float64, the spectrum (``eigenvalues``, one block after the other), the eigenvectors of each block
as columns (``eigenvectors``, or ``eigenvectors-00000``, ... by module) and, where F itself was summed, the undamped
sums Σ w g gᵀ as tiles of triangles (``sum-00000``, ...). Format 1 kept F itself (``fisher``) instead of the sum.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr

from ooc_influence._version import __version__
from ooc_influence.curvature.eigen import (
    BlockSpectrum,
    EigenBlock,
    EigenVectors,
    vectors_name,
)
from ooc_influence.curvature.rows import FittedRows, Staleness
from ooc_influence.curvature.sums import Sums, add_written_sum, empty_sums
from ooc_influence.errors import (
    CurvatureNotFoundError,
    InputError,
    StaleCurvatureError,
    writing,
)
from ooc_influence.fingerprint import check_same
from ooc_influence.linalg import Matrix, Range, WeightedRows, mirror
from ooc_influence.options import DampingMode
from ooc_influence.progress import html_table, optional_library
from ooc_influence.store import (
    GradientStore,
    NewFolder,
    PathLike,
    StorePath,
    array_store,
    check_free,
    exists,
    is_file,
    is_free,
    open_group,
    parse_path,
    read_array,
)

logger = logging.getLogger("ooc_influence")
FORMAT = 2
READABLE = (1, 2)
KINDS = ("whole", "module", "diagonal", "kronecker", "top", "gram")
DIAGONAL = ("diagonal", "kronecker")  # kinds of which only squares are summed
_ATTRIBUTES = "ooc_influence_curvature"


def _open_arrays(path: StorePath) -> Any:
    return open_group(array_store(path, read_only=True, chunk_bytes={}), "r")


def _check_fit(path: StorePath, opened: str | None, fit: str | None = None) -> None:
    on_disk = (complete_attributes(path) or {}).get("fit") if fit is None else fit
    if on_disk is not None and on_disk != opened:
        raise StaleCurvatureError(
            f"expected the curvature {path} as it was when it was opened; received a newer fit: open it again"
        )


class Curvature(BlockSpectrum):
    """The curvature of some rows of a store.

    Use :func:`fit_curvature`, :func:`fit_fisher` or :func:`fit_gram` to make one and :meth:`open` to read one back.

    Attributes
    ----------
    path : Path
        Its Zarr group.
    eigenvalues : (r,) float64
        The undamped spectrum of F as far as it is known: largest first in each block, in columns' order if diagonal.
    trace : float
        tr(F).
    rows : int
        Live rows used, m in F = (1/m) Σ w g gᵀ.
    damping : float
        The relative damping used where a call gives none.
    list_damping : float
        The same for lists of rows for queries, which may differ.
    d : int
        Side of F: the stored numbers a row.
    """

    def __init__(self, path: StorePath, attributes: Mapping[str, Any]) -> None:
        self.path = path
        self._attrs = dict(attributes)
        self.trace = float(attributes["trace"])
        self.rows = int(attributes["rows"])
        self.damping = float(attributes["damping"])
        self.list_damping = float(attributes.get("list_damping") or self.damping)
        scale = self._read("column_scale") if self.has_prior else None
        super().__init__(self._blocks(self._read("eigenvalues")), scale)
        if self.kind == "kronecker":  # what is recorded is the trace of the sums, whose columns have weights
            self.trace = float(self.eigenvalues.sum())
        self.check_fit()

    def _blocks(self, eigenvalues: Matrix) -> list[EigenBlock]:
        """Return the blocks that a spectrum on disk is made of."""
        d, r = int(self._attrs.get("d", len(eigenvalues))), len(eigenvalues)
        ranges, all_columns = self._attrs.get("ranges") or [(0, d)], slice(0, d)
        if self.kind == "kronecker":
            means = zip(ranges, self._attrs["means"], strict=True)
            return [
                EigenBlock(slice(a, b), eigenvalues[a:b], None, trace=mean * (b - a)) for (a, b), mean in means
            ]  # fmt: skip
        if self.kind == "diagonal":
            return [EigenBlock(all_columns, eigenvalues, None, trace=self.trace)]
        if self.kind == "top":
            vectors, rest = self._vectors("eigenvectors", d, r), float(self._attrs["rest"])
            span, unknown = self._span(d), min(d, self.rows) - r
            return [EigenBlock(all_columns, eigenvalues, vectors, rest, unknown, trace=self.trace, dimension=span)]
        if self.kind == "gram":
            vectors, span = self._vectors("eigenvectors", d, r), self._span(d)
            return [EigenBlock(all_columns, eigenvalues, vectors, trace=self.trace, dimension=span, keeps=False)]
        return [
            EigenBlock(
                slice(first, last), eigenvalues[first:last],
                self._vectors(vectors_name(self.kind, number), last - first, last - first),
                dimension=self._span(last - first),
            )
            for number, (first, last) in enumerate(ranges)
        ]  # fmt: skip

    def _span(self, columns: int) -> int:
        """Return how many of ``columns`` F can span: all above a prior, else at most as many as there are rows."""
        return columns if self.has_prior else min(columns, self.rows)

    def _vectors(self, name: str, columns: int, rank: int) -> EigenVectors:
        # not methods: vectors that refer to their curvature would outlive it until Python looks for cycles
        check = partial(_check_fit, self.path, self._attrs.get("fit"))
        return EigenVectors((columns, rank), partial(_open_arrays, self.path), name, check)

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
        path = parse_path(path)
        attributes = complete_attributes(path)
        if attributes is None:
            raise CurvatureNotFoundError(
                f"expected a finished curvature at {path}; received none: run fit_curvature or 'ooc-influence fisher'"
            )
        kind = attributes.get("kind", "whole")
        if attributes["format"] not in READABLE or kind not in KINDS:
            raise InputError(
                f"expected a curvature of format {READABLE[-1]} or before at {path}; received "
                f"{attributes['format']}, of kind {kind!r}: upgrade ooc_influence"
            )
        curvature = cls(path, attributes)
        if fit is not None:
            curvature.check_fit(fit)
        return curvature

    def _read(self, name: str) -> npt.NDArray[Any]:
        return read_array(_open_arrays(self.path), name)

    def check_fit(self, fit: str | None = None) -> None:
        """Check that what is on disk is still the fit this object was opened on: another one may replace it.

        Raises
        ------
        StaleCurvatureError
            If it is not.
        """
        _check_fit(self.path, self._attrs.get("fit"), fit)

    def __reduce__(self) -> tuple[Any, ...]:
        return Curvature.open, (self.path, self._attrs["fit"])

    def __dask_tokenize__(self) -> str:
        return str(self._attrs["fit"])

    @property
    def kind(self) -> str:
        """``whole``, ``module``, ``diagonal``, ``kronecker``, ``top`` (a low rank) or ``gram``."""
        return str(self._attrs.get("kind", "whole"))

    @property
    def has_prior(self) -> bool:
        """Whether it is of whitened rows above a prior: D (F̃ + λI) D, where F̃ is that of rows times D⁻¹."""
        return "prior" in self._attrs

    @property
    def takes_damping(self) -> bool:
        """Whether a call may choose a damping: not for rows whitened at one before they were reduced."""
        return True

    @property
    def attrs(self) -> Mapping[str, Any]:
        """What was recorded: rows used, their digest, the store's identity, the mask's digest, weights."""
        return self._attrs

    @property
    def keeps_sums(self) -> bool:
        """Whether the undamped sums that F is made of are on disk."""
        return self.kind != "gram" and bool(self._attrs.get("summed", True))

    def sums(self) -> Sums:
        """Return the undamped sums that F is made of, read from disk."""
        total = empty_sums(self.ranges, self.kind in DIAGONAL)
        self.add_sums_to(total)
        return total

    def add_sums_to(self, total: Sums) -> None:
        """Add :meth:`sums` to others, in place."""
        for number, square in enumerate(total.squares):
            add_written_sum(self.path, number, square)
        total.live += self.rows
        total.clipped += int(self._attrs["clipped"])
        self.check_fit()

    @property
    def ranges(self) -> tuple[Range, ...]:
        """The columns of each block."""
        return tuple((block.columns.start, block.columns.stop) for block in self.blocks)

    def fisher(self) -> Matrix:
        """Return F, (d, d), as it was summed, without its prior; of a diagonal or a Gram matrix, made of the spectrum.

        Raises
        ------
        InputError
            If only part of the spectrum is known and F was never summed.
        """
        if self._attrs["format"] == 1:
            matrix: Matrix = self._read("fisher")
            self.check_fit()
            return matrix
        matrix = self._summed_fisher()
        if self.column_scale is not None:
            matrix *= self.column_scale[:, None] * self.column_scale
        return matrix

    def _summed_fisher(self) -> Matrix:
        if self.kind == "kronecker":
            return np.diag(self.eigenvalues)
        if self.kind in ("diagonal", "gram"):
            return self.blocks[0].matrix()
        if not self.keeps_sums:
            raise InputError(
                f"expected a curvature that keeps F; received {self.path}, whose spectrum was computed from the rows: "
                "fit without rank, or with more memory"
            )
        matrix = np.zeros((self.d, self.d))
        for block, square in zip(self.blocks, self.sums().squares, strict=True):
            mirror(square)
            matrix[block.columns, block.columns] = square
        matrix /= self.rows
        return matrix

    @property
    def gram(self) -> zarr.Array[Any]:
        """K = A Aᵀ, (m, m) float64 on disk, undamped: row i is the i-th of the rows chosen, zero where dropped.

        Of a curvature with a prior, that of the whitened rows.

        Raises
        ------
        CurvatureNotFoundError
            If it was not fitted by its Gram matrix, or before K was kept.
        """
        if not exists(self.path / "gram" / "zarr.json"):
            raise CurvatureNotFoundError(f"expected the Gram matrix in {self.path}; received none: fit with refit=True")
        array = open_matrix(self.path / "gram")
        self.check_fit()
        return array

    def damping_value(self, damping: float | None = None, mode: DampingMode = "relative") -> float:
        """Return λ for a damping; where blocks have a λ each, the mean over columns.

        None takes the recorded default (and is relative).

        Raises
        ------
        InputError, SingularFisherError
            As for :meth:`lambdas`.
        """
        return self.mean_lambda(self.lambdas(damping, mode)[0])

    def lambdas(
        self, damping: float | Sequence[float | None] | npt.NDArray[Any] | None = None, mode: DampingMode = "relative"
    ) -> Matrix:
        """Return λ of each block for each damping, (L, B): what products are damped by.

        A relative one is damping · tr(F_b)/d_b in block b, d_b the smaller of its columns and the rows of the fit (of a
        diagonal, its columns): the mean of the eigenvalues that can be positive.

        Raises
        ------
        InputError
            For a negative or non-finite damping, an unknown mode, or none where the mode is absolute.
        SingularFisherError
            If F is zero, or λ is zero and F has no inverse.
        """
        dampings = damping if isinstance(damping, (Sequence, np.ndarray)) else [damping]
        return np.array([self.block_lambdas(self._factor(each, mode), mode) for each in dampings])

    def _factor(self, damping: float | None, mode: DampingMode) -> float:
        if damping is None and mode == "absolute":
            raise InputError("expected a damping with damping_mode='absolute'; received none: the default is relative")
        return self.damping if damping is None else damping

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
        if self._attrs["store_id"] == train.identity and not self.staleness(train).is_fresh:
            raise StaleCurvatureError(
                f"expected a curvature of the {train.n} rows of {train.path}; received {self.path}, fitted when it "
                f"held {self._attrs['store_rows']} (or before rows were dropped): run fit_curvature again, or "
                f"'{fit_command(train, self.path)}'"
            )

    def staleness(self, train: GradientStore, chosen: WeightedRows | None = None) -> Staleness:
        """Return how its rows have changed in the store it was fitted on, or by the time a new fit chose them."""
        digest = train.rows_digest() if chosen is None else chosen.rows_digest
        if self._attrs["format"] == 1 or chosen is None:
            if self._attrs["rows_digest"] == digest:
                return Staleness()
            if self._attrs["format"] == 1:
                return Staleness(refit="rows changed")
        record = self.fitted_rows()
        if record.live != self.rows:  # by a fit that looked up dropped rows as it went along
            return Staleness(refit=f"{self.rows} of {record.live} live rows were summed")
        return record.staleness(train, chosen)

    def equals(self, other: Curvature) -> bool:
        """Return whether two whole curvatures of one store, by F or the Gram matrix, are the same F to rounding."""
        names = ("store_id", "rows_digest", "selection", "weights", "rows")
        same = all(self._attrs.get(name) == other.attrs.get(name) for name in names)
        return same and {self.kind, other.kind} <= {"whole", "gram"}

    def fitted_rows(self) -> FittedRows:
        """Return what it records of its rows (from format 2 on)."""
        names = [name for name in ("records", "dropped", "numbers") if exists(self.path / name)]
        return FittedRows.load(self._attrs, {name: self._read(name) for name in names})

    def facts(self) -> dict[str, Any]:
        """Return its sizes, its spectrum in numbers and what was recorded of the fit: JSON values."""
        lambdas = self.lambdas()[0] if self.trace > 0 else None
        facts = {
            "curvature": str(self.path),
            "kind": self.kind,
            "method": {"gram": "dual", "kronecker": "kronecker"}.get(self.kind, "primal"),
            "k": self.d,
            "rows": self.rows,
            "trace": self.trace,
            "damping": self.damping,
            "largest_eigenvalue": float(self.eigenvalues.max(initial=0.0)),
            "smallest_eigenvalue": float(self.eigenvalues.min(initial=np.inf)) if len(self.eigenvalues) else 0.0,
            "default_damping": 0.0 if lambdas is None else self.mean_lambda(lambdas),
            "effective_dimension": 0.0 if lambdas is None else self.effective_dimension(lambdas),
        }
        optional = ("weights", "prior", "clipped", "selection", "sampling_error", "seconds")
        facts |= {name: self._attrs[name] for name in optional if self._attrs.get(name)}
        if self.kind == "top":
            low_rank = ("rank", "left_out", "rest", "passes", "residual", "converged", "way")
            facts |= {name: self._attrs[name] for name in low_rank}
            facts["effective_dimension_at_least"] = 0.0 if lambdas is None else self.least_dimension(lambdas)
        return facts

    def __repr__(self) -> str:
        facts = self.facts()
        kind = "" if self.kind == "whole" else f" {self.kind}"
        extra = f" sampling error={facts['sampling_error']:.3g}" if "sampling_error" in facts else ""
        extra += " above the Kronecker prior" if self.has_prior else ""
        extra += f" rank={facts['rank']} left out={facts['left_out']:.2%}" if "rank" in facts else ""
        weights = f" weights={facts['weights']['name']}" if "weights" in facts else ""
        return (
            f"<Curvature{kind} {str(self.path)!r} d={self.d} rows={self.rows}{weights} trace={self.trace:.4g} "
            f"damping={self.damping:g} d(λ={facts['default_damping']:.3g})={facts['effective_dimension']:.1f}{extra}>"
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


def fit_command(train: GradientStore, path: StorePath) -> str:
    """Return the command that fits a curvature of a store at ``path``."""
    options = f" --out {path}"
    if path.parent == train.path / "curvature":
        options = {"default": "", "gram": " --method dual"}.get(path.name, f" --name {path.name}")
    return f"ooc-influence fisher {train.path}{options}"


def open_matrix(path: StorePath) -> zarr.Array[Any]:
    """Return a Gram matrix on disk, to read; a missing tile is damage."""
    return zarr.open_array(array_store(path, read_only=True, chunk_bytes={}), mode="r")


def write_curvature(path: StorePath, attributes: Mapping[str, Any], write: Callable[[Any], Mapping[str, Any]]) -> None:
    """Write a curvature at ``path``, replacing one that is there.

    Parameters
    ----------
    path : StorePath
        Where.
    attributes : mapping
        Its attributes, JSON values, as far as they are known beforehand.
    write : callable
        Writes the arrays into a Zarr group and returns further attributes.

    Raises
    ------
    StoreWriteError
        If the folder cannot be written.
    """
    how = writing(f"to write the curvature to {path}", ", or give another path with out= (--out)")
    with how, NewFolder(path, replace=True) as folder:
        group = open_group(folder.arrays, "w")
        written = write(group)
        marks = {"format": FORMAT, "version": __version__, "fit": uuid.uuid4().hex, "complete": True}
        group.attrs[_ATTRIBUTES] = dict(attributes) | dict(written) | marks
        folder.publish()


def check_replaceable(path: StorePath) -> None:
    """Check that only a curvature, or nothing, is at ``path``.

    Raises
    ------
    StoreExistsError
        If something else is there.
    """
    for _ in range(10):  # another fit may be replacing one at this moment
        if _attributes(path) is not None or is_free(path):
            return
    check_free(path, "a curvature or nothing")


def complete_attributes(path: StorePath) -> dict[str, Any] | None:
    """Return the attributes of the finished curvature at ``path``; None where there is none."""
    attributes = _attributes(path)
    return attributes if attributes and attributes.get("complete") else None


def _attributes(path: StorePath) -> dict[str, Any] | None:
    if not is_file(path / "zarr.json"):
        return None
    try:
        attributes = dict(open_group(array_store(path, read_only=True), "r").attrs).get(_ATTRIBUTES)
    except (ValueError, TypeError, OSError):  # a damaged zarr.json, or a folder being replaced
        return None
    return attributes if isinstance(attributes, dict) else None


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
