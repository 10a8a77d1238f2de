"""Whether choosing samples in training, by their scores on trusted ones, keeps wrong labels from doing harm.

An MLP is trained by AdamW on 1200 of scikit-learn's digits for 20 epochs of 12 steps; 40 % of them have random labels.
From the fourth epoch on, ``online_selection`` weighs each batch's samples by their dot products with the mean gradient
of 300 digits with right labels: ``positive`` leaves out those of a score below zero, ``proportional`` weighs by the
score, or zero below that (Ren et al. 2018, arXiv 1803.09050). The trusted gradients are computed once, every epoch,
every four steps, or in each step. Accuracy is of 297 other digits.

Run: python tools/experiments/online.py [--folder online-output] [--seeds 5] [--quick].
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any

import numpy as np
import torch
from common import Result, Runs, arguments, report
from sklearn.datasets import load_digits
from torch import Tensor, nn

import ooc_influence as ooc

TRAIN, TRUSTED, WRONG = 1200, 300, 480
WARM_UP, BATCH = 3, 100
REFRESHED = {"never": 10**6, "every epoch": 12, "every 4 steps": 4, "in each step": 1}
COLUMNS = ("weights", "queries refreshed", "accuracy", "95 %", "weight of wrong labels", "of right ones", "seeds")


def positive(scores: np.ndarray) -> np.ndarray:
    return scores.mean(axis=0) > 0


def proportional(scores: np.ndarray) -> np.ndarray:
    weights = np.maximum(scores.mean(axis=0), 0)
    return weights / max(weights.mean(), 1e-12)


RULES: dict[str, Callable[[np.ndarray], np.ndarray]] = {"positive": positive, "proportional": proportional}


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return ooc.cross_entropy(model(batch[0]), batch[1])


@dataclass
class Study:
    """The digits, some of them with wrong labels, and a model in training."""

    seed: int

    def __post_init__(self) -> None:
        data = load_digits()
        self.images, self.right = torch.tensor(data.data / 16, dtype=torch.float32), torch.tensor(data.target)
        generator = torch.Generator().manual_seed(self.seed)
        self.wrong = torch.zeros(len(self.right), dtype=torch.bool)
        self.wrong[torch.randperm(TRAIN, generator=generator)[:WRONG]] = True
        drawn = torch.randint(0, 10, self.right.shape, generator=generator)
        self.labels = torch.where(self.wrong, drawn, self.right)
        torch.manual_seed(self.seed)
        self.model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=3e-3)

    def losses(self, rows: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self.model(self.images[rows]), self.labels[rows], reduction="none")

    def update(self, value: Tensor) -> None:
        self.optimizer.zero_grad()
        value.backward()
        self.optimizer.step()

    def queries(self, path: str) -> ooc.GradientStore:
        trusted = slice(TRAIN, TRAIN + TRUSTED)
        data = [(self.images[trusted], self.right[trusted])]
        return ooc.extract_gradients(self.model, loss, data, path, compressor=ooc.Dropout(k=4096), progress=False)

    def accuracy(self) -> float:
        rest = slice(TRAIN + TRUSTED, None)
        return float((self.model(self.images[rest]).argmax(1) == self.right[rest]).float().mean())


def run(rule: str | None, every: int, seed: int, epochs: int) -> Result:
    study = Study(seed)
    batches = [torch.randperm(TRAIN).split(BATCH) for _ in range(epochs)]
    warm = epochs if rule is None else WARM_UP
    for rows in (rows for epoch in batches[:warm] for rows in epoch):
        study.update(study.losses(rows).mean())
    if rule is None:
        return {"accuracy": study.accuracy()}
    weights = train_on_chosen(study, RULES[rule], every, [rows for epoch in batches[warm:] for rows in epoch])
    return {"accuracy": study.accuracy(), **weights}


def train_on_chosen(study: Study, weigh: Any, every: int, batches: list[Tensor]) -> Result:
    numbers = count()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        selection = ooc.online_selection(study.queries(f"{folder}/q{next(numbers)}"), weigh)
        with ooc.collect(study.model, f"{folder}/rows", select=selection) as collector:
            for number, rows in enumerate(batches):
                if number and number % every == 0:
                    selection.refresh(study.queries(f"{folder}/q{next(numbers)}"))
                with collector.step(rows) as step:
                    losses = study.losses(rows)
                    study.optimizer.zero_grad()
                    (step.select(losses) * losses).mean().backward()
                study.optimizer.step()
        store = ooc.GradientStore.open(f"{folder}/rows")
        wrong, weights = study.wrong[store.column("example")].numpy(), store.column("chosen")
    return {"wrong": float(weights[wrong].mean()), "right": float(weights[~wrong].mean())}


def interval(values: list[float]) -> float:
    """Return half the 95 % interval of a mean (Student's t)."""
    from scipy.stats import t

    return (
        float(t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5) if len(values) > 1 else 0.0
    )


def lines(results: list[Result]) -> list[Result]:
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(result["run"].rsplit(" / ", 1)[0], []).append(result)
    found = []
    for name, group in groups.items():
        rule, _, refreshed = name.partition(", ")
        accuracies = [one["accuracy"] for one in group]
        means = [
            float(np.mean([one[part] for one in group])) if part in group[0] else "" for part in ("wrong", "right")
        ]
        values = (rule, refreshed, float(np.mean(accuracies)), interval(accuracies), *means, len(group))
        found.append(dict(zip(COLUMNS, values, strict=True)))
    return found


def main() -> None:
    parser = arguments(__doc__, "online-output")
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    epochs, seeds = (WARM_UP + 1, 1) if options.quick else (20, options.seeds)
    runs = Runs(options.folder)
    ways = [(None, "", 0), *((rule, name, every) for rule in RULES for name, every in REFRESHED.items())]
    for seed in range(seeds):
        for rule, name, every in ways:
            label = "all 1" if rule is None else f"{rule}, {name}"
            runs.add(f"{label} / {seed}", {"epochs": epochs}, partial(run, rule, every, seed, epochs))
    if options.status:
        print("\n".join(runs.missing()) or "nothing is missing")
        return
    print(f"{len(runs.missing())} runs to do", file=sys.stderr)
    found = lines(runs.finish())

    def plot(axes: Any) -> None:
        names = [f"{one['weights']} {one['queries refreshed']}".strip() for one in found]
        axes.barh(names, [one["accuracy"] for one in found])
        axes.set(xlabel="accuracy")

    report("online", options.folder, found, COLUMNS, plot)


if __name__ == "__main__":
    main()
