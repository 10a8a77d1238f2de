"""How models are trained again: a user's functions, or what else has a ``train``, a ``loss`` and ``settings``."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ooc_influence.errors import InputError
from ooc_influence.extract import call_function

Numbers = npt.NDArray[np.int64]


class Trains(Protocol):
    """What trains a model on some rows of the train store, and measures it on some of the query store."""

    @property
    def settings(self) -> Mapping[str, Any]:
        """What the models depend on besides the rows, JSON values."""

    @property
    def train(self) -> Callable[[Numbers], Any]:
        """Train on rows."""

    @property
    def loss(self) -> Callable[[Any, Numbers], npt.ArrayLike]:
        """Measure a model on queries."""


@dataclass(frozen=True, eq=False)
class Training:
    """A training by functions of the user's.

    Attributes
    ----------
    train : callable (indices) -> model
        Trains a model, from where training began, on the rows ``indices`` of the train store, (m,) int64, ascending.
        Global generators are seeded before each call, alike for runs that are compared. Random choices about all rows,
        such as an order of which those left out are skipped, leave less noise in a difference than choices about
        ``indices``.
    loss : callable (model, queries) -> (c,) array
        The loss of each of the rows ``queries`` of the query store, (c,) int64: the one that was differentiated.
    settings : mapping
        What the models depend on besides the rows (learning rate, epochs), JSON values: a folder that holds runs with
        others is refused.
    name : str, optional
        Where :func:`load_training` found it, by which other processes load it.
    """

    train: Callable[[Numbers], Any]
    loss: Callable[[Any, Numbers], npt.ArrayLike]
    settings: Mapping[str, Any] = field(default_factory=dict)
    name: str | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        if self.name is not None:
            return load_training, (self.name,)
        return Training, (self.train, self.loss, self.settings)


def load_training(name: str) -> Training:
    """Return the training that a function of a file or module describes.

    Parameters
    ----------
    name : str
        ``path.py:function`` or ``module:function``: a function without arguments that returns a :class:`Training`, or
        ``(train, loss)``. What the file says is part of the settings: runs of another version of it are refused.

    Raises
    ------
    InputError
        If there is no such function, or it raises or returns something else.
    """
    source, _, function = name.rpartition(":")
    if source.endswith(".py"):
        name = f"{Path(source).absolute()}:{function}"
    result = call_function(name, "--train", "the training")
    if isinstance(result, tuple) and len(result) == 2:
        result = Training(*result)
    if not isinstance(result, Training) or not callable(result.train) or not callable(result.loss):
        raise InputError(
            f"expected {name} to return (train, loss), two functions, or a Training; received {type(result).__name__}"
        )
    file = inspect.getsourcefile(result.train) if inspect.isfunction(result.train) else None
    file = source if source.endswith(".py") else file
    code = {} if file is None else {"code": hashlib.sha256(Path(file).read_bytes()).hexdigest()}
    return replace(result, settings={"function": function, **code, **result.settings}, name=name)
