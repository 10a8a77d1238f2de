"""The gradient store: schema, commit records, memory-mapped reads, durable appends, on disk or object storage."""

from ooc_influence.store.arrays import (
    CHUNK_TARGET,
    chunk_rows,
    create_array,
    find_array,
    map_chunk,
    open_group,
    read_array,
    read_part,
    square_chunks,
    writable_array,
)
from ooc_influence.store.average import average_rows
from ooc_influence.store.claim import Claim, claimed_rows, make_claim, read_claims, wait_for
from ooc_influence.store.commits import mark_dropped
from ooc_influence.store.encoding import FACTORS, Encoding, Representation, parse_representation
from ooc_influence.store.gradient_store import (
    GradientStore,
    as_store,
    check_extracted,
    check_finished,
    check_has_rows,
    check_second_moments,
    parse_numbers,
)
from ooc_influence.store.layout import Layout, Storage, column_dtype
from ooc_influence.store.local import map_file, publish_folder, remove_partial_files, replacing
from ooc_influence.store.mask import LayerShape, Mask, ModuleBasis, ModuleMask, PilotMoments
from ooc_influence.store.paths import (
    NewFolder,
    PathLike,
    StorePath,
    array_store,
    check_free,
    check_writable,
    exists,
    expand_home,
    is_file,
    is_free,
    is_local,
    make_folder,
    names,
    not_free,
    parse_path,
    read_bytes,
    remove_empty,
    remove_tree,
    tree_bytes,
    write_bytes,
)
from ooc_influence.store.reader import (
    Block,
    RawBlock,
    RowSpan,
    read_blocks,
    read_into,
    read_raw_blocks,
    read_stored_blocks,
)
from ooc_influence.store.reduction import (
    GaussianReduction,
    GeneratedReduction,
    LograReduction,
    RademacherReduction,
    Reduction,
    SjltReduction,
    StoredReduction,
    columns_digest,
)
from ooc_influence.store.remote import ChunkCache
from ooc_influence.store.rewrite import compact_store, copy_tombstones, create_like, merge_stores, upgrade_store
from ooc_influence.store.signs import sign_flips, transform_size
from ooc_influence.store.step_log import SCALARS, WEIGHT, LoggedColumns, StepLog, StepLogWriter, StepRecord
from ooc_influence.store.verify import Damage, verify_memory
from ooc_influence.store.writer import (
    BUFFERS,
    RangeWriter,
    missing_spans,
    refuse_nonfinite,
    row_norms,
    row_products,
    writing_bytes,
)

__all__ = [
    "BUFFERS", "CHUNK_TARGET", "FACTORS", "SCALARS", "WEIGHT", "Block", "ChunkCache", "Claim", "Damage", "Encoding",
    "GaussianReduction", "GeneratedReduction", "GradientStore", "LayerShape", "Layout", "LoggedColumns",
    "LograReduction", "Mask", "ModuleBasis", "ModuleMask", "NewFolder", "PathLike", "PilotMoments",
    "RademacherReduction", "RangeWriter", "RawBlock", "Reduction", "Representation", "RowSpan", "SjltReduction",
    "StepLog", "StepLogWriter", "StepRecord", "Storage", "StorePath", "StoredReduction", "array_store", "as_store",
    "average_rows", "check_extracted", "check_finished", "check_free", "check_has_rows", "check_second_moments",
    "check_writable", "chunk_rows", "claimed_rows", "column_dtype", "columns_digest", "compact_store",
    "copy_tombstones", "create_array", "create_like", "exists", "expand_home", "find_array", "is_file", "is_free",
    "is_local", "make_claim", "make_folder", "map_chunk", "map_file", "mark_dropped", "merge_stores", "missing_spans",
    "names", "not_free", "open_group", "parse_numbers", "parse_path", "parse_representation", "publish_folder",
    "read_array", "read_blocks", "read_bytes", "read_claims", "read_into", "read_part", "read_raw_blocks",
    "read_stored_blocks", "refuse_nonfinite", "remove_empty", "remove_partial_files", "remove_tree", "replacing",
    "row_norms", "row_products", "sign_flips", "square_chunks", "transform_size", "tree_bytes", "upgrade_store",
    "verify_memory", "wait_for", "writable_array", "write_bytes", "writing_bytes",
]  # fmt: skip
