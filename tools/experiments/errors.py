"""The error of compression, measured and bounded: F, inverse-Hessian-vector products, scores, ranks.

Full gradients of a trained model's rows, compressed by dropout (uniform; importance; importance, then reduced to an
eighth of the mask) and by a Gaussian projection to as many numbers, over k and λ; relative errors are means over seeds
and queries, beside the bounds of docs/theory.md on their root mean squares. λ is relative to tr(F)/1024, the same for
every k. Rank: Spearman's correlation with the exact scores.

Data: the digits' MLP (p = 17,226; 1000 rows, 50 queries), the same gradients turned by a random Hadamard matrix, which
spreads them evenly over coordinates and leaves everything but the coordinates as it is, and with --data DIR the MNIST
MLP of tools/bench/quality.py (p = 109,386; 1000 rows).

Run: python tools/experiments/errors.py [--data DIR] [--folder errors-output] [--seeds 3] [--quick].
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from common import Result, Runs, arguments, report
from scipy.linalg import hadamard
from tasks import Task, batches, make_task
from torch import nn

import ooc_influence as ooc
from ooc_influence.compress import variance_factors
from ooc_influence.evaluate import CompressionErrors, ExactInfluence, reduction_bounds
from ooc_influence.evaluate.retrain import seeded
from ooc_influence.store import GaussianReduction, LayerShape, Mask, PilotMoments

LAMBDAS, UNIT = (0.01, 0.1, 1.0, 10.0), 1024
COLUMNS = ("data", "method", "k", "damping", "F", "F bound", "iHVP", "iHVP bound", "scores", "scores bound", "rank")


class Wide(Task):
    """Digits with the MLP of docs/evaluation.md's other tables."""

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))


class Case(NamedTuple):
    """Full gradients, and what masks are drawn from."""

    exact: ExactInfluence
    layers: tuple[LayerShape, ...]
    pilot: tuple[PilotMoments, ...]


@cache
def load(name: str, data: Path | None, quick: bool) -> Case:
    if name == "digits, turned":
        return turned(load("digits", data, quick))
    task = make_task("MNIST", data, quick) if name == "MNIST" else Wide("digits", 1000, 200, 2 if quick else 40)
    n, q = (80, 6) if quick else (1000, 50)
    with seeded(7):
        model = task.fit(np.arange(task.train_rows))
    parts = {"train": tuple(p[:n] for p in task.train), "test": tuple(p[:q] for p in task.test)}
    with tempfile.TemporaryDirectory() as place, warnings.catch_warnings():
        warnings.simplefilter("ignore", ooc.OocInfluenceWarning)
        whole = ooc.extract_gradients(
            model, task.loss, batches(parts["train"]), f"{place}/train", compressor=ooc.Identity(), dtype="float32"
        )
        test = ooc.extract_gradients(model, task.loss, batches(parts["test"]), f"{place}/test", like=whole)
        mask = ooc.Dropout(k=64, sampling="importance")
        drawn = ooc.extract_gradients(model, task.loss, batches(parts["train"]), f"{place}/pilot", compressor=mask)
        layers = tuple(module.layer for module in whole.mask.modules)
        return Case(ExactInfluence(whole.rows(), test.rows()), layers, drawn.mask.pilot)


def turned(case: Case) -> Case:
    """Return the same gradients in coordinates among which they are spread."""
    side = 1 << int(np.ceil(np.log2(case.exact.p) / 2))  # H_side ⊗ H_side turns side² coordinates
    signs = np.sign(np.random.default_rng(0).normal(size=case.exact.p)).astype(np.float32)
    H = (hadamard(side) / side**0.5).astype(np.float32)

    def turn(rows: np.ndarray) -> np.ndarray:
        padded = np.zeros((len(rows), side * side), np.float32)
        padded[:, : case.exact.p] = rows * signs
        return np.stack([(H @ row.reshape(side, side) @ H).ravel() for row in padded])

    layers = (LayerShape("all", "linear", (side, side), False),)
    return Case(ExactInfluence(turn(case.exact.gradients), turn(case.exact.queries)), layers, ())


def keep(rows: np.ndarray, mask: Mask) -> np.ndarray:
    """Return masked rows, (m, k) float64."""
    places, first = [], 0
    for module in mask.modules:
        places.append(first + module.rows.astype(np.int64) * module.layer.shape[1] + module.cols)
        first += module.layer.entries
    weight = np.concatenate([module.weight for module in mask.modules]).astype(np.float64)
    return np.asarray(rows[:, np.concatenate(places)] * weight)


