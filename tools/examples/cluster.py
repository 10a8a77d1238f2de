"""A Dask cluster of two worker processes, started by hand: extraction by shards, Fisher and top lists there, and here.

A scheduler and two workers are processes that share a folder, as they could be on two hosts. The commands are the ones
for a single machine with ``--scheduler`` behind them. Afterwards the same runs here, and the numbers are compared.

Run: python tools/examples/cluster.py [--folder cluster-output] [--quick].
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from distributed import Client

import ooc_influence as ooc

RECIPE = "ooc_influence.cli.demo:recipe"


def command(*words: str) -> None:
    """Run ``ooc-influence`` with these words."""
    print(f"$ ooc-influence {' '.join(words)}", flush=True)
    program = "from ooc_influence.cli.main import main; main()"
    subprocess.run([sys.executable, "-c", program, *words], check=True, stdout=subprocess.DEVNULL)


@contextlib.contextmanager
def cluster(folder: Path) -> Iterator[str]:
    """Start a scheduler and two workers, return the scheduler's file, and stop them in the end."""
    file = (folder / "scheduler.json").absolute()
    dask = [sys.executable, "-m", "distributed.cli.dask_scheduler"]
    worker = [sys.executable, "-m", "distributed.cli.dask_worker", "--nthreads", "1", "--no-dashboard"]
    with (folder / "cluster.log").open("w") as log:
        quiet = {"stdout": log, "stderr": log}
        processes = [subprocess.Popen([*dask, "--scheduler-file", str(file), "--port", "0", "--no-dashboard"], **quiet)]
        try:
            for _ in range(2):
                held = ["--scheduler-file", str(file), "--resources", "shard=1", "--local-directory", str(folder)]
                processes.append(subprocess.Popen([*worker, *held], **quiet))
            wait_for(file, 2)
            yield str(file)
        finally:
            for process in reversed(processes):
                process.terminate()
            for process in processes:
                process.wait(30)


def wait_for(file: Path, workers: int) -> None:
    for _ in range(600):
        if file.exists() and file.stat().st_size:
            break
        time.sleep(0.1)
    else:
        raise SystemExit("expected a scheduler within a minute; received none: see cluster.log")
    with Client(scheduler_file=str(file), set_as_default=False) as client:
        client.wait_for_workers(workers, timeout=60)
        print(f"{workers} workers, processes {sorted(client.run(_process).values())}")


def _process() -> int:
    import os

    return os.getpid()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("cluster-output"))
    parser.add_argument("--quick", action="store_true", help="fewer numbers a row")
    options = parser.parse_args()
    shutil.rmtree(options.folder, ignore_errors=True)
    options.folder.mkdir(parents=True)
    k = "128" if options.quick else "2048"
    train, test = str(options.folder / "train.zarr"), str(options.folder / "test.zarr")
    extract = ["extract", "--recipe", RECIPE]
    with cluster(options.folder) as file:
        there = ["--scheduler-file", file]
        made = ["--split", "train", "--store", train, "--k", k]
        command("init", "--recipe", RECIPE, *made, "--rows", "1437")
        command(*extract, *made, "--shards", "2", *there)
        command(*extract, "--split", "test", "--store", test, "--like", train)
        command("fisher", train, *there)
        command("score", test, train, "--out", str(options.folder / "scores.zarr"), *there)
        found = np.asarray(ooc.influence_scores(test, train, out=options.folder / "scores.zarr"))
    here = str(options.folder / "here.zarr")
    command(*extract, "--split", "train", "--store", here, "--k", k)
    ooc.fit_fisher(here)
    expected = ooc.influence_scores(test, here).compute()
    error = float(np.abs(found - expected).max() / np.abs(expected).max())
    print(f"scores {found.shape} of the cluster and of this process differ by {error:.1e} of the largest")
    if error > 1e-4:
        raise SystemExit("expected the same scores to rounding")


if __name__ == "__main__":
    main()
