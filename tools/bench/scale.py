"""A store of up to a hundred million rows: writing, verifying, fitting, lists with and without a sketch, cold and warm.

Rows are real ones resampled: gradients of the demo's digits, reduced to an eigenbasis; a row is a random mixture of two
of them plus noise, so that it is near its sources and no row repeats. Each measured call runs in a process of its own
(its time starts once ooc_influence is imported) and reports its peak anonymous memory. Limits are measured beside it:
plain files of the same size written and synced, one sequential read of the same files with nothing of them in the page
cache, every byte of them touched while they are there (void where they are more than memory holds), and float32
products (sgemm) of the same shape. Everything is kept in the folder, so a run that was stopped resumes; what has not
been measured is listed.

Run: python tools/bench/scale.py [--rows 1000000] [--dims 256] [--dtype int8-linear] [--sketch-dims 32]
[--damping D] [--queries 1,16,256,2048] [--workers 2] [--folder DIR]. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.pop("OPENBLAS_CORETYPE", None)

import numpy as np
from limits import Limits
from store import drop_cache, timed

import ooc_influence as ooc
from ooc_influence.memory import PeakMemory, available, format_bytes
from ooc_influence.store import create_like

TOP, SAMPLE = 100, 100_000
_CALLS = ("memory", "damping", "sketch_dims")  # options of the calls
_BLOCK = 65_536  # rows made at a time
_NOISE = 0.1  # of a row's norm


def make_base(folder: Path, dims: int) -> tuple[Path, Path]:
    """Make the digits' gradients, reduced to an eigenbasis: train and test rows."""
    from ooc_influence.cli.demo import recipe

    train, test = folder / "base.zarr", folder / "base-test.zarr"
    if not test.exists():
        digits = recipe()
        reduction = ooc.Eigenbasis(dims)
        how: dict[str, Any] = {"compressor": ooc.Dropout(k=max(4096, 8 * dims), reduce=reduction), "dtype": "float32"}
        ooc.extract_gradients(digits.model, digits.per_sample_loss, digits.split("train").batches, train, **how)
        ooc.extract_gradients(digits.model, digits.per_sample_loss, digits.split("test").batches, test, like=train)
    return train, test


def mixtures(base: Any, first: int, count: int, seed: int) -> Any:
    """Return rows ``first`` to ``first + count``: the same whoever asks."""
    generator = np.random.default_rng([seed, first])
    pairs = generator.integers(0, len(base), (2, count))
    shares = generator.uniform(0.2, 1, (2, count, 1)).astype(np.float32)
    rows = base[pairs[0]] * shares[0]
    rows += base[pairs[1]] * shares[1]
    spread = base.std(0) * np.float32(_NOISE)
    pool = generator.standard_normal((512, base.shape[1]), np.float32) * spread
    rows += pool[generator.integers(0, len(pool), count)] * generator.choice([-1, 1], (count, 1)).astype(np.float32)
    return rows


def fill(path: Path, base: Path, rows: int, dtype: str, seed: int) -> float:
    """Append rows until there are ``rows``; return the seconds that appending took, without making the rows."""
    source = ooc.GradientStore.open(base).rows()
    if not path.exists():
        create_like(ooc.GradientStore.open(base), path, ["resampled"], dtype=dtype, columns={}, ids=None).close()
    spent = 0.0
    with ooc.GradientStore.open(path, "a") as store:
        first = store.n
        while first < rows:
            block = mixtures(source, first, min(_BLOCK - first % _BLOCK, rows - first), seed)
            began = time.perf_counter()
            store.append(block, loss=np.ones(len(block), np.float32), grad_norm=None)
            spent += time.perf_counter() - began
            first += len(block)
            if first % 2**22 == 0:
                print(f"{path.name}: {first:,} of {rows:,} rows", file=sys.stderr, flush=True)
        began = time.perf_counter()
    return spent + time.perf_counter() - began


