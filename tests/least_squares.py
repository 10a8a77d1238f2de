"""A convex model whose leave-out effects are known: ridge regression, trained exactly. PyTorch is not loaded here."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np

N, P, Q, RIDGE = 60, 5, 12, 0.1
_random = np.random.default_rng(0)
X, XQ = _random.standard_normal((N, P)), _random.standard_normal((Q, P))
Y = X @ np.ones(P) + _random.standard_normal(N)
YQ = XQ @ np.ones(P) + 2 * _random.standard_normal(Q)


def train(indices):
    """Minimise the mean of squares over 2 and a ridge, on some rows."""
    if "TRAINED" in os.environ:  # a file in which calls are counted; after some, the process is killed
        log = Path(os.environ["TRAINED"])
        with log.open("a") as file:
            file.write(".")
        if len(log.read_text()) == int(os.environ.get("KILLED_AT", "-1")):
            os.kill(os.getpid(), signal.SIGKILL)
    rows = X[indices]
    return np.linalg.solve(rows.T @ rows / N + RIDGE * np.eye(P), rows.T @ Y[indices] / N)


def loss(model, queries):
    return (XQ[queries] @ model - YQ[queries]) ** 2 / 2


def training():
    return train, loss


def gradients():
    """Per-sample gradients of train rows and queries at the model trained on all rows."""
    model = train(np.arange(N))
    return (X @ model - Y)[:, None] * X, (XQ @ model - YQ)[:, None] * XQ
