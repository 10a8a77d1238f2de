"""Model families as people have them, small and random: what extraction is tried on.

:mod:`test_families` and ``tools/bench/families.py`` share them. A module holds a field; its libraries are imported when
a family is built, so that listing families takes none.
"""

from families.base import FAMILIES, Case, Family
from families.check import MODES, TOLERANCE, Finding, examine, oracle

from families import (  # isort: skip
    adapters,
    decoders,
    encoders,
    moe,
    multimodal,
    recurrent,
    seq2seq,
    sharing,
    speech,
    timm_layers,
    torch_layers,
    vision,
)

FIELDS = (
    vision, timm_layers, encoders, decoders, seq2seq, moe, recurrent, speech, multimodal, adapters, torch_layers,
    sharing,
)  # fmt: skip
# a few of each kind of fault, of a second each
QUICK = (
    "timm-batch-norm-act", "timm-std-conv-inside", "gated-rms-norm", "bit-linear", "bert-mlm", "mamba2", "mixtral",
    "lora-embedding", "prompt-tuning", "linear-shares-both", "conv-shares-weight", "tied-by-function",
    "positions-expand", "positions-slice", "table-argument", "weight-decay-in-the-loss", "chosen-tokens",
)  # fmt: skip

__all__ = ["FAMILIES", "FIELDS", "MODES", "QUICK", "TOLERANCE", "Case", "Family", "Finding", "examine", "oracle"]
