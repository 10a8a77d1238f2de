"""Errors are reviewed as a set: all say what was expected and what was received in one line, most what to do.

Messages are read out of the source, with a name in braces for a value; ``python tests/test_messages.py`` prints them.
"""

from __future__ import annotations

import ast
import copy
import pickle
import re
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import NamedTuple

import pytest

import ooc_influence
from ooc_influence import errors

PACKAGE = Path(ooc_influence.__file__).parent
FAMILY = [
    kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.OocInfluenceError)
]
USAGE = ("BadParameter", "UsageError", "ClickException")  # click's, which end a command as InputError does
BUDGET = re.compile(r"needs .*(budget|free).*: (use|give) ")
ADVICE = re.compile(r"(: |\? |; )[^:;]*[a-z' ]{4}")


class Message(NamedTuple):
    """A message, where it is raised and as what; kind is empty for a text that a function returns."""

    place: str
    kind: str
    text: str


def texts(node: ast.expr) -> list[str]:
    """Return what a message may be; nothing for one that another function makes."""
    match node:
        case ast.Constant(value=str(text)):
            return [text]
        case ast.FormattedValue(value=value):
            return [f"{{{ast.unparse(value)}}}"]
        case ast.JoinedStr(values=parts):
            return ["".join(chosen) for chosen in product(*map(texts, parts))]
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return ["".join(chosen) for chosen in product(texts(left), texts(right))]
        case ast.IfExp(body=body, orelse=other):
            return texts(body) + texts(other)
    return []


def messages(folder: Path) -> Iterator[Message]:
    kinds = {kind.__name__ for kind in FAMILY} | set(USAGE)
    for path in sorted(folder.rglob("*.py")):
        tree = ast.parse(path.read_text())
        raised = set()
        for node in ast.walk(tree):
            name = getattr(getattr(node, "func", None), "attr", getattr(getattr(node, "func", None), "id", None))
            if name in kinds and node.args:
                raised |= set(ast.walk(node.args[0]))
                for text in texts(node.args[0]):
                    yield Message(f"{path.relative_to(folder)}:{node.lineno}", name, text)
        parts = {part for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
        for node in ast.walk(tree):
            if isinstance(node, (ast.Constant, ast.JoinedStr)) and node not in raised | parts:
                for text in texts(node):
                    if text.startswith("expected "):
                        yield Message(f"{path.relative_to(folder)}:{node.lineno}", "", text)


def faults(message: Message) -> list[str]:
    """Return what is wrong with a message's form."""
    text, found = message.text, []
    budget = message.kind == "MemoryBudgetError"
    expected, _, received = text.partition("; received")
    if budget and not BUDGET.search(text):
        found.append("no need, budget and way out")
    carried = text.startswith("{error}")  # another of the family, with its place added
    if not budget and not carried and not (expected.startswith("expected ") and received):
        found.append("no 'expected ...; received ...'")
    if re.search(r"[.!]$|\n|  |\.\.\.$", text):
        found.append("a full stop, a line break or two spaces")
    if re.search(r"\b(please|sorry|invalid|illegal|must|oops|failed to)\b", text, re.I):
        found.append("a word that says nothing")
    if message.kind not in ("", "InputError", *USAGE) and not budget and not ADVICE.search(received.lstrip(":")):
        found.append("nothing to do about it")
    return found


MESSAGES = list(messages(PACKAGE))


def test_every_message_has_the_form():
    assert len(MESSAGES) > 300
    bad = [f"{message.place}: {', '.join(found)}: {message.text}" for message in MESSAGES if (found := faults(message))]
    assert not bad, "\n".join(bad)


@pytest.mark.parametrize(
    "text",
    [
        "expected a store; received none.",
        "invalid store",
        "expected a store at {path}",
        "expected a store; received none",
        "expected a store; received: {error}",
    ],
)
def test_the_rules_can_fail(text, tmp_path):
    (tmp_path / "bad.py").write_text(f"raise StoreNotFoundError(f{text!r})\n")
    (message,) = messages(tmp_path)
    assert faults(message)


def test_no_message_is_said_of_two_kinds():
    kinds: dict[str, set[str]] = {}
    for message in MESSAGES:
        if message.kind:
            kinds.setdefault(message.text, set()).add(message.kind)
    assert not {text: found for text, found in kinds.items() if len(found) > 1}


def test_they_are_one_line_and_cross_processes():
    # as Dask's workers do; it makes exceptions without their constructors
    pytest.importorskip("tblib.pickling_support").install()
    for kind in FAMILY:
        more = ([3, 5],) if kind is errors.NonFiniteError else ()
        error = kind("expected one line; received\n  two:\n\ncut it", *more)
        for same in (error, pickle.loads(pickle.dumps(error)), copy.copy(error)):
            assert type(same) is kind
            assert str(same) == "expected one line; received two: cut it"
            assert vars(same) == vars(error)


if __name__ == "__main__":
    for place, kind, text in MESSAGES:
        print(f"{place} {kind}: {text}")
