"""The gradient store: schema, commit records, memory-mapped reads, durable appends."""

from ooc_influence.store.arrays import CHUNK_TARGET, create_array, open_group, read_array, square_chunks, writable_array
from ooc_influence.store.encoding import Representation, parse_representation
from ooc_influence.store.gradient_store import GradientStore
from ooc_influence.store.layout import Storage, column_dtype
from ooc_influence.store.local import LocalArrayStore, folder_bytes, publish_folder, replace_folder, temporary_folder
from ooc_influence.store.mask import LayerShape, Mask, ModuleMask
from ooc_influence.store.reader import Block, read_blocks
from ooc_influence.store.rows import check_finite
from ooc_influence.store.view import PathLike, parse_path

__all__ = [
    "CHUNK_TARGET", "Block", "GradientStore", "LayerShape", "LocalArrayStore", "Mask", "ModuleMask", "PathLike",
    "Representation", "Storage", "check_finite", "column_dtype", "create_array", "folder_bytes", "open_group",
    "parse_path", "parse_representation", "publish_folder", "read_array", "read_blocks", "replace_folder",
    "square_chunks", "temporary_folder", "writable_array",
]  # fmt: skip
