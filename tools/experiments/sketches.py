"""How many candidates a sketch takes for the lists of a language model, by its numbers a row and the damping.

A causal transformer of two layers is trained on Shakespeare's characters, in passages of 64; its gradients are stored
in a Kronecker basis (16,384 entries), as float16 and as signs. The queries are other passages. For each sketch and
damping, in the unit of lists ("train"), the ranks in the sketch of the best 10 and 100 rows of 32 queries say how many
candidates hold 90, 99 and 100 % of them.

Run: python tools/experiments/sketches.py --data FOLDER [--folder DIR] [--status] [--quick]. The last line is JSON.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import Result, Runs, arguments, report
from tasks import Task, batches

import ooc_influence as ooc
from ooc_influence.influence.request import ScoreRequest
from ooc_influence.influence.sketch import SketchSearch
from ooc_influence.options import TopOptions, complete

SHARES = (0.9, 0.99, 1.0)
QUERIES = 32


def make_stores(folder: Path, data: Path, quick: bool) -> tuple[ooc.GradientStore, ooc.GradientStore]:
    """Train the model, extract, and return the queries and the train rows as numbers; signs are beside these."""
    rows, epochs, k = (300, 1, 512) if quick else (16_000, 3, 16_384)
    task = Task("Shakespeare", rows, QUERIES, epochs, data, tokens=True)
    train, query = folder / "train.zarr", folder / "query.zarr"
    if not query.exists():
        torch.manual_seed(0)
        model = task.fit(np.arange(rows))
        how: dict[str, Any] = {"compressor": ooc.Dropout(k=k, basis="kronecker"),
                               "loss_kind": "token_cross_entropy_mean"}  # fmt: skip
        ooc.extract_gradients(model, task.loss, batches(task.train), train, progress=True, **how)
        ooc.extract_gradients(model, task.loss, batches(task.test), query, like=train, loss_kind=how["loss_kind"])
    if not (folder / "signs.zarr").exists():
        ooc.rewrite_store(train, folder / "signs.zarr")
    return ooc.GradientStore.open(query), ooc.GradientStore.open(train)


def measure(folder: Path, data: Path, quick: bool, form: str, r: int, damping: float | None) -> Result:
    """Return the candidates that a sketch of ``r`` numbers takes."""
    query, train = make_stores(folder, data, quick)
    if form == "sign":
        train = ooc.GradientStore.open(folder / "signs.zarr")
    sketch = ooc.sketch_store(train, folder / f"sketch-{form}-{r}.zarr", r, query=query)
    scoring = ScoreRequest.open(query, train, {"damping": damping}, lists=True)
    recall = SketchSearch.of(scoring, sketch, complete(TopOptions, {})).recall(100)
    found: Result = {"rows": form, "numbers": r, "bytes": sketch.layout.encoding.row_bytes + 4, "n": train.n}
    found |= {"wide bytes": train.layout.encoding.row_bytes + 4, "damping": scoring.settings["damping"]}
    for top in (10, 100):
        ranks = np.sort(recall.ranks[..., :top].ravel())
        for share in SHARES:
            found[f"{top} at {share:.0%}"] = int(ranks[int(np.ceil(share * len(ranks))) - 1]) + 1
        found[f"{top} found by as many"] = recall.of(top, top)
    return found


def jobs(options: Any) -> Iterator[tuple[str, dict[str, Any], Any]]:
    for form in ("float16", "sign"):
        for r in (32, 64) if options.quick else (64, 128, 256, 512):
            for damping in (None, 0.1, 1.0):
                settings = {"rows": form, "numbers": r, "damping": damping, "quick": options.quick}
                call = partial(measure, options.folder, options.data, options.quick, form, r, damping)
                yield f"{form}, {r} numbers, damping {damping or 'of lists'}", settings, call


def main() -> None:
    parser = arguments(__doc__, "sketches")
    parser.add_argument("--data", type=Path, required=True, help="the folder that has shakespeare/input.txt")
    options = parser.parse_args()
    runs = Runs(options.folder)
    for job in jobs(options):
        runs.add(*job)
    missing = runs.missing()
    if options.status:
        print("\n".join(missing))
        return
    print(f"{len(missing)} runs to do", file=sys.stderr)
    results = sorted(runs.finish(), key=lambda run: (run["rows"], run["damping"], run["numbers"]))

    def plot(axes: Any) -> None:
        for form in ("float16", "sign"):
            for damping in sorted({run["damping"] for run in results}):
                some = [run for run in results if run["rows"] == form and run["damping"] == damping]
                style = "-" if form == "float16" else ":"
                axes.plot([run["numbers"] for run in some], [run["10 at 99%"] / run["n"] for run in some], style,
                          marker="o", label=f"{form}, damping {damping:g}")  # fmt: skip
        axes.set(xlabel="numbers a row", ylabel="candidates for 99 % of the best 10, share of rows", xscale="log")
        axes.set_yscale("log")
        axes.legend()

    columns = ["rows", "numbers", "bytes", "wide bytes", "damping", *(f"{top} at {share:.0%}" for top in (10, 100)
               for share in SHARES)]  # fmt: skip
    report("sketches", options.folder, results, columns, plot)


if __name__ == "__main__":
    main()
