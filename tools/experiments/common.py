"""What the experiments share: runs that are kept and gone on with, tables, the options of every script.

A run is a name with settings (JSON values); its result, a dict of JSON values, is a file in the output folder and is
not computed again. ``--status`` names the runs that are missing, ``--quick`` is the same with sizes for two minutes.
Every script writes ``results.json``, ``table.md`` and a plot there, prints the table, and ends with one line of JSON.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import platform
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch

import ooc_influence as ooc

Result = dict[str, Any]


class Runs:
    """The runs of one experiment, in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._jobs: list[tuple[str, dict[str, Any], Callable[[], Result]]] = []
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, name: str, settings: dict[str, Any], call: Callable[[], Result]) -> None:
        self._jobs.append((name, settings, call))

    def _path(self, name: str, settings: dict[str, Any]) -> Path:
        digest = hashlib.sha256(json.dumps([name, settings], sort_keys=True).encode()).hexdigest()[:12]
        return self.folder / f"run-{digest}.json"

    def missing(self) -> list[str]:
        return [name for name, settings, _ in self._jobs if not self._path(name, settings).exists()]

    def finished(self) -> list[Result]:
        """Return the results that are there."""
        paths = [self._path(name, settings) for name, settings, _ in self._jobs]
        return [json.loads(path.read_text()) for path in paths if path.exists()]

    def finish(self, workers: int = 1) -> list[Result]:
        """Do what is missing, in processes with a core each if there are several; return all results, with their names.

        What is sent to processes must be a function of a module, with :func:`functools.partial` for its arguments.
        """
        todo = [(name, self._path(name, settings), call) for name, settings, call in self._jobs]
        todo = [job for job in todo if not job[1].exists()]
        if workers == 1:
            for job in todo:
                _run(*job)
        elif todo:
            context = multiprocessing.get_context("spawn")
            turns = context.Value("i", 0)
            with ProcessPoolExecutor(workers, context, _take_a_core, (turns,)) as pool:
                for done in as_completed([pool.submit(_run, *job) for job in todo]):
                    print(f"{done.result()}: done", file=sys.stderr)
        return self.finished()


def _run(name: str, path: Path, call: Callable[[], Result]) -> str:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps({"run": name, **call()}))
    partial.replace(path)
    return name


def _take_a_core(turns: Any) -> None:
    with turns.get_lock():
        turn, turns.value = turns.value, turns.value + 1
    if hasattr(os, "sched_setaffinity"):
        held = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {held[turn % len(held)]})
    torch.set_num_threads(1)


def arguments(description: str | None, folder: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(folder), help="where runs and results are kept")
    parser.add_argument("--quick", action="store_true", help="small sizes: two minutes, and no more than a hint")
    parser.add_argument("--status", action="store_true", help="name the runs that are missing, and stop")
    return parser


def table(results: Sequence[Result], columns: Sequence[str]) -> str:
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for result in results:
        cells = (result.get(column, "") for column in columns)
        lines.append("| " + " | ".join(f"{c:.3f}" if isinstance(c, float) else str(c) for c in cells) + " |")
    return "\n".join(lines)


def report(name: str, folder: Path, results: list[Result], columns: Sequence[str], plot: Callable[[Any], None]) -> None:
    """Write and print what was found."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    machine = {"machine": platform.machine(), "torch": torch.__version__, "version": ooc.__version__}
    found = {"experiment": name, **machine, "runs": results}
    (folder / "results.json").write_text(json.dumps(found, indent=1))
    text = table(results, columns)
    (folder / "table.md").write_text(text + "\n")
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    plot(axes)
    figure.savefig(folder / "plot.png", dpi=120)
    pyplot.close(figure)
    print(text)
    print(json.dumps(found))
