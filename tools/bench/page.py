"""Write the tables of docs/benchmarks.md from the runs in tools/bench/results.jsonl.

Each line of that file is a run: script, arguments, date, machine, and the JSON that the script ended with. The page
shows ratios, never times, and lists the scripts that have no run in the file.

Run: python tools/bench/page.py [--run SCRIPT [ARGUMENTS]]. With --run, the benchmark SCRIPT (store, memory, ...) runs
first, and its result replaces that of its earlier run in the file.
"""

from __future__ import annotations

import argparse
import ast
import datetime
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BENCH = Path(__file__).resolve().parent
RESULTS = BENCH / "results.jsonl"
PAGE = BENCH.parent.parent / "docs" / "benchmarks.md"
MEANING = {
    "collect": "of times, 1 is no cost",
    "extraction": "of times, below 1 is faster",
    "memory": "of peaks, smaller is better",
    "pages": "of times, smaller is better",
    "rows_memory": "of peaks, 1 is flat",
    "selfcheck": "of times, smaller is better",
    "tokens": "of times, smaller is better",
    "trace": "of times, smaller is better",
    "vocabulary": "of peaks, smaller is better",
}
BEGIN, END = "<!-- made by tools/bench/page.py -->\n", "<!-- end of what is made -->\n"
OTHERWISE = ("families",)  # scripts whose results are a page of their own


def benchmarks() -> list[str]:
    """Return the names of the scripts that measure."""
    scripts = (p for p in BENCH.glob("*.py") if p != Path(__file__).resolve() and p.stem not in OTHERWISE)
    return sorted(path.stem for path in scripts if '"__main__"' in path.read_text("utf-8"))


def summary(name: str) -> str:
    """Return the first line of a script's docstring."""
    said = ast.get_docstring(ast.parse((BENCH / f"{name}.py").read_text("utf-8")))
    return (said or "").splitlines()[0]


def read_results(path: Path = RESULTS) -> list[dict[str, Any]]:
    """Return the runs, by script."""
    runs = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    return sorted(runs, key=lambda run: str(run["script"]))


def ratios(result: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Yield what was measured, against what, and the ratio, which may be void."""
    for key, value in result.items():
        ours, over, limit = key.partition("_over_")
        if over and not isinstance(value, (dict, list)):
            shown = "void" if value is None else f"{value:.2f}"
            yield ours.replace("_", " "), limit.replace("_", " "), shown


def command(run: dict[str, Any]) -> str:
    """Return the command line of a run."""
    return " ".join(["python", f"tools/bench/{run['script']}.py", *run["arguments"]])


def tables(runs: list[dict[str, Any]]) -> str:
    """Return the Markdown of all tables, and the list of scripts without one."""
    parts = []
    for run in runs:
        lines = [f"### {run['script']}", "", summary(run["script"]), ""]
        lines += [f"`{command(run)}`, {run['machine']}, {run['date']}:", ""]
        meaning = MEANING.get(run["script"], "of rates, above 1 is faster")
        lines += [f"| ours | over | ratio ({meaning}) |", "|---|---|---|"]
        lines += [f"| {' | '.join(row)} |" for row in ratios(run["result"])]
        parts.append("\n".join(lines) + "\n")
    missing = [name for name in benchmarks() if name not in {run["script"] for run in runs}]
    if missing:
        rest = [f"- `python tools/bench/{name}.py`: {summary(name)}" for name in missing]
        parts.append("\n".join(["### Not in these tables", "", *rest]) + "\n")
    return "\n".join(parts)


def render(page: str, runs: list[dict[str, Any]]) -> str:
    """Return a page with its generated part updated."""
    return replace_made(page, tables(runs), "tools/bench/page.py")


def replace_made(page: str, made: str, script: str) -> str:
    """Return a page in which the part that a script generates is replaced."""
    begin = BEGIN.replace("tools/bench/page.py", script)
    before, _, rest = page.partition(begin)
    after = rest.partition(END)[2]
    return f"{before}{begin}\n{made}\n{END}{after}"


def measure(name: str, arguments: list[str], machine: str) -> None:
    """Run a benchmark, and replace its earlier result."""
    script = [sys.executable, BENCH / f"{name}.py", *arguments]
    done = subprocess.run(script, stdout=subprocess.PIPE, text=True, check=True)
    run = {"script": name, "arguments": arguments, "date": datetime.date.today().isoformat(), "machine": machine}
    run["result"] = json.loads(done.stdout.splitlines()[-1])
    others = [other for other in read_results() if other["script"] != name] if RESULTS.exists() else []
    lines = [json.dumps(each) for each in sorted([*others, run], key=lambda each: str(each["script"]))]
    RESULTS.write_text("\n".join(lines) + "\n", "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--machine", default=f"{os.cpu_count()} shared cores", help="in words, with --run")
    parser.add_argument("--run", nargs=argparse.REMAINDER, default=[], help="a script and its arguments")
    options = parser.parse_args()
    if options.run:
        if options.run[0] not in benchmarks():
            parser.error(f"expected one of {', '.join(benchmarks())}; received {options.run[0]}")
        measure(options.run[0], options.run[1:], options.machine)
    PAGE.write_text(render(PAGE.read_text("utf-8"), read_results()), "utf-8")


if __name__ == "__main__":
    main()
