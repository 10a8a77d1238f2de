"""Averages of rows that are collected in training: one row an example, continued at the end of every epoch.

Rows are collected into a store of their own, the journal. Folding it makes a new generation of averages from the last
one and the journal (:func:`ooc_influence.store.average_rows`); a generation counts once its last row is committed, and
the next journal begins empty. All of them are in a hidden folder beside the store, until the last generation gets the
store's name. A checkpoint of the training names a generation and a number of rows in its journal. What the last two
refer to is kept: the training may be killed after it asked for the second and before it saved it.
"""

from __future__ import annotations

import logging
import os
import re
import uuid
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ooc_influence.errors import InputError, MismatchError, StoreNotFoundError, writing
from ooc_influence.store import (
    Claim,
    GradientStore,
    PathLike,
    Storage,
    average_rows,
    check_free,
    column_dtype,
    exists,
    is_local,
    make_claim,
    not_free,
    parse_path,
    publish_folder,
    remove_tree,
)

logger = logging.getLogger("ooc_influence")
_NAME = re.compile(r"(average|journal)-(\d+)")
_REMOVED = "removed-"


class _State(NamedTuple):
    """What a checkpoint refers to: a generation of averages, and the first rows of its journal."""

    generation: int
    rows: int


class Averages:
    """Averages that are being made, and the journal of rows that are not in them yet.

    Parameters
    ----------
    path : path
        Where the averages will be.

    Attributes
    ----------
    generation : int
        How often rows were folded into the averages so far.
    interrupted : bool
        Whether an earlier training left them unfinished, and no checkpoint of it was loaded since.
    """

    def __init__(self, path: PathLike) -> None:
        parsed = parse_path(path)
        if not is_local(parsed):
            raise InputError(
                f"expected a local folder for averages that are made in training; received {path}: collect rows there "
                "without average=True, and average them afterwards (average_rows)"
            )
        self._path = parsed
        self.folder = parsed.parent / f".{parsed.name}.averaging"
        self.generation, self.interrupted = 0, False
        self._claim: Claim | None = None
        self._states: deque[_State] = deque(maxlen=2)  # of the last checkpoints
        self._earlier: set[int] = set()  # generations of an earlier process, whose checkpoints are not known
        self._published()  # anything else at the path is refused at once

    def open(self) -> None:
        """Use the folder alone, and find out how far an earlier training was."""
        with writing(f"to make averages in {self.folder}", ", or choose another path"):
            (self.folder / "commits").mkdir(parents=True, exist_ok=True)
            self._claim = make_claim(self.folder, name="averages")
            for name in os.listdir(self.folder):  # noqa: PTH208
                if name.startswith(_REMOVED):
                    remove_tree(self.folder / name)
            self._earlier = self._there("average") | self._there("journal")
            published = self._published()
            if published is not None:
                self._path.rename(self._average(published))
            self.generation = self._newest()
            self.interrupted = published is None and (self.generation > 0 or self._rows(0) > 0)

    def close(self) -> None:
        """Let another process use the folder."""
        if self._claim is not None:
            self._claim.release()
            self._claim = None

    def check_step(self, ids: list[Any]) -> None:
        """Check that rows of these ids may be collected now.

        Raises
        ------
        MismatchError
            If there are rows of a training that was interrupted, whose checkpoint was not loaded.
        InputError
            For ids that no row can have.
        """
        if self.interrupted:
            raise MismatchError(
                f"expected the checkpoint that an interrupted training continues from, since there are rows of it in "
                f"{self.folder}; received a step: load it (load_state_dict), or remove the folder to begin again"
            )
        kind = column_dtype(ids)
        if kind not in ("int64", "str"):
            raise InputError(f"expected ids that are whole numbers or strings, for averages; received {kind}")

    @property
    def journal(self) -> Path:
        """The store of the rows since the last generation."""
        return self.folder / f"journal-{self.generation}"

    @property
    def first(self) -> Path:
        """The first journal, beside which the work of a pilot is kept."""
        return self.folder / "journal-0"

    def reference(self) -> Path:
        """Return a store whose mask is that of the rows; where there is none, the first journal's path."""
        return self._path if self._published() is not None else self._latest(self._newest())

    @property
    def latest(self) -> Path:
        """The journal, or before it is made the averages that it belongs to; its own path where there are none."""
        return self._latest(self.generation)

    def _latest(self, generation: int) -> Path:
        paths = (self.folder / f"journal-{generation}", self._average(generation))
        return next((path for path in paths if exists(path)), self.folder / f"journal-{generation}")

    def _published(self) -> int | None:
        """Return the generation that has the store's name, None where nothing has."""
        try:
            store = GradientStore.open(self._path)
        except StoreNotFoundError:
            check_free(self._path, "averages or nothing")
            return None
        generation = (store.attrs.get("collected") or {}).get("generation")
        if generation is None:
            raise not_free(self._path, "averages that were collected, or nothing,", "a store of other rows")
        return int(generation)

    def _average(self, generation: int) -> Path:
        return self.folder / f"average-{generation}"

    def _names(self) -> list[str]:
        return [name for name in os.listdir(self.folder) if _NAME.fullmatch(name)] if self.folder.is_dir() else []  # noqa: PTH208

    @staticmethod
    def _number(name: str) -> int:
        return int(name.rpartition("-")[2])

    def _there(self, kind: str) -> set[int]:
        return {self._number(name) for name in self._names() if name.startswith(kind)}

    def _finished(self, generation: int) -> GradientStore | None:
        """Return a generation of averages, None where it is not there or not finished."""
        try:
            store = GradientStore.open(self._average(generation))
        except StoreNotFoundError:
            return None
        return store if store.n == store.layout.planned_rows else None

    def _newest(self) -> int:
        return max((each for each in self._there("average") if self._finished(each) is not None), default=0)

    def _remove(self, *names: str) -> None:
        """Remove stores of the folder, whole: half of one could be taken for damaged."""
        for name in names:
            if exists(self.folder / name):
                gone = self.folder / f"{_REMOVED}{uuid.uuid4().hex}"
                (self.folder / name).rename(gone)
                remove_tree(gone)

    def fold(self, storage: Storage | None, progress: bool | None = None) -> None:
        """Make the next generation, of the averages and the journal, if there are live rows in it."""
        try:
            journal = GradientStore.open(self.journal)
        except StoreNotFoundError:
            return
        if not journal.n or (journal.has_dropped and bool(journal.dropped.all())):
            return
        before, target = self._finished(self.generation), self._average(self.generation + 1)
        options: Any = {"start": before, "storage": storage, "progress": progress}
        try:
            made = average_rows(journal, target, **options)
        except MismatchError:  # a killed training began it, of rows that are no longer those of the journal
            if not exists(target):
                raise
            self._remove(target.name)
            made = average_rows(journal, target, **options)
        state = _State(self.generation, journal.n)
        self._record(made, generation=self.generation + 1, of=list(state))
        self.generation += 1
        self._states = deque((self._same(each) for each in self._states), maxlen=2)
        self._prune()

    @staticmethod
    def _record(store: GradientStore, **facts: Any) -> None:
        with GradientStore.open(store.path, "a") as written:
            written.record(collected={**(store.attrs.get("collected") or {}), **facts}, made_from=[])

    def _same(self, state: _State) -> _State:
        """Return the state of a generation that is made of nothing but what a state refers to, or that state."""
        made = self._finished(state.generation + 1)
        if made is None or (made.attrs.get("collected") or {}).get("of") != list(state):
            return state
        return _State(state.generation + 1, 0)

    def _prune(self) -> None:
        """Remove what no checkpoint refers to that may be loaded."""
        earlier = set() if len(self._states) == 2 else self._earlier
        averages = {self.generation, *earlier, *(state.generation for state in self._states)}
        journals = {self.generation, *earlier, *(state.generation for state in self._states if state.rows)}
        self._remove(
            *(f"average-{each}" for each in self._there("average") - averages),
            *(f"journal-{each}" for each in self._there("journal") - journals),
        )

    def state(self, rows: int) -> dict[str, int]:
        """Return what a checkpoint has to hold, and keep what it refers to; what earlier ones need may be removed."""
        self._states.append(_State(self.generation, rows))
        self._prune()
        return {"generation": self.generation}

    def restore(self, state: Mapping[str, int]) -> int:
        """Return to what a checkpoint refers to, whose journal is closed; return the rows to keep of the journal.

        Raises
        ------
        MismatchError
            If that is no longer there.
        """
        if "generation" not in state:
            raise MismatchError(
                f"expected the state of averages that are made in training; received {dict(state)}, of single rows: "
                "load the checkpoint of a training with average=True"
            )
        wanted = self._same(_State(state["generation"], state["rows"]))
        have = self._rows(wanted.generation)
        if (wanted.generation and self._finished(wanted.generation) is None) or have < wanted.rows:
            there = f"generation {self.generation} with {self._rows(self.generation)} further rows"
            raise MismatchError(
                f"expected generation {wanted.generation} of the averages in {self.folder} and {wanted.rows} further "
                f"rows, as when the checkpoint was saved; received {there}: what the last two checkpoints need is "
                "kept, so continue from one of these, or collect to another path"
            )
        keep = {f"average-{wanted.generation}"} | ({f"journal-{wanted.generation}"} if wanted.rows else set())
        self._remove(*(set(self._names()) - keep))
        self.generation, self.interrupted = wanted.generation, False
        self._earlier, self._states = set(), deque([wanted], maxlen=2)
        return wanted.rows

    def _rows(self, generation: int) -> int:
        try:
            return GradientStore.open(self.folder / f"journal-{generation}").n
        except StoreNotFoundError:
            return 0

    def publish(self, model: Mapping[str, Any]) -> None:
        """Give the last generation the store's name; ``model`` is what the store records of the model."""
        if self.generation:
            average = self._average(self.generation)
            with GradientStore.open(average, "a") as store:
                collected = {**(store.attrs.get("collected") or {}), "generation": self.generation}
                store.record(model=dict(model), collected=collected, made_from=[])
            with writing(f"to publish averages at {self._path}", ", and run again"):
                if not publish_folder(average, self._path):
                    raise not_free(self._path)
        self._earlier = set()
        self._states = deque(list(self._states)[-1:], maxlen=2)  # what came before it was saved
        keep = {state for state in self._states if state.generation != self.generation or state.rows}
        self._remove(
            *(set(self._names()) - {f"{kind}-{each.generation}" for each in keep for kind in ("average", "journal")})
        )
        if keep:
            logger.info(
                "%s: what the training's last checkpoint refers to is kept; remove it when the training is over",
                self.folder,
            )
            return
        if self._claim is not None:
            self._claim.release(remove=True)
            self._claim = None
        remove_tree(self.folder)
