"""What is stored of model families, against float64 autograd: verified share, worst error, what is refused.

A family of tests/families/ is a small random model as people have them, with a loss and batches of several shapes. In
each of two modes, by default and with ``fallback=True``, everything is extracted, once in the order of the batches and
once with the batch first that has as many samples as tokens; every stored entry is compared with the gradient of the
same loss by ``torch.autograd``, in float64, one sample in a batch by itself. The outcome is one of

    right         all that is stored is right, and the store claims no more than that
    refused       an error of the package's family, before a row was stored (late: after a batch whose rows are right)
    wrong         an entry is off by more than 2e-4 of its layer's largest
    overclaimed   the store says that it covers more than is right
    frozen        entries of frozen parameters are stored
    crashed       another error
    unbuilt       this version of its library does not build or differentiate the family

Findings are kept, a line each, in --kept; a family is examined again when the package's or the families' code has
changed, or with --again. --page writes their table into docs/families.md.

Run: python tools/bench/families.py [--quick] [--only NAME,FIELD]. The last line is JSON.
"""

from __future__ import annotations

import argparse
import fnmatch
import hashlib
import json
import logging
import os
import sys
import warnings
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent / "tests"))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from families import FAMILIES, FIELDS, MODES, QUICK, TOLERANCE, Family, Finding, examine, oracle
from page import replace_made

BENCH = Path(__file__).resolve().parent
ROOT = BENCH.parent.parent
KEPT = BENCH / "families.jsonl"
PAGE = ROOT / "docs" / "families.md"
GOOD = ("right", "refused", "refused late")
Result = dict[str, Any]


def digest(family: Family) -> str:
    """Return a digest of the code that a finding depends on."""
    tests = ROOT / "tests" / "families"
    files = [
        *sorted((ROOT / "ooc_influence").rglob("*.py")),
        *(tests / f"{n}.py" for n in ("base", "check", family.field)),
    ]
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:12]


def read_kept(path: Path) -> dict[tuple[str, str], Result]:
    """Return what is kept, by family and mode, of families that there are."""
    lines = path.read_text("utf-8").splitlines() if path.exists() else []
    found = {(result["family"], result["mode"]): result for result in map(json.loads, lines)}
    return {key: found[key] for key in ((name, mode) for name in FAMILIES for mode in MODES) if key in found}


def keep(path: Path, kept: dict[tuple[str, str], Result]) -> None:
    """Write what is kept; a run that is killed loses one family."""
    new = path.with_suffix(".new")
    new.write_text("".join(json.dumps(kept[key]) + "\n" for key in sorted(kept)), "utf-8")
    new.replace(path)


def chosen(only: str, quick: bool) -> list[Family]:
    """Return the families asked for, by name, pattern or field."""
    patterns = [part for part in only.split(",") if part]
    picked = [
        family
        for name, family in FAMILIES.items()
        if (not quick or name in QUICK)
        and (not patterns or any(fnmatch.fnmatchcase(what, p) for what in (name, family.field) for p in patterns))
    ]
    if not picked:
        sys.exit(f"expected names, patterns or fields of families; received {only!r}: none of them")
    return picked


def examine_all(families: Iterable[Family], path: Path, *, again: bool) -> list[Result]:
    """Examine what is not kept of this code, and return the findings of all families given."""
    kept, results = read_kept(path), []
    for family in families:
        code = digest(family)
        missing = [m for m in MODES if again or kept.get((family.name, m), {}).get("code") != code]
        if missing:
            for finding in examine_one(family, missing):
                kept[family.name, finding.mode] = shortened(finding.to_dict()) | {"code": code}
                print(line(kept[family.name, finding.mode]), file=sys.stderr, flush=True)
            keep(path, kept)
        results += [kept[family.name, mode] for mode in MODES]
    return results


def examine_one(family: Family, modes: list[str]) -> list[Finding]:
    """Examine a family; one that another version of its library does not build is said to be unbuilt."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            case = family.case()
            expected = oracle(case)
        except Exception as error:
            said = f"{type(error).__name__}: {error}".splitlines()[0]
            return [Finding(family.name, family.field, mode, outcome="unbuilt", message=said) for mode in modes]
    return [examine(family, mode, case, expected) for mode in modes]


def line(found: Result) -> str:
    """Return a finding in a line."""
    return (
        f"{found['family']:24} {found['mode']:9} {found['outcome']:12} {found['share']:7.2%} {found['worst']:8.1e} "
        f"{found['seconds']:5.1f} s {found['message'][:200]}"
    )


def shown(found: Result) -> str:
    """Return a finding in the table's words."""
    share = f"{found['share']:.1%}" if found["share"] < 0.9995 else "all"
    if found["outcome"] == "right":
        return f"{share}, {found['worst']:.0e}"
    return f"refused after {share}" if found["outcome"] == "refused late" else found["outcome"]


