"""Making and reading Zarr arrays the way every part of the store does.

Chunk keys are flat (``c.5.0``), so that a chunk is one file and one folder entry; empty chunks are written, because a
missing file has to mean damage; no codec unless asked, so that chunks can be mapped; ``check=True`` adds Zarr's crc32c
codec, for small arrays that no commit record covers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import zarr
from zarr.codecs import Crc32cCodec

from ooc_influence.errors import StoreDamagedError

CHUNK_TARGET = 16 * 2**20  # bytes; the measured sweet spot of writing and reading


def create_array(
    parent: Any,
    name: str | None,
    shape: tuple[int, ...],
    chunks: tuple[int, ...],
    dtype: Any,
    *,
    fill: Any = None,
    check: bool = False,
) -> Any:
    """Create array ``name`` in a Zarr group, or, without a name, as the root of a store.

    Strings (``dtype=str``) keep Zarr's own default codecs.
    """
    options: dict[str, Any] = {}
    if dtype is not str:
        options = {
            "compressors": (Crc32cCodec(),) if check else None,
            "fill_value": 0 if fill is None else fill,
        }
    make = zarr.create_array if name is None else parent.create_array
    place = {"store": parent, "zarr_format": 3} if name is None else {"name": name}
    return make(
        **place,
        shape=shape,
        chunks=tuple(max(1, size) for size in chunks),
        dtype=dtype,
        chunk_key_encoding={"name": "default", "separator": "."},
        config={"write_empty_chunks": True},
        **options,
    )


def writable_array(parent: Any, name: str | None = None) -> Any:
    """Return an array of a group, or the root of a store, to write to.

    Zarr forgets on every open that empty chunks are to be written: without it an all-zero chunk would leave no file.
    """
    array = zarr.open_array(parent, mode="r+") if name is None else parent[name]
    return array.with_config({"write_empty_chunks": True})


def square_chunks(side: int, itemsize: int) -> tuple[int, int]:
    """Return chunks of whole rows, about :data:`CHUNK_TARGET` bytes, of a (side, side) array."""
    return (max(1, min(side, CHUNK_TARGET // max(1, side * itemsize))), side)


def read_array(group: Any, name: str) -> npt.NDArray[Any]:
    """Return a whole small array, with a failing checksum as a :class:`StoreDamagedError`."""
    try:
        return np.asarray(group[name][...])
    except (ValueError, KeyError) as error:
        raise StoreDamagedError(
            f"expected a readable array {name!r} in {group.store_path}; received: {error}: restore it from a backup"
        ) from error


def open_group(store: Any, mode: Any) -> zarr.Group:
    """Open a Zarr v3 group on ``store``."""
    return zarr.open_group(store, mode=mode, zarr_format=3)
