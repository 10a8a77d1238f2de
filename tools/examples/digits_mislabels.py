"""Find wrong labels: a tenth of the digits' labels flipped, suspects of largest self-influence, a page to go through.

Run: python tools/examples/digits_mislabels.py [--folder digits-output] [--quick]. Open the page it names, tick the
wrong ones, export them, and drop them: ooc-influence drop digits-output/train.zarr --from label-errors.csv.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import ooc_influence as ooc
from ooc_influence.report import Corpus, write_report


def per_sample_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return ooc.cross_entropy(model(batch[0]), batch[1])


def train(images: Tensor, labels: Tensor, epochs: int) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(labels)).split(64):
            optimizer.zero_grad()
            per_sample_loss(model, (images[rows], labels[rows])).mean().backward()
            optimizer.step()
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("digits-output"))
    parser.add_argument("--quick", action="store_true", help="300 images, a few epochs")
    options = parser.parse_args()
    n, epochs = (300, 8) if options.quick else (1797, 20)
    digits = load_digits()
    images, labels = torch.tensor(digits.data[:n] / 16, dtype=torch.float32), torch.tensor(digits.target[:n])
    generator = np.random.default_rng(0)
    wrong = np.sort(generator.choice(n, n // 10, replace=False))
    labels[wrong] = (labels[wrong] + torch.from_numpy(generator.integers(1, 10, len(wrong)))) % 10

    shutil.rmtree(options.folder, ignore_errors=True)
    store = options.folder / "train.zarr"
    model = train(images, labels, epochs)
    ooc.extract_gradients(
        model, per_sample_loss, list(zip(images.split(64), labels.split(64), strict=True)), store,
        compressor=ooc.Dropout(k=4096, sampling="importance"), loss_kind="cross_entropy",
        columns={"label": labels.tolist()},
    )  # fmt: skip
    ooc.fit_fisher(store)
    suspects = (-ooc.self_influence(store)).argsort()[: len(wrong)]
    found = len(np.intersect1d(suspects, wrong))
    corpus = Corpus(images=(digits.images[:n] * 15).astype(np.uint8))
    page = write_report(store, options.folder / "report", data=corpus, title="Which digits are labelled wrongly?")
    print(f"{found} of {len(wrong)} flipped labels are among the {len(wrong)} rows of largest self-influence")
    print(f"look at them: {page / 'index.html'}")


if __name__ == "__main__":
    main()
