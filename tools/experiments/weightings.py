"""Which curvature: rows as they are, weighted, with labels sampled from the model, token rows with random signs.

Truth: models trained on random halves of a task's train rows (tasks.py), measured by minus their loss on its test
rows. Explained: models trained on all rows, and models trained on random halves of their own, each with curvature
from, and credit to, its own rows only; several are summed as they are, and by their queries' margins. Where "combined"
says margins, halves have curvature from, and give credit to, all rows (ooc_influence.influence.checkpoints). Gradients:
importance dropout, then the eigenbasis of the curvature's own rows (at most 2500 of them for MNIST, else 1500). LDS of
single models (mean over models) and of scores summed over all of them, for a grid of relative dampings, and for
dampings from the spectrum alone: λ with d(λ) = share · min(m, r).

    none      F = (1/m) Σ g gᵀ                        ggn       w = 1/expm1(ℓ)      trak      w = 1/(1 − p)²
    sampled   g of a label drawn from the model       signs     Σ_t s_t/√T ∇ℓ_t     signs ggn  Σ_t s_t √(w_t/T) ∇ℓ_t

Run: python tools/experiments/weightings.py --data DIR [--folder weightings-output] [--only digits] [--quick].
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from common import Result, Runs, arguments, report
from scipy.optimize import brentq
from tasks import Mnist, Rows, Task, batches, make_task, sampled, signed

import ooc_influence as ooc
from ooc_influence.evaluate import lds, random_subsets, retrain
from ooc_influence.evaluate.retrain import seeded
from ooc_influence.linalg import row_errors

GRID = [10 ** (power / 2) for power in range(-8, 5)]  # relative: 0.0001 to 100
SHARES = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7)  # of min(m, r): d(λ)
CHOICES = [*(f"{value:.3g}" for value in GRID), *(f"d = {share}" for share in SHARES)]
COLUMNS = (
    "task", "trained on", "models", "combined", "curvature", "best LDS", "best damping", "default 0.1", *CHOICES[13:],
)  # fmt: skip
BASIS_ROWS = {"MNIST": 2500}  # that an eigenbasis is made from, at most; else 1500
WEIGHTED = ("none", "ggn", "trak")
LABELS, TOKENS = (*WEIGHTED, "sampled"), ("none", "sampled", "signs", "signs ggn")


class Sizes(NamedTuple):
    """How much is done for a task."""

    truth: int  # models of the ground truth
    models: int  # explained, of each kind
    kept: int  # entries before the eigenbasis
    stored: int


def sizes(name: str, quick: bool) -> Sizes:
    if quick:
        return Sizes(6, 2, 512, 32)
    known = {"MNIST": Sizes(100, 10, 32768, 1024), "digits": Sizes(64, 10, 6570, 512)}
    return known.get(name, Sizes(64, 10, 16384, 512))


def truth(task: Task, folder: Path, models: int, workers: int) -> tuple[np.ndarray, np.ndarray]:
    """Return subsets (m, n) and outcomes (m, q)."""
    subsets = random_subsets(task.train_rows, models)
    where = folder / f"truth-{task.name.replace(' ', '-')}"
    if isinstance(task, Mnist):  # the models that quality.py trains
        return subsets, task.truth(models).runs(where, workers).outcomes
    held = retrain(task.fit, task.measure, subsets, where, settings=task.settings, workers=workers, progress=True)
    return subsets, held.outcomes


def stores(task: Task, model: Any, train: Rows, size: Sizes, folder: Path, way: str, seed: int) -> tuple[Any, ...]:
    """Return train rows, query rows and curvature in the eigenbasis of the curvature's own rows."""
    kind = {} if task.tokens else {"loss_kind": "cross_entropy"}
    wide, place = folder / "wide", folder / way.replace(" ", "-")
    if not wide.exists():
        p = sum(values.numel() for values in model.parameters())
        mask = ooc.Dropout(k=min(size.kept, p), sampling="importance", seed=seed)
        ooc.extract_gradients(model, task.loss, batches(train), wide, compressor=mask, **kind)
        ooc.extract_gradients(model, task.loss, batches(task.test), folder / "queries", like=wide, **kind)
    weights = way if way in ("ggn", "trak") else None
    own = wide
    if way not in ("none", "ggn", "trak"):
        other = sampled(task, model, train) if way == "sampled" else signed(task, model, train, ggn="ggn" in way)
        own = ooc.extract_gradients(model, task.loss, batches(other), folder / f"own {way}", like=wide, **kind).path
    basis_rows = min(BASIS_ROWS.get(task.name, 1500), len(train[1]))
    basis = ooc.reduce_store(own, place, min(size.stored, basis_rows), rows=basis_rows, weights=weights)
    curvature = ooc.fit_fisher(basis, weights=weights)
    rows = basis if own == wide else ooc.reduce_store(wide, folder / f"{place.name}-rows", like=basis)
    return rows, ooc.reduce_store(folder / "queries", folder / f"{place.name}-queries", like=basis), curvature