def plain_write(folder: Path, size: int) -> float:
    """Return the seconds of plain files of ``size`` bytes, 16 MiB each, written and synced."""
    target, data = folder / "plain", np.random.default_rng(0).bytes(2**24)
    target.mkdir(exist_ok=True)

    def write() -> None:
        for number in range(max(1, size >> 24)):
            with (target / str(number)).open("wb", buffering=0) as file:
                file.write(data)
                os.fsync(file.fileno())

    seconds = timed(write)
    subprocess.run(["rm", "-rf", str(target)], check=True)
    return seconds * size / (max(1, size >> 24) << 24)


def run_child(stage: str, arguments: dict[str, Any]) -> None:
    """Run a call and print what it took."""
    folder = Path(arguments["folder"])
    train, sketch, query = folder / "train.zarr", folder / "sketch.zarr", folder / f"q{arguments.get('queries')}.zarr"
    lists: dict[str, Any] = {"top": TOP, "memory": arguments["memory"], "damping": arguments["damping"]}

    def distributed() -> Any:
        from distributed import Client, LocalCluster

        with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster, Client(cluster):
            began = time.perf_counter()
            ooc.top_influential(query, train, **lists)
            return {"pass": time.perf_counter() - began}

    calls: dict[str, Callable[[], Any]] = {
        "verify": lambda: {"damage": len(ooc.GradientStore.open(train).verify())},
        "fit": lambda: ooc.fit_fisher(train, sample=min(SAMPLE, ooc.GradientStore.open(train).n), refit=True) and {},
        "sketch": lambda: {
            "row_bytes": ooc.sketch_store(train, sketch, arguments["sketch_dims"], memory=arguments["memory"])
            .layout.encoding.row_bytes
        },
        "lists": lambda: dict(ooc.top_influential(query, train, **lists).search),
        "sketched": lambda: dict(ooc.top_influential(query, train, sketch=sketch, **lists).search),
        "distributed": distributed,
    }  # fmt: skip
    with PeakMemory(0.01) as watch:
        began = time.perf_counter()
        found = calls[stage]()
        seconds = time.perf_counter() - began
    print(json.dumps({"seconds": seconds, "peak": watch.peak, **found}))


