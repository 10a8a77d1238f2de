"""From a fresh clone to the demo's result: seconds, megabytes, and commands.

The repository as it is committed is cloned to a temporary folder, where ``./tools/demo`` makes its own .venv. What that
takes depends on the package index, on pip's cache and on the machine; the demo alone is timed by a second run of it,
and a query of its stores by the command ``top``: seconds of the clock and of the processor, medians of several runs.
Installed bytes are those of .venv with what the demo needs. Arguments go to the demo.

Run: python tools/bench/first_contact.py [--folder DIR]. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
QUERIES = 9  # runs of one, of which the median counts
COMMANDS = ("git clone REPOSITORY", "cd ooc_influence", "./tools/demo")


def timed(command: list[object], folder: Path) -> tuple[float, str]:
    """Run with what it says shown; return the seconds and its standard output."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    start = time.perf_counter()
    done = subprocess.run(
        [str(part) for part in command], cwd=folder, stdout=subprocess.PIPE, text=True, env=environment
    )
    seconds = time.perf_counter() - start
    sys.stderr.write(done.stdout)
    if done.returncode:
        sys.exit(f"expected {command[0]} to run; received exit code {done.returncode}")
    return seconds, done.stdout


def query_seconds(command: Path, folder: Path) -> tuple[float, float]:
    """Return the medians of what ``top`` takes on the demo's stores: seconds, and user and system time."""
    (train,), (query,) = (list(folder.glob(f"{name}-k*.zarr")) for name in ("train", "test"))
    elapsed, used = [], []
    for _ in range(QUERIES):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        elapsed.append(timed([command, "top", query, train, "--top", "1", "--average-queries", "--json"], folder)[0])
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        used.append(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
    return statistics.median(elapsed), statistics.median(used)


def mebibytes(folder: Path) -> int:
    """Return what a folder takes on the disk; a file with several names counts once."""
    sizes = {}
    for path in folder.rglob("*"):
        found = path.lstat()
        sizes[found.st_ino] = found.st_blocks * 512
    return sum(sizes.values()) >> 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, help="clone into this folder and keep it; default a temporary one")
    options, rest = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as temporary:
        clone = (options.folder or Path(temporary)).resolve() / "ooc_influence"
        cloning, _ = timed(["git", "clone", "--quiet", ROOT, clone], Path(temporary))
        first, said = timed(["./tools/demo", "--out", "first", "--json", *rest], clone)
        again, _ = timed(["./tools/demo", "--out", "second", "--json", *rest], clone)
        query, query_cpu = query_seconds(clone / ".venv" / "bin" / "ooc-influence", clone / "first")
        result = json.loads(said.splitlines()[-1])
        facts = {
            "bench": "first_contact",
            "commands": len(COMMANDS),
            "seconds": round(cloning + first),
            "seconds_of_the_demo": round(again),
            "seconds_of_a_query": round(query, 2),
            "cpu_seconds_of_a_query": round(query_cpu, 2),
            "installing_over_demo": round((first - again) / again, 1),
            "venv_MiB": mebibytes(clone / ".venv"),
            "clone_MiB": mebibytes(clone / ".git"),
            "auc": round(result["mislabelled"]["self-influence"]["auc"], 3),
        }
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
