"""Real processes: killed in the middle, two at once, a disk that is full."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import textwrap
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from conftest import random_rows, whole_mask
from numpy.testing import assert_array_equal

from ooc_influence import GradientStore, Storage
from ooc_influence.errors import StoreWriteError

HERE = str(Path(__file__).parent)
HEAD = f"import sys; sys.path.insert(0, {HERE!r})\n"

EXTRACT = HEAD + textwrap.dedent("""
    import time, torch
    from models import Mlp, batches, data, loss, make
    from ooc_influence import Dropout, Storage, extract_gradients
    torch.set_num_threads(1)
    path, last, count = sys.argv[1], int(sys.argv[2]), 0
    def slow(model, batch):
        global count
        count += 1
        if count > last > 0:
            time.sleep(600)  # until it is killed
        return loss(model, batch)
    source = batches(*data(Mlp, 200), 6)
    print("ready", flush=True)
    extract_gradients(make(Mlp), slow, source, path, compressor=Dropout(k=300), storage=Storage(16, 2))
    print("done", flush=True)
""")

APPEND = HEAD + textwrap.dedent("""
    import numpy as np
    from conftest import random_rows
    from ooc_influence import GradientStore
    from ooc_influence.errors import StoreBusyError
    path, seed = sys.argv[1], int(sys.argv[2])
    store = GradientStore.open(path, "a")
    print("ready", flush=True)
    sys.stdin.readline()
    try:
        for row in random_rows(300, 8, seed):
            store.append(row[None], loss=[seed])
        store.close()
        print("done")
    except StoreBusyError as error:
        print("refused")
""")


def start(script, *arguments):
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


def files(path):
    """Every chunk file of a store, by name."""
    return {
        str(file.relative_to(path)): file.read_bytes()
        for file in path.rglob("*")
        if file.is_file() and file.name != "zarr.json" and not file.name.startswith(".claim")
    }


def test_kill_9_then_resume_equals_an_uninterrupted_run(tmp_path):
    """Killed three times between its first commit and its last, each time after it committed more."""
    whole = tmp_path / "whole.zarr"
    subprocess.run([sys.executable, "-c", EXTRACT, str(whole), "0"], check=True, capture_output=True)
    expected = GradientStore.open(whole).rows()
    path = tmp_path / "killed.zarr"
    seen = [0]
    for _ in range(3):
        process = start(EXTRACT, path, 8)  # batches, 48 rows: at least one group of 32 is committed
        assert process.stdout.readline() == "ready\n"
        while process.poll() is None and (not path.exists() or GradientStore.open(path).n == seen[-1]):
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        store = GradientStore.open(path)
        seen.append(store.n)
        assert store.n % 16 == 0
        assert_array_equal(store.rows(), expected[: store.n])
        assert store.verify() == []
    assert all(before < after < 200 for before, after in pairwise(seen)), seen
    subprocess.run([sys.executable, "-c", EXTRACT, str(path), "0"], check=True, capture_output=True)
    assert files(path) == files(whole)
    assert not list(path.rglob("*.partial"))


def test_two_processes_appending_lose_nothing(tmp_path):
    path = tmp_path / "s.zarr"
    GradientStore.create(path, whole_mask(8), dtype="float32", storage=Storage(16, 2)).close()
    processes = [start(APPEND, path, seed) for seed in (1, 2)]
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    outcomes = [process.communicate()[0].strip() for process in processes]
    assert "done" in outcomes
    store = GradientStore.open(path)
    assert store.verify() == []
    stored = {tuple(row) for row in store.rows().tolist()}
    for seed, outcome in zip((1, 2), outcomes, strict=True):
        rows = {tuple(row) for row in random_rows(300, 8, seed).tolist()}
        assert rows <= stored if outcome == "done" else not rows & stored
    assert store.n == 300 * outcomes.count("done")


def test_a_claim_dies_with_its_process(tmp_path):
    path = tmp_path / "s.zarr"
    GradientStore.create(path, whole_mask(8), storage=Storage(16, 2)).close()
    script = HEAD + textwrap.dedent("""
        import time
        from conftest import random_rows
        from ooc_influence import GradientStore
        store = GradientStore.open(sys.argv[1], "a")
        store.append(random_rows(16, 8), loss=[0.0] * 16)
        store.flush()
        store.append(random_rows(4, 8), loss=[0.0] * 4)
        print("holding", flush=True)
        time.sleep(60)
    """)
    process = start(script, path)
    assert process.stdout.readline() == "holding\n"
    process.kill()
    process.communicate()
    with GradientStore.open(path, "a") as store:
        assert store.n == 16
        store.append(random_rows(4, 8), loss=np.zeros(4))
    assert GradientStore.open(path).n == 20


def _append_and_flush(store, rows):
    store.append(rows, loss=np.zeros(len(rows)))
    store.flush()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_full_disk_keeps_what_was_committed(tmp_path):
    """A limit on file size stands for the disk: the write fails half-way with EFBIG."""
    rows = random_rows(64, 8)
    store = GradientStore.create(tmp_path / "s.zarr", whole_mask(8), dtype="float32", storage=Storage(16, 2))
    store.append(rows[:16], loss=np.zeros(16))
    store.flush()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (300, hard))
        with pytest.raises(
            StoreWriteError, match=r"file too large: lift the limit.*the 16 rows committed stay readable"
        ):
            _append_and_flush(store, rows[16:])
        store.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    reader = GradientStore.open(store.path)
    assert_array_equal(reader.rows(), rows[:16])
    assert reader.verify() == []
    with GradientStore.open(store.path, "a") as again:
        again.append(rows[16:], loss=np.zeros(48))
    assert_array_equal(GradientStore.open(store.path).rows(), rows)


def test_a_forked_child_cannot_write(tmp_path):
    path = tmp_path / "s.zarr"
    GradientStore.create(path, whole_mask(8), dtype="float32", storage=Storage(2, 1)).close()
    store = GradientStore.open(path, "a")
    store.append(random_rows(3, 8), loss=np.zeros(3))
    child = os.fork()
    if child == 0:
        try:
            store.append(random_rows(3, 8), loss=np.zeros(3))
        except StoreWriteError:
            store.close()
            os._exit(7)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    store.append(random_rows(1, 8), loss=np.zeros(1))
    store.close()
    assert GradientStore.open(path).n == 4
    assert GradientStore.open(path).verify() == []


def test_readers_open_while_a_writer_commits(tmp_path):
    """Every opened view is a prefix of what is written, whatever the writer is doing at that moment."""
    path = tmp_path / "s.zarr"
    rows = random_rows(300, 8, 1)
    GradientStore.create(path, whole_mask(8), dtype="float32", storage=Storage(2, 1)).close()
    process = start(APPEND, path, 1)
    assert process.stdout.readline() == "ready\n"
    process.stdin.write("go\n")
    process.stdin.flush()
    seen = []
    while process.poll() is None:
        store = GradientStore.open(path)
        assert_array_equal(store.rows(), rows[: store.n])
        seen.append(store.n)
    process.communicate()
    assert seen == sorted(seen)
    assert len(set(seen)) > 3
    assert GradientStore.open(path).n == 300
