"""A page served to this machine's browser: ``http.server``, since a page of one reader needs no more.

Every address begins with a token that only the reader of the terminal has seen; the Host header must name this server,
so that no other site can reach it by a name of its own (DNS rebinding); other origins get no answer; a query must come
from the page itself.
"""

from __future__ import annotations

import contextlib
import errno
import hmac
import ipaddress
import json
import secrets
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Unpack

from ooc_influence.errors import InputError, warn
from ooc_influence.options import ReportOptions, takes
from ooc_influence.report.examples import Corpus, ImageFolder
from ooc_influence.report.folder import PageFolder, to_script
from ooc_influence.report.live_query import Jobs, LiveQuery, Model
from ooc_influence.report.write import Settings, check_queries, open_report, write_pages
from ooc_influence.store import GradientStore, PathLike

LARGEST = 2**20  # bytes of a query
_UNKNOWN = "this query is no longer known"
_LOOPBACK = ("127.0.0.1", "localhost")
_KINDS = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".png": "image/png",
          ".svg": "image/svg+xml"}  # fmt: skip
_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "frame-ancestors 'none'",  # the page's own policy says the rest
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class PageServer(ThreadingHTTPServer):
    """Serves a page's folder, and answers its queries. Warns where others than this machine can reach it.

    Port 0 chooses a free one.

    Attributes
    ----------
    url : str
        What to open.
    jobs : Jobs or None
        What runs queries; None where there are none to run.

    Raises
    ------
    InputError
        If the address cannot be listened on.
    """

    daemon_threads = True

    def __init__(self, folder: Path, *, host: str = "127.0.0.1", port: int = 0, token: bool = True) -> None:
        self.folder = folder.resolve()
        self.jobs: Jobs | None = None
        self.token = secrets.token_urlsafe(24) if token else ""
        try:
            super().__init__((host, port), _Handler)
        except (OSError, UnicodeError) as error:
            raise InputError(_refused(host, port, error)) from error
        if not ipaddress.ip_address(str(self.server_address[0])).is_loopback:
            warn(_exposed(host, token))
        named = f"{host}:{self.server_port}"
        self.hosts = {f"{name}:{self.server_port}" for name in _LOOPBACK} if host in _LOOPBACK else None
        self.url = f"http://{named}/{self.token}/" if token else f"http://{named}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of a reader who left before the answer was ready."""
        if not isinstance(sys.exception(), (ConnectionError, TimeoutError)):
            super().handle_error(request, client_address)


def _refused(host: str, port: int, error: Exception) -> str:
    """Return the message for an address that cannot be listened on."""
    number, reason = getattr(error, "errno", None), getattr(error, "strerror", None) or str(error)
    if isinstance(error, (socket.gaierror, UnicodeError)) or number == errno.EADDRNOTAVAIL:
        return (
            f"expected an IPv4 address of this machine to listen on (--host); received {host}: {reason}: name another"
        )
    if number == errno.EACCES:
        return f"expected a port that you may listen on (--port); received {port}: {reason}: choose one from 1024 on"
    return f"expected a free port to listen on (--port); received {host}:{port}: {reason}: choose another, or 0 for any"


def _exposed(host: str, token: bool) -> str:
    """Return the warning for an address that other machines can reach."""
    if token:
        return f"listening on {host}: other machines reach it, unencrypted; whoever has the address can read the texts"
    return (
        f"listening on {host} WITHOUT A TOKEN: anybody who reaches this machine over the network can read the texts "
        "and ask the model: leave out --no-token, or --host"
    )


