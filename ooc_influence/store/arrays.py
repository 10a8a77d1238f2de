"""Creating and reading Zarr arrays as every part of the store does.

Chunk keys are flat (``c.5.0``), so that a chunk is one file and one folder entry; empty chunks are written, because a
missing file must mean damage; no codec unless asked, so that chunks can be mapped; ``codec="crc32c"`` is for
small arrays that no commit record covers.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import crc32c
import numpy as np
import numpy.typing as npt
import zarr
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec, GzipCodec, ZstdCodec

from ooc_influence.errors import InputError, StoreDamagedError
from ooc_influence.store import local
from ooc_influence.store.local import LocalArrayStore

CHUNK_TARGET = 16 * 2**20  # bytes; the measured sweet spot of writing and reading
_CHECKSUM = 4  # bytes of one
_CODECS: dict[str, Callable[[int], Any]] = {  # by name, given the bytes of a number
    "zstd": lambda size: ZstdCodec(level=3),
    "blosc": lambda size: BloscCodec(cname="zstd", clevel=3, shuffle="bitshuffle", typesize=size),
    "lz4": lambda size: BloscCodec(cname="lz4", clevel=5, shuffle="bitshuffle", typesize=size),
    "gzip": lambda size: GzipCodec(level=5),
}


def parse_codec(name: str | None) -> str | None:
    """Return ``name`` if it is a known codec, or None for none."""
    if name is not None and name not in _CODECS:
        raise InputError(f"expected codec one of {', '.join(_CODECS)}, or none; received {name!r}")
    return name


def create_array(
    parent: Any,
    name: str | None,
    shape: tuple[int, ...],
    chunks: tuple[int, ...],
    dtype: Any,
    *,
    fill: Any = None,
    codec: str | None = None,
    dims: Sequence[str] | None = None,
) -> Any:
    """Create array ``name`` in a Zarr group, or, without a name, as the root of a store.

    Strings (``dtype=str``) keep Zarr's own default codecs. ``dims`` are what xarray calls the axes; where none are
    given, they are named after the array.
    """
    options: dict[str, Any] = {}
    if dtype is not str:
        compress = Crc32cCodec() if codec == "crc32c" else _CODECS[codec](np.dtype(dtype).itemsize) if codec else None
        options = {
            "compressors": None if compress is None else (compress,),
            "fill_value": 0 if fill is None else fill,
        }
    make = zarr.create_array if name is None else parent.create_array
    target = {"store": parent, "zarr_format": 3} if name is None else {"name": name}
    return make(
        **target,
        shape=shape,
        chunks=tuple(max(1, size) for size in chunks),
        dtype=dtype,
        chunk_key_encoding={"name": "default", "separator": "."},
        config={"write_empty_chunks": True},
        dimension_names=dims or [f"{name or 'axis'}_{axis}" for axis in range(len(shape))],
        **options,
    )


def chunk_rows(shape: Sequence[int], most: int) -> int:
    """Return the rows of a chunk of at most ``most`` numbers: chunks are written whole, so they are of like sizes.

    A chunk larger than its array, or a last one that is mostly empty, would be padded on disk.
    """
    n, limit = max(1, shape[0]), max(1, most // max(1, math.prod(shape[1:])))
    return -(-n // -(-n // limit))


def write_groups(parent: Any, groups: Mapping[str, tuple[Mapping[str, Any], Mapping[str, npt.NDArray[Any]]]]) -> None:
    """Write many groups of small checked arrays below a group, as :func:`create_array` would, all at once.

    Parameters
    ----------
    parent : Group
        Where to write; its store is one of this package's.
    groups : mapping of str to (mapping, mapping of str to array)
        By path: the group's attributes, and its arrays of one axis, by name.
    """
    base, documents = parent.path, {}

    def put(path: str, data: bytes) -> None:
        documents[f"{base}/{path}" if base else path] = data

    above = {"/".join(each.split("/")[:depth]) for each in groups for depth in range(1, each.count("/") + 1)}
    for path in above:
        put(f"{path}/zarr.json", _group_document({}))
    for path, (attributes, arrays) in groups.items():
        put(f"{path}/zarr.json", _group_document(attributes))
        for name, values in arrays.items():
            put(f"{path}/{name}/zarr.json", _array_document(values, name))
            if values.size:
                data = np.ascontiguousarray(values, values.dtype.newbyteorder("<")).tobytes()
                put(f"{path}/{name}/c.0", data + crc32c.crc32c(data).to_bytes(4, "little"))
    parent.store.put_all(documents)


def _group_document(attributes: Mapping[str, Any]) -> bytes:
    return json.dumps({"attributes": dict(attributes), "zarr_format": 3, "node_type": "group"}, indent=2).encode()


def _array_document(values: npt.NDArray[Any], name: str) -> bytes:
    """Return the metadata that Zarr would write for an array, made from its metadata for one of the same type."""
    document = json.loads(_template(values.dtype.str))
    document["shape"] = [values.size]
    document["chunk_grid"]["configuration"]["chunk_shape"] = [max(1, values.size)]
    document["dimension_names"] = [f"{name}_0"]
    return json.dumps(document, indent=2).encode()


@functools.cache
def _template(dtype: str) -> bytes:
    store = zarr.storage.MemoryStore()
    create_array(zarr.open_group(store, mode="w"), "one", (1,), (1,), dtype, codec="crc32c")
    return bytes(store._store_dict["one/zarr.json"].to_bytes())


def writable_array(parent: Any, name: str | None = None) -> Any:
    """Return an array of a group, or the root of a store, to write to.

    Zarr has to be told on every open to write empty chunks: otherwise an all-zero chunk leaves no file.
    """
    array = zarr.open_array(parent, mode="r+") if name is None else parent[name]
    return array.with_config({"write_empty_chunks": True})


def square_chunks(side: int, itemsize: int) -> tuple[int, int]:
    """Return chunks of whole rows, about :data:`CHUNK_TARGET` bytes, of a (side, side) array."""
    return (max(1, min(side, CHUNK_TARGET // max(1, side * itemsize))), side)


def read_array(group: Any, name: str) -> npt.NDArray[Any]:
    """Return a whole small array of a group; see :func:`read_whole`."""
    return read_whole(find_array(group, name))


def find_array(group: Any, name: str) -> Any:
    """Return an array of a group, to read from.

    Raises
    ------
    StoreDamagedError
        If it is missing, or its metadata cannot be read.
    """
    try:
        return group[name]
    except (ValueError, KeyError) as error:
        raise StoreDamagedError(_unreadable(f"{group.store_path}/{name}", error)) from error


def read_whole(array: Any) -> npt.NDArray[Any]:
    """Return a whole small array."""
    try:
        _check_stored(array)
        return np.asarray(array[...])
    except (ValueError, KeyError, TypeError, AttributeError, MemoryError) as error:
        raise StoreDamagedError(_unreadable(array.store_path, error)) from error


def read_part(array: Any, key: Any) -> npt.NDArray[Any]:
    """Return part of an array.

    Raises
    ------
    StoreDamagedError
        If a checksum fails or a file is missing.
    """
    try:
        return np.asarray(array[key])
    except (ValueError, KeyError) as error:
        raise StoreDamagedError(_unreadable(array.store_path, error)) from error


def map_chunk(array: Any, number: int, *, check: bool) -> npt.NDArray[Any] | None:
    """Return a chunk of whole rows as a memory map, which reads nothing but what is looked at.

    Parameters
    ----------
    array : zarr.Array
        (rows, columns), with a checksum for each chunk and no other codec.
    number : int
        Which chunk; the last one may have more rows than are left.
    check : bool
        Compare it with its checksum, for which all of it is read.

    Returns
    -------
    (rows of a chunk, columns), or None
        None for an array that is stored otherwise, or on object storage.

    Raises
    ------
    StoreDamagedError
        If the checksum fails, or the file is missing or of another size.
    """
    plain = [type(codec) for codec in array.metadata.codecs] == [BytesCodec, Crc32cCodec]
    if not plain or not isinstance(array.store, LocalArrayStore) or array.chunks[1:] != array.shape[1:]:
        return None
    key = array.metadata.encode_chunk_key((number, *(0 for _ in array.shape[1:])))
    stored = array.store.map_chunk(f"{array.path}/{key}".lstrip("/"))
    if stored is None:  # where it may be: of zeros
        return None
    size = array.dtype.itemsize * math.prod(array.chunks)
    damage = f"{len(stored)} bytes, not {size + _CHECKSUM}" if len(stored) != size + _CHECKSUM else ""
    if check and not damage and crc32c.crc32c(stored[:size].data) != int.from_bytes(stored[size:].tobytes(), "little"):
        damage = "another checksum"
    if damage:
        raise StoreDamagedError(_unreadable(f"{array.store_path}/{key}", damage))
    return np.asarray(stored[:size].view(array.dtype.newbyteorder("<")).reshape(array.chunks))


def _unreadable(where: object, error: object) -> str:
    return (
        f"expected a readable array {where}; received: {error}: see 'ooc-influence verify', or restore it from a backup"
    )


def _check_stored(array: Any) -> None:
    """Check, before allocating memory, that an array's files can hold its shape, which may have been edited."""
    store = array.store
    if isinstance(store, LocalArrayStore) and array.path not in store.expected.may_lack:
        file_bytes = local.tree_bytes(store.root / array.path)
        if array.nbytes > file_bytes:
            raise ValueError(f"a shape of {array.shape}, and files of {file_bytes} bytes in all")


def open_group(store: Any, mode: Any) -> zarr.Group:
    """Open a Zarr v3 group on ``store``."""
    return zarr.open_group(store, mode=mode, zarr_format=3)
