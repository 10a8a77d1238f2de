"""Commands and scripts as separate processes, without the seconds that importing torch takes each time.

A server process imports what they need once and forks a child for each; the child takes over the caller's arguments,
folder, environment and streams. ``ooc-influence`` and ``python`` on the path that :class:`Warm` makes are small
programs that ask the server. What runs is the package's own entry point, in a process of its own.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
ASK = """#!{python} -IS
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    request = json.dumps([{name!r}, sys.argv[1:], os.getcwd(), dict(os.environ)])
    socket.send_fds(server, [request.encode()], [0, 1, 2])
    code = server.recv(1)
sys.exit(code[0] if code else 70)
"""
QUIET = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "HF_HUB_OFFLINE"), "1")


class Warm:
    """A running server, and a folder of programs that ask it."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="warm"))  # a short path: addresses of sockets have 107 bytes
        self.environment = os.environ | QUIET | {
            "PATH": f"{self.folder}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT), "HF_HOME": str(self.folder / "hub"), "MPLBACKEND": "agg",
        }  # fmt: skip
        address = str(self.folder / "server")
        self._server = subprocess.Popen(
            [sys.executable, __file__, address], env=self.environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        for name in ("ooc-influence", "python"):
            program = self.folder / name
            program.write_text(ASK.format(python=sys.executable, address=address, name=name))
            program.chmod(0o755)
        if self._server.stdout.readline() != b"ready\n":
            raise RuntimeError("the server of warm processes did not start")

    def run(self, command: list[str], folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run a command in a folder; everything it started is ended with it."""
        environment = self.environment | variables
        with tempfile.TemporaryFile("w+") as out:  # not a pipe: what runs in the background would keep it open
            process = subprocess.Popen(
                command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip
            try:
                code = process.wait(timeout=300)
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            out.seek(0)
            return subprocess.CompletedProcess(command, code, out.read())

    def close(self) -> None:
        self._server.stdin.close()
        self._server.wait()
        self._server.stdout.close()
        shutil.rmtree(self.folder)


def serve(address: str) -> None:
    import selectors

    os.fsync = lambda handle: None  # nothing here can see what a sync does
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(address)
        server.listen()
        _import_all()
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # children are not waited for
        print("ready", flush=True)
        waiting = selectors.DefaultSelector()
        waiting.register(server, selectors.EVENT_READ)
        waiting.register(sys.stdin, selectors.EVENT_READ)
        while True:
            ready = [key.fileobj for key, _ in waiting.select()]
            if sys.stdin in ready:  # closed
                return
            caller, _ = server.accept()
            if os.fork() == 0:
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                waiting.close()
                server.close()
                _child(caller)
            caller.close()


def _import_all() -> None:
    import importlib
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in (
            "torch.utils.data", "sklearn.datasets", "zarr", "dask.array", "scipy.linalg", "scipy.stats", "transformers",
            "datasets", "matplotlib.figure", "s3fs", "xarray", "pandas", "jinja2", "PIL.Image",
            "ooc_influence.cli.main", "ooc_influence.cli.extraction", "ooc_influence.cli.scoring", "ooc_influence.hf",
            "ooc_influence.evaluate",
            "ooc_influence.report", "ooc_influence.cli.demo",
        ):  # fmt: skip
            with contextlib.suppress(ImportError):  # an extra that is not installed
                importlib.import_module(name)
        with contextlib.suppress(ImportError):  # loaded on first use
            from transformers import AutoTokenizer, GPT2LMHeadModel  # noqa: F401


def _child(caller: socket.socket) -> None:
    """Be the process that was asked for."""
    import atexit
    import threading
    import traceback

    request, streams, _, _ = socket.recv_fds(caller, 2**20, 3)
    threading.Thread(target=_end_with, args=(caller,), daemon=True).start()
    name, arguments, folder, environment = json.loads(request)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    code: object = 0
    try:
        _run(name, arguments, folder)
    except SystemExit as stopped:
        code = stopped.code
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    caller.sendall(bytes([code if isinstance(code, int) else 0 if code is None else 1]))
    os._exit(0)


def _end_with(caller: socket.socket) -> None:
    """Die as the program that asked did: a page that kills it means this process."""
    caller.recv(1)  # nothing is ever sent
    os.kill(os.getpid(), signal.SIGKILL)


def _run(name: str, arguments: list[str], folder: str) -> None:
    import runpy
    import warnings

    warnings.resetwarnings()
    if name == "ooc-influence":
        from ooc_influence.cli.main import main

        sys.argv = [name, *arguments]
        main()
    else:
        warnings.simplefilter("error", UserWarning)
        sys.argv = arguments
        sys.path.insert(0, str(Path(folder, arguments[0]).parent))
        runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    serve(sys.argv[1])
