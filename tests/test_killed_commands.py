"""Commands killed with SIGKILL at three moments, one after the other, and run again: they end as if nothing had been.

The moments are counted in writes (files opened to write, renamed, removed, folders made), which an uninterrupted run
counts first: a quarter of them, then another quarter of what a run after the first kill has left, and so on.
"""

from __future__ import annotations

import re
import shutil

import numpy as np
import pytest
from tiny_hf import MARKS, documents, make_model, write
from warm import Warm

import ooc_influence as ooc

pytest.importorskip("jinja2")
pytest.importorskip("pyarrow")
pytestmark = MARKS
N, Q = 12, 3
WATCH = """
import os, signal, sys
from pathlib import Path
place, stop, report, count = os.getcwd(), int(sys.argv[1]), sys.argv[2], 0
CHANGES = {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate", "os.link"}

def watch(event, arguments):
    global count
    if event == "open":
        changes = isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
    else:
        changes = event in CHANGES
    if not changes or not isinstance(arguments[0], (str, bytes, os.PathLike)):
        return
    if os.path.abspath(os.fsdecode(arguments[0])).startswith(place):
        count += 1
        if count == stop:
            os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(watch)
from ooc_influence.cli.main import main
try:
    main(sys.argv[3:])
finally:
    Path(report).write_text(str(count))
"""
STORES = "run/train.zarr --queries run/queries.zarr"
COMMANDS = {
    "trace": "trace --model ../model --data ../corpus.jsonl --queries ../answers.jsonl -o run --token-rows 2 --top 4 "
    "--id id --keep source --yes",
    "report": f"report {STORES} --model ../model --token-rows 2 -o pages",
    "select": f"select {STORES} --keep 4 --redundancy 0.5 --out kept.jsonl -o kept.parquet",
    "top": "top run/queries.zarr run/train.zarr --top 4 -o lists.parquet",
    "drop": "drop run/train.zarr --from ../unwanted.txt",
    "export": "export run/train.zarr -o rows.npy",
    "import": "import ../rows.npy --store imported.zarr --ids ../names.txt",
}  # fmt: skip


@pytest.fixture(scope="module")
def warm():
    server = Warm()
    yield server
    server.close()


@pytest.fixture(scope="module")
def place(tmp_path_factory, warm):
    """A folder with a model, documents and answers, and in ``ready`` a finished run of ``trace``."""
    folder = tmp_path_factory.mktemp("killed")
    make_model(folder / "model")
    rows = [{**entry, "id": f"d{number}", "source": f"s{number % 2}"} for number, entry in enumerate(documents(N))]
    write(folder / "corpus.jsonl", rows)
    answers = [{"prompt": text, "completion": "w1 w2 w3"} for text in ("w4 w5", "w6", "w7 w8 w9")]
    write(folder / "answers.jsonl", answers)
    (folder / "watch.py").write_text(WATCH)
    (folder / "ready").mkdir()
    done = warm.run([str(warm.folder / "ooc-influence"), *COMMANDS["trace"].split()], folder / "ready")
    assert done.returncode == 0, done.stdout
    names = ooc.GradientStore.open(folder / "ready" / "run" / "train.zarr").ids()[:3]
    (folder / "unwanted.txt").write_text("\n".join(map(str, names)))
    np.save(folder / "rows.npy", np.random.default_rng(0).normal(size=(300, 20)))
    (folder / "names.txt").write_text("\n".join(map(str, range(300))))
    return folder


def results(folder):
    """Return what is in a folder as comparable values: rows of stores, other files without times, places, identities.

    Hidden folders, of what was being made, are removed by a later command, a day after the crash.
    """
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if any(part.startswith(".") for part in path.relative_to(folder).parts):
            continue
        if path.suffix == ".zarr" and path.is_dir():
            store = ooc.GradientStore.open(path)
            found[name] = store.rows().tobytes(), store.loss.tobytes(), store.ids().tolist(), store.dropped.tolist()
        elif path.is_file() and not any(part.endswith(".zarr") for part in path.relative_to(folder).parts):
            text = path.read_bytes().replace(str(folder).encode(), b"")
            found[name] = re.sub(rb'"(written|identity|created|bytes)": ?("[^"]*"|{[^}]*}|\d+)', b"", text)
    return found


@pytest.mark.parametrize("name", COMMANDS)
def test_a_killed_command_ends_as_an_uninterrupted_one(place, warm, tmp_path, name):
    def run(folder, stop=0):
        command = [str(warm.folder / "python"), "../watch.py", str(stop), str(tmp_path / "count"), *words]
        return warm.run(command, folder)

    words = COMMANDS[name].split()
    for folder in (place / f"{name}-whole", place / f"{name}-killed"):
        folder.mkdir() if name == "trace" else shutil.copytree(place / "ready", folder)
    done = run(place / f"{name}-whole")
    assert done.returncode == 0, done.stdout
    writes = int((tmp_path / "count").read_text())
    assert writes >= (2 if name == "top" else 4)
    killed = 0
    for part in (1, 2, 3):
        killed += run(place / f"{name}-killed", max(1, round(writes * part / 4))).returncode == 70
    assert killed >= 2  # what a run continues may be less than its part
    done = run(place / f"{name}-killed")
    assert done.returncode == 0, done.stdout
    assert results(place / f"{name}-killed") == results(place / f"{name}-whole")
