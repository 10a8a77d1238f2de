"""The picture and the table of attribution over bytes a row, on both language-model truths, of finetuned.py's results.

LDS at each method's best damping, and the query-loss difference where it was measured, from 272 bytes to whole
gradients: ours and other packages'. ``finetuned.py`` (``--kind``) computes what is missing; ``--status`` names it.

Run: python tools/experiments/bytes_a_row.py [--folder finetuned-output] [--picture FILE.png].
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from common import Result, arguments, table


class Family(NamedTuple):
    """Methods of one line in the picture: how their names begin, how rows are stored, words they have or lack."""

    start: str
    stored: str = ""
    words: tuple[str, ...] = ()
    lacks: tuple[str, ...] = ("reduced", "averaged", "sampled rows")
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
        difference = losses.get(line["method"], {}) if line["stored"] != "sign" else {}  # of the first mask's int8 rows
        own |= {"1 % removed": difference.get("1%", ""), "5 % removed": difference.get("5%", "")}
        found.append(own)
    return found


def draw(truths: dict[str, list[Result]], path: Path) -> None:
    """Write the picture: a panel for each truth."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = {name: lines for name, lines in truths.items() if lines}
    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(5.2 * len(panels), 4.4), layout="constrained", squeeze=False
    )
    for axis, (name, lines) in zip(axes[0], panels.items(), strict=True):
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
        label: handle for axis in axes[0] for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, fontsize=7, frameon=False)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = arguments(__doc__, "finetuned-output")
    parser.add_argument("--picture", type=Path, help="where; default bytes-a-row.png in the folder")
    options = parser.parse_args()
    truths = {"fine-tuned": read(options.folder), "from scratch": read(options.folder / "from-scratch")}
    if options.status:
        missing = [name for name, lines in truths.items() if not lines]
        print("\n".join(f"finetuned.py was not run: {name}" for name in missing) or "nothing is missing")
        return
    removed = options.folder / "qld.json"
    found = joined(truths, json.loads(removed.read_text()) if removed.exists() else [])
    draw(truths, options.picture or options.folder / "bytes-a-row.png")
    text = table(found, COLUMNS)
    (options.folder / "bytes-a-row.md").write_text(text + "\n")
    print(text)
    print(json.dumps({"experiment": "bytes_a_row", "runs": found}))


if __name__ == "__main__":
    main()
