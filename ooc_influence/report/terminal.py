"""Tables and small grey images as text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

_SHADES = " ░▒▓█"


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Return an aligned text table; numbers go right, text left, floats with four significant digits."""
    cells = [[_cell(value) for value in row] for row in rows]
    widths = [max(len(line[column]) for line in [list(header), *cells]) for column in range(len(header))]
    right = [bool(rows) and isinstance(rows[0][column], (int, float, np.number)) for column in range(len(header))]
    lines = [list(header), ["-" * width for width in widths], *cells]
    return "\n".join(
        "  ".join(
            text.rjust(width) if flush else text.ljust(width)
            for text, width, flush in zip(line, widths, right, strict=True)
        ).rstrip()
        for line in lines
    )


def _cell(value: Any) -> str:
    if isinstance(value, (float, np.floating)):
        return f"{value:.4g}"
    return str(value)


def draw_images(images: Sequence[npt.NDArray[Any]], captions: Sequence[Sequence[str]], gap: int = 3) -> str:
    """Return grey images (h, w), values in [0, 1], side by side, two characters a pixel, captions (lines) above."""
    width = 2 * images[0].shape[1]
    width = max(width, *(len(line) for lines in captions for line in lines))
    rows = [(" " * gap).join(lines[number].ljust(width) for lines in captions) for number in range(len(captions[0]))]
    for row in range(images[0].shape[0]):
        parts = []
        for image in images:
            levels = np.clip(np.rint(np.asarray(image[row], float) * (len(_SHADES) - 1)), 0, len(_SHADES) - 1)
            parts.append("".join(_SHADES[int(level)] * 2 for level in levels).ljust(width))
        rows.append((" " * gap).join(parts))
    return "\n".join(line.rstrip() for line in rows)