def compress(case: Case, method: str, k: int, seed: int) -> tuple[Callable[[Any], Any], Callable[..., Any]]:
    """Return the map of rows, and the bounds at a λ."""
    exact = case.exact
    if method == "Gaussian":
        held = GaussianReduction(exact.p, k, seed)
        whole = np.concatenate([block for _, block in held.blocks(1024)])
        return lambda rows: (np.asarray(rows, np.float32) @ whole).astype(np.float64), partial(
            exact.projection_bounds, k
        )
    wide = 8 * k if method == "reduced" else k
    dropout = ooc.Dropout(k=min(wide, exact.p), sampling="uniform" if method == "uniform" else "importance", seed=seed)
    mask = dropout.draw(case.layers, case.pilot)
    factors = variance_factors(dropout, case.layers, case.pilot)
    if method != "reduced":
        return lambda rows: keep(rows, mask), lambda value: exact.dropout_bounds(factors, value)
    rows, queries = keep(exact.gradients, mask), keep(exact.queries, mask)
    values, vectors = np.linalg.eigh(rows @ rows.T)
    held = int((values > 1e-12 * values.max()).sum())  # directions in which there is nothing have no basis
    top = np.argsort(-values)[: min(k, held)]
    basis = rows.T @ (vectors[:, top] / np.sqrt(values[top]))

    def bounds(value: float) -> CompressionErrors:
        return reduction_bounds(rows, queries, exact.dropout_bounds(factors, value), exact, k, value)

    return lambda given: keep(given, mask) @ basis, bounds


def measure(name: str, method: str, k: int, seed: int, data: Path | None, quick: bool) -> Result:
    case = load(name, data, quick)
    torch.manual_seed(0)
    unit, found = case.exact.trace / UNIT, {}
    call, bounds = compress(case, method, k, seed)
    kept = {id(part): call(part) for part in (case.exact.gradients, case.exact.queries)}
    for damping in LAMBDAS:
        errors = case.exact.measure(lambda rows: kept[id(rows)] if id(rows) in kept else call(rows), damping * unit)
        limit = bounds(damping * unit)
        values = [errors.fisher, limit.fisher, errors.ihvp, limit.ihvp, errors.scores, limit.scores, errors.rank]
        found[str(damping)] = [float(np.mean(value)) for value in values]
    rank = case.exact.trace**2 / float(np.square(case.exact.kernel).sum())
    shape = {"concentration": case.exact.concentration(), "rank": rank}
    return {"errors": found, **shape}


def lines(results: list[Result]) -> list[Result]:
    groups: dict[tuple[str, str, str], list[Result]] = {}
    for result in results:
        groups.setdefault(tuple(result["run"].split(" / ")[:3]), []).append(result)
    return [
        dict(zip(COLUMNS, [*key, damping, *np.mean([one["errors"][damping] for one in own], 0).tolist()], strict=True))
        for key, own in groups.items()
        for damping in own[0]["errors"]
    ]


def main() -> None:
    parser = arguments(__doc__, "errors-output")
    parser.add_argument("--data", type=Path, help="a folder with mnist/; default: the digits only")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    runs = Runs(options.folder)
    for name in ("digits", "digits, turned", *(("MNIST",) if options.data else ())):
        for method in ("uniform", "importance", "reduced", "Gaussian"):
            if name == "digits, turned" and method in ("importance", "reduced"):
                continue  # no layers, no pilot: coordinates are alike
            for k in (64, 256) if options.quick else (256, 1024, 4096):
                for seed in range(1 if options.quick else options.seeds):
                    call = partial(measure, name, method, k, seed, options.data, options.quick)
                    runs.add(f"{name} / {method} / {k} / {seed}", {"quick": options.quick}, call)
    if options.status:
        print("\n".join(runs.missing()) or "nothing is missing")
        return
    print(f"{len(runs.missing())} runs to do", file=sys.stderr)
    results = runs.finish()
    found = lines(results)
    for name in dict.fromkeys(result["run"].split(" / ")[0] for result in results):
        one = next(result for result in results if result["run"].startswith(f"{name} / "))
        print(f"{name}: concentration {one['concentration']:.1f}, effective rank {one['rank']:.1f}", file=sys.stderr)

    def plot(axes: Any) -> None:
        for name, style in (("digits", "-"), ("digits, turned", "--"), ("MNIST", ":")):
            for method, colour in (("uniform", "C0"), ("importance", "C1"), ("reduced", "C2"), ("Gaussian", "C3")):
                own = [one for one in found if (one["data"], one["method"], one["damping"]) == (name, method, "1.0")]
                if own:
                    places = [int(one["k"]) for one in own]
                    axes.loglog(places, [one["scores"] for one in own], style, color=colour, label=f"{name}: {method}")
                    axes.loglog(places, [one["scores bound"] for one in own], "x", color=colour)
        axes.set(xlabel="k", ylabel="relative error of scores (x: bound), damping 1", ylim=(3e-3, None))
        axes.set_xticks(sorted({int(one["k"]) for one in found}), minor=False)
        axes.xaxis.set_major_formatter("{x:.0f}")
        axes.xaxis.set_minor_formatter("")
        axes.legend(fontsize=6)

    report("errors", options.folder, found, COLUMNS, plot)


if __name__ == "__main__":
    main()
