"""The picture and the tables of attribution over bytes a row, of finetuned.py's and facts.py's results.

On both language-model truths the LDS at each method's best damping, and the query-loss difference where it was
measured, from 272 bytes to whole gradients: ours and other packages'; of a real model's planted facts the mean
reciprocal rank. ``finetuned.py`` (``--kind``) and ``facts.py`` compute what is missing; ``--status`` names it.

Run: python tools/experiments/bytes_a_row.py [--folder finetuned-output] [--facts facts-output] [--picture FILE.png].
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from common import Result, arguments, table
from finetuned import QLD_METHODS


class Family(NamedTuple):
    """Methods of one line in the picture: how their names begin, how rows are stored, words they have or lack."""

    start: str
    stored: str = ""
    words: tuple[str, ...] = ()
    lacks: tuple[str, ...] = ("reduced", "averaged", "sampled rows", "stores of")
    ours: bool = True

    def lines(self, found: Sequence[Result]) -> list[Result]:
        """Return the family's lines, by bytes."""
        lacks = [word for word in self.lacks if word not in self.words]
        own = [
            line for line in found
            if line["method"].startswith(self.start) and line.get("stored", "").startswith(self.stored)
            and all(word in line["method"] for word in self.words)
            and not any(word in line["method"] for word in lacks)
        ]  # fmt: skip
        return sorted(own, key=lambda line: line["bytes a row"])


FAMILIES = {
    "ours: signs, averaged checkpoints, + sampled rows": Family("Kronecker grid", "sign", ("averaged", "sampled rows")),
    "ours: signs, averaged checkpoints": Family("Kronecker grid", "sign", ("averaged",)),
    "ours: signs": Family("Kronecker grid", "sign"),
    "ours: int8": Family("Kronecker grid", "int8"),
    "ours: reduced, int8": Family("Kronecker grid", "int8", ("reduced",)),
    "ours: empirical Fisher, reduced": Family("importance entries", "int8", ("reduced",)),
    "TrackStar (bergson)": Family("bergson TrackStar", ours=False),
    "LoGra, EK-FAC (dattri-LLM)": Family("dattri-LLM LoGra, EK-FAC", ours=False),
    "LoGra, one Fisher": Family("LoGra", ours=False),
    "TRAK's recipe, one model": Family("TRAK", ours=False),
    "whole gradients, EK-FAC": Family("whole gradients, EK-FAC", lacks=("factors", "sampled"), ours=False),
    "whole gradients, dot product": Family("whole gradients, dot", ours=False),
}
FACTS = {
    "ours: signs": ("Kronecker grid", "as sign"),
    "ours: float16": ("Kronecker grid", "as float16"),
    "ours: empirical Fisher": ("importance entries", ""),
    "whole gradients, EK-FAC": ("whole gradients, ekfac, one", ""),
    "whole gradients, dot product": ("whole gradients, dot", ""),
}  # methods of a line in the picture of facts: how their names begin and end
FACT_COLUMNS = ("rows", "bytes a row", "mean reciprocal rank", "both among 5", "masks")
COLUMNS = ("method", "bytes a row", "LDS", "of EK-FAC's", "LDS from scratch", "1 % removed", "5 % removed")


def read(folder: Path) -> list[Result]:
    """Return the lines of a table of finetuned.py; none where there is none."""
    path = folder / "results.json"
    runs = json.loads(path.read_text())["runs"] if path.exists() else []
    return [line for line in runs if "LDS" in line]


def joined(truths: dict[str, list[Result]], removed: list[Result]) -> list[Result]:
    """Return a line a method of any family, by bytes, with what every truth says of it."""
    scratch = {(line["method"], line["stored"]): line["LDS"] for line in truths["from scratch"]}
    losses = {line["method"]: line for line in removed}
    texts = [line for line in truths["fine-tuned"] if line["bytes a row"] == 0 and line["stored"] == "text"]
    chosen = [line for family in FAMILIES.values() for line in family.lines(truths["fine-tuned"])] + texts
    found = []
    for line in sorted(chosen, key=lambda line: (line["bytes a row"], line["LDS"])):
        own: Result = {
            "method": f"{line['method']}, {line['stored']}",
            **{name: line.get(name) for name in COLUMNS[1:4]},
        }
        own["LDS from scratch"] = scratch.get((line["method"], line["stored"]), "")
        same = QLD_METHODS.get(line["method"]) == line["stored"]
        difference = losses.get(line["method"], {}) if same else {}
        own |= {"1 % removed": difference.get("1%", ""), "5 % removed": difference.get("5%", "")}
        found.append(own)
    return found


