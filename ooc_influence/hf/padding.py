"""How long rows of tokens may be, and their padding, such that a text's loss is the one it has alone.

A classifier pads with its configuration's ``pad_token_id``: some count positions by it, some look for the last token
before it. One that has none would refuse several texts at once; it is given a token that no text of the batch contains,
for the duration of a call. Which side padding belongs on, or whether it changes the result on both, is tried out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from ooc_influence.errors import InputError
from ooc_influence.extract import to_device
from ooc_influence.hf.pretokenised import IGNORED

Side = Literal["right", "left"]
PAD = "pad_token_id"  # of a batch: the padding token to set in the model's configuration
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}  # of the largest logit
_HALF = 3e-2  # for other dtypes


def pad_right(rows: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Return rows of tokens as one tensor, (b, t) int64, and which are no padding, (b, t) int64."""
    ids = torch.full((len(rows), max(len(row) for row in rows)), pad)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        ids[index, : len(row)], mask[index, : len(row)] = torch.tensor(row), 1
    return ids, mask


class ClassifierCollator:
    """Pads rows to be classified and makes tensors of them.

    Parameters
    ----------
    pad : int or None
        The token that the model takes for padding; None where it knows none.
    vocabulary : int
        Tokens that the model knows.
    preferred : sequence of int or None
        Tokens to pad with if the model knows none, where no text of the batch contains them.
    side : {"right", "left"}
        Where padding goes.
    """

    def __init__(
        self, pad: int | None, vocabulary: int, preferred: Sequence[int | None] = (), side: Side = "right"
    ) -> None:
        self._pad, self._vocabulary, self._side = pad, vocabulary, side
        self._preferred: list[int] = [token for token in preferred if token is not None and 0 <= token < vocabulary]

    @classmethod
    def of(cls, model: Any, tokenizer: Any, side: Side = "right") -> ClassifierCollator:
        """Return the one that fits a model and its tokenizer."""
        pad, size = _text_config(model).pad_token_id, int(model.get_input_embeddings().weight.shape[0])
        pad = pad if isinstance(pad, int) and 0 <= pad < size else None
        return cls(pad, size, [getattr(tokenizer, f"{name}_token_id", None) for name in ("pad", "eos", "unk")], side)

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Return ``input_ids``, ``attention_mask`` (b, t), ``labels`` and, where the model lacks it, the padding token.

        Labels are (b,) int64 classes, (b,) float32 numbers, or (b, outputs) float32.
        """
        tokens = [row["input_ids"] for row in rows]
        pad = self._pad if self._pad is not None else self._unused(tokens)
        left = self._side == "left"
        ids, mask = pad_right([row[::-1] for row in tokens] if left else tokens, pad)
        if left:
            ids, mask = ids.flip(1), mask.flip(1)
        values = [row["label"] for row in rows]
        labels = torch.tensor(values, dtype=torch.int64 if isinstance(values[0], int) else torch.float32)
        batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        return batch if self._pad is not None else batch | {PAD: torch.tensor(pad)}

    def _unused(self, rows: Sequence[Sequence[int]]) -> int:
        used = {token for row in rows for token in row}
        candidates = [*self._preferred, *range(min(self._vocabulary, len(used) + 1))]
        unused: int | None = next((token for token in candidates if token not in used), None)
        if unused is None:
            raise InputError(
                "expected a batch that leaves a token of the model's vocabulary for padding; received one with all of "
                f"{self._vocabulary}: give a smaller one (--tokens, --batch-size)"
            )
        return unused


def _text_config(model: Any) -> Any:
    """Return the part of a model's configuration that is about text."""
    config = model.config
    return config.get_text_config() if hasattr(config, "get_text_config") else config


@contextmanager
def padding_token(model: Any, token: Tensor | None) -> Iterator[None]:
    """Set the padding token of a model's configuration for the duration of a call, where one is given."""
    if token is None:
        yield
        return
    config = _text_config(model)
    before = config.pad_token_id
    config.pad_token_id = int(token)
    try:
        yield
    finally:
        config.pad_token_id = before


