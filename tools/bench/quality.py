"""Quality of compressed scores: the linear datamodeling score (LDS) on MNIST, against retrained models.

Truth: 100 models (MLP 784-128-64-10, dropout 0.1 behind each ReLU, SGD 0.01, momentum 0.9, batch 64, 50 epochs), each
trained on a random half of 5000 images, measured by minus the loss on each of 500 others. Scores: of one such model,
trained on all 5000, through stores made by the package's own calls with its defaults (float16 rows), one for each way
to compress and each mask seed. LDS: Spearman's rank correlation over the 100 models between summed scores and outcomes,
mean over the 500.

Images: the 10,000 of MNIST's test set, as DIR/mnist/t10k-images-idx3-ubyte.gz and t10k-labels-idx1-ubyte.gz; the first
5000 train, the next 500 test; pixels shifted and scaled to mean 0 and deviation 1, as usual. Damping is relative,
λ = damping · tr(F)/d with d the stored numbers a row; the best of a fixed grid is shown, and the default.

Run: python tools/bench/quality.py --data DIR [--folder quality-output] [--workers 2] [--quick]. Models and scores are
kept in the folder: a stopped run resumes, --status says what is missing, --rescore scores again. Prints
Markdown; the last line is JSON. --quick is the same with a sixteenth of the rows and stored numbers and smaller models:
seconds, and no more than a hint.
"""

from __future__ import annotations

import argparse
import functools
import gzip
import hashlib
import json
import os
import shutil
import sys
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

os.environ.pop("OPENBLAS_CORETYPE", None)

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

import ooc_influence as ooc
from ooc_influence.evaluate import Runs, finished_runs, lds, random_subsets, retrain
from ooc_influence.evaluate.retrain import seeded
from ooc_influence.report import table
from ooc_influence.store.local import write_file

RECIPE = {"dropout": 0.1, "lr": 0.01, "momentum": 0.9, "batch": 64, "pixels": [0.1307, 0.3081]}
GRID = [10 ** (power / 2) for power in range(-6, 5)]  # 0.001 to 100
DOTS = 1e9  # a damping that leaves dot products
# the model, its optimizer, the batch's rows and the epoch -> a context around a step of the training
Watch = Callable[[nn.Module, torch.optim.Optimizer, Tensor, int], AbstractContextManager[Any]]
MODEL_SEED = 2**20  # not one of the retrained models'
TARGETS = {
    "uniform 1024": 0.115,
    "importance 1024": 0.13,
    "importance 32768 to 1024, 5000 pilot rows": 0.20,
    "importance 32768 to 1024, 1500 pilot rows": 0.17,
    "importance 32768 to 256, 5000 pilot rows": 0.15,
}


@dataclass(frozen=True)
class Size:
    """How large the experiment is; ``scale`` divides every k; the pilots are shares of the rows."""

    train: int = 5000
    test: int = 500
    models: int = 100
    epochs: int = 50
    seeds: int = 3
    hidden: tuple[int, int] = (128, 64)
    scale: int = 1

    @property
    def entries(self) -> int:
        """Parameters of a model, p."""
        widths = (784, *self.hidden, 10)
        return sum((before + 1) * after for before, after in pairwise(widths))


QUICK = Size(train=312, test=31, models=16, epochs=30, seeds=1, hidden=(32, 16), scale=16)


@functools.cache
def load(data: Path) -> tuple[Tensor, Tensor, str]:
    """Return images (n, 784), labels (n,), and a digest of both."""
    parts = [gzip.decompress((data / "mnist" / f"t10k-{name}-ubyte.gz").read_bytes())
             for name in ("images-idx3", "labels-idx1")]  # fmt: skip
    images = np.frombuffer(parts[0], np.uint8, offset=16).reshape(-1, 784)
    labels = np.frombuffer(parts[1], np.uint8, offset=8)
    if len(images) != len(labels):
        raise SystemExit(f"expected as many images as labels; received {len(images)} and {len(labels)}")
    mean, deviation = RECIPE["pixels"]
    pixels = ((images / 255 - mean) / deviation).astype(np.float32)
    return (
        torch.from_numpy(pixels),
        torch.from_numpy(labels.astype(np.int64)),
        hashlib.sha256(b"".join(parts)).hexdigest(),
    )


def make_model(size: Size) -> nn.Module:
    first, second, drop = *size.hidden, RECIPE["dropout"]
    return nn.Sequential(
        nn.Linear(784, first), nn.ReLU(), nn.Dropout(drop),
        nn.Linear(first, second), nn.ReLU(), nn.Dropout(drop), nn.Linear(second, 10),
    )  # fmt: skip


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return ooc.cross_entropy(model(batch[0]), batch[1])


