"""The code blocks of README.md and docs/, and the marks that say what is done with each.

A mark is an HTML comment on the line before a block:

======================  ===============================================================================================
``<!-- run -->``        runs, in order, in a folder of the page's own: bash by ``bash -e``, Python as a script
``<!-- run slow -->``   the same under ``-m slow``, with all others of the page
``<!-- syntax: ... -->``  is parsed only, for the reason given
``<!-- needs: ... -->``   is parsed only, for want of the thing named
``<!-- prints -->``     consecutive lines that the blocks above it on the page print, compared with what they do
``<!-- output -->``     nobody types it: output, a drawing
======================  ===============================================================================================

``<!-- setup: ... -->`` anywhere on a page says which folder it starts from. At first it holds those of its files that
the visible line "Starts from ..." names (:mod:`test_docs`).
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
_MARK = re.compile(r"<!-- (run|run slow|prints|output|syntax: .+|needs: .+) -->")
_SETUP = re.compile(r"^<!-- setup: (.+) -->$", re.M)
CODE, TEXT = ("bash", "python"), ("text",)
LANGUAGES = {"run": CODE, "syntax": CODE, "needs": CODE, "prints": TEXT, "output": TEXT}


class BlockError(ValueError):
    """A block without a mark, or with one that does not fit it."""


@dataclass(frozen=True)
class Block:
    """A fenced block: where it is, its language, its text, and its mark."""

    page: str
    line: int
    language: str
    text: str
    mark: str

    @property
    def kind(self) -> str:
        """run, run slow, syntax, needs, prints or output."""
        return self.mark.split(":")[0]

    @property
    def what(self) -> str:
        """The reason, or the thing needed."""
        return self.mark.partition(": ")[2]


def read_blocks(page: str, text: str) -> list[Block]:
    """Return the blocks of a page in order."""
    lines = text.splitlines()
    found, number = [], 0
    while number < len(lines):
        line = lines[number]
        if not line.lstrip().startswith(("```", "~~~")):
            number += 1
            continue
        where = f"{page}:{number + 1}"
        language = re.fullmatch(r"```([a-z]+)", line)
        if language is None:
            raise BlockError(f"{where}: expected ``` and a language at the start of the line; received {line!r}")
        mark = _MARK.fullmatch(lines[number - 1]) if number else None
        if mark is None:
            raise BlockError(f"{where}: expected a mark (tests/blocks.py) on the line before; received none")
        if language[1] not in LANGUAGES[mark[1].split(":")[0].split()[0]]:
            raise BlockError(f"{where}: expected another mark of a {language[1]} block; received {mark[1]!r}")
        stop = lines.index("```", number + 1)
        block = "\n".join(lines[number + 1 : stop]) + "\n"
        found.append(Block(page, number + 1, language[1], block, mark[1]))
        number = stop + 1
    return found


def setups(text: str) -> list[str]:
    """Return what a page's folder holds at first."""
    found = _SETUP.search(text)
    return found[1].split() if found else []


def summary(blocks: list[Block]) -> str:
    """Return the counts as CONTRIBUTING.md states them."""
    kinds = Counter(block.kind for block in blocks)
    needs = Counter(block.what for block in blocks if block.kind == "needs")
    named = ", ".join(f"{what} {count}" for what, count in sorted(needs.items()))
    return (
        f"{kinds['run']} are run, {kinds['run slow']} more with `-m slow`, {kinds['syntax']} are parsed only, "
        f"{kinds['needs']} need something ({named}), {kinds['output'] + kinds['prints']} are output, "
        f"{kinds['prints']} of it compared with what is printed."
    )
