"""Zarr's metadata documents, looked at before Zarr makes anything of them.

A store may come from elsewhere, be damaged or edited by hand: a document that Zarr would stumble over is an error of
ours that names the file, and one that asks for a codec or data type outside an allow-list is refused, so that no store
can ask for code to be run. Consolidated metadata, copies of all documents in one, are left out: they would go around
this, and they are old once a row was appended.
"""

from __future__ import annotations

import json
from typing import Any

from zarr.core.group import GroupMetadata
from zarr.core.metadata.v3 import ArrayV3Metadata

from ooc_influence.errors import StoreFormatError

METADATA = "zarr.json"  # the name of every document
_CODECS = {"bytes", "crc32c", "vlen-utf8", "zstd", "blosc", "gzip"}


def check_document(text: bytes, where: object) -> bytes:
    """Return a document to be given to Zarr: as it is, or without consolidated metadata.

    Raises
    ------
    StoreFormatError
        If it cannot be read, or asks for unknown codecs or data types.
    """
    try:
        found: Any = json.loads(text)
        consolidated = found.pop("consolidated_metadata", None)
        is_array = found["node_type"] == "array"
        if is_array:
            asked = {codec["name"] for codec in found["codecs"]} - _CODECS
            asked |= set() if isinstance(found["data_type"], str) else {json.dumps(found["data_type"])[:40]}
            if asked:
                raise StoreFormatError(
                    f"expected known codecs and data types in {where}; received {', '.join(sorted(asked))}: it was "
                    "edited; restore it from a backup"
                )
        (ArrayV3Metadata if is_array else GroupMetadata).from_dict(dict(found))
    except StoreFormatError:
        raise
    except Exception as error:  # whatever JSON and Zarr make of it
        raise StoreFormatError(
            f"expected Zarr metadata that can be read in {where}; received {type(error).__name__}: {error}: restore it "
            "from a backup"
        ) from error
    return text if consolidated is None else json.dumps(found).encode()
