"""The experiments run at their quick sizes, keep what they did, and end with one line of JSON."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOM = Path(__file__).parent.parent / "tools" / "experiments"
QUICK = {
    "mislabel": ["--seeds", "1"],
    "online": [],
    "compression_cost": [],
    "errors": [],
    "weightings": [],
    "retraining": [],
    "selection": [],
    "sources": [],
}
# or a model
NEEDS_DATA = {
    "collected",
    "facts",
    "fidelity",
    "bytes_a_row",
    "finetuned",
    "finetuning",
    "reranked",
    "sketches",
    "spans",
}
SLOW = {"compression_cost", "errors", "mislabel", "online", "retraining", "selection", "sources", "weightings"}
SHARED = {"baselines", "common", "dense", "gathering", "rivals", "tasks"}


def start(name, *arguments):
    command = [sys.executable, str(ROOM / f"{name}.py"), "--quick", "--folder", "out", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_every_experiment_is_listed():
    assert {path.stem for path in ROOM.glob("*.py")} - SHARED == set(QUICK) | NEEDS_DATA


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in QUICK]
)
def test_it_runs_and_goes_on(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    missing = start(name, *QUICK[name], "--status").stdout.splitlines()
    assert len(missing) > 3
    done = start(name, *QUICK[name])
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["experiment"] == name
    assert found["runs"]
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"results.json", "table.md", "plot.png"}
    again = start(name, *QUICK[name])
    assert "0 runs to do" in again.stderr
    assert json.loads(again.stdout.splitlines()[-1]) == found
