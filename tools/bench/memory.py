"""Peak anonymous memory of fit_fisher and top_influential at n and 4n rows, under a budget.

Each measurement is a fresh process that samples its own anonymous resident memory (RssAnon: mapped file pages are not
in it) every millisecond. Stores hold random rows. Flat means that 4n rows take no more than n.

Run: python tools/bench/memory.py [--rows 16384] [--k 2048] [--memory 512MiB]. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.pop("OPENBLAS_CORETYPE", None)

import numpy as np

import ooc_influence as ooc
from ooc_influence.memory import PeakMemory, format_bytes, parse_bytes
from ooc_influence.store import LayerShape, Mask, ModuleMask

QUERIES, TOP = 64, 100


def make_store(path: Path, rows: int, k: int, seed: int) -> None:
    entries = np.arange(k, dtype=np.int32)
    layer = LayerShape("bench", "linear", (1, k), False)
    mask = Mask((ModuleMask(layer, np.zeros_like(entries), entries, np.ones(k, np.float32)),))
    generator = np.random.Generator(np.random.PCG64(seed))
    spectrum = (np.arange(k, dtype=np.float32) + 1) ** -0.5
    with ooc.GradientStore.create(path, mask) as store:
        for start in range(0, rows, 1024):
            block = generator.standard_normal((min(1024, rows - start), k), np.float32) * spectrum
            store.append(block, loss=np.zeros(len(block)))


def measure(stage: str, folder: Path, name: str, memory: str) -> dict[str, int]:
    command = [sys.executable, __file__, "--child", stage, str(folder), name, memory]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return json.loads(output.splitlines()[-1])


def child(stage: str, folder: str, name: str, memory: str) -> None:
    train = Path(folder) / name
    with PeakMemory(interval=0.001) as watch:
        if stage == "fisher":
            ooc.fit_fisher(train, memory=memory, refit=True)
        else:
            ooc.top_influential(Path(folder) / "queries", train, top=TOP, memory=memory)
    print(json.dumps({"peak": watch.peak, "start": watch.start}))


def main() -> None:
    if "--child" in sys.argv:
        child(*sys.argv[2:])
        return
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=16384)
    parser.add_argument("--k", type=int, default=2048)
    parser.add_argument("--memory", default="512MiB")
    options = parser.parse_args()
    result: dict[str, object] = {"bench": "memory", "rows": options.rows, "k": options.k, "budget": options.memory}
    budget = parse_bytes(options.memory)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for label, rows, seed in (("n", options.rows, 0), ("4n", 4 * options.rows, 1), ("queries", QUERIES, 2)):
            make_store(folder / label, rows, options.k, seed)
        for stage in ("fisher", "top"):
            peaks = {label: measure(stage, folder, label, options.memory) for label in ("n", "4n")}
            for label, found in peaks.items():
                peak, start = format_bytes(found["peak"]), format_bytes(found["start"])
                print(f"{stage} at {label}: peak {peak}, at start {start}")
                result[f"{stage}_{label}_over_budget"] = round(found["peak"] / budget, 3)
            result[f"{stage}_4n_over_n"] = round(peaks["4n"]["peak"] / peaks["n"]["peak"], 3)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
