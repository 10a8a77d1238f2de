"""What is fixed when a store is created, the arrays that follow from it, and the attributes that record it.

==================  ===========  =====================================================================================
array               shape        meaning
==================  ===========  =====================================================================================
gradients           (n, columns) the kept gradient entries (:mod:`.encoding`), (n, k) or as many as k numbers take, in
                                 chunks of whole rows
row_scale           (n,)         float32 scale of each row's representation
loss                (n,)         float32 per-sample loss
grad_norm           (n,)         float32 Euclidean norm of the row before it was encoded; its square estimates the full
                                 gradient's squared norm without bias (at k = p it is that norm)
column_scale        (k,)         optional: float32 numbers that rows are divided by before they are encoded
dropped             (n,)         bool: the row is removed; its number stays. Attribute ``dropped`` of the Zarr group
                                 ``marks`` lists the groups that have such rows; only their files exist
example_id          (n,)         optional: the user's name of the row, str or int64
columns/<name>      (n,)         optional: what users group and filter by
commits             (chunks,)    uint64 commit records (:mod:`.commits`), one a gradients chunk
==================  ===========  =====================================================================================

Per-row arrays other than ``gradients``, and ``commits``, are chunked by *groups* of ``group_chunks`` gradients
chunks. A writer's range is a whole number of groups, so no file is shared between two writers. Every file of
``commits`` exists from the moment its group does: a missing one is damage, not an end.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, Self

import numpy as np

from ooc_influence._version import __version__
from ooc_influence.errors import InputError, StoreFormatError
from ooc_influence.fingerprint import json_digest
from ooc_influence.store.arrays import CHUNK_TARGET, create_array, open_group, parse_codec
from ooc_influence.store.encoding import Encoding, Representation, parse_representation
from ooc_influence.store.paths import StorePath, array_store

FORMAT_VERSION = 3
READABLE_VERSIONS = (1, 2, 3)
ATTRIBUTES = "ooc_influence"  # the key of all our attributes in the group
TOMBSTONES = "marks"  # a Zarr group whose attributes are written only when rows are dropped
ROW_ARRAYS = ("row_scale", "loss", "grad_norm")
_NAME = re.compile(r"(?!zarr\.json$)[A-Za-z0-9_][A-Za-z0-9_.-]*")  # of a column: it becomes a folder's
_COLUMN_DTYPES = ("bool", "int64", "float64", "str")


def column_dtype(values: Any) -> str:
    """Return the stored dtype of a column's values: bool, int64, float64 or str.

    Raises
    ------
    InputError
        If the values are none of these.
    """
    try:
        array = np.asarray(values)
    except ValueError:  # ragged
        array = np.empty((0, 0))
    if array.ndim != 1:
        raise InputError(f"expected one value a row; received values of shape {array.shape[1:]} or of several shapes")
    kind = array.dtype.kind
    name = {"b": "bool", "i": "int64", "u": "int64", "f": "float64", "U": "str", "T": "str"}.get(kind)
    if kind == "u" and array.max(initial=0) > np.iinfo(np.int64).max:
        raise InputError("expected whole numbers below 2^63; received larger ones: store them as strings")
    if name is None and all(isinstance(value, str) for value in values):
        name = "str"
    if name is None:
        odd = next(value for value in values if not isinstance(value, str))
        raise InputError(
            f"expected values that are numbers, booleans or strings, all of one kind; received {type(odd).__name__}: "
            "convert them, for example with str()"
        )
    return name


def numpy_dtype(name: str) -> Any:
    """Return the NumPy dtype for a column of dtype ``name``."""
    return object if name == "str" else np.dtype(name)


_CHUNK_ROWS = _GROUP_ROWS = 2**16  # at most, however narrow they are


@dataclass(frozen=True)
class Storage:
    """How rows are laid out on disk.

    Attributes
    ----------
    chunk_rows : int or None
        Rows of a gradients chunk; by default as many as fill about 16 MiB, the measured sweet spot. Also the unit of
        commit: a crash loses the chunk being filled, and those still in the writer's queue.
    group_chunks : int or None
        Chunks that share one file of the small per-row arrays, and the unit in which writers divide a store.

    codec : str or None
        A Zarr codec for the rows: ``"zstd"``, ``"blosc"``, ``"lz4"`` or ``"gzip"``. None, the default, keeps chunks
        mappable; compression pays for masked gradients with many exact zeros.
    """

    chunk_rows: int | None = None
    group_chunks: int | None = None
    codec: str | None = None

    def __post_init__(self) -> None:
        for name in ("chunk_rows", "group_chunks"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise InputError(f"expected {name} >= 1; received {value!r}")
        parse_codec(self.codec)

    def over(self, layout: Layout) -> dict[str, Any]:
        """Return these settings by name; where one is None, that of ``layout``."""
        return {name: getattr(self, name) or value for name, value in layout.storage.items()}

    def sizes(self, k: int, dtype: Representation, planned_rows: int | None = None) -> tuple[int, int]:
        """Return rows a chunk and chunks a group, for ``k`` numbers a row.

        A group has at most 64 chunks and about 65536 rows, since its small files are written again with every chunk;
        of a planned store it is smaller still, and a small planned store has smaller chunks, so that many writers can
        share it.
        """
        rows = self.chunk_rows or max(1, min(_CHUNK_ROWS, CHUNK_TARGET // Encoding.of(dtype, k).row_bytes))
        if self.chunk_rows is None and planned_rows is not None:
            rows = min(rows, max(64, -(-planned_rows // 64)))
        if self.group_chunks is not None:
            return rows, self.group_chunks
        group = max(1, min(64, _GROUP_ROWS // rows))
        if planned_rows is not None:
            group = max(1, min(group, -(-planned_rows // rows) // 64))
        return rows, group


@dataclass(frozen=True)
class Layout:
    """The fixed geometry of a store; see the module's table.

    Attributes
    ----------
    k : int
        Stored numbers a row.
    dtype : str
        Representation of the rows.
    chunk_rows, group_chunks : int
        Rows a chunk, chunks a group.
    planned_rows : int or None
        Rows the store will have, where several writers divide it; None for a store that grows by appending.
    ids : str or None
        Dtype of ``example_id``; None where rows have no ids.
    columns : dict of str to str
        Name to dtype of ``columns/<name>``.
    codec : str or None
        Codec of ``gradients``.
    column_scale : bool
        Whether there is a ``column_scale``.
    block : int or None
        Columns of int8 or int4 rows that share a scale, or entries of sign rows that a rotation mixes; None for other
        rows, and for those of formats 1 and 2.
    """

    k: int
    dtype: Representation
    chunk_rows: int
    group_chunks: int
    planned_rows: int | None = None
    ids: str | None = None
    columns: dict[str, str] = field(default_factory=dict)
    codec: str | None = None
    column_scale: bool = False
    block: int | None = None

    @property
    def storage(self) -> dict[str, Any]:
        """Chunking and codec by name, as :class:`Storage` has them."""
        return {name: getattr(self, name) for name in ("chunk_rows", "group_chunks", "codec")}

    @property
    def group_rows(self) -> int:
        """Rows that share one file of the small arrays."""
        return self.chunk_rows * self.group_chunks

    @cached_property
    def encoding(self) -> Encoding:
        """The stored form of a row of ``gradients``."""
        return Encoding(self.dtype, self.k, self.block)

    @property
    def chunk_bytes(self) -> int:
        """Bytes of a gradients chunk, before any codec."""
        return self.chunk_rows * self.encoding.row_bytes

    @property
    def metadata(self) -> dict[str, str]:
        """Array path to dtype of what the caller gives for each row: the id and the columns, in checksum order."""
        columns = {f"columns/{name}": self.columns[name] for name in sorted(self.columns)}
        return ({"example_id": self.ids} if self.ids else {}) | columns

    @property
    def row_arrays(self) -> dict[str, str]:
        """Array path to dtype of every per-row array but ``gradients`` and ``dropped``, in checksum order."""
        return dict.fromkeys(ROW_ARRAYS, "float32") | self.metadata

    @property
    def chunk_sizes(self) -> dict[str, int | None]:
        """Array path to the bytes of a chunk file, None where it varies, of every array that committed rows are in."""
        sizes: dict[str, int | None] = {"gradients": None if self.codec else self.chunk_bytes}
        for name, dtype in self.row_arrays.items():
            sizes[name] = None if dtype == "str" else self.group_rows * np.dtype(dtype).itemsize
        return sizes

    @property
    def arrays(self) -> list[str]:
        """Paths of all arrays that have to do with rows."""
        extra = ["column_scale"] if self.column_scale else []
        return ["gradients", *self.row_arrays, "dropped", "commits", *extra]

    def create_arrays(self, group: Any) -> None:
        """Create the per-row arrays in a new Zarr group, long enough for the planned rows."""
        rows = self.planned_rows or 0
        create_array(
            group, "gradients", (rows, self.encoding.columns), (self.chunk_rows, self.encoding.columns),
            self.encoding.dtype, fill=self.encoding.fill, codec=self.codec, dims=("row", "stored"),
        )  # fmt: skip
        if self.columns:
            group.create_group("columns")
        for name, dtype in self.row_arrays.items():
            fill = float("nan") if dtype.startswith("float") else None
            kind: Any = str if dtype == "str" else dtype
            create_array(group, name, (rows,), (self.group_rows,), kind, fill=fill, dims=("row",))
        create_array(group, "dropped", (rows,), (self.group_rows,), bool, codec="crc32c", dims=("row",))
        group.create_group(TOMBSTONES, attributes={"dropped": []})
        chunks = -(-rows // self.chunk_rows)
        create_array(group, "commits", (chunks,), (self.group_chunks,), "uint64", codec="crc32c", dims=("chunk",))[
            ...
        ] = 0

    def __post_init__(self) -> None:
        if self.planned_rows is not None and self.planned_rows < 1:
            raise InputError(f"expected planned_rows >= 1; received {self.planned_rows}")
        for name in self.columns:
            if not _NAME.fullmatch(name):
                raise InputError(f"expected a column name of letters, digits, '_', '-' and '.'; received {name!r}")

    def to_dict(self) -> dict[str, Any]:
        """Return the layout as JSON-ready values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: object = "store") -> Self:
        """Return the layout written in a store's attributes, each value checked: attributes can be edited by hand.

        Raises
        ------
        StoreFormatError
            If a value is not possible.
        """
        try:
            layout = cls(**values)
            parse_representation(layout.dtype)
            parse_codec(layout.codec)
            optional = [size for size in (layout.planned_rows, layout.block) if size is not None]
            sizes = [layout.k, layout.chunk_rows, layout.group_chunks, *optional]
            possible = all(type(size) is int and 0 < size < 2**62 for size in sizes)
            possible = possible and layout.chunk_rows < 2**32 and type(layout.column_scale) is bool
            possible = possible and (layout.block is None or not layout.encoding.separable)
            if layout.dtype == "sign":
                possible = possible and layout.block is not None and layout.block.bit_count() == 1
            dtypes = set(layout.columns.values()) | ({layout.ids} if layout.ids else set())
            if not possible or not dtypes <= set(_COLUMN_DTYPES):
                raise ValueError(f"sizes {sizes}, column dtypes {sorted(dtypes)}")
        except (TypeError, ValueError, AttributeError) as error:
            raise StoreFormatError(
                f"expected a layout of format {FORMAT_VERSION} in {where}; received {error}: "
                "its attributes were edited or damaged; restore zarr.json from a backup"
            ) from error
        return layout

    def check_array(self, name: str, array: Any, where: object) -> None:
        """Check that an array on the disk has the geometry that this layout says.

        Raises
        ------
        StoreFormatError
            If it has another: one of the two was edited.
        """
        dtype = {"gradients": self.encoding.dtype, "dropped": np.dtype(bool), "commits": np.dtype("uint64")}.get(name)
        columns = (self.encoding.columns,) if name == "gradients" else ()
        first = {"gradients": self.chunk_rows, "commits": self.group_chunks}.get(name, self.group_rows)
        if name == "column_scale":
            expected: tuple[Any, ...] = ((), (self.k,))
            received = (array.shape[1:], array.chunks)
        else:
            expected, received = (columns, (first, *columns)), (array.shape[1:], array.chunks)
        stored = self.row_arrays.get(name, "float32")
        fits = array.dtype == dtype if dtype is not None else stored == "str" or array.dtype == np.dtype(stored)
        if expected != received or not fits:
            raise StoreFormatError(
                f"expected array {name!r} of {where} in chunks of {expected[1]}; received {received[1]} of "
                f"{array.dtype}: zarr.json was edited or damaged; restore it from a backup"
            )


