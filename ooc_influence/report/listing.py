"""The list of queries: a line each, loaded first; long texts beside it, loaded when somebody searches."""

from __future__ import annotations

from typing import Any

from ooc_influence.report.folder import PageFolder

LISTED_A_FILE = 5000  # lines
_TEXTS_A_FILE = 2**20  # characters
_SNIPPET = 160  # characters of a text in its line


class QueryList:
    """Writes ``list-<i>``, lines of queries, and ``texts-<i>``, [query, text] of each text longer than its line's.

    White space counts as one blank in both. Memory holds a file of each.

    Parameters
    ----------
    folder : PageFolder
        Where.
    """

    def __init__(self, folder: PageFolder) -> None:
        self._folder = folder
        self._lines: list[list[Any]] = []
        self._texts: list[tuple[int, str]] = []
        self._lists = self._files = self._size = 0

    def add(self, entry: dict[str, Any]) -> None:
        """Add the next query, as its page takes it."""
        text = " ".join((entry["text"] or "").split())
        self._lines.append(_line(entry, text[:_SNIPPET]))
        if len(self._lines) == LISTED_A_FILE:
            self._write_lines()
        if len(text) > _SNIPPET:
            self._texts.append((entry["number"], text))
            self._size += len(text)
        if self._size >= _TEXTS_A_FILE:
            self._write_texts()

    def finish(self) -> int:
        """Write what is left; return the number of files of texts."""
        if self._lines:
            self._write_lines()
        if self._texts:
            self._write_texts()
        return self._files

    def _write_lines(self) -> None:
        self._folder.write_data(f"list-{self._lists}", self._lines)
        self._lists, self._lines = self._lists + 1, []

    def _write_texts(self) -> None:
        self._folder.write_data(f"texts-{self._files}", self._texts)
        self._files, self._size, self._texts = self._files + 1, 0, []


def _line(entry: dict[str, Any], text: str) -> list[Any]:
    """Return a query as a line: id, text, label, source, loss, best and worst score, image, 1 if it is dropped."""
    best, worst = (entry[side][0][1] if entry[side] else None for side in ("proponents", "opponents"))
    facts = [entry[name] for name in ("label", "source", "loss")]
    return [entry["id"], text, *facts, best, worst, entry.get("image"), *([1] if entry["dropped"] else [])]
