"""A Dask cluster for the commands: connecting to a scheduler, and scripts that start one."""

from __future__ import annotations

import contextlib
import json
import re
import shlex
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from ooc_influence.errors import ClusterError, InputError, MissingExtraError, install_extra

ANSWER = 10.0  # seconds in which a scheduler answers
PATIENCE = 60.0  # seconds to wait for a scheduler's file and for its first worker


@contextlib.contextmanager
def connected(address: str | None, file: str | None) -> Iterator[None]:
    """Make the cluster of a scheduler the ambient one, if an address or a file names it.

    Raises
    ------
    InputError
        If both are given.
    ClusterError
        If no scheduler answers, or no worker comes.
    MissingExtraError
        If distributed is not installed.
    """
    if address is None and file is None:
        yield
        return
    if address is not None and file is not None:
        raise InputError("expected --scheduler or --scheduler-file; received both")
    try:
        from distributed import Client
    except ImportError as error:
        raise MissingExtraError(
            f"expected distributed for --scheduler; received none: {install_extra('distributed')}"
        ) from error
    scheduler = _read_address(Path(file)) if file is not None else str(address)
    _check_answers(scheduler)
    with Client(scheduler, timeout=ANSWER, set_as_default=False) as client:
        try:
            client.wait_for_workers(1, timeout=PATIENCE)
        except TimeoutError as error:
            raise ClusterError(
                f"expected workers of the scheduler at {scheduler}; received none in {PATIENCE:.0f} s: start some with "
                f"'dask worker {scheduler}'"
            ) from error
    with Client(scheduler, timeout=ANSWER):
        yield


def _check_answers(scheduler: str) -> None:
    """Check that a scheduler answers, by a bare connection.

    A client that cannot connect stays Dask's default one until it is collected, and says then that it cannot be closed.
    """
    import asyncio

    from distributed.comm.core import connect
    from distributed.security import Security

    async def ask() -> None:
        comm = await connect(scheduler, timeout=ANSWER, **Security().get_connection_args("client"))
        await comm.close()

    try:
        asyncio.run(ask())
    except Exception as error:  # whatever the protocol named makes of the address
        raise ClusterError(
            f"expected a Dask scheduler at {scheduler}, as in tcp://host:8786; received none ({error}): start one with "
            "'dask scheduler', see docs/howto/cluster.md"
        ) from error


def _read_address(file: Path) -> str:
    """Return the address in a scheduler's file, which may take a while to be written."""
    end = time.monotonic() + PATIENCE
    while True:
        try:
            return str(json.loads(file.read_text())["address"])
        except (OSError, ValueError, KeyError) as error:
            if time.monotonic() > end:
                raise ClusterError(
                    f"expected a scheduler's file at {file}; received: {error}: start one with 'dask scheduler "
                    f"--scheduler-file {file}' where this machine and the workers see it"
                ) from error
        time.sleep(0.1)


@click.command("cluster-script", context_settings={"ignore_unknown_options": True})
@click.argument("kind", type=click.Choice(["slurm", "local"]))
@click.argument("commands", nargs=-1, type=click.UNPROCESSED)
@click.option("--jobs", type=click.IntRange(min=1), default=4, show_default=True, help="Workers: a SLURM job each.")
@click.option("--cores", type=click.IntRange(min=1), default=8, show_default=True, help="Cores of a job.")
@click.option("--memory", default="32GiB", show_default=True, metavar="SIZE", help="Memory of a job.")
@click.option("--walltime", default="04:00:00", show_default=True, metavar="HH:MM:SS", help="Time of a job.")
@click.option("--queue", metavar="NAME", help="The partition.")
@click.option("--account", metavar="NAME", help="The account that is billed.")
@click.option("--gpus", type=click.IntRange(min=0), default=0, show_default=True, help="GPUs of a job.")
@click.option("--directive", "directives", multiple=True, metavar="TEXT",
              help="A further #SBATCH line, such as '--constraint=a100'; may be repeated.")  # fmt: skip