class Bench:
    """What has been measured in a folder, and what is."""

    def __init__(self, folder: Path, options: argparse.Namespace) -> None:
        self.folder, self.options, self.path = folder, options, folder / "measured.json"
        self.measured: dict[str, Any] = json.loads(self.path.read_text()) if self.path.exists() else {}
        self.train, self.sketch = folder / "train.zarr", folder / "sketch.zarr"

    def once(self, name: str, measure: Callable[[], Any]) -> Any:
        """Return what was measured under a name, or measure it."""
        if name not in self.measured:
            self.measured[name] = measure()
            self.path.write_text(json.dumps(self.measured, indent=1))
            print(f"{name:32} {self.measured[name]}", flush=True)
        return self.measured[name]

    def child(self, stage: str, **more: Any) -> dict[str, Any]:
        arguments = {"folder": str(self.folder), **{name: getattr(self.options, name) for name in _CALLS}, **more}
        command = [sys.executable, __file__, "--child", stage, json.dumps(arguments)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr[-2000:])
        result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return result

    def write(self) -> None:
        options, folder = self.options, self.folder
        base, test = make_base(folder, options.dims)
        before = ooc.GradientStore.open(self.train).n if self.train.exists() else 0
        spent = fill(self.train, base, options.rows, options.dtype, 1)
        row_bytes = ooc.GradientStore.open(self.train).layout.encoding.row_bytes
        if before < options.rows:
            added = (options.rows - before) * row_bytes
            part = min(added, 2**31)
            limit = plain_write(folder, part)
            self.once("append", lambda: {"rate": added / spent, "plain_rate": part / limit, "row_bytes": row_bytes})
        for count in options.queries:
            fill(folder / f"q{count}.zarr", test, count, "float32", 2)

    def measure(self) -> None:
        """Measure all that is missing."""
        self.write()
        self.once("fit", lambda: self.child("fit"))
        self.once("verify", lambda: self.child("verify"))
        limits = Limits(self.train, self.folder, 16)
        fits = sum(file.stat().st_size for file in (self.train / "gradients").iterdir()) < 0.7 * available()
        for count in self.options.queries:
            self.once(f"read before {count}", lambda: limits.plain_read(self.train))
            self.once(f"cold {count}", lambda count=count: self.cold(self.train, "lists", count))
            if fits:
                self.once(f"touch before {count}", lambda: limits.touched(self.train))
                self.once(f"warm {count}", lambda count=count: self.warm("lists", count))
            left = Limits(self.train, self.folder, count)
            self.once(f"sgemm {count}", left.sgemm)
        if self.options.workers > 1:
            self.once("distributed 16", lambda: self.cold(self.train, "distributed", 16))
        self.once("sketch", lambda: self.child("sketch"))
        for count in self.options.queries:
            self.once(f"sketched {count}", lambda count=count: self.warm("sketched", count))
        self.once("plan", self.plan)

    def cold(self, path: Path, stage: str, count: int) -> dict[str, Any] | None:
        return self.child(stage, queries=count) if drop_cache(path) else None

    def warm(self, stage: str, count: int) -> dict[str, Any]:
        """Return the quicker of two calls, the first of which fills the page cache."""
        return min((self.child(stage, queries=count) for _ in range(2)), key=lambda found: found["seconds"])

    def plan(self) -> dict[str, Any]:
        """Return what ``plan`` says of the stages that were measured."""
        found, options = {}, self.options
        for count in options.queries:
            asked: dict[str, Any] = {"queries": count, "dtype": options.dtype, "folder": self.folder, "top": TOP}
            for stage in ooc.plan(options.rows, options.dims, memory=options.memory, workers=1, **asked).stages:
                name = f"{stage.name} {count}" if "top" in stage.name else stage.name
                found[name] = {"seconds": stage.seconds, "disk": stage.disk, "peak": stage.peak}
        return found

    def result(self) -> dict[str, Any]:
        """Return the ratios of what was measured."""
        at, found = self.measured, {}
        append = at.get("append")
        if append is not None:
            found["append_over_plain_writes"] = append["rate"] / append["plain_rate"]
        for count in self.options.queries:
            cold, warm, sketched = (at.get(f"{name} {count}") for name in ("cold", "warm", "sketched"))
            read, touched = at.get(f"read before {count}"), at.get(f"touch before {count}")
            if cold and read:
                found[f"{count}_cold_over_read"] = read / cold["seconds"]
            if warm and touched:
                found[f"{count}_warm_over_touch"] = touched / warm["seconds"]
            if (warm or cold) and at.get(f"sgemm {count}"):
                found[f"{count}_over_sgemm"] = at[f"sgemm {count}"] / (warm or cold)["seconds"]
            if sketched and (warm or cold):
                found[f"{count}_sketched_over_whole"] = (warm or cold)["seconds"] / sketched["seconds"]
        return {name: round(value, 3) for name, value in found.items()}


def main() -> None:
    if "--child" in sys.argv:
        run_child(sys.argv[2], json.loads(sys.argv[3]))
        return
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dims", type=int, default=256)
    parser.add_argument("--dtype", default="int8-linear")
    parser.add_argument("--sketch-dims", type=int, default=32)
    parser.add_argument("--damping", type=float, help="of lists; default that of the curvature")
    counts = lambda text: [int(part) for part in text.split(",")]  # noqa: E731
    parser.add_argument("--queries", type=counts, default=[1, 16, 256, 2048])
    parser.add_argument("--workers", type=int, default=1, help="2: also two Dask workers")
    parser.add_argument("--memory", default="4GiB", help="budget of the calls")
    parser.add_argument("--folder", help="where to write, and to resume; default a temporary folder")
    options = parser.parse_args()
    facts = {name: getattr(options, name) for name in ("rows", "dims", "dtype", "sketch_dims", "damping")}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(options.folder or temporary).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        os.chdir(folder)  # the demo's model is kept there
        bench = Bench(folder, options)
        bench.measure()
        peaks = {name: format_bytes(part["peak"]) for name, part in bench.measured.items()
                 if isinstance(part, dict) and "peak" in part}  # fmt: skip
        print(json.dumps({"bench": "scale", **facts, **bench.result(), "peaks": peaks, "measured": bench.measured}))


if __name__ == "__main__":
    main()
