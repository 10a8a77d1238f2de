"""The folder of a page: its own files, and data as scripts that hand JSON to a function.

A page opened from disk may not fetch, but it may load scripts from beside it. What is data stays data: JSON in ASCII
with ``<`` escaped, so that no text can end the script or start another (nor can U+2028, a line end to some parsers).
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ooc_influence._version import __version__
from ooc_influence.errors import OocInfluenceError, StoreExistsError, StoreWriteError, refused
from ooc_influence.notebook import optional_library
from ooc_influence.report.manifest import NAME, foreign_entries, read_manifest, remove_own, write_manifest

SCRIPTS = ("core.js", "draw.js", "cards.js", "queries.js", "labels.js", "overview.js", "ask.js", "start.js")
_DIGITS = 6  # of a number in a page


class PageFolder:
    """A folder being written beside its place, put there whole when the context ends without an error.

    Parameters
    ----------
    target : Path
        Where the page goes: nothing may be there but an empty folder, or an earlier page, whose own files are
        replaced; what else is in its folder stays.

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
        with self._writing():
            check_free(self._target)
            self._target.parent.mkdir(parents=True, exist_ok=True)
            self.path = Path(
                tempfile.mkdtemp(prefix=f".{self._target.name}.", suffix=".partial", dir=self._target.parent)
            )
            (self.path / "data").mkdir()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if isinstance(error, OocInfluenceError):
                raise
            raise StoreWriteError(refused(f"to write a report to {self._target}", error)) from error

    def write_data(self, name: str, value: Any) -> None:
        """Write JSON-ready values as ``data/<name>.js``."""
        text = f"ooc.receive({json.dumps(name)}, {to_script(value)});\n"
        with self._writing():
            (self.path / "data" / f"{name}.js").write_text(text, "ascii")

    def write_page(self, title: str, *, live: bool = False) -> None:
        """Write ``index.html`` and what it loads."""
        text = page(title, live=live)
        with self._writing():
            (self.path / "assets").mkdir()
            for name in ("report.css", "icon.svg", *SCRIPTS):
                (self.path / "assets" / name).write_bytes(asset(name))
            (self.path / "index.html").write_text(text, "utf-8")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            shutil.rmtree(self.path, ignore_errors=True)
            return
        try:
            with self._writing():
                self._publish()
        finally:
            shutil.rmtree(self.path, ignore_errors=True)  # there still where that failed

    def _publish(self) -> None:
        write_manifest(self.path)
        self.path.chmod(0o777 & ~_umask())
        if not self._target.exists():
            self.path.rename(self._target)
            return
        own, earlier = check_free(self._target), self.path.with_suffix(".earlier")
        self._target.rename(earlier)
        try:
            kept = foreign_entries(earlier, own)
            self._check_apart(kept)
            self.path.rename(self._target)
        except BaseException:
            earlier.rename(self._target)
            raise
        for name in kept:
            (self._target / name).parent.mkdir(parents=True, exist_ok=True)
            (earlier / name).rename(self._target / name)
        remove_own(earlier, own)

    def _check_apart(self, kept: list[str]) -> None:
        """Check that what stays in the folder leaves room for the page's files."""
        taken = next((name for name in kept if os.path.lexists(self.path / name)), None)
        if taken is not None:
            raise StoreExistsError(
                f"expected only files of an earlier report where this one has its own; received {taken} in "
                f"{self._target}: move it away, or choose another folder"
            )


def check_free(target: Path) -> frozenset[str]:
    """Check that a page may be written at a place; return the files there that it may remove.

    Raises
    ------
    StoreExistsError
        If something is there that is no earlier page.
    """
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return frozenset()
    own = read_manifest(target)
    if own is None:
        raise StoreExistsError(
            f"expected nothing or an earlier report (a folder with its {NAME}) at {target}; received something else: "
            "choose another folder"
        )
    return own


def to_script(value: Any) -> str:
    """Return values as JSON that may stand in a script: ASCII, no ``<``, numbers of six digits, NaN as null."""
    return json.dumps(tidy(value), allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def tidy(value: Any) -> Any:
    """Return values with floats rounded to six digits, and null for those that are not finite."""
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): tidy(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [tidy(item) for item in value]
    return value


def asset(name: str) -> bytes:
    """Return a file that the page loads."""
    return files("ooc_influence.report").joinpath("page", name).read_bytes()


def page(title: str, *, live: bool) -> str:
    """Return ``index.html``, escaped by its template.

    Raises
    ------
    MissingExtraError
        Without Jinja2.
    """
    jinja2 = optional_library("jinja2", "pages")
    source = files("ooc_influence.report").joinpath("page", "index.html.j2").read_text("utf-8")
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(source)
    text: str = template.render(title=title, scripts=SCRIPTS, version=__version__, live=live)
    return text


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