def cluster_script(kind: str, commands: tuple[str, ...], **worker: Any) -> None:
    """Print a bash script that starts workers, runs COMMANDS on them, and stops them.

    COMMANDS are ooc-influence commands, each one argument, such as 'fisher train.zarr'; the script adds the scheduler.
    slurm: workers are jobs of SLURM, by way of dask-jobqueue (pip install dask-jobqueue), whose defaults in
    ~/.config/dask/jobqueue.yaml hold too. local: processes of this machine, to try things out.
    """
    click.echo(make_script(kind, commands, Worker(**worker)), nl=False)


_SCRIPT = """\
#!/usr/bin/env bash
# Starts a Dask scheduler and {jobs} workers, {what}, runs the commands on them, and stops them.
# Run it where the workers' folders are seen: scheduler file, stores and recipes are found by path.
set -euo pipefail
file="$(mktemp -u "$PWD/.scheduler-XXXXXX").json"
{start}
pids="$!{more}"
trap 'kill $pids 2>/dev/null || true; wait; rm -f "$file"' EXIT
{run}
"""
_SLURM = """\
python - "$file" <<'PYTHON' &
import json
import os
import signal
import sys

from dask_jobqueue import SLURMCluster

if __name__ == "__main__":
    cluster = SLURMCluster(
{arguments}
    )
    cluster.scale(jobs={jobs})
    with open(sys.argv[1] + ".new", "w") as file:
        json.dump({{"address": cluster.scheduler_address}}, file)
    os.replace(sys.argv[1] + ".new", sys.argv[1])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # leaving closes the cluster and cancels its jobs
    signal.pause()
PYTHON"""
_LOCAL = """\
dask scheduler --port 0 --no-dashboard --scheduler-file "$file" &
scheduler=$!
dask worker --scheduler-file "$file" --nworkers {jobs} --nthreads 1 --memory-limit {memory} --no-dashboard \\
  --resources "shard=1" &"""


@dataclass(frozen=True)
class Worker:
    """What a cluster's workers are: how many, their size, and how SLURM runs them; as the options of the same names."""

    jobs: int = 4
    cores: int = 8
    memory: str = "32GiB"
    walltime: str = "04:00:00"
    queue: str | None = None
    account: str | None = None
    gpus: int = 0
    directives: Sequence[str] = ()


def make_script(kind: str, commands: Sequence[str], worker: Worker) -> str:
    """Return the script that :func:`cluster_script` prints.

    Raises
    ------
    InputError
        For a memory or walltime of another form, or options that go with SLURM only.
    """
    from ooc_influence.memory import parse_bytes

    parse_bytes(worker.memory)
    run = "\n".join(f'ooc-influence {command} --scheduler-file "$file"' for command in commands)
    run = run or 'echo "scheduler file: $file"; wait'
    if kind == "local":
        if worker.queue or worker.account or worker.gpus or worker.directives:
            raise InputError("expected --queue, --account, --gpus and --directive with slurm; received them with local")
        start = _LOCAL.format(jobs=worker.jobs, memory=shlex.quote(worker.memory))
        return _SCRIPT.format(
            jobs=worker.jobs, what="processes of this machine", start=start, more=" $scheduler", run=run
        )
    if not re.fullmatch(r"(\d+-)?\d{1,2}:\d{2}:\d{2}", worker.walltime):
        raise InputError(f"expected --walltime as HH:MM:SS or D-HH:MM:SS; received {worker.walltime!r}")
    lines = [*worker.directives, *([f"--gpus={worker.gpus}"] if worker.gpus else [])]
    arguments = {
        "queue": worker.queue,
        "account": worker.account,
        "cores": worker.cores,  # all of a job's: one task at a time, whose BLAS uses them
        "processes": 1,
        "memory": worker.memory,
        "walltime": worker.walltime,
        "worker_extra_args": ["--nthreads", "1", "--resources", "shard=1"],
        "job_extra_directives": lines or None,
    }
    keywords = "\n".join(f"        {name}={value!r}," for name, value in arguments.items() if value is not None)
    start = _SLURM.format(arguments=keywords, jobs=worker.jobs)
    return _SCRIPT.format(jobs=worker.jobs, what="jobs of SLURM", start=start, more="", run=run)
