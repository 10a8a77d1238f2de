"""docs/benchmarks.md has the tables that tools/bench/page.py makes of the kept runs."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

BENCH = Path(__file__).parent.parent / "tools" / "bench"


@pytest.fixture(scope="module")
def page():
    spec = importlib.util.spec_from_file_location("bench_page", BENCH / "page.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_committed_page_is_what_the_kept_runs_make(page):
    text = page.PAGE.read_text("utf-8")
    assert page.BEGIN in text
    assert page.END in text
    assert page.render(text, page.read_results()) == text


def test_runs_are_told_whole(page):
    runs = page.read_results()
    assert runs
    for run in runs:
        assert set(run) == {"script", "arguments", "date", "machine", "result"}
        assert run["script"] == run["result"]["bench"]
        assert list(page.ratios(run["result"]))


def test_ratios_alone_are_shown(page):
    result = {"bench": "store", "open_seconds": 3.5, "cold_raw_over_read": None, "warm_raw_over_map": 0.9084}
    run = {"script": "store", "arguments": ["--mib", "1"], "date": "2026-01-01", "machine": "a machine"}
    made = page.tables([run | {"result": result}])
    assert "`python tools/bench/store.py --mib 1`, a machine, 2026-01-01:" in made
    assert "| warm raw | map | 0.91 |" in made
    assert "| cold raw | read | void |" in made
    assert "3.5" not in made
    assert "- `python tools/bench/memory.py`: " in made
    assert "- `python tools/bench/store.py`" not in made


def test_another_run_changes_the_page(page):
    text, runs = page.PAGE.read_text("utf-8"), page.read_results()
    other = json.loads(json.dumps(runs))
    name = next(name for name in other[0]["result"] if "_over_" in name)
    other[0]["result"][name] = 123.0
    assert "| 123.00 |" in page.render(text, other)
    assert page.render(page.render(text, other), runs) == text
