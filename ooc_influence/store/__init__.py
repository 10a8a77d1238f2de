"""The gradient store: schema, commit records, memory-mapped reads, durable appends, on disk or object storage."""

from ooc_influence.store.arrays import (
    CHUNK_TARGET,
    create_array,
    find_array,
    open_group,
    read_array,
    read_part,
    square_chunks,
    writable_array,
)
from ooc_influence.store.cache import ChunkCache
from ooc_influence.store.claim import Claim, make_claim, wait_for
from ooc_influence.store.encoding import Representation, parse_representation
from ooc_influence.store.gradient_store import GradientStore
from ooc_influence.store.layout import Storage, column_dtype
from ooc_influence.store.local import remove_partial_files
from ooc_influence.store.mask import LayerShape, Mask, ModuleMask, PilotMoments
from ooc_influence.store.paths import (
    NewFolder,
    PathLike,
    StorePath,
    array_store,
    exists,
    expand_home,
    is_file,
    is_local,
    names,
    parse_path,
    read_bytes,
    remove_empty,
    remove_tree,
    tree_bytes,
    write_bytes,
)
from ooc_influence.store.reader import Block, RawBlock, check_finite, read_blocks, read_into, read_raw_blocks
from ooc_influence.store.reduction import (
    GaussianReduction,
    GeneratedReduction,
    LograReduction,
    RademacherReduction,
    Reduction,
    SjltReduction,
    StoredReduction,
    columns_digest,
    kept_at,
)
from ooc_influence.store.rewrite import compact_store, create_like, merge_stores
from ooc_influence.store.tombstones import copy_tombstones, mark_dropped, parse_numbers
from ooc_influence.store.upgrade import upgrade_store
from ooc_influence.store.verify import Damage
from ooc_influence.store.writer import RangeWriter, missing_spans, writing_bytes

__all__ = [
    "CHUNK_TARGET", "Block", "ChunkCache", "Claim", "Damage", "GaussianReduction", "GeneratedReduction",
    "GradientStore", "LayerShape", "LograReduction", "Mask", "ModuleMask", "NewFolder", "PathLike", "PilotMoments",
    "RademacherReduction", "RangeWriter", "RawBlock", "Reduction", "Representation", "SjltReduction", "Storage",
    "StorePath", "StoredReduction", "array_store", "check_finite", "column_dtype", "columns_digest", "compact_store",
    "copy_tombstones", "create_array", "create_like", "exists", "expand_home", "find_array", "is_file", "is_local",
    "kept_at", "make_claim", "mark_dropped", "merge_stores", "missing_spans", "names", "open_group", "parse_numbers",
    "parse_path", "parse_representation", "read_array", "read_blocks", "read_bytes", "read_into", "read_part",
    "read_raw_blocks", "remove_empty", "remove_partial_files", "remove_tree", "square_chunks", "tree_bytes",
    "upgrade_store", "wait_for", "writable_array", "write_bytes", "writing_bytes",
]  # fmt: skip
