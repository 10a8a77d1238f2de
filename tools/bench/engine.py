"""The engine against the machine: Fisher, scores, top lists, self-influence; memory at n, 4n, 16n and under a limit.

Each share is limit / ours within one run, interleaved, the median of several; above 1 we are faster. The limits
(limits.py): the best ssyrk and sgemm of the engines at hand on blocks as large as ours, the same with plain writes
beside it, one sequential read of the same files, a plain map of the same files converted to float32. A cold measurement
drops the page cache first and is void (null) where pages stayed. Times of ours are those of a call's pass over the
rows; the factorisation of F and the preconditioning of queries, which do not depend on n, are reported apart. For a
rotated store stands the same one with a diagonal curvature, which is what makes the difference. Peaks are anonymous
memory of fresh processes; the last of them runs under RLIMIT_DATA with a store several times as large.

Run: python tools/bench/engine.py [--rows 100000] [--k 4096] [--queries 2048] [--repeats 3] [--only NAME,...].
The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

os.environ.pop("OPENBLAS_CORETYPE", None)

import numpy as np
from limits import Limits
from store import chunk_files, drop_cache, timed, whole_mask
from threadpoolctl import threadpool_info

import ooc_influence as ooc
from ooc_influence.influence.request import ScoreRequest
from ooc_influence.memory import PeakMemory, format_bytes, parse_bytes
from ooc_influence.progress import Progress

STAGES = ("fisher", "top", "scores", "self-influence")
TOP = 100


def make_store(path: Path, rows: int, k: int, seed: int, dtype: str = "float16") -> Path:
    """Random rows with a decaying spectrum."""
    generator = np.random.Generator(np.random.PCG64(seed))
    spectrum = (np.arange(k, dtype=np.float32) + 1) ** -0.5
    with ooc.GradientStore.create(path, whole_mask(k), dtype=dtype) as store:
        for start in range(0, rows, 1024):
            block = generator.standard_normal((min(1024, rows - start), k), np.float32) * spectrum
            store.append(block, loss=np.zeros(len(block)))
    return path


@contextmanager
def passes() -> Iterator[list[float]]:
    """Collect the seconds between a progress line's beginning and end: a call's pass over the rows."""
    found: list[float] = []
    enter, leave = Progress.__enter__, Progress.__exit__

    def entering(self: Any) -> Any:
        self.began = time.perf_counter()
        return enter(self)

    def leaving(self: Any, *error: Any) -> None:
        found.append(time.perf_counter() - self.began)
        leave(self, *error)

    Progress.__enter__, Progress.__exit__ = entering, leaving
    try:
        yield found
    finally:
        Progress.__enter__, Progress.__exit__ = enter, leave


def ours(call: Callable[[], object], prepared: list[float] | None = None) -> float:
    """Return the seconds of a call's passes; those of preconditioning go to ``prepared`` instead, where it is given."""
    precondition, spent = ScoreRequest.precondition, 0.0

    def timed_precondition(self: Any, *args: Any) -> Any:
        nonlocal spent
        began = time.perf_counter()
        try:
            return precondition(self, *args)
        finally:
            spent += time.perf_counter() - began

    if prepared is not None:
        ScoreRequest.precondition = timed_precondition
    try:
        with passes() as found:
            call()
    finally:
        ScoreRequest.precondition = precondition
    if prepared is not None:
        prepared.append(spent)
    return sum(found) - spent


def share(limit: Callable[[], float], measured: Callable[[], float], repeats: int) -> float | None:
    """Return the median of limit / ours, the limit taken before and after; None where a measurement was void."""
    ratios = []
    for _ in range(repeats):
        before, taken, after = limit(), measured(), limit()
        ratios.append((before + after) / 2 / taken)
    return None if any(np.isnan(ratio) for ratio in ratios) else round(median(ratios), 3)