class _Handler(BaseHTTPRequestHandler):
    server: PageServer
    server_version, sys_version = "ooc-influence", ""
    timeout = 30

    def do_GET(self) -> None:
        path = self._path()
        if path is None:
            return
        if path.startswith("api/jobs/"):
            state = None if self.server.jobs is None else self.server.jobs.state(path.removeprefix("api/jobs/"))
            status = HTTPStatus.NOT_FOUND if state is None else HTTPStatus.OK
            self._json(status, state or {"error": _UNKNOWN})
            return
        file = (self.server.folder / (path or "index.html")).resolve()
        kind = _KINDS.get(file.suffix)
        if kind is None or not file.is_relative_to(self.server.folder) or not file.is_file():
            self._refuse(HTTPStatus.NOT_FOUND)
            return
        self._send(HTTPStatus.OK, f"{kind}; charset=utf-8" if kind.startswith("text") else kind, file.read_bytes())

    def do_POST(self) -> None:
        path = self._path()
        if path is None:
            return
        origin, site = self.headers.get("Origin"), self.headers.get("Sec-Fetch-Site", "same-origin")
        if origin not in (None, f"http://{self.headers.get('Host')}") or site not in ("same-origin", "none"):
            self._refuse(HTTPStatus.FORBIDDEN)
            return
        length = self.headers.get("Content-Length", "")
        if self.headers.get_content_type() != "application/json" or not length.isdigit():
            self._refuse(HTTPStatus.UNSUPPORTED_MEDIA_TYPE)
            return
        if int(length) > LARGEST:
            self._refuse(HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
            return
        try:
            values = json.loads(self.rfile.read(int(length)))
        except ValueError:
            values = None
        if self.server.jobs is None or path not in ("api/query", "api/stop"):
            self._refuse(HTTPStatus.NOT_FOUND)
        elif not isinstance(values, dict):
            self._json(HTTPStatus.BAD_REQUEST, {"error": f"expected a JSON object; received {type(values).__name__}"})
        elif path == "api/stop":
            self._stop(self.server.jobs, values.get("job"))
        else:
            try:
                self._json(HTTPStatus.ACCEPTED, self.server.jobs.submit(values))
            except InputError as error:
                self._json(HTTPStatus.TOO_MANY_REQUESTS, {"error": str(error)})

    def _stop(self, jobs: Jobs, name: Any) -> None:
        """Stop the job that is named, and no other: each belongs to the page that submitted it."""
        if not isinstance(name, str):
            self._json(HTTPStatus.BAD_REQUEST, {"error": "expected the job to stop, as job; received none"})
        elif jobs.stop(name):
            self._json(HTTPStatus.OK, {})
        else:
            self._json(HTTPStatus.NOT_FOUND, {"error": _UNKNOWN})

    def _path(self) -> str | None:
        """Return the path behind the token; None, and the request refused, where the caller may not ask."""
        hosts = self.server.hosts
        if hosts is not None and self.headers.get("Host") not in hosts:
            self._refuse(HTTPStatus.MISDIRECTED_REQUEST)
            return None
        path = self.path.partition("?")[0].removeprefix("/")
        if not self.server.token:
            return path
        token, slash, rest = path.partition("/")
        right = hmac.compare_digest(token.encode("utf-8", "replace"), self.server.token.encode())
        if not (right and slash):
            self._refuse(HTTPStatus.NOT_FOUND)
            return None
        return rest

    def _refuse(self, status: HTTPStatus) -> None:
        self.close_connection = True
        self._send(status, "text/plain; charset=utf-8", f"{status.phrase}\n".encode())

    def _json(self, status: HTTPStatus, values: dict[str, Any]) -> None:
        self._send(status, "application/json", to_script(values).encode())

    def _send(self, status: HTTPStatus, kind: str, body: bytes) -> None:
        self.send_response(status)
        for name, value in (_HEADERS | {"Content-Type": kind, "Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *values: Any) -> None:  # noqa: A002 - the base class's name
        """Say nothing: addresses hold the token."""


@contextlib.contextmanager
@takes(ReportOptions)
def live_report(
    store: GradientStore | PathLike,
    queries: GradientStore | PathLike | None = None,
    *,
    model: Model | None = None,
    listen: tuple[str, int] = ("127.0.0.1", 0),
    token: bool = True,
    data: Corpus | str | Path | None = None,
    query_data: Corpus | str | Path | None = None,
    **options: Unpack[ReportOptions],
) -> Iterator[PageServer]:
    """Write a report to a temporary folder and yield its server, ready for ``serve_forever``; clean up at the end.

    Parameters
    ----------
    model : Model, optional
        Makes gradients of new queries; without it, the page has no form for them.
    listen : (str, int)
        Host and port; port 0 chooses a free one.
    token : bool
        Whether addresses begin with a token.
    store, queries, data, query_data
        As for :func:`write_report`.
    **options : ReportOptions
        See :mod:`ooc_influence.options`; one curvature and one damping.

    Raises
    ------
    InputError
        If the address cannot be listened on.
    MismatchError
        If the store was made with another model.
    OocInfluenceError
        See :func:`write_report`.
    """
    corpus, examples = Corpus.of(data), check_queries(queries, query_data, options["by"])
    report = open_report(store, queries, Settings.of(options))
    if model is not None:
        model.check(report.train)
    with contextlib.ExitStack() as stack:
        path = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ooc_influence-"))) / "page"
        server = stack.enter_context(PageServer(path, host=listen[0], port=listen[1], token=token))
        live = None
        if model is not None:
            live = LiveQuery(report, model, (corpus, examples), ImageFolder(path, "train"), options)
        with PageFolder(path) as folder:
            write_pages(report, folder, corpus, examples, options, ask=None if live is None else live.facts())
        if live is not None:
            server.jobs = Jobs(live.answer)
            stack.callback(server.jobs.close)
        yield server


def serve(server: PageServer, started: Callable[[str], None]) -> None:
    """Serve until Ctrl-C, after passing the address to ``started``."""
    started(server.url)
    with contextlib.suppress(KeyboardInterrupt):
        server.serve_forever(poll_interval=0.2)
