"""Cost and fidelity of each representation and codec: bytes a row, write and read rate, and the ranking of scores.

Rows are masked gradients of a real model: the demo's classifier of handwritten digits (scikit-learn's), extracted once
in float32. Fidelity is Spearman's rank correlation of all influence scores with the float32 store's. Rates are taken on
the same rows repeated to --mib MiB of float32, as ratios to plain float32 in the same run: above 1 is faster.

Run: python tools/bench/representations.py [--mib 256] [--k 1024] [--repeats 3]. Prints Markdown; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import time
from pathlib import Path
from statistics import median

os.environ.pop("OPENBLAS_CORETYPE", None)

import numpy as np
import torch  # noqa: F401 - there in every extraction; rounds to float16 faster than NumPy
from scipy.stats import spearmanr

import ooc_influence as ooc
from ooc_influence.extract.recipe import load_recipe
from ooc_influence.store import read_blocks, tree_bytes

KINDS = [
    ("float32", None), ("float16", None), ("bfloat16", None), ("int8", None), ("int4", None), ("float32", "blosc"),
    ("float16", "zstd"), ("float16", "blosc"), ("float16", "lz4"), ("int8", "blosc"),
]  # fmt: skip


def extract(folder: Path, k: int) -> tuple[ooc.GradientStore, ooc.GradientStore]:
    """Return the train and test stores of the demo's model, float32."""
    here = Path.cwd()
    os.chdir(folder)  # the recipe keeps its model there
    try:
        recipe = load_recipe("ooc_influence.cli.demo:recipe")
    finally:
        os.chdir(here)
    found = []
    for name, like in (("train", None), ("test", folder / "train")):
        data = recipe.split(name)
        found.append(
            ooc.extract_gradients(
                recipe.model, recipe.per_sample_loss, data.batches, folder / name, dtype="float32", like=like,
                compressor=None if like else ooc.Dropout(k=k),
            )
        )  # fmt: skip
    return found[0], found[1]


def write(path: Path, source: ooc.GradientStore, rows: np.ndarray, dtype: str, codec: str | None) -> float:
    """Write rows to a store, in its usual chunks; return the seconds."""
    start = time.perf_counter()
    storage = ooc.Storage(codec=codec)
    with ooc.GradientStore.create(path, source.mask, dtype=dtype, storage=storage, attributes=source.attrs) as store:
        for first in range(0, len(rows), 512):
            part = rows[first : first + 512]
            store.append(part, loss=np.zeros(len(part)))
    return time.perf_counter() - start


def read(path: Path) -> float:
    store = ooc.GradientStore.open(path)
    start = time.perf_counter()
    for block in read_blocks(store, 0, store.n, 4096):
        assert block.stop
    return time.perf_counter() - start


def fidelity(folder: Path, train: ooc.GradientStore, test: ooc.GradientStore, dtype: str) -> np.ndarray:
    """Return all scores with both stores' rows in a representation."""
    for name, source in (("t", train), ("q", test)):
        write(folder / f"{name}-{dtype}", source, source.rows(), dtype, None)
    ooc.fit_fisher(folder / f"t-{dtype}")
    return ooc.influence_scores(folder / f"q-{dtype}", folder / f"t-{dtype}").compute().ravel()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--mib", type=int, default=256)
    parser.add_argument("--k", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    result: dict[str, object] = {"bench": "representations", "mib": options.mib, "k": options.k}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        train, test = extract(folder, options.k)
        scores = {dtype: fidelity(folder, train, test, dtype) for dtype, codec in KINDS if codec is None}
        rows = train.rows()
        copies = max(1, options.mib * 2**20 // rows.nbytes)
        many = np.tile(rows, (copies, 1))
        seconds: dict[tuple[str, str | None], list[tuple[float, float]]] = {kind: [] for kind in KINDS}
        sizes: dict[tuple[str, str | None], float] = {}
        for turn in range(options.repeats):
            for dtype, codec in KINDS if turn % 2 else KINDS[::-1]:
                path = folder / "timed"
                written = write(path, train, many, dtype, codec)
                read(path)
                seconds[dtype, codec].append((written, read(path)))
                sizes[dtype, codec] = tree_bytes(path / "gradients") / len(many)
                shutil.rmtree(path)
        base = [median(times) for times in zip(*seconds["float32", None], strict=True)]
        print("| representation | codec | bytes a row | write rate | read rate | rank correlation of scores |")
        print("|---|---|---|---|---|---|")
        for dtype, codec in KINDS:
            times = [median(found) for found in zip(*seconds[dtype, codec], strict=True)]
            rates = [round(limit / time, 2) for limit, time in zip(base, times, strict=True)]
            rank = float(spearmanr(scores[dtype], scores["float32"]).statistic)
            size = round(sizes[dtype, codec])
            print(f"| {dtype} | {codec or 'none'} | {size} | {rates[0]} | {rates[1]} | {rank:.5f} |")
            label = f"{dtype}_{codec}" if codec else dtype
            result |= {f"{label}_bytes": size, f"{label}_write_over_float32": rates[0],
                       f"{label}_read_over_float32": rates[1], f"{label}_spearman": round(rank, 6)}  # fmt: skip
    print(json.dumps(result))


if __name__ == "__main__":
    main()