class Bench:
    """The stores, and what is measured on them."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options, self.folder = options, folder
        self.n, self.k, self.repeats = options.rows, options.k, options.repeats
        self.train = make_store(folder / "train", self.n, self.k, 0)
        self.few, self.many = (
            make_store(folder / f"query{q}", q, self.k, 1) for q in (min(16, options.queries), options.queries)
        )
        self.memory = options.memory
        began = time.perf_counter()
        self.fit_seconds = ours(lambda: ooc.fit_fisher(self.train, memory=self.memory))
        self.factor_seconds = time.perf_counter() - began - self.fit_seconds
        self.limits = Limits(self.train, folder, options.queries)
        self.count = 0

    def out(self) -> Path:
        self.count += 1
        return self.folder / f"scores{self.count}"

    def stored(self, dtype: str) -> Path:
        """Return the train store in a representation."""
        if dtype == "float16":
            return self.train
        path = self.folder / dtype
        return path if path.exists() else make_store(path, self.n, self.k, 0, dtype)

    def fisher(self) -> dict[str, Any]:
        def fit(train: Path) -> float:
            return ours(lambda: ooc.fit_fisher(train, refit=True, memory=self.memory))

        linear = self.stored("int8-linear")
        return {
            "fisher_warm_over_ssyrk": share(self.limits.ssyrk, lambda: fit(self.train), self.repeats),
            "fisher_int8-linear_warm_over_ssyrk": share(self.limits.ssyrk, lambda: fit(linear), self.repeats),
        }

    def cold(self) -> dict[str, Any]:
        def fit() -> float:
            if not drop_cache(self.train):
                return float("nan")
            return ours(lambda: ooc.fit_fisher(self.train, refit=True, memory=self.memory))

        def score() -> float:
            if not (drop_cache(self.train) and drop_cache(self.few)):
                return float("nan")
            return ours(lambda: ooc.top_influential(self.few, self.train, top=TOP, memory=self.memory))

        return {
            "fisher_cold_over_ssyrk": share(self.limits.ssyrk, fit, self.repeats),
            "few_queries_cold_over_read": share(lambda: self.limits.plain_read(self.train), score, self.repeats),
        }

    def distributed(self) -> dict[str, Any]:
        from distributed import Client, LocalCluster

        with (
            LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None, memory_limit=None) as cluster,
            Client(cluster),
        ):
            return {
                "fisher_distributed_over_ssyrk": share(
                    self.limits.ssyrk, lambda: ours(lambda: ooc.fit_fisher(self.train, refit=True, memory=self.memory)),
                    self.repeats,
                ),
                "top_distributed_over_sgemm": share(
                    self.limits.sgemm,
                    lambda: ours(lambda: ooc.top_influential(self.many, self.train, top=TOP, memory=self.memory)),
                    self.repeats,
                ),
            }  # fmt: skip

    def scores(self) -> dict[str, Any]:
        prepared: list[float] = []

        def write(*apart: list[float]) -> float:
            out = self.out()
            seconds = ours(lambda: ooc.influence_scores(self.many, self.train, out=out, memory=self.memory), *apart)
            subprocess.run(["rm", "-rf", str(out)], check=True)
            return seconds

        def lists(*apart: list[float]) -> float:
            return ours(lambda: ooc.top_influential(self.many, self.train, top=TOP, memory=self.memory), *apart)

        limit = self.limits.sgemm
        return {
            "scores_over_sgemm": share(limit, lambda: write(prepared), self.repeats),
            "scores_over_sgemm_and_plain_writes": share(self.limits.sgemm_written, lambda: write([]), self.repeats),
            "scores_and_preconditioning_over_sgemm": share(limit, write, self.repeats),
            "top_over_sgemm": share(limit, lambda: lists(prepared), self.repeats),
            "top_and_preconditioning_over_sgemm": share(limit, lists, self.repeats),
            "preconditioning_seconds": round(median(prepared), 2),
        }

    def lists(self) -> dict[str, Any]:
        """Measure top lists of rows in several forms, whatever product finds them, without a curvature."""
        found: dict[str, Any] = {}
        options = {"top": TOP, "memory": self.memory, "curvature": False, "normalize": "none"}
        one = make_store(self.folder / "query1", 1, self.k, 1)
        for dtype in ("float16", "int8-linear", "sign"):
            train = self.stored(dtype)
            searched = ooc.top_influential(self.many, train, **options).search
            found |= {f"lists_{dtype}_{name}": value for name, value in searched.items()}

            def lists(query: Path, train: Path = train, cold: bool = False) -> float:
                if cold and not (drop_cache(train) and drop_cache(query)):
                    return float("nan")
                return ours(lambda: ooc.top_influential(query, train, **options))

            def touch(train: Path = train) -> float:
                return self.limits.touched(train)

            def read(train: Path = train) -> float:
                return self.limits.plain_read(train)

            found |= {
                f"lists_{dtype}_over_sgemm": share(self.limits.sgemm, lambda: lists(self.many), self.repeats),
                f"lists_{dtype}_16_warm_over_touch": share(touch, lambda: lists(self.few), self.repeats),
                f"lists_{dtype}_16_cold_over_read": share(read, lambda: lists(self.few, cold=True), self.repeats),
                f"lists_{dtype}_1_cold_over_read": share(read, lambda: lists(one, cold=True), self.repeats),
            }
        return found

    def self_influence(self) -> dict[str, Any]:
        def values() -> float:
            return ours(lambda: ooc.self_influence(self.train, memory=self.memory))

        def norms() -> float:
            return ours(lambda: ooc.self_influence(self.train, curvature=False, memory=self.memory))

        def diagonal() -> float:
            return ours(lambda: ooc.self_influence(self.train, curvature="diagonal", memory=self.memory))

        ooc.fit_fisher(self.train, name="diagonal", blocks="diagonal", memory=self.memory)
        return {
            "self_wide_over_sgemm": share(lambda: self.limits.sgemm(self.k), values, self.repeats),
            "self_rotated_over_convert": share(self.limits.converted, diagonal, self.repeats),
            "self_without_curvature_over_convert": share(self.limits.converted, norms, self.repeats),
        }

    def naive(self) -> dict[str, Any]:
        """Run the graphs one would write by hand, on part of the rows: their partial products grow with them."""
        import dask.array as da
        from dask.diagnostics import ResourceProfiler

        store = ooc.GradientStore.open(self.train)
        rows = min(self.n, self.options.naive_rows)
        scale = da.from_array(store.small("row_scale"), chunks=store.layout.chunk_rows)
        stored = da.from_zarr(str(self.train), component="gradients")
        lazy = (stored[: self.n].astype("float32") * scale[:, None])[:rows]
        part = rows / self.n
        peaks = []

        def square() -> float:
            with ResourceProfiler(dt=0.1) as profiler:
                seconds = timed(lambda: (lazy.T @ lazy).compute(scheduler="threads"))
            peaks.extend(sample.mem for sample in profiler.results)
            return seconds

        left = da.from_array(self.limits.left, chunks=self.limits.left.shape)
        return {
            "naive_fisher_over_ssyrk": share(lambda: self.limits.ssyrk() * part, square, 1),
            "naive_fisher_peak_mib": round(max(peaks, default=0)),
            "naive_scores_over_sgemm": share(
                lambda: self.limits.sgemm() * part,
                lambda: timed(lambda: (left @ lazy.T).compute(scheduler="threads")), 1,
            ),
        }  # fmt: skip

    def growth(self) -> dict[str, Any]:
        """Peak memory and time a row at n, 4n and 16n, in fresh processes under a budget."""
        base, k, budget = self.options.growth_rows, self.options.growth_k, self.options.budget
        sizes = {"n": base, "4n": 4 * base, "16n": 16 * base}
        query = make_store(self.folder / "growth-query", 64, k, 3)
        stores = {label: make_store(self.folder / f"growth-{label}", rows, k, 4) for label, rows in sizes.items()}
        found: dict[str, Any] = {}
        for stage in STAGES:
            taken = {label: [child(stage, query, path, budget) for _ in range(2)] for label, path in stores.items()}
            peaks = {label: min(run["peak"] for run in runs) for label, runs in taken.items()}
            rates = {label: min(run["seconds"] for run in runs) / sizes[label] for label, runs in taken.items()}
            found[f"{stage}_peak_16n_over_n"] = round(peaks["16n"] / peaks["n"], 3)
            found[f"{stage}_peak_over_budget"] = round(max(peaks.values()) / parse_bytes(budget), 3)
            found[f"{stage}_time_16n_over_n"] = round(rates["16n"] / rates["n"], 3)
        for path in stores.values():
            subprocess.run(["rm", "-rf", str(path)], check=True)
        return found

    def limit(self) -> dict[str, Any]:
        """Fisher and top-100 of 64 queries on a store several times as large as the process may allocate."""
        limit, k = parse_bytes(self.options.limit), self.options.growth_k
        rows = self.options.limit_factor * limit // (2 * k) // 1024 * 1024 + 1024
        query = make_store(self.folder / "limit-query", 64, k, 5)
        train = make_store(self.folder / "limit-train", rows, k, 6)
        size = sum(file.stat().st_size for file in chunk_files(train))
        budget = str(int(limit * 0.75))
        found: dict[str, Any] = {"limit": f"RLIMIT_DATA {format_bytes(limit)}", "limit_rows": rows}
        found["limit_store_over_limit"] = round(size / limit, 2)
        for stage in ("fisher", "top"):
            run = child(stage, query, train, budget, limit=limit)
            found[f"limit_{stage}_seconds"] = round(run["seconds"], 1)
            found[f"limit_{stage}_peak_over_limit"] = round(run["peak"] / limit, 3)
        subprocess.run(["rm", "-rf", str(train)], check=True)
        return found

    def gpu(self) -> dict[str, Any]:
        """Scores on a GPU against copying the stored rows there; null without one."""
        try:
            import torch
        except ImportError:
            return {"gpu_top_over_copy": None}
        if not torch.cuda.is_available():
            return {"gpu_top_over_copy": None}
        store = ooc.GradientStore.open(self.train)
        rows = min(store.n, 8192)
        pinned = torch.empty((rows, self.k), dtype=torch.float16, pin_memory=True)
        there = torch.empty((rows, self.k), dtype=torch.float16, device="cuda")

        def copy() -> float:
            torch.cuda.synchronize()
            began = time.perf_counter()
            for start in range(0, store.n, rows):
                there[: store.n - start].copy_(pinned[: store.n - start], non_blocking=True)
            torch.cuda.synchronize()
            return time.perf_counter() - began

        def top() -> float:
            options = {"top": TOP, "device": "cuda", "memory": self.memory}
            return ours(lambda: ooc.top_influential(self.few, self.train, **options))

        copy(), top()
        return {"gpu_top_over_copy": share(copy, top, self.repeats), "gpu": torch.cuda.get_device_name()}


def child(stage: str, query: Path, train: Path, memory: str, limit: int = 0) -> dict[str, float]:
    """Run a stage in a fresh process, under RLIMIT_DATA where one is given; return its peak bytes and seconds."""
    command = [sys.executable, __file__, "--child", stage, str(query), str(train), memory, str(limit)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def run_child(stage: str, query: str, train: str, memory: str, limit: str) -> None:
    import ooc_influence.curvature
    import ooc_influence.influence  # noqa: F401 - importing is not measured

    if int(limit):
        resource.setrlimit(resource.RLIMIT_DATA, (int(limit), int(limit)))
    if stage != "fisher" and not (Path(train) / "curvature").exists():
        ooc.fit_fisher(train, memory=memory)
    calls: dict[str, Callable[[], object]] = {
        "fisher": lambda: ooc.fit_fisher(train, refit=True, memory=memory),
        "top": lambda: ooc.top_influential(query, train, top=TOP, memory=memory),
        "scores": lambda: ooc.influence_scores(query, train, out=f"{train}.scores", memory=memory),
        "self-influence": lambda: ooc.self_influence(train, memory=memory),
    }
    with PeakMemory(interval=0.001) as watch:
        seconds = ours(calls[stage])
    subprocess.run(["rm", "-rf", f"{train}.scores"], check=True)
    print(json.dumps({"peak": watch.peak, "seconds": seconds}))


ALL = ("fisher", "distributed", "cold", "scores", "lists", "self_influence", "naive", "growth", "limit", "gpu")
TARGETS = {
    "fisher_warm_over_ssyrk": ">= 0.90",
    "fisher_int8-linear_warm_over_ssyrk": ">= 1.5",
    "fisher_distributed_over_ssyrk": ">= 0.85",
    "fisher_cold_over_ssyrk": ">= 0.80",
    "scores_over_sgemm": ">= 0.90",
    "top_over_sgemm": ">= 0.85",
    "few_queries_cold_over_read": ">= 0.90",
    "lists_float16_over_sgemm": ">= 1.5",
    "lists_int8-linear_over_sgemm": ">= 2.0",
    "lists_float16_16_cold_over_read": ">= 0.90",
    "lists_int8-linear_16_cold_over_read": ">= 0.90",
    "lists_int8-linear_16_warm_over_touch": ">= 0.30",
    "self_wide_over_sgemm": ">= 0.85",
    "self_rotated_over_convert": ">= 0.80",
    "gpu_top_over_copy": ">= 0.80",
}


def main() -> None:
    if "--child" in sys.argv:
        run_child(*sys.argv[2:])
        return
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--k", type=int, default=4096)
    parser.add_argument("--queries", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--memory", default="4GiB", help="budget of the timed calls")
    parser.add_argument("--naive-rows", type=int, default=32_768)
    parser.add_argument("--growth-rows", type=int, default=16_384, help="n of n, 4n, 16n")
    parser.add_argument("--growth-k", type=int, default=2048)
    parser.add_argument("--budget", default="1GiB", help="of the runs at n, 4n, 16n")
    parser.add_argument("--limit", default="768MiB", help="RLIMIT_DATA of the last runs")
    parser.add_argument("--limit-factor", type=int, default=4, help="the store, in limits")
    parser.add_argument("--only", default=",".join(ALL), help="some of " + ", ".join(ALL))
    parser.add_argument("--folder", help="where to write; default a temporary folder")
    options = parser.parse_args()
    cores = sorted({str(pool.get("architecture")) for pool in threadpool_info() if pool["user_api"] == "blas"})
    result: dict[str, Any] = {"bench": "engine", "blas_core": ", ".join(cores)}
    result |= {name: getattr(options, name) for name in ("rows", "k", "queries", "repeats", "growth_rows", "growth_k")}
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        bench = Bench(options, Path(name))
        result["ssyrk_gflops"] = round(bench.n * bench.k**2 / bench.limits.ssyrk() / 1e9, 1)
        result["sgemm_gflops"] = round(2 * bench.n * bench.k * len(bench.limits.left) / bench.limits.sgemm() / 1e9, 1)
        result["factor_seconds"] = round(bench.factor_seconds, 1)
        print(
            f"BLAS core {result['blas_core']}, ssyrk {result['ssyrk_gflops']}, sgemm {result['sgemm_gflops']} GFLOP/s"
        )
        for part in options.only.split(","):
            for label, value in getattr(bench, part)().items():
                result[label] = value
                print(f"{label:40} {TARGETS.get(label, ''):>9} {value}", flush=True)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