def facts(folder: Path) -> list[Result]:
    """Return the lines of facts.py's table with a name of ``FACTS``, medians over masks, by bytes.

    Each at its best damping and unit.
    """
    path = folder / "results.json"
    runs = json.loads(path.read_text())["runs"] if path.exists() else []
    groups: dict[tuple[str, str], list[Result]] = {}
    for line in runs:
        for name, (start, end) in FACTS.items():
            method, _, _ = line["method"].partition(", mask")
            if method.startswith(start) and method.endswith(end):
                groups.setdefault((name, method), []).append(line)
    found = []
    for (name, method), own in groups.items():
        masks: dict[str, list[Result]] = {}
        for line in own:
            masks.setdefault(line["method"], []).append(line)
        best = [max(each, key=lambda line: line["mean reciprocal rank"]) for each in masks.values()]
        values = {column: float(np.median([line[column] for line in best])) for column in FACT_COLUMNS[2:4]}
        size = int(np.median([line["bytes a row"] for line in best]))
        found.append({"rows": method, "bytes a row": size, **values, "masks": len(best), "family": name})
    texts = [line for line in runs if line["method"] == "BM25"]
    found += [{"rows": "BM25", **{name: line[name] for name in FACT_COLUMNS[1:4]}, "masks": ""} for line in texts]
    return sorted(found, key=lambda line: (line["bytes a row"], line["rows"]))


def draw_facts(axis: Any, found: Sequence[Result]) -> None:
    """Draw the panel of a real model's facts."""
    from matplotlib import colormaps

    for name, color, marker in zip(FACTS, (2, 0, 5, 10, 11), "sop+d", strict=True):
        points = [(line["bytes a row"], line["mean reciprocal rank"]) for line in found if line.get("family") == name]
        if points:
            axis.semilogx(*zip(*points, strict=True), marker=marker, color=colormaps["tab20"](color), label=name)
    axis.set(title="SmolLM2-135M, thirty facts", xlabel="bytes a row", ylabel="mean reciprocal rank", ylim=(0, 1))
    axis.legend(fontsize=7, frameon=False)


def draw(truths: dict[str, list[Result]], of_facts: Sequence[Result], path: Path) -> None:
    """Write the picture: a panel for each truth, and one of facts."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = {name: lines for name, lines in truths.items() if lines}
    count = len(panels) + bool(of_facts)
    figure, axes = pyplot.subplots(1, count, figsize=(4.6 * count, 4.4), layout="constrained", squeeze=False)
    if of_facts:
        draw_facts(axes[0, -1], of_facts)
    for axis, (name, lines) in zip(axes[0], panels.items(), strict=False):
        for number, (label, family) in enumerate(FAMILIES.items()):
            points = [(line["bytes a row"], line["LDS"]) for line in family.lines(lines)]
            if points:
                axis.semilogx(
                    *zip(*points, strict=True), marker="o^sDvp*PX+d<"[number], markersize=5 if family.ours else 4,
                    linestyle="-" if family.ours else ":", color=pyplot.colormaps["tab20"](number), label=label,
                )  # fmt: skip
        texts = [line for line in lines if line["method"] == "BM25"]
        for line in texts:
            axis.axhline(line["LDS"], color="grey", linewidth=0.6)
            axis.annotate("BM25", (3e2, line["LDS"]), fontsize=7, color="grey", va="bottom")
        axis.set(title=f"{name}, {lines[0]['models']} models", xlabel="bytes a row", ylabel="LDS, best damping")
    handles = {
        label: handle
        for axis in axes[0, : len(panels)]
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, fontsize=7, frameon=False)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = arguments(__doc__, "finetuned-output")
    parser.add_argument("--facts", type=Path, default=Path("facts-output"), help="results of facts.py")
    parser.add_argument("--picture", type=Path, help="where; default bytes-a-row.png in the folder")
    options = parser.parse_args()
    truths = {"fine-tuned": read(options.folder), "from scratch": read(options.folder / "from-scratch")}
    of_facts = facts(options.facts)
    if options.status:
        missing = [f"finetuned.py was not run: {name}" for name, lines in truths.items() if not lines]
        missing += [] if of_facts else ["facts.py was not run"]
        print("\n".join(missing) or "nothing is missing")
        return
    removed = options.folder / "qld.json"
    found = joined(truths, json.loads(removed.read_text()) if removed.exists() else [])
    draw(truths, of_facts, options.picture or options.folder / "bytes-a-row.png")
    text = table(found, COLUMNS) + ("\n\n" + table(of_facts, FACT_COLUMNS) if of_facts else "")
    (options.folder / "bytes-a-row.md").write_text(text + "\n")
    print(text)
    print(json.dumps({"experiment": "bytes_a_row", "runs": found, "facts": of_facts}))


if __name__ == "__main__":
    main()
