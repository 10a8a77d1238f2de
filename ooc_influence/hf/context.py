"""How many tokens a model sees at once.

A model with a table of positions has as many as the table has rows behind the first that a token takes: some families
begin behind their padding token's, others at an offset of their own. One whose positions are relative has no limit;
one that rotates has the length it was made for, which scaling may extend.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from ooc_influence.hf.padding import text_config

_CONTEXT = 4096  # where neither the model nor the tokenizer says
_LENGTHS = ("max_position_embeddings", "n_positions", "max_seq_len")
_TABLE = re.compile(
    r"(char_|absolute_)?(position|positional|pos)_(embeddings?|embed|emb)|embed_positions|positions_embed|wpe"
)
_NOT_TEXT = re.compile(r"vision|visual|image|img|audio|video")  # parts of a model that see no text
_LARGEST = 10**7  # tokenizers say 10^30 where they do not know


def context_length(model: Any, tokenizer: Any) -> int:
    """Return how many tokens a row has by default: what the model and its tokenizer say.

    Parameters
    ----------
    model : PreTrainedModel
        The model.
    tokenizer : PreTrainedTokenizer or None
        Its tokenizer: ``model_max_length``.

    Returns
    -------
    int
        At most :func:`longest_row`; 4096 where nothing is said.
    """
    said = [longest_row(model), getattr(tokenizer, "model_max_length", None)]
    return min(_known(said), default=_CONTEXT)


def longest_row(model: Any, *, alone: bool = False) -> int | None:
    """Return how many tokens a model can see at once; None where it has no limit.

    Parameters
    ----------
    model : PreTrainedModel
        The model.
    alone : bool
        Whether each row is a batch of its own. Where rotations depend on the longest row of a batch, those that are
        together may have only as many tokens as the model was first made for.
    """
    virtual = _virtual_tokens(model)
    tables = list(_table_lengths(model))
    limit = min(tables) if tables else _configured(model, alone=alone)
    return None if limit is None else limit - virtual


def _known(said: list[Any]) -> list[int]:
    return [length for length in said if isinstance(length, int) and 2 <= length < _LARGEST]


def _table_lengths(model: nn.Module) -> Iterator[int]:
    """Yield the tokens that each table of positions has a row for."""
    modules = dict(model.named_modules())
    for name, module in modules.items():
        parent, _, own = name.rpartition(".")
        weight = getattr(module, "weight", None)
        if not _TABLE.fullmatch(own) or _NOT_TEXT.search(parent) or not isinstance(weight, Tensor) or weight.dim() != 2:
            continue
        if not isinstance(module, nn.Embedding) and not hasattr(module, "padding_idx"):
            continue
        positions = getattr(modules.get(parent), "position_ids", None)
        if not isinstance(positions, Tensor):
            positions = None
        rows = len(weight) - _first_row(module, positions)
        yield rows if positions is None else min(rows, positions.numel())


def _first_row(module: Any, positions: Tensor | None) -> int:
    """Return which row of a table of positions the first token takes; ``positions`` is where its owner numbers them."""
    if getattr(module, "padding_idx", None) is not None:
        return int(module.padding_idx) + 1  # tokens are counted on from padding's row
    if isinstance(getattr(module, "offset", None), int):
        return int(module.offset)
    return 0 if positions is None or positions.is_meta else int(positions.flatten()[0])


def _configured(model: Any, *, alone: bool) -> int | None:
    """Return what a configuration says of a model without a table of positions."""
    config = text_config(model)
    if getattr(config, "relative_attention", False) or getattr(config, "relative_attention_num_buckets", None):
        return None
    said = [getattr(config, name, None) for name in _LENGTHS]
    known = _known(said)
    return _scaled(config, min(known), alone=alone) if known else None


def _scaled(config: Any, length: int, *, alone: bool) -> int:
    """Return a context length with what the scaling of rotations makes of it.

    Rotations that differ from layer to layer say nothing: configurations of such models give the scaled length.
    """
    scaling = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    if not isinstance(scaling, Mapping):
        return length
    kind = scaling.get("rope_type", scaling.get("type"))
    original = scaling.get("original_max_position_embeddings")
    original = int(original or getattr(config, "original_max_position_embeddings", None) or length)
    if kind == "linear":
        return int(length * float(scaling.get("factor") or 1))
    if kind == "yarn":
        return max(length, int(original * float(scaling.get("factor") or 1)))
    if kind == "dynamic":  # beyond it, rotations follow the longest text seen, also an earlier one
        return min(length, original)
    if kind == "longrope" and not alone:  # beyond it, every text of the batch is rotated by other factors
        return min(length, original)
    return length


def _virtual_tokens(model: Any) -> int:
    """Return how many tokens a prompt-tuning adapter puts before every text."""
    adapter = getattr(model, "active_peft_config", None)
    return int(getattr(adapter, "num_virtual_tokens", None) or 0)