_REQUIRED = {"format": int, "layout": dict, "mask_digest": str, "created": dict, "p": int}


def read_attributes(path: StorePath) -> dict[str, Any]:
    """Return a store's attributes, checked."""
    try:
        group = open_group(array_store(path, read_only=True), "r")
        attrs: Any = dict(group.attrs).get(ATTRIBUTES)
    except (ValueError, TypeError, AttributeError, KeyError, FileNotFoundError) as error:
        raise StoreFormatError(
            f"expected a gradient store at {path}; received a zarr.json that cannot be read ({error}): "
            "restore it from a backup"
        ) from error
    fits = isinstance(attrs, dict) and all(isinstance(attrs.get(name), kind) for name, kind in _REQUIRED.items())
    if not fits or not isinstance(attrs["created"].get("id"), str) or not _tells_reduction(attrs.get("reduction")):
        raise StoreFormatError(
            f"expected a gradient store at {path}; received another Zarr group: give the folder that "
            "extract_gradients wrote"
        )
    if attrs["format"] not in READABLE_VERSIONS:
        raise StoreFormatError(
            f"expected store format {FORMAT_VERSION} at {path}; received {attrs['format']}: "
            f"upgrade ooc_influence (this is {__version__})"
        )
    if attrs["format"] > 1 and attrs.get("digest") != attributes_digest(attrs):
        raise StoreFormatError(
            f"expected the attributes of {path} as they were written; received others: zarr.json was edited or "
            "damaged; restore it from a backup"
        )
    return dict(attrs)


def _tells_reduction(facts: Any) -> bool:
    return facts is None or (
        isinstance(facts, dict) and all(isinstance(facts.get(name), str) for name in ("name", "digest"))
    )


def attributes_digest(attrs: Mapping[str, Any]) -> str:
    """Return the SHA-256 over a store's attributes without the digest itself."""
    rest = {name: value for name, value in attrs.items() if name != "digest"}
    return json_digest(rest)


def write_attributes(path: StorePath, attributes: Mapping[str, Any]) -> None:
    """Replace a store's attributes by writing one file once."""
    files = array_store(path)
    attrs = json.loads(json.dumps({name: value for name, value in attributes.items() if name != "digest"}))
    open_group(files, "r+").attrs[ATTRIBUTES] = attrs | {"digest": attributes_digest(attrs)}
    files.sync_folders()
