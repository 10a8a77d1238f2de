"""Rows of tokens padded to a batch of tensors."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ooc_influence.hf.padding import pad_right

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
        """Return ``input_ids``, ``attention_mask`` and ``labels`` (b, t)."""
        ids, mask = pad_right([row["input_ids"] for row in rows], self._pad)
        labels = torch.full_like(ids, IGNORED)
        for at, row in enumerate(rows):
            labels[at, : len(row["labels"])] = torch.tensor(row["labels"])
        batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        if self._seed is not None:
            signs = np.ones(tuple(ids.shape), np.float32)
            for at, row in enumerate(rows):
                generator = np.random.Generator(np.random.Philox(key=[self._seed, row["row"]]))
                length = len(row["input_ids"])
                signs[at, :length] = 2.0 * generator.integers(0, 2, length) - 1
            batch["signs"] = torch.from_numpy(signs)
        return batch
