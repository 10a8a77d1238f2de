"""A report served live: the same pages from a temporary folder, and a page that takes new queries."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ooc_influence.curvature import Curvature
from ooc_influence.report.asking import Asker, Model
from ooc_influence.report.examples import Corpus
from ooc_influence.report.folder import PageFolder
from ooc_influence.report.images import ImageFolder
from ooc_influence.report.jobs import Jobs
from ooc_influence.report.server import PageServer
from ooc_influence.report.write import Settings, check_queries, open_report, write_pages
from ooc_influence.store import GradientStore, PathLike


@contextlib.contextmanager
def live_report(
    store: GradientStore | PathLike,
    queries: GradientStore | PathLike | None = None,
    *,
    model: Model | None = None,
    listen: tuple[str, int] = ("127.0.0.1", 0),
    token: bool = True,
    data: Corpus | str | Path | None = None,
    query_data: Corpus | str | Path | None = None,
    curvature: Curvature | PathLike | bool | None = None,
    damping: float | None = None,
    top: int = 10,
    suspects: int = 500,
    by: Sequence[str] | None = None,
    title: str | None = None,
    normalize: str | None = None,
    **scoring: Any,
) -> Iterator[PageServer]:
    """Write a report to a temporary folder and give its server, ready for ``serve_forever``; clean up at the end.

    Parameters
    ----------
    model : Model, optional
        Makes gradients of new queries; without, there is no page to ask on.
    listen : (str, int)
        Host and port; port 0 takes a free one.
    token : bool
        Whether addresses begin with a token.
    store, queries, data, query_data, curvature, damping, top, suspects, by, title, normalize, **scoring
        As for :func:`write_report`.

    Raises
    ------
    InputError
        If one cannot listen there.
    MismatchError
        If the store was made with another model.
    OocInfluenceError
        See :func:`write_report`.
    """
    corpus, examples = Corpus.of(data), check_queries(queries, query_data, by)
    report = open_report(store, queries, Settings(curvature, damping, top, normalize, scoring))
    if model is not None:
        model.check(report.train)
    with contextlib.ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ooc_influence-"))) / "page"
        server = stack.enter_context(PageServer(place, host=listen[0], port=listen[1], token=token))
        with PageFolder(place) as folder:
            ask = None if model is None else model.facts()
            write_pages(report, folder, corpus, examples, suspects, by, title, ask=ask)
        if model is not None:
            asker = stack.enter_context(Asker(report, model, corpus, ImageFolder(place, "train")))
            server.jobs = Jobs(asker.answer)
            stack.callback(server.jobs.close)
        yield server


def serve(server: PageServer, started: Callable[[str], None]) -> None:
    """Serve until the thread is interrupted; ``started`` is told the address."""
    started(server.url)
    with contextlib.suppress(KeyboardInterrupt):
        server.serve_forever(poll_interval=0.2)
