"""Progress of long work: rows done, rate and ETA on a terminal or in a log; silent in a library unless asked for.

Block loops run inside Dask tasks, which cannot carry a progress bar. They call :func:`tick` with a key; a bar opened
under that key in the same process shows it; on a Dask worker the tick travels as an event, with its key. A bar
that closes early (an error, Ctrl-C) makes the next tick stop its task, and so does cancelling the task. To show
progress elsewhere than on a terminal, use :func:`watched`.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from html import escape
from types import TracebackType
from typing import Any, Self

from ooc_influence.errors import MissingExtraError, install_extra

logger = logging.getLogger("ooc_influence")
Watcher = Callable[[str, int, int | None], None]  # what is done, rows done, rows in all
_watcher: ContextVar[Watcher | None] = ContextVar("ooc_influence_watcher", default=None)
_bars: dict[str, Progress] = {}
_stopped: set[str] = set()
_lock = threading.Lock()
_EVERY = 30.0  # seconds between two lines of a log
TOPIC = "ooc_influence"  # of events in which tasks on Dask workers report their progress


class Progress:
    """A progress line, or nothing at all.

    Parameters
    ----------
    label : str
        What is being done.
    total : int or None
        Rows in all, where known: an ETA needs it.
    show : bool or None
        ``True`` draws on stderr, or writes a line there every half a minute where it is no terminal; ``False`` and
        ``None`` (a library's default) stay silent.
    unit : str
        What is counted.
    """

    def __init__(self, label: str, total: int | None, show: bool | None, unit: str = "row") -> None:
        self.key = uuid.uuid4().hex
        self._bar: Any = None
        self._label, self._total, self._done, self._watcher = label, total, 0, _watcher.get()
        self._report(0)
        if show and (sys.stderr.isatty() or "ipykernel" in sys.modules):
            from tqdm import tqdm

            self._bar = tqdm(desc=label, total=total, unit=f" {unit}", unit_scale=True, dynamic_ncols=True)
        elif show:
            self._bar = _Lines(label, total, unit)

    def advance(self, rows: int) -> None:
        """Count ``rows`` more as done; stop a cancelled task (InterruptedError)."""
        check_cancelled()
        self._report(rows)
        if self._bar is not None:
            with _lock:
                self._bar.update(rows)

    def _report(self, rows: int) -> None:
        if self._watcher is not None:
            with _lock:
                self._done += rows
            self._watcher(self._label, self._done, self._total)

    def note(self, **notes: str) -> None:
        """Show further facts behind the rate."""
        if self._bar is not None:
            with _lock:
                self._bar.set_postfix(notes, refresh=False)

    def stop(self) -> None:
        """Make the next tick of every task under this key stop its task."""
        _bars.pop(self.key, None)
        _stopped.add(self.key)

    def __enter__(self) -> Self:
        _bars[self.key] = self
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _bars.pop(self.key, None)
        if error is not None:
            self.stop()
        if self._bar is not None:
            self._bar.close()


class _Lines:
    """The progress of long work in a log: a line every :data:`_EVERY` seconds. As ``tqdm`` is used here."""

    def __init__(self, label: str, total: int | None, unit: str) -> None:
        self._label, self._total, self._units = label, total, f"{unit[:-1]}ies" if unit.endswith("y") else f"{unit}s"
        self._done, self._notes, self._began = 0, "", time.monotonic()
        self._due = self._began + _EVERY

    def update(self, rows: int) -> None:
        """Count rows as done; write a line where it is time."""
        self._done += rows
        now = time.monotonic()
        if now >= self._due:
            self._due = now + _EVERY
            sys.stderr.write(f"{self._line(now - self._began)}\n")
            sys.stderr.flush()

    def _line(self, seconds: float) -> str:
        rate = self._done / seconds
        of = "" if self._total is None else f" of {self._total:,}"
        left = ""
        if self._total is not None and 0 < self._done <= self._total:
            left = f", {duration((self._total - self._done) / rate)} left"
        return f"{self._label}: {self._done:,}{of} {self._units}, {rate:.3g} a second{left}{self._notes}"

    def set_postfix(self, notes: dict[str, str], refresh: bool = False) -> None:
        """Note further facts for the next line."""
        self._notes = "".join(f", {name} {value}" for name, value in notes.items())

    def close(self) -> None:
        """Write nothing more."""


def duration(seconds: float) -> str:
    """Return a time in words of two parts at most, such as ``2 h 10 min``."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    minutes = round(seconds / 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 48:
        return f"{round(hours / 24)} days"
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


LONG = 600.0  # seconds of work that is confirmed before it starts


def announce(text: str, show: bool | None) -> None:
    """Tell what happens, beside progress lines: on stderr where ``show``, and in the log."""
    logger.info(text)
    if show:
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()


@contextlib.contextmanager
def watched(watcher: Watcher) -> Iterator[None]:
    """Report to ``watcher`` the progress of all that this thread starts; an error of the watcher stops the work."""
    token = _watcher.set(watcher)
    try:
        yield
    finally:
        _watcher.reset(token)


def tick(key: str, rows: int) -> None:
    """Advance the bar opened under ``key``, here or at the client of the Dask worker this runs on.

    Raises
    ------
    InterruptedError
        If the work was stopped in the meantime: threads, here or on a worker, cannot be interrupted otherwise.
    """
    bar = _bars.get(key)
    if bar is not None:
        bar.advance(rows)
    elif key in _stopped:
        raise InterruptedError("the run this task belongs to was stopped")
    elif key and "distributed" in sys.modules:
        with contextlib.suppress(ValueError, AttributeError):  # not on a worker, or distributed half imported
            sys.modules["distributed"].get_worker().log_event(TOPIC, (key, rows))
        check_cancelled()


def show(key: str, rows: int) -> None:
    """Advance the bar opened under ``key``, if it is in this process: other runs report theirs, too."""
    bar = _bars.get(key)
    if bar is not None:
        bar.advance(rows)


def check_cancelled() -> None:
    """Stop the Dask task this runs in (InterruptedError) if its client cancelled it; do nothing elsewhere."""
    state = None
    with contextlib.suppress(ValueError, AttributeError, KeyError):  # not a task of a worker
        worker = sys.modules["distributed"].get_worker()
        state = worker.state.tasks[sys.modules["distributed.worker"].thread_state.key].state
    if state == "cancelled":
        raise InterruptedError("the task was cancelled")


_EXTRAS = {"faiss": "faiss", "jinja2": "report", "matplotlib": "report", "PIL": "report", "pyarrow": "parquet"}


def optional_library(name: str, purpose: str, extra: str | None = None) -> Any:
    """Import a library that only some calls need; where it is missing, say how to install it, by ``extra`` if given."""
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
