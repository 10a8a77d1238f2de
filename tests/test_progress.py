"""Progress where nobody looks: a line every half a minute, with a rate and the time that is left."""

from __future__ import annotations

import pytest

from ooc_influence import progress
from ooc_influence.progress import Progress, duration


@pytest.fixture
def clock(monkeypatch):
    """The seconds that have passed, as a list of one."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_lines_of_a_log(clock, capsys):
    with Progress("extract", 1000, True) as bar:
        for second in range(1, 76):
            clock[0] = float(second)
            bar.note(**{"disk wait": "3%"})
            bar.advance(10)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "extract: 300 of 1,000 rows, 10 a second, 1 min left, disk wait 3%",
        "extract: 600 of 1,000 rows, 10 a second, 40 s left, disk wait 3%",
    ]


def test_without_a_total_no_time_is_left(clock, capsys):
    with Progress("pages", None, True, unit="query") as bar:
        clock[0] = 31.0
        bar.advance(62)
    assert capsys.readouterr().err == "pages: 62 queries, 2 a second\n"


@pytest.mark.parametrize("show", [None, False])
def test_a_library_is_silent(clock, capsys, show):
    with Progress("extract", 10, show) as bar:
        clock[0] = 100.0
        bar.advance(10)
    assert capsys.readouterr().err == ""


def test_durations():
    found = [duration(seconds) for seconds in (0.2, 59, 90, 3600, 7800, 200_000)]
    assert found == ["0 s", "59 s", "2 min", "1 h 0 min", "2 h 10 min", "2 days"]
