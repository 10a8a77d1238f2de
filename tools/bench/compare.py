"""Two revisions of the package side by side: the same benchmarks of each, run in turns.

Each revision runs its own scripts of this folder, which know that revision's modules. Every figure is a ratio within
one such run already, ours against a limit of the machine. Here the medians of the two revisions are divided: above 1,
the later revision is faster. ``slower`` lists those below 0.95.

Run: python tools/bench/compare.py BEFORE [--rounds 3] [--only engine,store,extraction]. BEFORE is a git revision; the
other one is the working tree. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = {
    "engine": "--rows 20000 --k 2048 --queries 512 --repeats 3 --only fisher,scores,self_influence",
    "store": "--mib 256 --chunks 10000 --repeats 3",
    "extraction": "--rounds 5 --k 16384 --samplings importance,grid --models decoder,cnn",
}
SMALLER_IS_FASTER = {"extraction"}
MOST = 0.95  # of the earlier revision's ratio, below which a line counts as slower


def figures(result: Any, path: str) -> Iterator[tuple[str, float]]:
    """Yield the ratios of a benchmark's JSON by their names: those called ``..._over_...``."""
    for name, value in result.items() if isinstance(result, dict) else ():
        if isinstance(value, dict):
            yield from figures(value, f"{path}.{name}")
        elif isinstance(value, int | float) and not isinstance(value, bool) and "_over_" in name:
            yield f"{path}.{name}", float(value)


def run(tree: Path, script: str) -> dict[str, float]:
    """Return the ratios of one run of a tree's script."""
    command = [sys.executable, str(tree / "tools" / "bench" / f"{script}.py"), *SCRIPTS[script].split()]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(tree)}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr}")
    return dict(figures(json.loads(done.stdout.splitlines()[-1]), script))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", help="the earlier revision")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default=",".join(SCRIPTS))
    options = parser.parse_args()
    measured: dict[str, tuple[list[float], list[float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        before = Path(folder) / "before"
        subprocess.run(["git", "-C", ROOT, "worktree", "add", "-q", "--detach", before, options.before], check=True)
        try:
            for script in options.only.split(","):
                for number in range(options.rounds):
                    for which in (0, 1) if number % 2 else (1, 0):
                        for name, value in run(ROOT if which else before, script).items():
                            measured.setdefault(name, ([], []))[which].append(value)
                    print(f"{script}: round {number + 1} of {options.rounds}", flush=True)
        finally:
            subprocess.run(["git", "-C", ROOT, "worktree", "remove", "--force", before], check=True)
    ratios = {}
    for name, (earlier, later) in measured.items():
        if not earlier or not later:
            print(f"{name:55} only one of the two revisions has it")
            continue
        inverse = name.split(".")[0] in SMALLER_IS_FASTER
        ratio = median(earlier) / median(later) if inverse else median(later) / median(earlier)
        ratios[name] = round(ratio, 3)
        print(f"{name:55} {median(earlier):8.3f} -> {median(later):8.3f}   {ratio:.3f}")
    slower = {name: ratio for name, ratio in ratios.items() if ratio < MOST}
    print(
        json.dumps({"bench": "compare", "before": options.before, "rounds": options.rounds, "slower": slower, **ratios})
    )


if __name__ == "__main__":
    main()
