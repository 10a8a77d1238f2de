"""The demo's data and model: 1,797 real handwritten digits, a tenth of the training labels flipped, an MLP.

Also a recipe for the command line: ``--recipe ooc_influence.cli.demo.digits:recipe``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from ooc_influence.errors import MissingExtraError, install_extra
from ooc_influence.extract import Recipe, Split, cross_entropy

TRAIN = 1437  # of 1797; the rest is the test set
FLIPPED_SHARE = 0.1
BATCH = 128
_SEED = 0
DEFAULT_FOLDER = "demo-output"


@dataclass(frozen=True)
class Digits:
    """The images and labels.

    Attributes
    ----------
    images : (1797, 64) float32
        Train rows first, values in [0, 1].
    labels : (1797,) int64
        As the model is trained on them: a tenth of the train labels are wrong.
    true_labels : (1797,) int64
        As the data set has them.
    """

    images: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int64]
    true_labels: npt.NDArray[np.int64]

    @cached_property
    def flipped(self) -> npt.NDArray[np.bool_]:
        """Which train labels are wrong, (1437,)."""
        return np.not_equal(self.labels, self.true_labels)[:TRAIN]

    def train_batch(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Return train rows ``start`` to ``stop``; rows beyond the data set are augmented passes over it."""
        rows = np.arange(start, stop)
        source = rows % TRAIN
        images = self.images[source].copy()
        for number in np.unique(rows // TRAIN):
            if number > 0:
                here = rows // TRAIN == number
                images[here] = _augment(images[here], int(number), source[here])
        return torch.from_numpy(images), torch.from_numpy(self.labels[source])

    def train_batches(self, rows: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield batches of train rows ``start`` to ``rows``, cut on one grid wherever they start."""
        while start < rows:
            stop = min(rows, (start // BATCH + 1) * BATCH)
            yield self.train_batch(start, stop)
            start = stop

    def test_batches(self) -> list[tuple[Tensor, Tensor]]:
        """Return the test set in batches."""
        images, labels = torch.from_numpy(self.images[TRAIN:]), torch.from_numpy(self.labels[TRAIN:])
        return list(zip(images.split(BATCH), labels.split(BATCH), strict=True))


def load_digits() -> Digits:
    """Return scikit-learn's digits, shuffled and with labels flipped under a fixed seed.

    Raises
    ------
    MissingExtraError
        If scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits as load
    except ImportError as error:
        raise MissingExtraError(
            f"expected scikit-learn for the digits; received none: {install_extra('demo')}"
        ) from error
    data: Any = load()
    generator = np.random.Generator(np.random.PCG64(_SEED))
    order = generator.permutation(len(data.target))
    images = (data.data[order] / 16).astype(np.float32)
    true_labels = data.target[order].astype(np.int64)
    labels = true_labels.copy()
    wrong = generator.permutation(TRAIN)[: round(TRAIN * FLIPPED_SHARE)]
    labels[wrong] = (labels[wrong] + generator.integers(1, 10, len(wrong))) % 10
    return Digits(images, labels, true_labels)


def _augment(images: npt.NDArray[np.float32], number: int, source: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    """Turn, scale and shift images a little, the same way whenever pass ``number`` comes to image ``source``."""
    random = np.random.Generator(np.random.PCG64([_SEED, number])).uniform(-1, 1, (TRAIN, 4))[source]
    angle, scale = random[:, 0] * 0.26, 1 + 0.1 * random[:, 1]
    turn = np.zeros((len(images), 2, 3), np.float32)
    turn[:, 0, 0] = turn[:, 1, 1] = np.cos(angle) * scale
    turn[:, 0, 1], turn[:, 1, 0] = -np.sin(angle) * scale, np.sin(angle) * scale
    turn[:, :, 2] = random[:, 2:] * 0.2
    pixels = torch.from_numpy(images).view(-1, 1, 8, 8)
    grid = F.affine_grid(torch.from_numpy(turn), list(pixels.shape), align_corners=False)
    moved: npt.NDArray[np.float32] = F.grid_sample(pixels, grid, align_corners=False).view(-1, 64).numpy()
    return moved


def make_model() -> nn.Module:
    """Return the untrained MLP 64-128-64-10."""
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))


def train_model(digits: Digits, epochs: int = 20) -> nn.Module:
    """Return the MLP trained on the (partly wrong) labels; seconds on a CPU."""
    torch.manual_seed(_SEED)
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-2)
    images, labels = digits.train_batch(0, TRAIN)
    for _ in range(epochs):
        for chosen in torch.randperm(TRAIN).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(images[chosen]), labels[chosen]).backward()
            optimizer.step()
    return model


def load_model(digits: Digits, folder: Path) -> nn.Module:
    """Return the trained model; it is kept in ``folder`` and trained only if it is not there."""
    path = folder / "model.pt"
    model = make_model()
    if path.exists():
        model.load_state_dict(torch.load(path, weights_only=True))
        return model
    model = train_model(digits)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    torch.save(model.state_dict(), temporary)
    temporary.replace(path)
    return model


def per_sample_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Return the cross-entropy of each image, (b,)."""
    images, labels = batch
    return cross_entropy(model(images), labels)


def make_recipe(digits: Digits, model: nn.Module, rows: int = TRAIN) -> Recipe:
    """Return model, loss and the splits ``train`` (``rows`` rows) and ``test``."""
    train = Split(
        lambda start: digits.train_batches(rows, start),
        columns={"label": lambda batch: batch[1]},
    )
    test = Split(digits.test_batches(), columns={"label": lambda batch: batch[1]})
    return Recipe(model, per_sample_loss, {"train": train, "test": test}, loss_kind="cross_entropy")


def recipe() -> Recipe:
    """Return the recipe of the digits, with the model of ``demo-output`` (trained and left there if need be)."""
    digits = load_digits()
    return make_recipe(digits, load_model(digits, Path(DEFAULT_FOLDER)))
