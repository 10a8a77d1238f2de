"""Typed queries as jobs, one after the other in a thread, with their progress; stopped between blocks of rows."""

from __future__ import annotations

import queue
import threading
import uuid
from collections import OrderedDict
from collections.abc import Callable, Mapping
from itertools import takewhile
from typing import Any

from ooc_influence.errors import InputError, OocInfluenceError
from ooc_influence.progress import watched

_WAITING = 8  # queries that may wait
_KEPT = 20  # answers kept for their pages


class Jobs:
    """Runs what is submitted, in order. :meth:`close` ends the thread.

    Parameters
    ----------
    answer : callable (mapping of str to str) -> dict
        Does the work; an :class:`OocInfluenceError` is told as its message.
    """

    def __init__(self, answer: Callable[[Mapping[str, str]], dict[str, Any]]) -> None:
        self._answer = answer
        self._waiting: queue.Queue[tuple[str, Mapping[str, str]] | None] = queue.Queue(_WAITING)
        self._states: OrderedDict[str, dict[str, Any]] = OrderedDict()
        self._lock = threading.Lock()
        self._stop, self._closed = threading.Event(), False
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
        state = {"job": name, "state": "waiting", "stage": "", "done": 0, "total": None}
        with self._lock:
            self._states[name] = state
            while len(self._states) > _KEPT + _WAITING:
                self._states.popitem(last=False)
        try:
            self._waiting.put_nowait((name, values))
        except queue.Full as error:
            with self._lock:
                self._states.pop(name, None)
            raise InputError(f"expected fewer than {_WAITING} queries waiting; received one more: wait") from error
        return self.state(name) or state

    def state(self, name: str) -> dict[str, Any] | None:
        """Return what is known of a job, with how many are ``ahead`` of it; None if nothing is known (any more)."""
        with self._lock:
            if name not in self._states:
                return None
            earlier = takewhile(lambda own: own["job"] != name, self._states.values())
            ahead = sum(own["state"] in ("waiting", "running") for own in earlier)
            return self._states[name] | {"ahead": ahead}

    def stop(self) -> None:
        """Stop the job that runs, at its next block of rows."""
        self._stop.set()

    def close(self, seconds: float = 10.0) -> None:
        """Stop, and wait so long for the thread to end."""
        self._closed = True
        self._stop.set()
        while True:  # none of those that wait is begun
            try:
                self._waiting.get_nowait()
            except queue.Empty:
                break
        self._waiting.put(None)
        self._thread.join(seconds)

    def _set(self, name: str, **values: Any) -> None:
        with self._lock:
            if name in self._states:
                self._states[name].update(values)

    def _run(self) -> None:
        while True:
            entry = self._waiting.get()
            if entry is None or self._closed:
                return
            name, values = entry
            self._stop.clear()
            self._set(name, state="running", stage="gradients")

            def watch(label: str, done: int, total: int | None, name: str = name) -> None:
                if self._stop.is_set() or self._closed:
                    raise InterruptedError("stopped")
                self._set(name, stage=label, done=done, total=total)

            try:
                with watched(watch):
                    found = self._answer(values)
                self._set(name, state="done", result=found)
            except InterruptedError:
                self._set(name, state="stopped", error="stopped")
            except OocInfluenceError as error:
                self._set(name, state="failed", error=" ".join(str(error).split()))
            except Exception as error:  # the page is told; the server goes on
                self._set(name, state="failed", error=f"unexpected {type(error).__name__}: {error}")
