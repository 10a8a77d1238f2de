"""What notebooks show: small HTML tables, and optional libraries that results are handed to."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from html import escape
from typing import Any

from ooc_influence.errors import MissingExtraError, install_extra

_EXTRAS = {"jinja2": "report", "matplotlib": "report", "PIL": "report", "pyarrow": "parquet"}


def optional_library(name: str, purpose: str, extra: str | None = None) -> Any:
    """Import a library that only some calls need; ``extra`` is the package's extra that brings it.

    Raises
    ------
    MissingExtraError
        If it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        extra = extra or _EXTRAS.get(package)
        todo = f"pip install {package}" if extra is None else install_extra(extra)
        raise MissingExtraError(f"expected the library {package!r} for {purpose}; received {error}: {todo}") from error


def html_table(title: str, header: Sequence[str] | None, rows: Sequence[Sequence[Any]]) -> str:
    """Return a table of escaped text; without a header each line's first cell is one."""
    head = "" if header is None else f"<thead><tr>{''.join(_cell(name, 'th') for name in header)}</tr></thead>"
    first = "td" if header is not None else "th"
    lines = "".join(
        f"<tr>{_cell(row[0], first)}{''.join(_cell(value, 'td') for value in row[1:])}</tr>" for row in rows
    )
    return f"<table><caption>{escape(title)}</caption>{head}<tbody>{lines}</tbody></table>"


def _cell(value: Any, tag: str) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return f"<{tag}>{escape(text)}</{tag}>"
