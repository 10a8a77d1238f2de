"""A recipe: what the command line needs to run somebody's model, as a Python function returns it."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import sys
import sysconfig
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from ooc_influence.errors import InputError, OocInfluenceError
from ooc_influence.extract.batching import Batches
from ooc_influence.extract.metadata import RowSource


@dataclass(frozen=True)
class Split:
    """Named data: batches, and what belongs to each row.

    Attributes
    ----------
    batches : iterable or callable
        As for :func:`extract_gradients`.
    ids, columns
        As for :func:`extract_gradients`.
    """

    batches: Batches
    ids: RowSource | None = None
    columns: Mapping[str, RowSource] | None = None


@dataclass(frozen=True)
class Recipe:
    """A model, its per-sample loss and its data; what the function named by ``--recipe`` returns.

    Attributes
    ----------
    model : torch.nn.Module
        The trained model.
    per_sample_loss : callable (model, batch) -> (b,) tensor
        Its loss.
    splits : mapping of str to Split or batches
        The data, by name (``"train"``, ``"test"``).
    loss_kind : str, optional
        As for :func:`extract_gradients`.
    query : callable (str) -> batch, optional
        Makes a batch of what somebody types or pastes as a new query (``serve``), one sample or several.
    """

    model: Any
    per_sample_loss: Any
    splits: Mapping[str, Split | Batches]
    loss_kind: str | None = None
    query: Any = None

    def split(self, name: str) -> Split:
        """Return a split by name.

        Raises
        ------
        KeyError
            If there is none of that name.
        """
        found = self.splits[name]
        return found if isinstance(found, Split) else Split(found)


_PACKAGE = f"{Path(__file__).parents[1]}{os.sep}"


def load_recipe(name: str) -> Recipe:
    """Return the recipe of ``path.py:function`` or ``module:function``.

    Raises
    ------
    InputError
        If the name has another form, or the file, module or function is missing, fails or returns something else.
    """
    place, colon, function_name = name.rpartition(":")
    if not colon or not place or not function_name:
        raise InputError(f"expected --recipe path.py:function or module:function; received {name!r}")
    try:
        module = _load_file(Path(place)) if place.endswith(".py") else _load_module(place)
        function = getattr(module, function_name, None)
        if not callable(function):
            raise InputError(f"expected a function {function_name!r} in {place}; received none: check the name")
        result = function()
    except InputError:
        raise
    except (Exception, SystemExit) as error:
        raise InputError(_failed(name, error, traceback.extract_tb(error.__traceback__)[-1])) from error
    if isinstance(result, tuple) and len(result) == 3:
        result = Recipe(*result)
    if not isinstance(result, Recipe):
        raise InputError(
            f"expected {name} to return (model, per_sample_loss, splits) or a Recipe; received {type(result).__name__}"
        )
    named = isinstance(result.splits, Mapping) and all(isinstance(key, str) for key in result.splits)
    if not named or not result.splits:
        raise InputError(
            f"expected the splits of {name} as a mapping of name to batches; received {result.splits!r:.80}"
        )
    if not isinstance(result.model, nn.Module) or not callable(result.per_sample_loss):
        raise InputError(
            f"expected {name} to return a torch.nn.Module and a loss function; received "
            f"{type(result.model).__name__} and {type(result.per_sample_loss).__name__}"
        )
    return result


@contextlib.contextmanager
def running(name: str | None) -> Iterator[None]:
    """Say which line of a recipe's own code (its loss, its model, its data) failed; other errors pass as they are.

    Parameters
    ----------
    name : str or None
        The recipe's; None where there is none.

    Raises
    ------
    InputError
        Naming the line, where an exception comes out of one.
    """
    try:
        yield
    except OocInfluenceError:
        raise
    except Exception as error:
        frame = None if name is None else _own_frame(error)
        if frame is None:
            raise
        raise InputError(_failed(name, error, frame)) from error


def _own_frame(error: Exception) -> traceback.FrameSummary | None:
    """Return the user's line that an error comes out of, itself or by what it called of Python's and of libraries.

    None for an error of this package, also where the user's code called it.
    """
    libraries = tuple({sysconfig.get_paths()[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")})
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if frame.filename.startswith(_PACKAGE):
            return None
        if not frame.filename.startswith((*libraries, "<")):
            return frame
    return None


def _failed(name: str | None, error: BaseException, frame: traceback.FrameSummary) -> str:
    return (
        f"expected the recipe {name} to run; received {type(error).__name__}: {error} "
        f"(at {frame.filename}:{frame.lineno}): mend the recipe"
    )


def _load_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise InputError(f"expected a Python file {path}; received no such file")
    known = path.stem in sys.modules or importlib.util.find_spec(path.stem) is not None
    name = f"recipe_{path.stem}" if known else path.stem  # datasets.py must not hide the library of that name
    sys.path.insert(0, str(path.resolve().parent))  # the recipe may import its neighbours
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _load_module(name: str) -> ModuleType:
    sys.path.insert(0, str(Path.cwd()))
    return importlib.import_module(name)


def choose_split(recipe: Recipe, name: str | None) -> Split:
    """Return the split called ``name``, or the only one.

    Raises
    ------
    InputError
        If the name is missing or unknown.
    """
    known = ", ".join(recipe.splits)
    if name is None and len(recipe.splits) > 1:
        raise InputError(f"expected --split, one of {known}; received none")
    if name is not None and name not in recipe.splits:
        raise InputError(f"expected --split to be one of {known}; received {name!r}")
    return recipe.split(name or next(iter(recipe.splits)))
