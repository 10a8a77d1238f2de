"""Rows of tokens padded to a batch of tensors."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

IGNORED = -100  # the label of a token that is no target


class Collator:
    """Pads rows of tokens on the right and makes tensors of them.

    Parameters
    ----------
    pad : int
        The token to pad with; it is masked.
    sign_seed : int, optional
        Give every token a random sign of its own, ``signs`` (b, t), a function of seed, row and place.
    """

    def __init__(self, pad: int, sign_seed: int | None = None) -> None:
        self._pad, self._seed = pad, sign_seed

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Return ``input_ids``, ``attention_mask`` (b, t) and ``labels`` ((b, t), or (b,) classes)."""
        longest = max(len(row["input_ids"]) for row in rows)
        ids = torch.full((len(rows), longest), self._pad)
        mask = torch.zeros_like(ids)
        classes = isinstance(rows[0]["labels"], int)
        labels = torch.tensor([row["labels"] for row in rows]) if classes else torch.full_like(ids, IGNORED)
        for at, row in enumerate(rows):
            length = len(row["input_ids"])
            ids[at, :length], mask[at, :length] = torch.tensor(row["input_ids"]), 1
            if not classes:
                labels[at, :length] = torch.tensor(row["labels"])
        batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        if self._seed is not None:
            signs = np.ones((len(rows), longest), np.float32)
            for at, row in enumerate(rows):
                generator = np.random.Generator(np.random.Philox(key=[self._seed, row["row"]]))
                length = len(row["input_ids"])
                signs[at, :length] = 2.0 * generator.integers(0, 2, length) - 1
            batch["signs"] = torch.from_numpy(signs)
        return batch
