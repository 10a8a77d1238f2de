"""Typed queries as jobs, one after the other in a thread, with their progress; each can be stopped by its name.

A waiting job is taken out of the queue; a running one stops between blocks of rows. The models' side of the package,
and torch with it, is imported by functions: pages alone are served without it.
"""

from __future__ import annotations

import tempfile
import threading
import uuid
from abc import ABC, abstractmethod
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from typing_extensions import override

from ooc_influence.errors import InputError, OocInfluenceError
from ooc_influence.influence import TopInfluential
from ooc_influence.options import ReportOptions
from ooc_influence.progress import optional_library, watched
from ooc_influence.report.examples import TEXT_LIMIT, Corpus, Examples, ImageFolder
from ooc_influence.report.tokens import TokenPages, documents_of
from ooc_influence.report.write import Report
from ooc_influence.store import GradientStore

if TYPE_CHECKING:
    from ooc_influence.hf import Loaded

_WAITING = 8  # queries that may wait
_KEPT = 20  # answers kept for their pages
_UNFINISHED = ("waiting", "running")


class Jobs:
    """Runs ``answer`` on what is submitted, in order; shows the message of an error. :meth:`close` ends the thread."""

    def __init__(self, answer: Callable[[Mapping[str, str]], dict[str, Any]]) -> None:
        self._answer = answer
        self._queue: deque[tuple[str, Mapping[str, str]]] = deque()
        self._states: OrderedDict[str, dict[str, Any]] = OrderedDict()
        self._stopping: set[str] = set()  # running jobs that are to stop
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="ooc_influence-jobs", daemon=True)
        self._thread.start()

    def submit(self, values: Mapping[str, str]) -> dict[str, Any]:
        """Put a query in the queue; return its state.

        Raises
        ------
        InputError
            If too many wait already.
        """
        name = uuid.uuid4().hex
        with self._changed:
            if len(self._queue) >= _WAITING:
                raise InputError(f"expected fewer than {_WAITING} queries waiting; received one more: wait")
            self._states[name] = {"job": name, "state": "waiting", "stage": "", "done": 0, "total": None}
            self._queue.append((name, values))
            self._forget()
            state = self._state(name)
            self._changed.notify()
        return state

    def state(self, name: str) -> dict[str, Any] | None:
        """Return a job's state, with how many are ``ahead`` of it; None for a job that is unknown or forgotten."""
        with self._changed:
            return self._state(name) if name in self._states else None

    def stop(self, name: str) -> bool:
        """Stop a job, before it begins or at its next block of rows; return False if it is unknown or forgotten."""
        with self._changed:
            if name not in self._states:
                return False
            if self._states[name]["state"] == "waiting":
                self._queue = deque(entry for entry in self._queue if entry[0] != name)
                self._end(name, state="stopped", error="stopped")
            elif self._states[name]["state"] == "running":
                self._stopping.add(name)
            return True

    def close(self, seconds: float = 10.0) -> None:
        """Stop all jobs, and wait at most this long for the thread to end."""
        with self._changed:
            self._closed = True
            self._queue.clear()
            self._changed.notify()
        self._thread.join(seconds)

    def _state(self, name: str) -> dict[str, Any]:
        earlier = takewhile(lambda state: state["job"] != name, self._states.values())
        return self._states[name] | {"ahead": sum(state["state"] in _UNFINISHED for state in earlier)}

    def _forget(self) -> None:
        """Forget the oldest jobs that have ended, beyond those that are kept."""
        ended = [name for name, state in self._states.items() if state["state"] not in _UNFINISHED]
        for name in ended[: max(0, len(ended) - _KEPT)]:
            del self._states[name]

    def _end(self, name: str, **values: Any) -> None:
        self._states[name].update(values)
        self._stopping.discard(name)

    def _next(self) -> tuple[str, Mapping[str, str]] | None:
        """Wait for a job, and mark it as running; None at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._closed)
            if self._closed:
                return None
            name, values = self._queue.popleft()
            self._states[name].update(state="running", stage="gradients")
            return name, values

    def _run(self) -> None:
        while (entry := self._next()) is not None:
            name, values = entry
            try:
                with watched(lambda *seen, name=name: self._watch(name, *seen)):
                    outcome: dict[str, Any] = {"state": "done", "result": self._answer(values)}
            except InterruptedError:
                outcome = {"state": "stopped", "error": "stopped"}
            except OocInfluenceError as error:
                outcome = {"state": "failed", "error": " ".join(str(error).split())}
            except Exception as error:  # the page shows it; the server stays up
                outcome = {"state": "failed", "error": f"unexpected {type(error).__name__}: {error}"}
            with self._changed:
                if name in self._stopping:  # it was done before it noticed
                    outcome = {"state": "stopped", "error": "stopped"}
                self._end(name, **outcome)

    def _watch(self, name: str, label: str, done: int, total: int | None) -> None:
        """Note a job's progress; raise InterruptedError if it is to stop."""
        with self._changed:
            if name in self._stopping or self._closed:
                raise InterruptedError("stopped")
            self._states[name].update(stage=label, done=done, total=total)


