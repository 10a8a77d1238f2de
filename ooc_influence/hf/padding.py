"""Padding of texts to be classified, such that a text's loss is the one it has alone.

A classifier pads with its configuration's ``pad_token_id``: some count positions by it, some look for the last token
before it. One that has none would refuse several texts at once; it is given a token that no text of the batch contains,
for the duration of a call. Which side padding belongs on, or whether it changes the result on both, is tried out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from ooc_influence.errors import InputError
from ooc_influence.extract.batching import to_device

Side = Literal["right", "left"]
PAD = "pad_token_id"  # of a batch: the token to be told to the model
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}  # of the largest logit
_HALF = 3e-2  # for other dtypes


def pad_right(rows: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Return rows of tokens as one tensor, (b, t) int64, and which are no padding, (b, t) int64."""
    ids = torch.full((len(rows), max(len(row) for row in rows)), pad)
    mask = torch.zeros_like(ids)
    for at, row in enumerate(rows):
        ids[at, : len(row)], mask[at, : len(row)] = torch.tensor(row), 1
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
        """Return the one that a model and its tokenizer ask for."""
        known, size = text_config(model).pad_token_id, int(model.get_input_embeddings().weight.shape[0])
        pad = known if isinstance(known, int) and 0 <= known < size else None
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
        found: int | None = next((token for token in candidates if token not in used), None)
        if found is None:
            raise InputError(
                "expected a batch that leaves a token of the model's vocabulary for padding; received one with all of "
                f"{self._vocabulary}: give a smaller one (--tokens, --batch-size)"
            )
        return found


def text_config(model: Any) -> Any:
    """Return the part of a model's configuration that is about text."""
    config = model.config
    return config.get_text_config() if hasattr(config, "get_text_config") else config


@contextmanager
def told_padding(model: Any, token: Tensor | None) -> Iterator[None]:
    """Tell a model a padding token meanwhile; its configuration is afterwards as it was."""
    if token is None:
        yield
        return
    config = text_config(model)
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
    """Return the side where padding leaves a text's logits as they are alone.

    Parameters
    ----------
    model : nn.Module
        The classifier.
    short, long : dict
        Rows of two texts, ``input_ids`` and ``label``; the first is padded beside the second.
    make : callable (side) -> ClassifierCollator
        Makes batches.
    logits : callable (model, batch) -> (b, outputs)
        Runs the model.

    Raises
    ------
    InputError
        If padding changes them on both sides.
    """
    differences = []
    with _evaluating(model), torch.no_grad():
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


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    with ExitStack() as undo:
        for module in model.modules():
            undo.callback(setattr, module, "training", module.training)
        model.eval()
        yield
