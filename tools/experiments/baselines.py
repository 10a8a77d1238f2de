"""Scores of texts that need no gradients: words in common, and what a model's layers hold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer
from torch import Tensor, nn

Floats = np.ndarray[Any, np.dtype[np.floating[Any]]]


def bm25(queries: Sequence[str], rows: Sequence[str], k1: float = 1.2, b: float = 0.75) -> Floats:
    """Return the Okapi scores (Robertson and Zaragoza 2009), (q, n)."""
    words = CountVectorizer(token_pattern=r"\w+")
    counts = words.fit_transform(rows).toarray().astype(np.float64)
    length = counts.sum(1, keepdims=True)
    rare = np.log1p((len(counts) - (counts > 0).sum(0) + 0.5) / ((counts > 0).sum(0) + 0.5))
    weight = rare * counts * (k1 + 1) / (counts + k1 * (1 - b + b * length / length.mean()))
    return np.asarray((words.transform(queries) > 0) @ weight.T)


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
