"""Fidelity for a byte: the linear datamodeling score against the bytes a stored row takes, one plot and one table.

Truth, rows and explained model are those of tools/bench/quality.py on MNIST (100 models retrained on random halves).
Ways: dropout (uniform, importance), importance dropout of 32768 entries in its eigenbasis (also with rows weighted by
"ggn", in basis and curvature), Gaussian projection, LoGra, GraSS; rows as float16, int8, int4. LDS at the best of a
grid of relative dampings, and at the default; medians over seeds of masks.

Run: python tools/experiments/fidelity.py --data DIR [--folder fidelity-output] [--seeds 3] [--quick].
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from common import Result, Runs, arguments, report
from tasks import Mnist, batches, make_task

import ooc_influence as ooc
from ooc_influence.evaluate import lds

GRID = [10 ** (power / 2) for power in range(-6, 5)]
COLUMNS = ("way", "numbers", "stored as", "bytes a row", "best LDS", "best damping", "default LDS")
DTYPES = ("float16", "int8", "int4")
WIDE, RANKS, COUNTS = 32768, (128, 256, 512, 1024, 2048), (256, 512, 1024, 2048)
FAMILIES = ("uniform", "importance", "reduced", "reduced, ggn", "Gaussian", "LoGra", "GraSS")


def compressor(way: str, k: int, seed: int) -> Any:
    if way == "GraSS":
        return ooc.Grass(k, kept=16 * k, seed=seed)
    if way == "LoGra":
        side = round((k / 3) ** 0.5)  # of three layers; the last is smaller
        return ooc.LoGra(side, side, seed)
    return ooc.Gaussian(k, seed) if way == "Gaussian" else ooc.Dropout(k=k, sampling=way, seed=seed)


class Scored:
    """A task's model and the outcomes of its retrained ones."""

    def __init__(self, task: Mnist, folder: Path, models: int, workers: int) -> None:
        truth = task.truth(models)
        self.task, self.model = task, truth.model(folder)
        self.runs = truth.runs(folder, workers)

    def extract(self, rows: str, place: str, **how: Any) -> Any:
        part = self.task.train if rows == "train" else self.task.test
        kind = {"loss_kind": "cross_entropy"}
        return ooc.extract_gradients(self.model, self.task.loss, batches(part, 250), place, **kind, **how)

    def line(self, way: str, train: Any, test: Any, weights: str | None = None) -> Result:
        """Return a line of the table."""
        curvature = ooc.fit_fisher(train, weights=weights)
        scores = ooc.influence_scores(test, train, curvature=curvature, damping=[*GRID, curvature.damping]).compute()
        found = [lds(one, self.runs.subsets, self.runs.outcomes).mean for one in scores]
        best = int(np.argmax(found[:-1]))
        size = train.layout.encoding.row_bytes
        cells = [way, train.k, train.layout.encoding.name, size, found[best], round(GRID[best], 4), found[-1]]
        return dict(zip(COLUMNS, cells, strict=True))


def family(way: str, seed: int, folder: Path, data: Path, quick: bool, workers: int) -> Result:
    task = make_task("MNIST", data, quick)
    assert isinstance(task, Mnist)
    found = []
    with tempfile.TemporaryDirectory() as place, warnings.catch_warnings():
        warnings.simplefilter("ignore", ooc.OocInfluenceWarning)
        scored = Scored(task, folder, 8 if quick else 100, workers)
        if way.startswith("reduced"):
            found = list(reduced(scored, way, seed, place, quick))
        else:
            for k in (64,) if quick else COUNTS:
                for dtype in DTYPES:
                    name = f"{place}/{k}-{dtype}"
                    train = scored.extract("train", name, compressor=compressor(way, k, seed), dtype=dtype)
                    found.append(scored.line(way, train, scored.extract("test", f"{name}-q", like=train)))
    return {"lines": found}


def reduced(scored: Scored, way: str, seed: int, place: str, quick: bool) -> Iterator[Result]:
    """Yield the lines of one mask: the eigenbasis is made once, its smaller ranks by rotation."""
    weights = "ggn" if "ggn" in way else None
    mask = ooc.Dropout(k=1024 if quick else WIDE, sampling="importance", seed=seed)
    wide = scored.extract("train", f"{place}/wide", compressor=mask)
    wide_queries = scored.extract("test", f"{place}/wide-q", like=wide)
    ranks = (16, 64) if quick else RANKS
    most = ooc.reduce_store(wide, f"{place}/most", max(ranks), weights=weights, dtype="float32")
    queries = ooc.reduce_store(wide_queries, f"{place}/most-q", like=most, dtype="float32")
    for r in ranks:
        for dtype in DTYPES:
            name = f"{place}/{r}-{dtype}"
            train = ooc.reduce_store(most, name, r, rotate=True, weights=weights, dtype=dtype)
            test = ooc.reduce_store(queries, f"{name}-q", like=train)
            yield scored.line(way, train, test, weights)


def medians(results: list[Result]) -> Iterator[Result]:
    groups: dict[tuple[Any, ...], list[Result]] = {}
    for result in results:
        for place, line in enumerate(result["lines"]):
            groups.setdefault((line["way"], place), []).append(line)
    for own in groups.values():
        middle = {name: float(np.median([one[name] for one in own])) for name in ("best LDS", "default LDS")}
        yield {**own[0], **middle, "numbers": int(np.median([one["numbers"] for one in own]))}


def main() -> None:
    parser = arguments(__doc__, "fidelity-output")
    parser.add_argument("--data", type=Path, required=True, help="a folder with mnist/")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2, help="processes that train the truth's models")
    options = parser.parse_args()
    runs = Runs(options.folder)
    for seed in range(1 if options.quick else options.seeds):
        for way in FAMILIES:
            call = partial(family, way, seed, options.folder, options.data, options.quick, options.workers)
            runs.add(f"{way} / {seed}", {"quick": options.quick}, call)
    if options.status:
        print("\n".join(runs.missing()) or "nothing is missing")
        return
    print(f"{len(runs.missing())} runs to do", file=sys.stderr)
    found = list(medians(runs.finish()))

    def plot(axes: Any) -> None:
        for colour, way in enumerate(FAMILIES):
            for marker, dtype in zip("osd", DTYPES, strict=True):
                own = [one for one in found if one["way"] == way and one["stored as"] == dtype]
                places, values = [one["bytes a row"] for one in own], [one["best LDS"] for one in own]
                label = f"{way}, {dtype}" if way == "reduced" else (way if dtype == "float16" else None)
                axes.semilogx(places, values, f"-{marker}", color=f"C{colour}", label=label, markersize=4)
        axes.set(xlabel="bytes a row", ylabel="LDS, best damping")
        axes.legend(fontsize=6)

    report("fidelity", options.folder, found, COLUMNS, plot)


if __name__ == "__main__":
    main()
