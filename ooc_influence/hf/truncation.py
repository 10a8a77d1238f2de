"""Texts to be classified that are longer than the context, cut as the model's tokenizer cuts them.

It keeps the special tokens that a classifier reads ([SEP], </s>), and the side that ``truncation_side`` says.
"""

from __future__ import annotations

from typing import Any

from ooc_influence.errors import InputError


def check_room(tokenizer: Any, max_length: int) -> None:
    """Check that rows have room for a token beside the special ones.

    Raises
    ------
    InputError
        If not.
    """
    special = tokenizer.num_special_tokens_to_add(pair=False)
    if max_length <= special:
        raise InputError(
            f"expected max_length > {special}, the special tokens that the tokenizer adds; received {max_length}"
        )


def truncate(tokenizer: Any, text: str, max_length: int) -> tuple[list[int], tuple[int, int]]:
    """Return a text's tokens, at most ``max_length``, and the characters they are of, from and to.

    The characters are (-1, -1) of a tokenizer without offsets.

    Raises
    ------
    InputError
        If the tokenizer does not cut it.
    """
    made = tokenizer(text, add_special_tokens=True, truncation=True, max_length=max_length, verbose=False)
    ids = list(made["input_ids"])
    if len(ids) > max_length:
        raise InputError(
            f"expected a tokenizer that cuts texts to {max_length} tokens; received {type(tokenizer).__name__}, which "
            "does not: shorten them yourself"
        )
    if not made.encodings:
        return ids, (-1, -1)
    encoding = made.encodings[0]
    spans = [
        span
        for span, special in zip(encoding.offsets, encoding.special_tokens_mask, strict=True)
        if not special and span[1] > span[0]
    ]
    if not spans:
        return ids, (-1, -1)
    left = tokenizer.truncation_side == "left"
    return ids, (spans[0][0], len(text)) if left else (0, spans[-1][1])
