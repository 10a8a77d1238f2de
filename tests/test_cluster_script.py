"""Scripts that start a cluster: bash accepts them, SLURM's is constructed from what they say, the local one runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import zarr
from conftest import random_rows, write_store
from test_cli import run  # noqa: F401 - a fixture

SLURM = "cluster-script slurm --jobs 3 --cores 16 --memory 64GiB --walltime 1-02:00:00 --queue gpu --account lab"


def make(capsys, line, *commands):
    from ooc_influence.cli.main import cli

    with pytest.raises(SystemExit) as stopped:
        cli.main([*line.split(), *commands])
    assert not stopped.value.code
    return capsys.readouterr().out


def check_syntax(text):
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)


def python_part(text):
    """The script's Python up to where jobs are asked for."""
    return text.split("<<'PYTHON' &\n")[1].split("\nPYTHON")[0].split("    cluster.scale")[0]


def test_slurm(capsys):
    text = make(capsys, SLURM + " --gpus 2 --directive --constraint=a100", "fisher train.zarr", "top q t --top 3")
    check_syntax(text)
    assert 'ooc-influence fisher train.zarr --scheduler-file "$file"\nooc-influence top q t --top 3 --sched' in text
    assert "scale(jobs=3)" in text
    jobqueue = pytest.importorskip("dask_jobqueue")
    names = {"__name__": "__main__"}
    exec(python_part(text), names)
    assert isinstance(names["cluster"], jobqueue.SLURMCluster)
    job = names["cluster"].job_script()
    names["cluster"].close()
    check_syntax(job)
    for line in (
        "-p gpu",
        "-A lab",
        "--cpus-per-task=16",
        "--mem=64G",
        "-t 1-02:00:00",
        "--gpus=2",
        "--constraint=a100",
    ):
        assert f"#SBATCH {line}\n" in job
    assert "--nthreads 1 --resources shard=1" in job


def test_slurm_without_jobqueue(capsys, monkeypatch):
    """What the constructor is given, by a stand-in: dask-jobqueue is no dependency."""
    given = {}
    stand_in = type(sys)("dask_jobqueue")
    stand_in.SLURMCluster = lambda **arguments: given.update(arguments)
    monkeypatch.setitem(sys.modules, "dask_jobqueue", stand_in)
    exec(python_part(make(capsys, "cluster-script slurm")), {"__name__": "__main__"})
    assert given == {
        "cores": 8, "processes": 1, "memory": "32GiB", "walltime": "04:00:00",
        "worker_extra_args": ["--nthreads", "1", "--resources", "shard=1"],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("cluster-script slurm --memory lots", "memory size such as"),
        ("cluster-script slurm --walltime soon", "--walltime as HH:MM:SS"),
        ("cluster-script local --queue gpu", "with slurm; received them with local"),
    ],
)
def test_mistakes(run, line, message):  # noqa: F811
    code, _, err = run(line)
    assert code == 2
    assert message in err


@pytest.mark.slow
def test_the_local_script_runs(tmp_path, capsys):
    pytest.importorskip("distributed")
    write_store(tmp_path / "train.zarr", random_rows(500, 20))
    write_store(tmp_path / "query.zarr", random_rows(5, 20, 1))
    text = make(
        capsys, "cluster-script local --jobs 2 --memory 1GiB", "fisher train.zarr --json",
        "score query.zarr train.zarr --out scores.zarr --json",
    )  # fmt: skip
    check_syntax(text)
    paths = [str(Path(sys.executable).parent), os.environ["PATH"]]
    environment = os.environ | {"PATH": os.pathsep.join(paths), "PYTHONPATH": str(Path(__file__).parent.parent)}
    done = subprocess.run(
        ["bash"], input=text, text=True, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, timeout=300
    )
    assert done.returncode == 0
    assert [json.loads(line).get("rows") for line in done.stdout.splitlines()] == [500, 500]
    assert np.isfinite(zarr.open_array(str(tmp_path / "scores.zarr"))[...]).all()
    assert not list(tmp_path.glob(".scheduler*"))
