"""Draw docs/img/answer.png, the picture in docs/examples.md: a test image of the demo and the training rows behind it.

The demo trains a digit classifier on data with a tenth of the labels wrong, and explains the misclassified test image
of largest loss. This script runs it and draws the answer; every number in the picture is the demo's own.

Run: python tools/picture.py [--out FILE] [--folder FOLDER]. Extras demo and report.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from ooc_influence.cli.demo import Digits, load_digits

PICTURE = Path(__file__).resolve().parent.parent / "docs" / "img" / "answer.png"
GREEN, RED, GREY = "#1a7f37", "#cf222e", "#57606a"


def draw(explained: dict[str, Any], digits: Digits) -> Figure:
    """Return the figure: the query on the left, its proponents above its opponents on the right."""
    figure = Figure(figsize=(10.2, 4.2), facecolor="white")
    query, label, predicted = explained["query"], explained["label"], explained["predicted"]
    test_images = digits.images[len(digits.flipped) :]
    draw_image(figure, test_images[query], (0.02, 0.20, 0.23, 0.52), GREY)
    article = "an" if predicted == 8 else "a"
    figure.text(0.135, 0.80, f"Why is this {label} taken for {article} {predicted}?", ha="center", size=12)
    figure.text(0.135, 0.13, f"test image {query}", ha="center", size=9, color=GREY)
    draw_rows(figure, digits, explained["proponents"], 0.56, GREEN)
    draw_rows(figure, digits, explained["opponents"], 0.07, RED)
    for kind, meaning, colour, height in (
        ("proponents:", f"training rows that pull the model towards {label}", GREEN, 0.915),
        ("opponents:", f"training rows that pull it away from {label}", RED, 0.425),
    ):
        figure.text(0.32, height, kind, size=12, color=colour, weight="bold")
        figure.text(0.44, height, meaning, size=11)
    return figure


def draw_rows(figure: Figure, digits: Digits, entries: list[dict[str, Any]], bottom: float, colour: str) -> None:
    """Draw training images side by side, each with its row, score and label."""
    for column, entry in enumerate(entries):
        left = 0.32 + 0.23 * column
        draw_image(figure, digits.images[entry["row"]], (left, bottom + 0.02, 0.13, 0.29), colour)
        captions = [f"row {entry['row']}", f"score {entry['score']:+.0f}", f"label {entry['label']}"]
        for line, caption in enumerate(captions):
            figure.text(left + 0.138, bottom + 0.25 - 0.065 * line, caption, size=9)
        if entry["wrong"]:
            figure.text(left + 0.138, bottom + 0.055, "mislabelled", size=9, color=RED, weight="bold")


def draw_image(figure: Figure, pixels: Any, box: tuple[float, float, float, float], colour: str) -> None:
    """Draw an 8 x 8 image in a frame."""
    axes = figure.add_axes(box)
    axes.imshow(pixels.reshape(8, 8), cmap="gray_r", vmin=0, vmax=1)
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set(color=colour, linewidth=1.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=PICTURE, help="the PNG to write")
    parser.add_argument("--folder", help="the demo's folder; what is there from an earlier run is used again")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        command = [sys.executable, "-m", "ooc_influence", "demo", "--json", "--out", options.folder or temporary]
        result = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    figure = draw(result["explained"], load_digits())
    figure.savefig(options.out, dpi=110, metadata={"Software": None})  # the same answer makes the same bytes


if __name__ == "__main__":
    main()
