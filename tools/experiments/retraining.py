"""Retraining on, and without, the most influential rows: what becomes of the loss on a set of targets.

A model is trained on all rows of a task (tasks.py); rows are ranked by their mean influence on 20 targets it was not
trained on (MNIST: of one class; Shakespeare: any passages). Then models are trained anew on the top m % alone, and on
everything but the top m %, and measured by their mean loss on the targets. Kept rows should leave it low, removed ones
should raise it. Compared: random rows, dropout (uniform, importance, importance in its eigenbasis), Gaussian
projection, GraSS and LoGra, all at 1024 numbers a row or as near as they come (at most half the rows). A seed is one of
targets, models and masks; means over seeds with 95 % intervals (Student's t).

Data: DIR/mnist (2000 images of the test set) and DIR/shakespeare (1500 passages of 64 characters); without --data
the digits of scikit-learn.

Run: python tools/experiments/retraining.py [--data DIR] [--folder retraining-output] [--seeds 5] [--quick].
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import Result, Runs, arguments, report
from scipy.stats import t
from tasks import Rows, Task, batches, make_task

import ooc_influence as ooc
from ooc_influence.evaluate.retrain import seeded

SHARES = {"keep": (0.1, 0.3, 0.5), "remove": (0.1, 0.3)}
TARGETS, NUMBERS = 20, 1024
WAYS = ("random", "uniform", "importance", "reduced", "Gaussian", "GraSS", "LoGra")
COLUMNS = ("task", "rows", "%", "ranked by", "loss on targets", "±", "minus random", "± of it", "seeds")


def task_of(name: str, data: Path | None, quick: bool) -> Task:
    task = make_task(name, data, quick)
    return task if quick or name != "MNIST" else replace(task, train_rows=2000, test_rows=500, epochs=20)


def targets(task: Task, seed: int) -> Rows:
    """Return the rows in question: of one class where there are classes."""
    generator = np.random.default_rng(seed)
    labels = task.test[1].numpy()
    places = np.arange(len(labels)) if task.tokens else np.flatnonzero(labels == seed % 10)
    chosen = torch.from_numpy(np.sort(generator.permutation(places)[:TARGETS]))
    return tuple(part[chosen] for part in task.test)


def compressor(way: str, p: int, n: int, seed: int, layers: int) -> Any:
    k = min(NUMBERS, p // 8, n // 2)
    side = max(1, round((k / layers) ** 0.5))
    return {
        "uniform": lambda: ooc.Dropout(k, seed=seed),
        "importance": lambda: ooc.Dropout(k, "importance", seed),
        "reduced": lambda: ooc.Dropout(min(16 * k, p), "importance", seed, reduce=ooc.Eigenbasis(k, pilot=n)),
        "Gaussian": lambda: ooc.Gaussian(k, seed),
        "GraSS": lambda: ooc.Grass(k, kept=min(16 * k, p), seed=seed),
        "LoGra": lambda: ooc.LoGra(side, side, seed),
    }[way]()


def ranking(task: Task, way: str, aim: Rows, seed: int) -> np.ndarray:
    """Return train rows, most helpful to the targets first."""
    if way == "random":
        return np.random.default_rng(seed).permutation(task.train_rows)
    with seeded(seed):
        model = task.fit(np.arange(task.train_rows))
    layers = sum(isinstance(module, torch.nn.Linear) for module in model.modules())
    p = sum(values.numel() for values in model.parameters())
    with tempfile.TemporaryDirectory() as place, warnings.catch_warnings():
        warnings.simplefilter("ignore", ooc.OocInfluenceWarning)
        chosen = compressor(way, p, task.train_rows, seed, layers)
        train = ooc.extract_gradients(model, task.loss, batches(task.train), f"{place}/train", compressor=chosen)
        query = ooc.extract_gradients(model, task.loss, batches(aim), f"{place}/query", like=train)
        scores = ooc.influence_scores(query, train, curvature=ooc.fit_fisher(train), average_queries=True).compute()
    return np.argsort(-scores[0], kind="stable")


def retrained(task: Task, way: str, seed: int) -> Result:
    """Return the targets' mean loss after each retraining."""
    aim, found = targets(task, seed), {}
    order = ranking(task, way, aim, seed)
    for kind, shares in SHARES.items():
        for share in shares:
            count = round(share * task.train_rows)
            with seeded(1000 + seed):
                model = task.fit(np.sort(order[:count] if kind == "keep" else order[count:]))
            with torch.no_grad():
                found[f"{kind} {round(100 * share)}"] = float(task.loss(model, aim).mean())
    return found


def interval(values: np.ndarray) -> float:
    """Return half the width of the mean's 95 % interval; NaN for a single value."""
    if len(values) < 2:
        return float("nan")
    return float(t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5)


def lines(results: list[Result]) -> Iterator[Result]:
    groups: dict[tuple[str, str, str], list[float]] = {}
    for result in results:
        task, way, _ = result["run"].split(" / ")
        for what in (name for name in result if name != "run"):
            groups.setdefault((task, what, way), []).append(result[what])
    for (task, what, way), values in sorted(groups.items(), key=lambda item: item[0][:2]):
        own, other = np.array(values), np.array(groups[task, what, "random"])
        kind, share = what.split()
        gap = own - other
        cells = [task, kind, int(share), way, own.mean(), interval(own), gap.mean(), interval(gap)]
        yield dict(zip(COLUMNS, [*cells[:4], *map(float, cells[4:]), len(own)], strict=True))


def main() -> None:
    parser = arguments(__doc__, "retraining-output")
    parser.add_argument("--data", type=Path, help="a folder with mnist/ and shakespeare/; default: the digits")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    runs = Runs(options.folder)
    for name in ("MNIST", "Shakespeare") if options.data else ("digits",):
        task = task_of(name, options.data, options.quick)
        for seed in range(2 if options.quick else options.seeds):
            for way in WAYS:
                runs.add(f"{name} / {way} / {seed}", task.settings, partial(retrained, task, way, seed))
    if options.status:
        print("\n".join(runs.missing()) or "nothing is missing")
        return
    print(f"{len(runs.missing())} runs to do", file=sys.stderr)
    found = list(lines(runs.finish(1 if options.quick else options.workers)))

    def plot(axes: Any) -> None:
        names = list(dict.fromkeys(f"{one['task']}: {one['rows']} {one['%']} %" for one in found))
        for number, way in enumerate(WAYS[1:]):
            own = [one for one in found if one["ranked by"] == way]
            places = [names.index(f"{one['task']}: {one['rows']} {one['%']} %") + number / 8 - 0.3 for one in own]
            gaps, widths = [one["minus random"] for one in own], [one["± of it"] for one in own]
            axes.errorbar(gaps, places, xerr=widths, fmt="o", markersize=3, label=way)
        axes.set_yticks(range(len(names)), names, fontsize=6)
        axes.set(xlabel="loss on targets, less that of random rows")
        axes.axvline(0, color="grey", linewidth=0.5)
        axes.legend(fontsize=6)

    report("retraining", options.folder, found, COLUMNS, plot)


if __name__ == "__main__":
    main()