def dampings(curvature: Any) -> list[float]:
    """Return λ of every choice."""
    unit, spectrum = curvature.trace / curvature.d, np.maximum(curvature.eigenvalues, 0)
    found = [value * unit for value in GRID]
    most = min(curvature.rows, curvature.d)
    for share in SHARES:
        gap = lambda power, share=share: (spectrum / (spectrum + 10**power * unit)).sum() - share * most  # noqa: E731
        found.append(10 ** brentq(gap, -12, 12) * unit)
    return found


def trained_on(kind: str) -> str:
    return "all" if kind == "all" else "half"


def trained(task: Task, kind: str, number: int) -> tuple[Any, np.ndarray]:
    """Return a model and the rows it was trained on."""
    rows = np.arange(task.train_rows)
    if kind != "all":
        rows = np.flatnonzero(random_subsets(task.train_rows, number + 1, seed=1)[number])
    with seeded(2**20 + number + 1000 * (kind != "all")):
        return task.fit(rows), rows


def mistakes(task: Task, kind: str, number: int, folder: Path) -> Result:
    """Write 1 − p of all train rows (n,) and of the test rows (q,)."""
    model, _ = trained(task, kind, number)
    with torch.no_grad():
        parts = [torch.cat([task.loss(model, batch) for batch in batches(part)]) for part in (task.train, task.test)]
    found = [row_errors(part.double().numpy()) for part in parts]
    np.savez(place_of(folder, task, f"{kind}-errors", number), rows=found[0], queries=found[1])
    return {}


def errors_of(task: Task, kind: str, folder: Path, models: int) -> list[Any]:
    return [np.load(place_of(folder, task, f"{kind}-errors", number)) for number in range(models)]


def explain(task: Task, kind: str, number: int, size: Sizes, folder: Path) -> Result:
    """Write the summed scores of one model, (L, m, q)."""
    subsets = random_subsets(task.train_rows, size.truth)
    model, rows = trained(task, kind, number)
    ways, factor = (TOKENS if task.tokens else LABELS), np.float32(1)
    if kind == "margins":
        errors = errors_of(task, "half", folder, size.models)
        ways, rows = WEIGHTED, np.arange(task.train_rows)
        factor = (np.mean([own["rows"] for own in errors], axis=0) / errors[number]["rows"]).astype(np.float32)
    train = tuple(part[rows] for part in task.train)
    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings():
        warnings.simplefilter("ignore", ooc.OocInfluenceWarning)
        found, values = {}, {}
        for each in ways:
            held, queries, curvature = stores(task, model, train, size, Path(name), each, number)
            lambdas = dampings(curvature)
            scores = ooc.influence_scores(
                queries, held, curvature=curvature, damping=lambdas, damping_mode="absolute"
            ).compute()
            credit = (subsets[:, rows] * factor).astype(np.float32)
            found[each] = np.einsum("lqn,mn->lmq", scores, credit, optimize=True)
            values[each] = [value * curvature.d / curvature.trace for value in lambdas]
    np.savez(place_of(folder, task, kind, number), **found)
    return {"relative": values}


def place_of(folder: Path, task: Task, kind: str, number: int) -> Path:
    return folder / f"sums-{task.name.replace(' ', '-')}-{kind}-{number}.npz"


def correlation(sums: np.ndarray, outcomes: np.ndarray) -> float:
    """Return the LDS of summed scores (m, q)."""
    m = len(sums)
    return lds(sums.T, np.eye(m, dtype=bool), outcomes).mean


def kinds(task: Task) -> tuple[str, ...]:
    return ("all", "half") if task.tokens else ("all", "half", "margins")


