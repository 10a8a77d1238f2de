"""How much of exact EK-FAC's first places exact re-ranking of a few candidates finds, on the fine-tuned model.

For rows of each size, the first ten of each of 128 queries among 1024 rows: as stored rows rank them, and after 64
candidates of each side were ranked again; against all rows ranked again (EK-FAC with the same factors), and against
dense.py's EK-FAC, whose factors are those of all rows (of ``finetuned.py --only "whole gradients"``, where it was run).

Run: python tools/experiments/reranked.py --data DIR [--folder finetuned-output] [--quick].
"""

from __future__ import annotations

import tempfile
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from common import Result, Runs, arguments, report
from finetuned import EXACT, Sheet, Study
from finetuning import FineTuning, make_finetuning

import ooc_influence as ooc

COLUMNS = ("rows", "bytes a row", "pilot", "stored", "ranked again", "stored, dense", "ranked again, dense")
TOP, CANDIDATES = 10, 64


def overlap(one: np.ndarray, other: np.ndarray) -> float:
    """Return the mean share of numbers that the lists (q, top) have in common."""
    return float(np.mean([len(np.intersect1d(a, b)) / len(b) for a, b in zip(one, other, strict=True)]))


def dense_lists(folder: Path, top: int) -> np.ndarray | None:
    """Return the first rows of each query by dense EK-FAC at its default damping, (q, top)."""
    for path in sorted((folder / "scores" / "whole-gradients").glob("*.npz")):
        sheet = Sheet.load(path)
        if sheet.method == EXACT:
            assert sheet.default is not None
            return np.argsort(-sheet.scores["none"][sheet.default], axis=1, kind="stable")[:, :top]
    return None


def measure(task: FineTuning, folder: Path, k: int, dtype: str, samples: int, candidates: int) -> Result:
    study = Study.of(task)
    basis = ooc.KroneckerBasis(samples=samples)
    with tempfile.TemporaryDirectory(dir=task.folder) as place, warnings.catch_warnings():
        warnings.simplefilter("ignore", ooc.OocInfluenceWarning)
        mask = ooc.Dropout(k=k, sampling="grid", basis=basis)
        train = study.extract(task.train, f"{place}/train", compressor=mask, dtype=dtype, keep_factors=True)
        query = study.extract(task.test, f"{place}/query", like=train, dtype="float32")
        train = ooc.GradientStore.open(train.path)
        how: dict[str, Any] = {"normalize": "none", "top": min(TOP, task.train_rows)}
        first = ooc.top_influential(query, train, curvature="kronecker", **how).proponents.rows
        data = (task.split(task.test), task.split(task.train))
        again, every = (
            ooc.rerank(query, train, study.model, task.loss, data, candidates=count, progress=True, **how)
            for count in (candidates, task.train_rows)
        )
    found = {"rows": f"{k} {dtype}", "bytes a row": train.layout.encoding.row_bytes, "pilot": samples,
             "stored": overlap(first, every.proponents.rows),
             "ranked again": overlap(again.proponents.rows, every.proponents.rows)}  # fmt: skip
    exact = dense_lists(folder, how["top"])
    if exact is not None:
        found |= {"stored, dense": overlap(first, exact), "ranked again, dense": overlap(again.proponents.rows, exact)}
    return found


def plot(results: list[Result], axes: Any) -> None:
    """Draw overlaps with EK-FAC of the same factors over bytes a row, before and after ranking again."""
    ordered = sorted(results, key=lambda line: line["bytes a row"])
    for name in ("stored", "ranked again"):
        axes.semilogx([line["bytes a row"] for line in ordered], [line[name] for line in ordered], "o", label=name)
    axes.set(xlabel="bytes a row", ylabel=f"of EK-FAC's first {TOP}", ylim=(0, 1.02))
    axes.legend()


def main() -> None:
    parser = arguments(__doc__, "finetuned-output")
    parser.add_argument("--data", type=Path, required=True, help="a folder with agnews/ and shakespeare/")
    options = parser.parse_args()
    task = make_finetuning(options.data, options.folder, options.quick)
    runs = Runs(options.folder / "reranked")
    sizes = ((64, "sign"),) if options.quick else ((65536, "sign"), (16384, "int8"), (65536, "int8"), (4096, "int8"))
    for k, dtype in sizes:
        for samples in (16,) if options.quick else (256, 1024):
            call = partial(measure, task, options.folder, k, dtype, samples, 16 if options.quick else CANDIDATES)
            runs.add(f"{k} {dtype}, {samples}", task.settings, call)
    if options.status:
        print("\n".join(runs.missing()) or "nothing is missing")
        return
    results = runs.finish()
    report("reranked", options.folder / "reranked", results, COLUMNS, partial(plot, results))


if __name__ == "__main__":
    main()
