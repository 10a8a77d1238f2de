"""What an option is, and how a function or a command takes a kind of them."""

import difflib
import functools
import inspect
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, cast, get_args


@dataclass(frozen=True)
class Option:
    """One option.

    Attributes
    ----------
    default : object
        Its value where none is given.
    type : str
        Its type, as docstrings say it.
    doc : str
        What it does, for docstrings.
    help : str
        What it does, for the command line; options without are of the library alone.
    kind : type or "path"
        What the command line parses a value as.
    metavar : str, optional
        What stands for a value in the command line's help.
    choices : tuple of str
        The values it may have.
    multiple : bool
        Whether the flag may be repeated.
    least : int, optional
        The least whole number it may be, checked by the command line.
    flag : str, optional
        The flag, where it is not named like the option; of an option that is True by default, what turns it off.
    """

    default: Any
    type: str
    doc: str
    help: str = ""
    kind: Any = str
    metavar: str | None = None
    choices: tuple[str, ...] = ()
    multiple: bool = False
    least: int | None = None
    flag: str | None = None


Options = TypeVar("Options", bound=Mapping[str, Any])
Function = TypeVar("Function", bound=Callable[..., Any])
_LAST = ("device", "workers", "memory", "progress")  # what a call takes from the machine, listed after what it does


def definitions(kind: type[Any]) -> dict[str, Option]:
    """Return the options of a kind by name, in the order they are listed."""
    options = {name: get_args(hint)[1] for name, hint in kind.__annotations__.items()}
    order = sorted(options, key=lambda name: _LAST.index(name) if name in _LAST else -1)
    return {name: options[name] for name in order}


def complete(kind: type[Options], options: Mapping[str, Any]) -> Options:
    """Return options with the defaults of those that are missing."""
    defaults = {name: option.default for name, option in definitions(kind).items()}
    return cast(Options, {**defaults, **options})


def select(kind: type[Options], options: Mapping[str, Any]) -> Options:
    """Return those options that are of a kind."""
    return cast(Options, {name: options[name] for name in definitions(kind) if name in options})


def takes(kind: type[Any]) -> Callable[[Function], Function]:
    """Give a function that takes ``**options: Unpack[kind]`` the signature, defaults and docstring of its options.

    The docstring's entry ``**options`` is replaced by one for each option; calls get every option, and unknown names
    are refused with a :class:`TypeError` that names the closest one.
    """
    options = definitions(kind)
    defaults = {name: option.default for name, option in options.items()}

    def decorate(function: Function) -> Function:
        signature = _signature(function, kind, options)

        @functools.wraps(function)
        def call(*arguments: Any, **named: Any) -> Any:
            for name in named:
                if name not in signature.parameters:
                    raise TypeError(_unexpected(function.__name__, name, signature.parameters))
            return function(*arguments, **(defaults | named))

        call.__signature__ = signature  # type: ignore[attr-defined]
        call.__doc__ = document(function.__doc__ or "", options)
        return cast(Function, call)

    return decorate


def _signature(function: Callable[..., Any], kind: type[Any], options: Mapping[str, Option]) -> inspect.Signature:
    """Return a function's signature with each option in the place of ``**options``."""
    signature = inspect.signature(function)
    explicit = [each for each in signature.parameters.values() if each.kind is not inspect.Parameter.VAR_KEYWORD]
    further = [
        inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=option.default, annotation=_annotation(kind, name)
        )
        for name, option in options.items()
    ]
    return signature.replace(parameters=[*explicit, *further])


def _annotation(kind: type[Any], name: str) -> Any:
    annotation = get_args(kind.__annotations__[name])[0]
    return getattr(annotation, "__forward_arg__", annotation)


def _unexpected(function: str, name: str, parameters: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(name, parameters, n=1)
    return f"{function}() got an unexpected keyword argument {name!r}" + (
        f". Did you mean {close[0]!r}?" if close else ""
    )


def document(doc: str, options: Mapping[str, Option]) -> str:
    """Return a docstring in which the entry ``**options`` is replaced by one for each option."""
    lines = doc.splitlines()
    start = next(number for number, line in enumerate(lines) if line.strip().startswith("**options"))
    indent = len(lines[start]) - len(lines[start].lstrip())
    stop = start + 1
    while stop < len(lines) and lines[stop].startswith(" " * (indent + 1)):
        stop += 1
    entries = []
    for name, option in options.items():
        entries.append(f"{' ' * indent}{name} : {option.type}")
        entries.append(textwrap.indent("\n".join(textwrap.wrap(option.doc, 116 - indent)), " " * (indent + 4)))
    return "\n".join([*lines[:start], *entries, *lines[stop:]])