def lines(task: Task, size: Sizes, folder: Path, outcomes: np.ndarray) -> Iterator[Result]:
    for kind in kinds(task):
        held = [dict(np.load(place_of(folder, task, kind, number))) for number in range(size.models)]
        for way in held[0]:
            for combined, values in combinations(task, kind, [one[way] for one in held], folder, outcomes):
                best, models = int(values[: len(GRID)].argmax()), size.models if combined else 1
                cells = [task.name, trained_on(kind), models, combined, way]
                cells += [float(values[best]), CHOICES[best], float(values[6])]
                yield dict(zip(COLUMNS, [*cells, *map(float, values[len(GRID) :])], strict=True)) | {
                    "grid": dict(zip(CHOICES, map(float, values), strict=True))
                }


def combinations(
    task: Task, kind: str, held: list[np.ndarray], folder: Path, outcomes: np.ndarray
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield LDS by choice of λ, of single models and of sums over all of them."""
    if kind != "margins":
        yield "", np.mean([[correlation(sums, outcomes) for sums in one] for one in held], axis=0)
        yield "mean", np.array([correlation(sums, outcomes) for sums in sum(held)])
    if not task.tokens:
        errors = errors_of(task, trained_on(kind), folder, len(held))
        whole = sum(one / own["queries"] for one, own in zip(held, errors, strict=True))
        name = "margins" if kind == "margins" else "query-margins"
        yield name, np.array([correlation(sums, outcomes) for sums in whole])


def rules(found: list[Result]) -> str:
    """Return a table of how far fixed choices of λ fall below the best one, by curvature: the mean, and the worst."""
    names = [*CHOICES[5:9], *CHOICES[len(GRID) + 2 :]]
    lines = ["| curvature | " + " | ".join(names) + " |", "|" + "---|" * (len(names) + 1)]
    for way in dict.fromkeys(one["curvature"] for one in found):
        own = [one["grid"] for one in found if one["curvature"] == way]
        gaps = [[1 - grid[name] / max(grid.values()) for grid in own] for name in names]
        lines.append(f"| {way} | " + " | ".join(f"{np.mean(gap):.0%}, {max(gap):.0%}" for gap in gaps) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = arguments(__doc__, "weightings-output")
    parser.add_argument("--data", type=Path, help="a folder with mnist/, agnews/, shakespeare/; default: the digits")
    parser.add_argument("--only", default="", help="some of digits, MNIST, AG News, Shakespeare")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    names = [name for name in options.only.split(",") if name] or (
        ["digits"] if not options.data else ["digits", "MNIST", "AG News", "Shakespeare"]
    )
    first, runs, found, kept = Runs(options.folder), Runs(options.folder), [], []
    for name in names:
        task, size = make_task(name, options.data, options.quick), sizes(name, options.quick)
        kept.append((task, size))
        for kind in kinds(task):
            for number in range(size.models):
                settings = {**task.settings, **size._asdict(), "kind": kind}
                if kind != "margins":  # what a model gives does not depend on how many there are
                    del settings["models"]
                call = partial(explain, task, kind, number, size, options.folder)
                runs.add(f"{name} / {kind} / {number}", settings, call)
                if kind != "margins" and not task.tokens:
                    call = partial(mistakes, task, kind, number, options.folder)
                    first.add(f"{name} / {kind}, errors / {number}", settings, call)
    missing = [*first.missing(), *runs.missing()]
    if options.status:
        print("\n".join(missing) or "nothing is missing")
        return
    print(f"{len(missing)} runs to do", file=sys.stderr)
    truths = [truth(task, options.folder, size.truth, options.workers)[1] for task, size in kept]
    for each in (first, runs):
        each.finish(1 if options.quick else options.workers)
    for (task, size), outcomes in zip(kept, truths, strict=True):
        found += lines(task, size, options.folder, outcomes)

    def plot(axes: Any) -> None:
        for each in found:
            style = "-" if each["models"] == 1 else "--"
            label = f"{each['task']}, {each['trained on']}, {each['models']} {each['combined']}: {each['curvature']}"
            axes.semilogx(GRID, list(each["grid"].values())[: len(GRID)], style, label=label)
        axes.set(xlabel="relative damping", ylabel="LDS")
        if len(found) <= 16:
            axes.legend(fontsize=5)

    (options.folder / "rules.md").write_text(rules(found) + "\n")
    print(rules(found), file=sys.stderr)
    report("weightings", options.folder, found, COLUMNS, plot)


if __name__ == "__main__":
    main()