FORMS = {"text": ("text",), "prompt": ("prompt", "completion"), "chat": ("prompt", "completion")}


class Model(ABC):
    """What makes gradients of a typed query.

    Attributes
    ----------
    name : str
        What a page calls it.
    fields : tuple of str
        What a reader types: ``text``, or ``prompt`` and ``completion``; ``label``.
    module : torch.nn.Module
        The model itself.
    """

    name: str
    fields: tuple[str, ...]
    module: Any
    checked = False  # whether a query's entries were compared with autograd: once a session

    def facts(self) -> dict[str, Any]:
        """Return what a page says of it."""
        return {"model": self.name, "fields": list(self.fields)}

    def check(self, train: GradientStore) -> None:
        """Check that ``train`` was made with this model, as every query's extraction would.

        Raises
        ------
        MismatchError
            If it was not.
        """
        from ooc_influence.extract import check_model

        check_model(
            train, self.module,
            "name the model that the store was extracted with (and its --adapter, --revision, --model-dtype), or leave "
            "it out to serve the pages alone", other=self.name,
        )  # fmt: skip

    def _check_once(self) -> bool:
        """Return whether to compare a query's entries with autograd: for the first of a session."""
        first, self.checked = not self.checked, True
        return first

    def language_model(self) -> Loaded | None:
        """Return the loaded language model, with which tokens are told apart; None for other models."""
        return None

    @abstractmethod
    def extract(self, values: Mapping[str, str], train: GradientStore, out: Path) -> GradientStore:
        """Write the rows of a query, made as those of ``train``, and return their store.

        Raises
        ------
        OocInfluenceError
            For what the model cannot take.
        """


class RecipeModel(Model):
    """The model of a recipe whose ``query`` makes a batch of a text.

    Raises
    ------
    InputError
        For a recipe without ``query``.
    """

    def __init__(self, recipe: Any, name: str) -> None:
        if not callable(recipe.query):
            raise InputError(
                f"expected the recipe {name} with query=, a function that makes a batch of a typed text; received none"
            )
        self._recipe, self.name, self.fields = recipe, f"the recipe {name}", ("text",)
        self.module = recipe.model

    @override
    def extract(self, values: Mapping[str, str], train: GradientStore, out: Path) -> GradientStore:
        from ooc_influence.extract import extract_gradients

        recipe = self._recipe
        try:
            batch = recipe.query(values["text"])
        except Exception as error:  # of the user's code, for a text that somebody typed
            raise InputError(f"expected a query that {self.name} can read; received {error}") from error
        return extract_gradients(
            recipe.model, recipe.per_sample_loss, [batch], out, like=train, loss_kind=recipe.loss_kind,
            check_gradients=self._check_once(),
        )  # fmt: skip


class HuggingFaceModel(Model):
    """A Hugging Face model.

    Parameters
    ----------
    model : str or path
        As for :func:`ooc_influence.hf.extract`.
    form : {"text", "prompt", "chat"}
        What is typed: running text, or a prompt and a completion, whose loss alone counts; ``chat`` puts the two
        through the tokenizer's chat template.
    **loading
        As for :func:`ooc_influence.hf.load`.
    """

    def __init__(self, model: str | Path, form: str = "text", **loading: Any) -> None:
        from ooc_influence.hf import load

        optional_library("datasets", "typed queries")
        self._loaded, self._form, self.name = load(model, **loading), form, str(model)
        self.module = self._loaded.model
        self.fields = FORMS[form] + (("label",) if self._loaded.task == "classification" else ())

    @override
    def language_model(self) -> Loaded | None:
        return self._loaded if self._loaded.task == "causal-lm" else None

    @override
    def extract(self, values: Mapping[str, str], train: GradientStore, out: Path) -> GradientStore:
        from ooc_influence.hf import extract

        record: dict[str, Any] = {name: values[name] for name in self.fields}
        kind = str(train.attrs.get("loss_kind"))
        if "label" in record and kind == "binary_cross_entropy":  # several classes
            record["label"] = [name.strip() for name in record["label"].split(",")]
        named: dict[str, Any] = {name: name for name in self.fields}
        return extract(
            self._loaded, [record], out, like=train, chat=self._form == "chat",
            reduction="sum" if kind.endswith("_sum") else "mean", check_gradients=self._check_once(),
            **named,
        )  # fmt: skip


