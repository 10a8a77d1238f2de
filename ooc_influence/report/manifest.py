"""The list of a report's own files, kept in it: what may be removed when another report takes its place."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

NAME = "report.json"
_KIND = "ooc-influence-report"


def write_manifest(folder: Path) -> None:
    """List every file of a folder, in the folder."""
    own = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    text = json.dumps({"kind": _KIND, "files": [*own, NAME]}, indent=0)
    (folder / NAME).write_text(text + "\n", "utf-8")


def read_manifest(folder: Path) -> frozenset[str] | None:
    """Return the files that a report lists, relative to its folder; None where the folder is no report."""
    try:
        found = json.loads((folder / NAME).read_text("utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(found, dict) or found.get("kind") != _KIND or not isinstance(found.get("files"), list):
        return None
    return frozenset(name for name in found["files"] if isinstance(name, str))


def foreign_entries(folder: Path, own: frozenset[str]) -> list[str]:
    """Return what else is in a folder, relative to it: files, and whole folders where nothing in them is listed."""
    above = {parent.as_posix() for name in own for parent in Path(name).parents}

    def walk(part: Path) -> Iterator[str]:
        for entry in sorted(part.iterdir()):
            name = entry.relative_to(folder).as_posix()
            folders = entry.is_dir() and not entry.is_symlink()
            if folders and name in above:
                yield from walk(entry)
            elif folders or name not in own:
                yield name

    return list(walk(folder))


def remove_own(folder: Path, own: frozenset[str]) -> None:
    """Remove the listed files that are in a folder, and every folder that this leaves empty; what fails stays."""
    for entry in sorted(folder.iterdir()) if folder.is_dir() else ():
        _remove(entry, folder, own)
    _rmdir(folder)


def _remove(entry: Path, folder: Path, own: frozenset[str]) -> None:
    """Remove an entry if it is listed; a name that leads out of the folder is never met on the way through it."""
    if entry.is_dir() and not entry.is_symlink():
        for inner in sorted(entry.iterdir()):
            _remove(inner, folder, own)
        _rmdir(entry)
    elif entry.relative_to(folder).as_posix() in own:
        try:
            entry.unlink()
        except OSError:
            return


def _rmdir(folder: Path) -> None:
    try:
        folder.rmdir()
    except OSError:
        return