def remark(default: Result, fallback: Result) -> str:
    """Return what is refused or left out, and why, in one line."""
    parts = []
    for found in (default, fallback):
        if found["outcome"] not in ("right",) and found["message"] not in "".join(parts):
            where = "with fallback: " if found is fallback else ""
            parts.append(f"{where}{_short(found['message'])}")
    if default["outcome"] == "right":
        parts.append(_left_out(default))
    return "; ".join(filter(None, parts))


def shortened(found: Result) -> Result:
    """Return what is kept of a finding: of what is left out, how much it is, and the largest two with their reasons."""
    told = {name: (facts["share"], f"{facts['reason']}, ") for name, facts in found["left_out"].items()}
    left = told or {name: (facts["share"], "") for name, facts in found["missing"].items()}
    first = sorted(left, key=lambda name: -left[name][0])[:2]
    named = [f"`{name or '(the model)'}` ({left[name][1]}{left[name][0]:.1%})" for name in first]
    short = {key: value for key, value in found.items() if key not in ("warned", "missing", "left_out")}
    return short | {"left_out": len(left), "largest_left_out": named}


def _left_out(found: Result) -> str:
    rest = found["left_out"] - len(found["largest_left_out"])
    more = f" and {rest} more" if rest else ""
    return f"left out: {', '.join(found['largest_left_out'])}{more}" if found["left_out"] else ""


_DIFFERS = "expected the entries gathered from each layer to be autograd's gradients of the loss; received others of "


def _short(message: str) -> str:
    said = message.split(": leave ")[0].split(": widen the selection")[0].replace("|", "\\|")
    said = said.replace(_DIFFERS, "differs from autograd: ")
    return said if len(said) <= 160 else said[:160].rsplit(" ", 1)[0] + " …"


def table(kept: dict[tuple[str, str], Result]) -> str:
    """Return the Markdown of all findings that are kept."""
    names = sorted({name for name, _ in kept}, key=list(FAMILIES).index)
    counts = summary(list(kept.values()))
    parts = [
        f"{counts['families']} families in two modes: {counts['right']} right, {counts['refused']} refused, "
        f"{counts['silently_wrong']} silently wrong; largest error among the correct ones {counts['worst']:.1e}.\n"
    ]
    for module in FIELDS:
        field = module.__name__.rpartition(".")[2]
        rows = [name for name in names if FAMILIES[name].field == field and {(name, m) for m in MODES} <= set(kept)]
        if not rows:
            continue
        title = (module.__doc__ or field).splitlines()[0].rstrip(".")
        lines = [f"### {title}", "", "| family | parameters | default | fallback | refused or left out |"]
        lines.append("|---|---|---|---|---|")
        for name in rows:
            default, fallback = (kept[name, mode] for mode in MODES)
            cells = (name, str(default["parameters"]), shown(default), shown(fallback), remark(default, fallback))
            lines.append(f"| {' | '.join(cells)} |")
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def summary(results: list[Result]) -> Result:
    """Return the counts."""
    outcomes = Counter(result["outcome"] for result in results)
    bad = [result for result in results if result["outcome"] not in GOOD]
    right = [result for result in results if result["outcome"] == "right"]
    return {
        "bench": "families",
        "families": len({result["family"] for result in results}),
        "right": outcomes["right"],
        "whole": sum(result["share"] > 0.9995 for result in right),
        "refused": outcomes["refused"] + outcomes["refused late"],
        "refused_late": outcomes["refused late"],
        "silently_wrong": outcomes["wrong"] + outcomes["overclaimed"] + outcomes["frozen"],
        "crashed": outcomes["crashed"],
        "unbuilt": outcomes["unbuilt"],
        "worst": (worst := max((result["worst"] for result in right), default=0.0)),
        "worst_over_tolerance": worst / TOLERANCE,
        "bad": sorted({f"{result['family']} ({result['mode']}): {result['outcome']}" for result in bad}),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="names, patterns or fields, with commas between them")
    parser.add_argument("--quick", action="store_true", help="a family of each kind")
    parser.add_argument("--again", action="store_true", help="examine what is kept of the same code, too")
    parser.add_argument("--kept", type=Path, default=KEPT, help="findings, a line each")
    parser.add_argument("--page", action="store_true", help="write the table of what is kept into docs/families.md")
    parser.add_argument("--list", action="store_true", help="name the families and end")
    options = parser.parse_args()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    families = chosen(options.only, options.quick)
    if options.list:
        print("\n".join(f"{family.name:28} {family.field}" for family in families))
        return
    results = examine_all(families, options.kept, again=options.again)
    if options.page:
        made = table(read_kept(options.kept))
        PAGE.write_text(replace_made(PAGE.read_text("utf-8"), made, "tools/bench/families.py"), "utf-8")
    print(json.dumps(summary(results)))


if __name__ == "__main__":
    main()
