"""The benchmarks run and end with one line of JSON; their numbers are not judged here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parent.parent / "tools" / "bench"
SMALL = {
    "extraction": ["--rounds", "1", "--k", "512", "--models", "cnn", "--samplings", "importance"],
    "memory": ["--rows", "600", "--k", "64"],
    "representations": ["--mib", "1", "--k", "100", "--repeats", "1"],
    "store": ["--mib", "32", "--chunks", "300", "--repeats", "1"],
}


def test_every_benchmark_is_listed():
    assert {path.stem for path in BENCH.glob("*.py")} == set(SMALL)


@pytest.mark.parametrize("name", SMALL)
def test_it_runs(name):
    command = [sys.executable, str(BENCH / f"{name}.py"), *SMALL[name]]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["bench"] == name
    assert any("_over_" in key for key in result)
