"""A page's folder: written beside its path and published whole, with a list of its files that a later one replaces."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager
from importlib.resources import files
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ooc_influence._version import __version__
from ooc_influence.checkpoint import ClaimedOutput, ResumableOutput
from ooc_influence.errors import StoreExistsError, writing
from ooc_influence.progress import optional_library
from ooc_influence.store import check_free, parse_path

NAME = "report.json"
_KIND = "ooc-influence-report"


def _write_manifest(folder: Path) -> None:
    """List every file of a folder, in the folder."""
    paths = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    text = json.dumps({"kind": _KIND, "files": [*paths, NAME]}, indent=0)
    (folder / NAME).write_text(text + "\n", "utf-8")


def _read_manifest(folder: Path) -> frozenset[str] | None:
    """Return the files that a report lists, relative to its folder; None where the folder is no report."""
    try:
        manifest = json.loads((folder / NAME).read_text("utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(manifest, dict) or manifest.get("kind") != _KIND or not isinstance(manifest.get("files"), list):
        return None
    return frozenset(name for name in manifest["files"] if isinstance(name, str))


def _foreign_entries(folder: Path, listed: frozenset[str]) -> list[str]:
    """Return what else is in a folder, relative to it: files, and whole folders where nothing in them is listed."""
    above = {parent.as_posix() for name in listed for parent in Path(name).parents}

    def walk(part: Path) -> Iterator[str]:
        for entry in sorted(part.iterdir()):
            name = entry.relative_to(folder).as_posix()
            folders = entry.is_dir() and not entry.is_symlink()
            if folders and name in above:
                yield from walk(entry)
            elif folders or name not in listed:
                yield name

    return list(walk(folder))


def _remove_listed(entry: Path, folder: Path, listed: frozenset[str]) -> None:
    """Remove an entry if it is listed, and every folder that this leaves empty; what cannot be removed stays.

    A name that leads out of the folder is never met on the way through it.
    """
    with contextlib.suppress(OSError):
        if entry.is_dir() and not entry.is_symlink():
            for inner in sorted(entry.iterdir()):
                _remove_listed(inner, folder, listed)
            entry.rmdir()
        elif entry.relative_to(folder).as_posix() in listed:
            entry.unlink()


_SCRIPTS = (
    "core.js",
    "draw.js",
    "tokens.js",
    "cards.js",
    "queries.js",
    "labels.js",
    "overview.js",
    "ask.js",
    "start.js",
)
_DIGITS = 6  # of a number in a page


class PageFolder:
    """A folder being written beside its path, published whole when the context ends without an error.

    Parameters
    ----------
    target : Path
        The folder of the page: it may be missing, empty, or an earlier page, whose own files are replaced; other files
        in it stay.

    Attributes
    ----------
    path : Path
        Where it is written meanwhile.

    Raises
    ------
    StoreExistsError
        If something else is there.
    StoreWriteError
        If the system refuses, here or while the page is written.
    """

    def __init__(self, target: Path) -> None:
        self._target = target.resolve()
        self._parts: ClaimedOutput | None = None
        with self._writing():
            replaceable_files(self._target)
            self._target.parent.mkdir(parents=True, exist_ok=True)
            self.path = Path(
                tempfile.mkdtemp(prefix=f".{self._target.name}.", suffix=".partial", dir=self._target.parent)
            )
            (self.path / "data").mkdir()

    def _writing(self) -> AbstractContextManager[None]:
        return writing(f"to write a report to {self._target}")

    def keep_parts(self, settings: dict[str, Any]) -> ResumableOutput:
        """Return where parts of the page that take long are kept until it is published, in a hidden folder beside it.

        The same call, interrupted or killed, reads them; ``settings`` are all that they depend on.
        """
        self._parts = ClaimedOutput(parse_path(self._target), settings, "the report", ", or choose another folder")
        return self._parts

    def write_data(self, name: str, value: Any) -> None:
        """Write JSON-ready values as ``data/<name>.js``."""
        text = f"ooc.receive({json.dumps(name)}, {to_script(value)});\n"
        with self._writing():
            (self.path / "data" / f"{name}.js").write_text(text, "ascii")

    def write_page(self, title: str, *, live: bool = False) -> None:
        """Write ``index.html``, escaped by its template, and what it loads."""
        jinja2, source = optional_library("jinja2", "pages"), files("ooc_influence.report").joinpath("page")
        environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
        template = environment.from_string(source.joinpath("index.html.j2").read_text("utf-8"))
        text = template.render(title=title, scripts=_SCRIPTS, version=__version__, live=live)
        with self._writing():
            (self.path / "assets").mkdir()
            for name in ("report.css", "icon.svg", *_SCRIPTS):
                (self.path / "assets" / name).write_bytes(source.joinpath(name).read_bytes())
            (self.path / "index.html").write_text(text, "utf-8")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        done = False
        try:
            if error is None:
                with self._writing():
                    self._publish()
                done = True
        finally:
            shutil.rmtree(self.path, ignore_errors=True)  # there still where that failed
            if self._parts is not None:
                self._parts.end(finished=done)

    def _publish(self) -> None:
        _write_manifest(self.path)
        self.path.chmod(0o777 & ~_umask())
        if not self._target.exists():
            self.path.rename(self._target)
            return
        listed, earlier = replaceable_files(self._target), self.path.with_suffix(".earlier")
        self._target.rename(earlier)
        try:
            kept = _foreign_entries(earlier, listed)
            clash = next((name for name in kept if os.path.lexists(self.path / name)), None)
            if clash is not None:
                raise StoreExistsError(
                    f"expected only files of an earlier report where this one has its own; received {clash} in "
                    f"{self._target}: move it away, or choose another folder"
                )
            self.path.rename(self._target)
        except BaseException:
            earlier.rename(self._target)
            raise
        for name in kept:
            (self._target / name).parent.mkdir(parents=True, exist_ok=True)
            (earlier / name).rename(self._target / name)
        _remove_listed(earlier, earlier, listed)


def replaceable_files(target: Path) -> frozenset[str]:
    """Return the files of an earlier page at a path, which a new one may remove.

    Raises
    ------
    StoreExistsError
        If something is there that is no earlier page.
    """
    listed = _read_manifest(target)
    if listed is None:
        check_free(target, f"nothing or an earlier report (a folder with its {NAME})")
    return listed or frozenset()


def to_script(value: Any) -> str:
    """Return values as JSON that may stand in a script: ASCII, no ``<``, numbers of six digits, NaN as null."""
    return json.dumps(_tidy(value), allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def _tidy(value: Any) -> Any:
    """Return values with floats rounded to six digits, and null for those that are not finite."""
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _tidy(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_tidy(item) for item in value]
    return value


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


LISTED_A_FILE = 5000  # lines
_TEXTS_A_FILE = 2**20  # characters
_SNIPPET = 160  # characters of a text in its line


class QueryList:
    """Writes ``list-<i>``, lines of queries, and ``texts-<i>``, [query, text] of each text that is not in its line.

    White space counts as one blank in both. A line has the text's beginning, of a chat its last question's. Memory
    holds a file of each.
    """

    def __init__(self, folder: PageFolder) -> None:
        self._folder = folder
        self._lines: list[list[Any]] = []
        self._texts: list[tuple[int, str]] = []
        self._lists = self._files = self._size = 0

    def add(self, entry: dict[str, Any]) -> None:
        """Add the next query, in the form of its page."""
        whole = entry["text"] or ""
        text = " ".join(whole.split())
        question = slice(entry["question"], entry.get("answer")) if "question" in entry else slice(None)
        shown = " ".join(whole[question].split())[:_SNIPPET]
        self._lines.append(_line(entry, shown))
        if len(self._lines) == LISTED_A_FILE:
            self._write_lines()
        if text != shown:
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