@dataclass(frozen=True)
class Truth:
    """The training and the measurement, to be sent to processes."""

    data: Path
    size: Size

    def rows(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        images, labels, _ = load(self.data)
        return images[start:stop], labels[start:stop]

    @property
    def test(self) -> tuple[Tensor, Tensor]:
        return self.rows(self.size.train, self.size.train + self.size.test)

    def train(self, indices: np.ndarray, watch: Watch | None = None) -> nn.Module:
        images, labels = (part[indices] for part in self.rows(0, self.size.train))
        model = make_model(self.size)
        optimizer = torch.optim.SGD(model.parameters(), lr=RECIPE["lr"], momentum=RECIPE["momentum"])
        for epoch in range(self.size.epochs):
            for chosen in torch.randperm(len(labels)).split(RECIPE["batch"]):
                with nullcontext() if watch is None else watch(model, optimizer, chosen, epoch):
                    optimizer.zero_grad()
                    F.cross_entropy(model(images[chosen]), labels[chosen]).backward()
                    optimizer.step()
        return model.eval()

    def measure(self, model: nn.Module) -> np.ndarray:
        with torch.no_grad():
            return -loss(model, self.test).numpy()

    def runs(self, folder: Path, workers: int | None) -> Runs:
        """Return what is there of the retrained models' outcomes; train what is not, with some workers."""
        subsets = random_subsets(self.size.train, self.size.models)
        size = {name: getattr(self.size, name) for name in ("train", "test", "epochs")}
        settings = {**RECIPE, **size, "hidden": list(self.size.hidden), "data": load(self.data)[2]}
        if workers is None:
            return finished_runs(subsets, folder / "models", settings=settings)
        return retrain(
            self.train, self.measure, subsets, folder / "models", settings=settings, workers=workers, progress=True
        )

    def model(self, folder: Path) -> nn.Module:
        """Return the model that is explained, trained on all rows; kept in the folder."""
        model, path = make_model(self.size).eval(), folder / "model.pt"
        if not path.exists():
            with seeded(MODEL_SEED):
                model = self.train(np.arange(self.size.train))
            torch.save(model.state_dict(), path.with_suffix(".tmp"))
            path.with_suffix(".tmp").replace(path)
        model.load_state_dict(torch.load(path, weights_only=True))
        return model


Maker = Callable[[int], ooc.Dropout | ooc.Gaussian]


def methods(size: Size) -> dict[str, Maker]:
    """Return the ways to compress, by name: seed -> compressor."""

    def plain(k: int, sampling: str) -> Maker:
        return lambda seed: ooc.Dropout(k=k, sampling=sampling, seed=seed)

    def reduced(r: int, pilot: int, weights: str | None = None) -> Maker:
        basis = ooc.Eigenbasis(r, pilot, weights)
        return lambda seed: ooc.Dropout(k=32768 // scale, sampling="importance", seed=seed, reduce=basis)

    scale, rows = size.scale, size.train
    found: dict[str, Maker] = {}
    for k in (512, 1024, 2048):
        found[f"uniform {k // scale}"] = plain(k // scale, "uniform")
    found[f"importance {1024 // scale}"] = plain(1024 // scale, "importance")
    for r, pilot in ((1024, rows), (1024, rows * 3 // 10), (256, rows)):
        found[f"importance {32768 // scale} to {r // scale}, {pilot} pilot rows"] = reduced(r // scale, pilot)
    for r in (1024, 256):
        name = f"importance {32768 // scale} to {r // scale}, {rows} pilot rows weighted by ggn"
        found[name] = reduced(r // scale, rows, "ggn")
    found[f"Gaussian projection {1024 // scale}"] = lambda seed: ooc.Gaussian(1024 // scale, seed)
    # every entry, in the eigenbasis of all rows: nothing is lost, for scores lie in the span of the train rows
    found["exact"] = lambda seed: ooc.Dropout(k=size.entries, reduce=ooc.Eigenbasis(rows, rows))
    return found


def jobs(size: Size) -> list[tuple[str, int]]:
    """Return (method, seed) of every store."""
    return [(name, seed) for name in methods(size) for seed in range(1 if name == "exact" else size.seeds)]


def place_of(folder: Path, job: tuple[str, int]) -> Path:
    return folder / "scores" / f"{job[0].replace(' ', '-').replace(',', '')}-seed{job[1]}.json"


def score(truth: Truth, runs: Runs, folder: Path, job: tuple[str, int]) -> dict[str, Any]:
    """Return the LDS of one store at every damping."""
    model, (name, seed) = truth.model(folder), job
    parts = {"train": truth.rows(0, truth.size.train), "test": truth.test}
    stores = {part: folder / f"{part}.zarr" for part in parts}
    for part, rows in parts.items():
        shutil.rmtree(stores[part], ignore_errors=True)
        batches = list(zip(*(values.split(250) for values in rows), strict=True))
        how = {"compressor": methods(truth.size)[name](seed)} if part == "train" else {"like": stores["train"]}
        ooc.extract_gradients(model, loss, batches, stores[part], loss_kind="cross_entropy", **how)
    train = ooc.GradientStore.open(stores["train"])
    curvature = ooc.fit_fisher(train)
    found = {}
    for damping in (*GRID, DOTS):
        scores = ooc.influence_scores(stores["test"], train, curvature=curvature, damping=damping)
        result = lds(scores, runs.subsets, runs.outcomes)
        found[repr(damping)] = [result.mean, result.standard_error, result.subset_error()]
    facts = {"numbers": train.k, "kept": train.mask.k, "default": curvature.damping, "lds": found,
             "left_out": None if train.mask.k == train.k or train.reduction is None
             else train.reduction.facts.get("left_out")}  # fmt: skip
    for path in stores.values():
        shutil.rmtree(path)
    return facts


def summary(folder: Path, size: Size) -> dict[str, dict[str, Any]]:
    """Return the numbers of each method: medians over seeds, at the best damping and at the default."""
    found: dict[str, dict[str, Any]] = {}
    for name in methods(size):
        held = [json.loads(place_of(folder, job).read_text()) for job in jobs(size) if job[0] == name]
        values = {damping: [one["lds"][repr(damping)][0] for one in held] for damping in (*GRID, DOTS)}
        best = max(GRID, key=lambda damping: median(values[damping]))
        usual = values[min(GRID, key=lambda damping: abs(damping - held[0]["default"]))]
        found[name] = {
            "numbers": held[0]["numbers"], "kept": [one["kept"] for one in held], "left_out": held[0]["left_out"],
            "lds": median(values[best]), "each": values[best], "damping": best, "default_lds": median(usual),
            "error_over_queries": held[0]["lds"][repr(best)][1], "error_over_models": held[0]["lds"][repr(best)][2],
        }  # fmt: skip
        if name == "exact":
            found["gradient dot products"] = {**found[name], "lds": values[DOTS][0], "each": values[DOTS],
                                              "damping": None, "default_lds": None}  # fmt: skip
    return found


def markdown(found: dict[str, dict[str, Any]]) -> str:
    lines = ["| rows | numbers | LDS, best damping | spread over seeds | best damping | LDS, default | target |",
             "|---|---|---|---|---|---|---|"]  # fmt: skip
    for name, own in found.items():
        spread = f"{min(own['each']):.4f} to {max(own['each']):.4f}" if len(own["each"]) > 1 else "one"
        damping = "" if own["damping"] is None else f"{own['damping']:.3g}"
        usual = "" if own["default_lds"] is None else f"{own['default_lds']:.4f}"
        target = f">= {TARGETS[name]}" if name in TARGETS else ""
        lines.append(f"| {name} | {own['numbers']} | {own['lds']:.4f} | {spread} | {damping} | {usual} | {target} |")
    return "\n".join(lines)


def ratios(found: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Return the widest reduced mask's LDS over others'."""
    reduced = next(own["lds"] for name, own in found.items() if " to " in name)
    others = {"uniform": list(found)[1], "gaussian": next(name for name in found if "Gauss" in name), "exact": "exact"}
    return {f"reduced_over_{key}": round(reduced / found[name]["lds"], 3) for key, name in others.items()}


def status(truth: Truth, folder: Path) -> str:
    """Return a table of what is finished and what is missing."""
    lines = [("models", *line) for line in truth.runs(folder, None).table()]
    left = [job for job in jobs(truth.size) if not place_of(folder, job).exists()]
    lines.append(("scores", "finished", len(jobs(truth.size)) - len(left), ""))
    lines += [("scores", "missing", 1, f"{name}, seed {seed}") for name, seed in left]
    return table(("what", "state", "runs", "which"), lines)


def run(truth: Truth, folder: Path, workers: int) -> None:
    runs = truth.runs(folder, workers)
    (folder / "scores").mkdir(exist_ok=True)
    for job in jobs(truth.size):
        if not place_of(folder, job).exists():
            facts = score(truth, runs, folder, job)
            write_file(place_of(folder, job), json.dumps(facts).encode())
            print(f"{job[0]}, seed {job[1]}: {max(value[0] for value in facts['lds'].values()):.4f}", file=sys.stderr)
    found = summary(folder, truth.size)
    text = markdown(found)
    result = {"bench": "quality", **asdict(truth.size), **ratios(found), "rows": found}
    result["mean_test_loss"] = round(-float(runs.outcomes.mean()), 4)
    write_file(folder / "quality.md", text.encode())
    write_file(folder / "quality.json", json.dumps(result, indent=1).encode())
    print(text)
    print(json.dumps(result))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, required=True, help="folder with mnist/t10k-*.gz")
    parser.add_argument("--folder", type=Path, default=Path("quality-output"), help="where models and scores are kept")
    parser.add_argument("--workers", type=int, default=2, help="processes that train")
    parser.add_argument("--quick", action="store_true", help="a sixteenth of the size, one seed")
    parser.add_argument("--status", action="store_true", help="say what is missing, and stop")
    parser.add_argument("--rescore", action="store_true", help="keep the models, forget the scores")
    options = parser.parse_args()
    warnings.simplefilter("ignore", ooc.OocInfluenceWarning)
    truth = Truth(options.data.resolve(), QUICK if options.quick else Size())
    options.folder.mkdir(parents=True, exist_ok=True)
    if options.rescore:
        shutil.rmtree(options.folder / "scores", ignore_errors=True)
    if options.status:
        print(status(truth, options.folder))
        return
    try:
        run(truth, options.folder, options.workers)
    except KeyboardInterrupt:
        print(status(truth, options.folder), file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
