"""The demo's data and model: 1,797 real handwritten digits, a tenth of the training labels flipped, an MLP.

Also a recipe for the command line: ``--recipe ooc_influence.cli.demo:recipe``.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from ooc_influence.compress import Dropout
from ooc_influence.curvature import fit_fisher
from ooc_influence.errors import InputError, MissingExtraError, install_extra, refused
from ooc_influence.evaluate import auc, recall_at
from ooc_influence.extract import Recipe, Split, cross_entropy, extract_gradients
from ooc_influence.influence import Ranking, self_influence, top_influential
from ooc_influence.memory import PeakMemory, format_bytes, parse_bytes
from ooc_influence.report import draw_images, table
from ooc_influence.store import GradientStore, tree_bytes

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
    """Return the MLP trained on the (partly wrong) labels; seconds on a CPU.

    In float64: roundings differ between processors, and training amplifies them.
    """
    torch.manual_seed(_SEED)
    model = make_model().double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-2)
    images, labels = digits.train_batch(0, TRAIN)
    for _ in range(epochs):
        for chosen in torch.randperm(TRAIN).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(images[chosen].double()), labels[chosen]).backward()
            optimizer.step()
    return model.float()


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


_CHECKED = (0.1, 0.2, 0.3)
_SHOWN = 3  # proponents and opponents in the picture


def run_demo(out: str, *, rows: int | None, k: int, memory: str, progress: bool, quiet: bool = False) -> dict[str, Any]:
    """Run the demo in folder ``out`` and return its numbers.

    Parameters
    ----------
    out : str
        Folder of the model, the stores and the picture; what is there from an earlier run is used again.
    rows : int or None
        Rows of the train store; more than the 1,437 images by passes over augmented ones.
    k : int
        Kept entries.
    memory : str
        Budget of every stage over the store: Fisher matrix, self-influence, top lists.
    progress, quiet : bool
        Show progress lines; show no text.

    Raises
    ------
    InputError
        For fewer rows than images.
    MissingExtraError
        If scikit-learn is not installed.
    """
    rows = TRAIN if rows is None else rows
    if rows < TRAIN:
        raise InputError(f"expected --rows >= {TRAIN}, the images there are; received {rows}")
    parse_bytes(memory)
    say = (lambda text="": None) if quiet else click.echo
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(refused(f"a folder to write to at {out}", error, ", or choose another --out")) from error
    began = time.perf_counter()
    with PeakMemory() as watch:
        digits = load_digits()
        say(
            f"{len(digits.images)} handwritten digits, {TRAIN} to train on, {digits.flipped.sum()} of those mislabelled"
        )
        model = load_model(digits, folder)
        recipe = make_recipe(digits, model, rows)
        train, test = _extract(recipe, folder, k, progress)
        curvature = fit_fisher(train, memory=memory, progress=progress)
        say(f"{train}\n{curvature}\n")
        recall = _find_mislabelled(train, digits, memory, progress)
        say(f"Wrong labels found by checking the most suspicious part of the {train.n} rows:")
        say(_recall_table(recall))
        explained = _explain(train, test, digits, model, memory, folder, say)
    seconds = time.perf_counter() - began
    facts = _facts(train, test, watch, memory)
    say(f"\n{table(('on disk and in memory', ''), list(facts['text']))}")
    say(f"\n{seconds:.0f} s in all; stores and picture are in {folder}/")
    numbers = {name: value for name, value in facts.items() if name != "text"}
    return {"rows": train.n, "k": train.k, "mislabelled": recall, "explained": explained, **numbers, "seconds": seconds}


def _extract(recipe: Any, folder: Path, k: int, progress: bool) -> tuple[GradientStore, GradientStore]:
    train_path = folder / f"train-k{k}.zarr"
    settings: dict[str, Any] = {"loss_kind": recipe.loss_kind, "progress": progress}
    stores = []
    for name in ("train", "test"):
        split = recipe.split(name)
        mask: dict[str, Any] = {"compressor": Dropout(k=k)} if name == "train" else {"like": train_path}
        path = folder / f"{name}-k{k}.zarr"
        stores.append(
            extract_gradients(
                recipe.model, recipe.per_sample_loss, split.batches, path, columns=split.columns, **mask, **settings
            )
        )
    return stores[0], stores[1]


def _find_mislabelled(train: GradientStore, digits: Digits, memory: str, progress: bool) -> dict[str, dict[str, float]]:
    """Return AUC and recall of self-influence, beside the loss and chance."""
    flipped = digits.flipped[np.arange(train.n) % TRAIN]
    ranked_by = {
        "self-influence": self_influence(train, memory=memory, progress=progress),
        "loss": train.small("loss"),
        "random": np.random.Generator(np.random.PCG64(1)).random(train.n),
    }
    return {
        name: {"auc": auc(scores, flipped)}
        | {f"found_at_{share:.0%}": recall_at(scores, flipped, share) for share in _CHECKED}
        for name, scores in ranked_by.items()
    }


def _recall_table(recall: dict[str, dict[str, float]]) -> str:
    header = ("ranked by", "AUC", *(f"found at {share:.0%}" for share in _CHECKED))
    rows = []
    for name, numbers in recall.items():
        shares = (f"{numbers[f'found_at_{share:.0%}']:.0%}" for share in _CHECKED)
        rows.append((name, f"{numbers['auc']:.3f}", *shares))
    return table(header, rows)


def _explain(
    train: GradientStore, test: GradientStore, digits: Digits, model: nn.Module, memory: str, folder: Path, say: Any
) -> dict[str, Any]:
    """Show the worst misclassified test image with its strongest proponents and opponents."""
    with torch.no_grad():
        predicted = model(torch.from_numpy(digits.images[TRAIN:])).argmax(1).numpy()
    loss = test.small("loss")
    query = int(np.argmax(np.where(predicted != digits.labels[TRAIN:], loss, -1)))
    result = top_influential(test, train, top=_SHOWN, memory=memory)
    label = int(digits.labels[TRAIN + query])
    images = [digits.images[TRAIN + query].reshape(8, 8)]
    captions = [[f"test image {query}", f"label {label}, taken for {predicted[query]}", f"loss {loss[query]:.2f}"]]
    for name, ranking in (("proponent", result.proponents), ("opponent", result.opponents)):
        for row, score in zip(ranking.rows[query], ranking.scores[query], strict=True):
            images.append(digits.train_batch(int(row), int(row) + 1)[0].view(8, 8).numpy())
            wrong = " (wrong)" if digits.flipped[row % TRAIN] else ""
            captions.append([f"{name} {row}", f"label {digits.labels[row % TRAIN]}{wrong}", f"score {score:+.3g}"])
    say("\nThe misclassified test image of largest loss, and the training images that support or oppose its label:")
    for first in range(1, len(images), _SHOWN):
        chosen = [0, *range(first, min(len(images), first + _SHOWN))]
        say("\n" + draw_images([images[index] for index in chosen], [captions[index] for index in chosen]))
    picture = _draw_png(images, captions, folder / "explained.png")
    if picture:
        say(f"\nThe same as a picture: {picture}")
    return {
        "query": query,
        "label": label,
        "predicted": int(predicted[query]),
        "proponents": _listed(result.proponents, query, digits),
        "opponents": _listed(result.opponents, query, digits),
    }


def _listed(ranking: Ranking, query: int, digits: Digits) -> list[dict[str, Any]]:
    return [
        {
            "row": row,
            "label": int(digits.labels[row % TRAIN]),
            "wrong": bool(digits.flipped[row % TRAIN]),
            "score": score,
        }
        for row, score in zip(ranking.rows[query].tolist(), ranking.scores[query].tolist(), strict=True)
    ]


def _draw_png(images: list[npt.NDArray[np.float32]], captions: list[list[str]], path: Path) -> Path | None:
    """Draw the images as a PNG; None where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(figsize=(1.6 * len(images), 2.3), layout="constrained")
    for index, (image, lines) in enumerate(zip(images, captions, strict=True)):
        axes = figure.add_subplot(1, len(images), index + 1)
        axes.imshow(image, cmap="gray_r", vmin=0, vmax=1)
        axes.set_title("\n".join(lines), fontsize=9)
        axes.set_axis_off()
    figure.savefig(path, dpi=120)
    return path


def _facts(train: GradientStore, test: GradientStore, watch: PeakMemory, memory: str) -> dict[str, Any]:
    stored = train.n * train.layout.chunk_bytes // train.layout.chunk_rows
    full = 4 * train.n * int(train.attrs["p"])
    sizes = {store.path.name: tree_bytes(store.path) for store in (train, test)}
    curvature = tree_bytes(train.path / "curvature")
    text = [(name, format_bytes(size)) for name, size in sizes.items()]
    text += [
        ("  of which train gradients", f"{format_bytes(stored)} ({train.n} rows x {train.k}, {train.layout.dtype})"),
        ("  of which curvature", f"{format_bytes(curvature)} (F and its eigenvectors, {train.k} x {train.k} float64)"),
        ("full gradients would take", f"{format_bytes(full)} ({train.n} rows x {train.attrs['p']}, float32)"),
        ("memory budget", memory),
        (
            "peak anonymous memory",
            f"{format_bytes(watch.peak)} ({format_bytes(watch.start)} of it before the first step)",
        ),
    ]
    return {"text": text, "disk_bytes": sizes, "gradient_bytes": stored, "peak_anonymous_bytes": watch.peak}