def choose_side(
    model: Any, short: dict[str, Any], long: dict[str, Any], make: Callable[[Side], ClassifierCollator],
    logits: Callable[[Any, dict[str, Tensor]], Tensor],
) -> Side:  # fmt: skip
    """Return the side where padding a short row beside a long one leaves its logits as they are alone."""
    differences = []
    with ExitStack() as stack, torch.no_grad():
        for module in model.modules():
            stack.callback(setattr, module, "training", module.training)
        model.eval()
        for side in ("right", "left"):
            batches = [to_device(make(side)(rows), model.device) for rows in ([short], [short, long])]
            alone, beside = (logits(model, batch)[0].double() for batch in batches)
            differences.append(float((beside - alone).abs().max()))
            scale = max(float(alone.abs().max()), torch.finfo(torch.float32).tiny)
            if differences[-1] <= _TOLERANCE.get(next(model.parameters()).dtype, _HALF) * scale:
                return side
    raise InputError(
        "expected a classifier whose outputs for a text do not change with padding; received one where they change by "
        f"{min(differences):.2g} beside a longer text: run texts one at a time (batch_size=1, --batch-size 1)"
    )


class Collator:
    """Pads rows of tokens on the right and makes tensors of them.

    Parameters
    ----------
    pad : int
        The token to pad with; it is masked.
    sign_seed : int, optional
        Give every token a random sign of its own, ``signs`` (b, t), a function of seed, row and position.
    """

    def __init__(self, pad: int, sign_seed: int | None = None) -> None:
        self._pad, self._seed = pad, sign_seed

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Return ``input_ids``, ``attention_mask`` and ``labels`` (b, t); ``advantage`` (b,) where rows have one."""
        ids, mask = pad_right([row["input_ids"] for row in rows], self._pad)
        labels = torch.full_like(ids, IGNORED)
        for index, row in enumerate(rows):
            labels[index, : len(row["labels"])] = torch.tensor(row["labels"])
        batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        if "advantage" in rows[0]:
            batch["advantage"] = torch.tensor([row["advantage"] for row in rows], dtype=torch.float32)
        if self._seed is not None:
            signs = np.ones(tuple(ids.shape), np.float32)
            for index, row in enumerate(rows):
                generator = np.random.Generator(np.random.Philox(key=[self._seed, row["row"]]))
                length = len(row["input_ids"])
                signs[index, :length] = 2.0 * generator.integers(0, 2, length) - 1
            batch["signs"] = torch.from_numpy(signs)
        return batch


_CONTEXT = 4096  # where neither the model nor the tokenizer says
_LENGTHS = ("max_position_embeddings", "n_positions", "max_seq_len")
_TABLE = re.compile(
    r"(char_|absolute_)?(position|positional|pos)_(embeddings?|embed|emb)|embed_positions|positions_embed|wpe"
)
_NOT_TEXT = re.compile(r"vision|visual|image|img|audio|video")  # parts of a model that see no text
_LARGEST = 10**7  # tokenizers say 10^30 where they do not know


def context_length(model: Any, tokenizer: Any) -> int:
    """Return how many tokens a row has by default: what the model and its tokenizer allow, or 4096."""
    return min(_lengths(longest_row(model), getattr(tokenizer, "model_max_length", None)), default=_CONTEXT)


def longest_row(model: Any, *, alone: bool = False) -> int | None:
    """Return how many tokens a model can see at once; None where it has no limit.

    ``alone`` says that each row is a batch of its own. Where rotations depend on the longest row of a batch, rows that
    share one may have only as many tokens as the model was first made for.
    """
    adapter = getattr(model, "active_peft_config", None)
    virtual = int(getattr(adapter, "num_virtual_tokens", None) or 0)  # that prompt tuning puts before every text
    tables = list(_table_lengths(model))
    limit = min(tables) if tables else _configured_length(model, alone=alone)
    return None if limit is None else limit - virtual


def _lengths(*values: Any) -> list[int]:
    """Return those of some values that are lengths."""
    return [length for length in values if isinstance(length, int) and 2 <= length < _LARGEST]


def _table_lengths(model: nn.Module) -> Iterator[int]:
    """Yield the tokens that each table of positions has a row for."""
    modules = dict(model.named_modules())
    for name, module in modules.items():
        parent, _, leaf = name.rpartition(".")
        weight = getattr(module, "weight", None)
        if (
            not _TABLE.fullmatch(leaf)
            or _NOT_TEXT.search(parent)
            or not isinstance(weight, Tensor)
            or weight.dim() != 2
        ):
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


def _configured_length(model: Any, *, alone: bool) -> int | None:
    """Return the context length in the configuration of a model without a table of positions."""
    config = _text_config(model)
    if getattr(config, "relative_attention", False) or getattr(config, "relative_attention_num_buckets", None):
        return None
    length = min(_lengths(*(getattr(config, name, None) for name in _LENGTHS)), default=None)
    scaling = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    if length is None or not isinstance(scaling, Mapping):
        return length
    # of rotations that differ from layer to layer it has no kind: their configurations give the scaled length
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
