"""The layer kinds: what is a layer's entry matrix, and how its kept entries are gathered."""

from ooc_influence.extract.entries.base import Entries, Located, Moments, Operands, computes_weights, is_coded, wide
from ooc_influence.extract.entries.calls import Call, float_leaves
from ooc_influence.extract.entries.conv import ConvEntries
from ooc_influence.extract.entries.embedding import EmbeddingBagEntries, EmbeddingEntries
from ooc_influence.extract.entries.func import (
    AdapterEntries,
    ExpertEntries,
    FuncEntries,
    RecurrentEntries,
    own_parameters,
    uncalled,
)
from ooc_influence.extract.entries.linear import LinearEntries, TransposedLinearEntries
from ooc_influence.extract.entries.norm import (
    BatchNormEntries,
    BiasEntries,
    GroupNormEntries,
    LayerNormEntries,
    RMSNormEntries,
)
from ooc_influence.extract.entries.rotated import RotatedEntries

KINDS: dict[str, type[Entries]] = {
    kind.kind: kind
    for kind in (
        LinearEntries, TransposedLinearEntries, ConvEntries, EmbeddingEntries, LayerNormEntries, RMSNormEntries,
        GroupNormEntries, BatchNormEntries, BiasEntries, ExpertEntries, AdapterEntries, RecurrentEntries,
        EmbeddingBagEntries, FuncEntries,
    )
}  # fmt: skip

__all__ = [
    "KINDS",
    "BiasEntries",
    "Call",
    "Entries",
    "FuncEntries",
    "Located",
    "Moments",
    "Operands",
    "RotatedEntries",
    "computes_weights",
    "float_leaves",
    "is_coded",
    "own_parameters",
    "uncalled",
    "wide",
]  # fmt: skip
