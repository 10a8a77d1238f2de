"""The one family of exceptions.

Every message is one line: what was expected, what was received, what to do. Children also subclass the
builtin a caller would reach for (``ValueError``, ``FileNotFoundError``, ...), so that general code catches them.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

_PACKAGE = f"{Path(__file__).parent}{os.sep}"
_ADVICE = {  # by the system's error number
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "make room"),
    errno.EFBIG: "lift the limit on the size of files",
    **dict.fromkeys((errno.EACCES, errno.EPERM), "change the permissions"),
    errno.EROFS: "make it writable",
    **dict.fromkeys((errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG), "check the path"),
}


class OocInfluenceError(Exception):
    """Base of every error this package raises for a reason the user can act on.

    Line breaks of the message, which other libraries' errors bring along, become spaces.
    """

    def __init__(self, message: object = "") -> None:
        super().__init__(" ".join(line.strip() for line in str(message).splitlines() if line.strip()))

    def __reduce__(self) -> tuple[Any, ...]:
        """Rebuild it through its constructor: a MemoryError copied without it, as Dask copies errors, fails."""
        return type(self), (str(self),), self.__dict__


class OocInfluenceWarning(UserWarning):
    """Something the user should know; the call continues."""


def warn(message: str) -> None:
    """Warn of something at the line of the caller's code that called this package."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_PACKAGE):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, OocInfluenceWarning, stacklevel=level)


class InputError(OocInfluenceError, ValueError):
    """An argument, a batch or a loss that is not what the call expects."""


class UnsupportedModelError(OocInfluenceError, ValueError):
    """A model whose layers cannot be tapped as asked."""


class StoreNotFoundError(OocInfluenceError, FileNotFoundError):
    """No store at the path given."""


class StoreExistsError(OocInfluenceError, FileExistsError):
    """Something is already where a store or an output is to be written."""


class StoreFormatError(OocInfluenceError, ValueError):
    """The path holds something that is not a store this version can read."""


class StoreDamagedError(OocInfluenceError, ValueError):
    """A committed chunk is missing, short or fails its checksum."""


class StoreBusyError(OocInfluenceError, BlockingIOError):
    """Another process is writing the same range of the store."""


class StoreReadError(OocInfluenceError, OSError):
    """The system refuses to read a file of a store that is there."""


class StoreWriteError(OocInfluenceError, OSError):
    """The disk refused a write; what was committed before stays readable."""


class MismatchError(OocInfluenceError, ValueError):
    """Two things that have to agree (masks, models, settings) do not."""


class CurvatureNotFoundError(OocInfluenceError, LookupError):
    """No curvature of that name or at that path."""


class StaleCurvatureError(OocInfluenceError, ValueError):
    """A curvature that was fitted on other rows than the store holds now."""


class SingularFisherError(OocInfluenceError, ArithmeticError):
    """Damping is zero (or negative) and the Fisher matrix has no inverse."""


class MemoryBudgetError(OocInfluenceError, MemoryError):
    """A stage cannot run within its memory budget."""


class RunFailedError(OocInfluenceError, RuntimeError):
    """A retraining run that raised, measured nothing of use, or whose process died."""


class ClusterError(OocInfluenceError, RuntimeError):
    """A Dask cluster that cannot be reached, or whose workers die."""


class MissingExtraError(OocInfluenceError, ImportError):
    """An optional dependency is not installed."""


def install_extra(extra: str) -> str:
    """Return the advice of a message about a missing extra of the package."""
    return f"install the extra {extra!r} (in the clone: pip install '.[{extra}]')"


class NonFiniteError(OocInfluenceError, ArithmeticError):
    """NaN or Inf in a loss or a gradient.

    Attributes
    ----------
    rows : list of int
        Row numbers (of the store being written) that are not finite.
    """

    def __init__(self, message: str, rows: Sequence[int]) -> None:
        super().__init__(message)
        self.rows = list(rows)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self), self.rows), self.__dict__


def counted(count: int, noun: str, many: str | None = None) -> str:
    """Return a number with its noun: ``1 row``, ``2 rows``."""
    return f"{count} {noun if count == 1 else many or noun + 's'}"


def listed(items: Iterable[object], most: int, separator: str = ", ") -> str:
    """Return the first ``most`` items in words, and how many more there are."""
    texts = [str(item) for item in items]
    more = f" and {len(texts) - most} more" if len(texts) > most else ""
    return separator.join(texts[:most]) + more


@contextlib.contextmanager
def writing(what: str, then: str = "") -> Iterator[None]:
    """Raise what the system refuses in the context as a :class:`StoreWriteError`; arguments as of :func:`refused`.

    Raises
    ------
    StoreWriteError
        If the system refuses something. Errors of the family pass as they are.
    """
    try:
        yield
    except OSError as error:
        if isinstance(error, OocInfluenceError):
            raise
        raise StoreWriteError(refused(what, error, then)) from error


def refused(what: str, error: OSError, then: str = "") -> str:
    """Return the message for something that the system refused, with its reason and advice.

    Parameters
    ----------
    what : str
        What was expected, such as "to write scores to s.zarr".
    error : OSError
        The system's, or one of the family that is caused by one.
    then : str
        What follows the advice, such as ", or choose another path".

    Raises
    ------
    InterruptedError
        The error itself, where it is one: the work was stopped, and nothing was refused.
    """
    if isinstance(error, InterruptedError):
        raise error
    if isinstance(error, OocInfluenceError) and isinstance(error.__cause__, OSError):
        error = error.__cause__
    number = errno.EACCES if error.errno is None and isinstance(error, PermissionError) else error.errno
    reason = error.strerror or str(error)
    if error.errno is not None and reason == os.strerror(error.errno):
        reason = reason[:1].lower() + reason[1:]
    path = Path("" if error.filename is None else os.fsdecode(error.filename))
    if path.name.startswith("."):  # a temporary name says nothing, its folder does
        path = path.parent
    where = "" if str(path) == "." or str(path) in what else f" ({path})"
    advice = _ADVICE.get(number or 0, "check the disk or the connection")
    return f"expected {what}; received {reason}{where}: {advice}{then}"
