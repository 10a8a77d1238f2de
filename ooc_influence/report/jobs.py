"""Typed queries as jobs, one after the other in a thread, with their progress; each can be stopped by its name.

One that waits is taken out of the line; one that runs stops between blocks of rows.
"""

from __future__ import annotations

import threading
import uuid
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from itertools import takewhile
from typing import Any

from ooc_influence.errors import InputError, OocInfluenceError
from ooc_influence.progress import watched

_WAITING = 8  # queries that may wait
_KEPT = 20  # answers kept for their pages
_UNFINISHED = ("waiting", "running")


class Jobs:
    """Runs what is submitted, in order. :meth:`close` ends the thread.

    Parameters
    ----------
    answer : callable (mapping of str to str) -> dict
        Does the work; an :class:`OocInfluenceError` is told as its message.
    """

    def __init__(self, answer: Callable[[Mapping[str, str]], dict[str, Any]]) -> None:
        self._answer = answer
        self._line: deque[tuple[str, Mapping[str, str]]] = deque()
        self._states: OrderedDict[str, dict[str, Any]] = OrderedDict()
        self._stopping: set[str] = set()  # of those that run, who is to stop
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="ooc_influence-jobs", daemon=True)
        self._thread.start()

    def submit(self, values: Mapping[str, str]) -> dict[str, Any]:
        """Put a query in the line; return its state.

        Raises
        ------
        InputError
            If too many wait already.
        """
        name = uuid.uuid4().hex
        with self._changed:
            if len(self._line) >= _WAITING:
                raise InputError(f"expected fewer than {_WAITING} queries waiting; received one more: wait")
            self._states[name] = {"job": name, "state": "waiting", "stage": "", "done": 0, "total": None}
            self._line.append((name, values))
            self._forget()
            state = self._state(name)
            self._changed.notify()
        return state

    def state(self, name: str) -> dict[str, Any] | None:
        """Return what is known of a job, with how many are ``ahead`` of it; None if nothing is known (any more)."""
        with self._changed:
            return self._state(name) if name in self._states else None

    def stop(self, name: str) -> bool:
        """Stop a job, before it begins or at its next block of rows; return whether it is known (still)."""
        with self._changed:
            if name not in self._states:
                return False
            if self._states[name]["state"] == "waiting":
                self._line = deque(entry for entry in self._line if entry[0] != name)
                self._end(name, state="stopped", error="stopped")
            elif self._states[name]["state"] == "running":
                self._stopping.add(name)
            return True

    def close(self, seconds: float = 10.0) -> None:
        """Stop all, and wait so long for the thread to end."""
        with self._changed:
            self._closed = True
            self._line.clear()
            self._changed.notify()
        self._thread.join(seconds)

    def _state(self, name: str) -> dict[str, Any]:
        earlier = takewhile(lambda own: own["job"] != name, self._states.values())
        return self._states[name] | {"ahead": sum(own["state"] in _UNFINISHED for own in earlier)}

    def _forget(self) -> None:
        """Forget the oldest of those that have ended, from a number on."""
        ended = [name for name, own in self._states.items() if own["state"] not in _UNFINISHED]
        for name in ended[: max(0, len(ended) - _KEPT)]:
            del self._states[name]

    def _end(self, name: str, **values: Any) -> None:
        self._states[name].update(values)
        self._stopping.discard(name)

    def _next(self) -> tuple[str, Mapping[str, str]] | None:
        """Wait for a job, and mark it as running; None at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._line or self._closed)
            if self._closed:
                return None
            name, values = self._line.popleft()
            self._states[name].update(state="running", stage="gradients")
            return name, values

    def _run(self) -> None:
        while (entry := self._next()) is not None:
            name, values = entry
            try:
                with watched(lambda *seen, name=name: self._watch(name, *seen)):
                    found = self._answer(values)
                outcome: dict[str, Any] = {"state": "done", "result": found}
            except InterruptedError:
                outcome = {"state": "stopped", "error": "stopped"}
            except OocInfluenceError as error:
                outcome = {"state": "failed", "error": " ".join(str(error).split())}
            except Exception as error:  # the page shows it; the server stays up
                outcome = {"state": "failed", "error": f"unexpected {type(error).__name__}: {error}"}
            with self._changed:
                if name in self._stopping:  # though it was done before it looked
                    outcome = {"state": "stopped", "error": "stopped"}
                self._end(name, **outcome)

    def _watch(self, name: str, label: str, done: int, total: int | None) -> None:
        """Note a job's progress.

        Raises
        ------
        InterruptedError
            If it is to stop.
        """
        with self._changed:
            if name in self._stopping or self._closed:
                raise InterruptedError("stopped")
            self._states[name].update(stage=label, done=done, total=total)