class LiveQuery:
    """Answers typed queries from a report's train store, with a model, and with examples from where they are.

    ``data`` are the examples of the train store and of the report's queries.
    """

    def __init__(
        self, report: Report, model: Model, data: tuple[Corpus, Corpus], pictures: ImageFolder, options: ReportOptions
    ) -> None:
        self._report, self._model, self._options = report, model, options
        self._data, self._query_data = data
        self._shown = Examples(report.train, self._data, np.arange(report.train.n), pictures)
        self._language_model = model.language_model() if options["token_rows"] else None

    def facts(self) -> dict[str, Any]:
        """Return what a page says of the model, and whether it may ask for the ``tokens`` of the report's queries."""
        stored = self._language_model is not None and self._report.query is not None
        return self._model.facts() | {"tokens": stored}

    def answer(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return a query and the examples of its lists, as a page takes them; for ``stored``, a number, its tokens.

        Raises
        ------
        InputError
            For a query that is empty, that the model cannot take, or that is not there.
        OocInfluenceError
            See :func:`ooc_influence.top_influential`.
        """
        if "stored" in values:
            return self._stored(values["stored"])
        fields = self._model.fields
        if not all(isinstance(values.get(name), str) and values[name].strip() for name in fields):
            raise InputError(f"expected {' and '.join(fields)} of the new query; received an empty one")
        report = self._report
        with tempfile.TemporaryDirectory(prefix="ooc_influence-") as folder:
            store = self._model.extract(values, report.train, Path(folder) / "query.zarr")
            settings = report.kept_settings()
            quiet = replace(settings, scoring=settings.scoring | {"progress": None})
            top = quiet.find_top(store, report.train, average_queries=store.n > 1)
            loss, norm = float(store.loss.mean()), float(store.grad_norm.mean())
            tokens = self._tokens(store, top, values)
        entry = report.entry(top, 0)
        text = "\n\n".join(values[name] for name in fields if name != "label")
        if "completion" in fields and len(text) - len(values["completion"]) < TEXT_LIMIT:
            entry["answer"] = len(text) - len(values["completion"])
        ranks = report.lexical_ranks(self._shown, [text], top) if self._options["bm25"] else None
        query = {
            "row": 0, "id": "typed", "loss": loss, "norm": norm, "dropped": False, "text": text[:TEXT_LIMIT],
            "cut": max(0, len(text) - TEXT_LIMIT), "label": values.get("label"), "source": None,
            "more": {"rows": store.n} if store.n > 1 else {}, "groups": {}, "bm25": ranks and ranks[0], **entry,
            **tokens,
        }  # fmt: skip
        rows = [row for side in ("proponents", "opponents") for row, _ in entry[side]]
        return {"query": query, "examples": report.examples(self._shown, rows)}

    def _tokens(self, store: GradientStore, top: TopInfluential, values: Mapping[str, str]) -> dict[str, Any]:
        """Return the tokens of a query, or, where its lists alone can be shown, why, in the form of its page."""
        if self._language_model is None:
            return {}
        if store.n > 1:
            return {"no_tokens": f"the query is longer than the model's context, and its {store.n} pieces are averaged"}
        document = {name: values[name] for name in self._model.fields}
        return self._told(lambda: self._pages(store, top, [document]).of_query(0))

    def _stored(self, number: Any) -> dict[str, Any]:
        """Return the tokens of a query of the report, or why it has none, in the form of its page."""
        count = 0 if self._report.query is None or self._language_model is None else self._report.query.n
        if type(number) is not int or not 0 <= number < count:
            raise InputError(f"expected the number of one of {count} queries that have tokens; received {number!r}")
        return self._told(lambda: self._stored_pages.of_query(number))

    @cached_property
    def _stored_pages(self) -> TokenPages:
        query, top = self._report.query, self._report.top
        assert query is not None
        assert top is not None
        return self._pages(query, top, documents_of(self._query_data))

    def _pages(self, store: GradientStore, top: TopInfluential, documents: Any) -> TokenPages:
        """Return what tells the tokens of a store's queries apart, as in a report."""
        assert self._language_model is not None
        places = documents, documents_of(self._data)
        return self._report.tokens(store, top, self._language_model, places, self._options)

    @staticmethod
    def _told(compute: Callable[[], dict[str, Any] | None]) -> dict[str, Any]:
        try:
            found = compute()
        except OocInfluenceError as error:  # the lists are an answer without
            return {"no_tokens": " ".join(str(error).split())}
        return {"no_tokens": "no row is listed for it"} if found is None else {"tokens": found}
