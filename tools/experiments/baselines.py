"""Scores of texts that need no gradients: words in common, and what a model's layers hold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from sklearn.feature_extraction.text import TfidfVectorizer
from torch import Tensor, nn

Floats = np.ndarray[Any, np.dtype[np.floating[Any]]]


def tfidf(queries: Sequence[str], rows: Sequence[str]) -> Floats:
    """Return cosines of term frequencies (logarithmic) times inverse document frequencies, (q, n)."""
    words = TfidfVectorizer(sublinear_tf=True)
    held = words.fit_transform(rows)
    return np.asarray((words.transform(queries) @ held.T).toarray())


def state_cosine(queries: Tensor, rows: Tensor) -> Floats:
    """Return cosines of mean hidden states (q, width) and (n, width), less the rows' mean, (q, n)."""
    units = [nn.functional.normalize(part.float() - rows.float().mean(0), dim=1) for part in (queries, rows)]
    with torch.no_grad():
        return (units[0] @ units[1].T).double().numpy()
