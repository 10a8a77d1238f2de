"""A store as other libraries' objects: a Dask array, an xarray dataset, a pandas frame, a table in a notebook.

Rows stay on disk: the Dask array and the xarray dataset are lazy, and the frame holds what belongs to each row but not
the row itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ooc_influence.notebook import html_table, optional_library
from ooc_influence.store.view import StoreView

if TYPE_CHECKING:
    import dask.array as da

_SCALES = ("row_scale",)  # of the stored form, no property of the example


class TabularView(StoreView):
    """The committed rows of a store, for other libraries."""

    def to_dask(self) -> da.Array:
        """Return the rows as a lazy (n, k) float32 Dask array, chunks as on disk; tasks carry the path only."""
        import dask.array as da

        chunks = (self.layout.chunk_rows, self.k)
        rows: da.Array = da.from_array(
            self, chunks=chunks, asarray=False, fancy=False, name=f"gradients-{self.rows_digest()}"
        )
        return rows

    def to_pandas(self) -> Any:
        """Return a DataFrame with a line a row: id, loss, grad_norm, dropped and the store's columns.

        Raises
        ------
        MissingExtraError
            Without pandas.
        """
        pandas = optional_library("pandas", "tables")
        frame = pandas.DataFrame({"id": self.ids(), **self._values()})
        frame.index.name = "row"
        return frame

    def to_xarray(self) -> Any:
        """Return a Dataset of dimensions (row, column): lazy float32 gradients, and what belongs to each row.

        ``xarray.open_zarr(path, consolidated=False)`` opens the arrays as they are stored: with scales apart, rows that
        are not committed, and those of quantised stores as whole numbers.

        Raises
        ------
        MissingExtraError
            Without xarray.
        """
        xarray = optional_library("xarray", "labelled arrays")
        rows = {name: ("row", values) for name, values in self._values().items()}
        coordinates = {"id": ("row", self.ids())} if self.layout.ids else {}
        return xarray.Dataset(
            {"gradients": (("row", "column"), self.to_dask()), **rows}, coordinates, {"store": str(self.path)}
        )

    def _values(self) -> dict[str, Any]:
        kept = [name for name in self.layout.row_arrays if name not in (*_SCALES, "example_id")]
        return {name.removeprefix("columns/"): self.small(name) for name in [*kept, "dropped"]}

    def _repr_html_(self) -> str:
        attrs, layout = self._attrs, self.layout
        dropped = int(self.dropped.sum()) if self.has_dropped else 0
        lines = [
            ("rows", f"{self.n:,}" + (f", {dropped:,} of them dropped" if dropped else "")),
            ("numbers a row", f"{self.k:,} of {attrs['p']:,} gradient entries, {layout.dtype}"),
            ("ids", layout.ids or "row numbers"),
            ("columns", ", ".join(layout.columns) or "none"),
            ("loss", str(attrs.get("loss_kind") or "not said")),
            ("chunks", f"{len(self.records):,} of {layout.chunk_rows:,} rows"),
            ("format", f"{attrs['format']}, written by version {attrs['version']}"),
        ]
        return html_table(f"GradientStore {self.path}", None, lines)
