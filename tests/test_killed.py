"""Real writer processes killed with SIGKILL, at random moments and at chosen points, until the store is whole.

A forked child opens the store and writes; it imports nothing anew, so hundreds of kills take seconds. The parent of
the children is a fresh interpreter without threads (``python test_killed.py``): forking one with threads is not sound.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest

HERE = Path(__file__).parent
N, K, CHUNK, GROUP = 96, 6, 4, 3
POINTS = ("none", "data", "small", "folders", "record", "after record", "resize")


def rows_of(n=N):
    return np.random.default_rng(5).normal(size=(n, K)).astype(np.float32)


def create(path, planned):
    from conftest import whole_mask

    from ooc_influence import GradientStore, Storage

    storage = Storage(chunk_rows=CHUNK, group_chunks=GROUP)
    GradientStore.create(
        path, whole_mask(K), dtype="float32", storage=storage, planned_rows=N if planned else None, ids="int64"
    ).close()


def write(path, start, stop, generator, pause, point="none", count=0):
    """Fill what is missing of a range, flushing at odd places."""
    arm(point, count)
    from ooc_influence import GradientStore

    rows = rows_of()
    with GradientStore.open(path, "a") as store:
        writer = store.writer(start, stop) if stop is not None else store.writer()
        end = N if stop is None else stop
        while writer.next_row < end:
            count = min(end - writer.next_row, generator.randint(1, 7))
            part = slice(writer.next_row, writer.next_row + count)
            store.append(rows[part], loss=np.arange(N)[part], ids=np.arange(N)[part])
            if generator.random() < 0.4:
                store.flush()
            time.sleep(pause)


def arm(point, count):
    """Let the process die at the count-th time it gets to a point."""
    from ooc_influence.store.commits import Committer
    from ooc_influence.store.local import LocalArrayStore

    left = [count]

    def dying(function, *, before):
        def call(*given, **named):
            left[0] -= before
            if before and left[0] <= 0:
                os.kill(os.getpid(), signal.SIGKILL)
            result = function(*given, **named)
            left[0] -= not before
            if not before and left[0] <= 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return call

    for owner, name, own, before in (
        (Committer, "_write_gradients", "data", False),
        (Committer, "_write_small", "small", True),
        (LocalArrayStore, "sync_folders", "folders", True),
        (Committer, "rewrite_records", "record", True),
        (Committer, "rewrite_records", "after record", False),
        (Committer, "resize", "resize", True),
    ):
        if point == own:
            setattr(owner, name, dying(getattr(owner, name), before=before))


def in_child(work):
    """Run in a forked child; return its pid."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        except BaseException as error:
            print(f"child: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)
    return pid


def check(path, planned):
    """Every committed row is what was written, nothing else is to be seen; return the rows committed."""
    from ooc_influence import GradientStore
    from ooc_influence.store.commits import rows_in

    store = GradientStore.open(path)
    rows = rows_of()
    assert np.array_equal(store.rows(), rows[: store.n])
    for chunk, held in enumerate(rows_in(store.records).tolist()):
        part = slice(chunk * CHUNK, chunk * CHUNK + held)
        assert np.array_equal(store.read("gradients", part, slice(0, K)), rows[part])
        assert store.read("example_id", part).tolist() == list(range(part.start, part.stop))
        assert np.array_equal(store.read("loss", part), np.arange(N)[part])
    assert store.verify(workers=1) == []
    assert planned or store.committed == store.n
    return store.committed


def contents(path):
    return {
        str(file.relative_to(path)): file.read_bytes()
        for file in path.rglob("*")
        if file.is_file() and file != path / "zarr.json" and not file.name.startswith(".claim")
    }


def checked(path, planned, report):
    """Check in a child, for the parent to stay without threads; the committed rows come back through a file."""
    pid = in_child(lambda: report.write_text(str(check(path, planned))))
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    return int(report.read_text())


def run(kills, seed):
    """Kill writers of stores until so many have been killed; print what was seen."""
    generator = random.Random(seed)
    seen = {"kills": 0, "stores": 0, "middle": 0, "points": {}}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        whole = {}
        for planned in (False, True):
            path = folder / f"whole-{planned}"

            def fill(path=path, planned=planned):
                create(path, planned)
                write(path, 0, N if planned else None, random.Random(0), 0)

            assert os.waitstatus_to_exitcode(os.waitpid(in_child(fill), 0)[1]) == 0
            whole[planned] = contents(path)
        while seen["kills"] < kills:
            seen["stores"] += 1
            planned = generator.random() < 0.5
            path = folder / f"s{seen['stores']}"
            assert os.waitstatus_to_exitcode(os.waitpid(in_child(partial(create, path, planned)), 0)[1]) == 0
            cuts = sorted(generator.sample(range(CHUNK * GROUP, N, CHUNK * GROUP), generator.randint(0, 2)))
            ranges = list(zip([0, *cuts], [*cuts, N], strict=True)) if planned else [(0, None)]
            committed, last = 0, 0
            for trial in range(60):
                rare = sorted(POINTS, key=lambda point: seen["points"].get(point, 0))[:3]  # some are seldom reached
                point = generator.choice(rare) if trial < 12 else "none"
                count, pause = generator.randint(1, 12), generator.choice([0, 0.002])
                children = []
                for start, stop in ranges:
                    inner = random.Random(generator.random())

                    children.append(in_child(partial(write, path, start, stop, inner, pause, point, count)))
                if point == "none" and trial < 12:
                    time.sleep(generator.uniform(0.02, 0.25))
                    for child in children:
                        os.kill(child, signal.SIGKILL)
                codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
                assert set(codes) <= {0, -signal.SIGKILL}, codes
                killed = codes.count(-signal.SIGKILL)
                seen["kills"] += killed
                seen["points"][point] = seen["points"].get(point, 0) + killed
                committed = checked(path, planned, folder / "report")
                assert committed >= last
                last = committed
                seen["middle"] += bool(killed and 0 < committed < N)
                if committed == N and not killed:
                    break
            assert committed == N
            found, wanted = contents(path), whole[planned]
            differing = {name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name)}
            assert not differing, differing
    print(json.dumps(seen))


def harness(kills, seed):
    environment = os.environ | {"PYTHONPATH": str(HERE)}
    done = subprocess.run(
        [sys.executable, __file__, str(kills), str(seed)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    seen = json.loads(done.stdout)
    assert seen["kills"] >= kills
    assert seen["middle"] >= kills // 4
    return seen


@pytest.mark.slow
def test_twenty_kills():
    assert harness(20, 1)["stores"] >= 1


@pytest.mark.slow
def test_two_hundred_kills():
    seen = harness(200, 2)
    assert all(seen["points"].get(point, 0) >= 5 for point in POINTS), seen
    assert seen["stores"] >= 5


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_really_full_disk(tmp_path):
    from conftest import whole_mask

    from ooc_influence import GradientStore, Storage
    from ooc_influence.errors import StoreWriteError

    place = tmp_path / "small"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(place)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr!r}")
    try:
        rows = np.random.default_rng(0).normal(size=(4000, 16)).astype(np.float32)
        store = GradientStore.create(
            place / "s", whole_mask(16), dtype="float32", storage=Storage(chunk_rows=64, group_chunks=4)
        )

        def fill():
            for start in range(store.writer().next_row, 4000, 50):
                store.append(rows[start : start + 50], loss=np.zeros(len(rows[start : start + 50])))
            store.close()

        with pytest.raises(StoreWriteError, match="no space left"):
            fill()
        store.close()
        held = GradientStore.open(place / "s")
        assert 0 < held.n < 4000
        assert np.array_equal(held.rows(), rows[: held.n])
        assert held.verify() == []
        del held
        subprocess.run(["mount", "-o", "remount,size=4m", str(place)], check=True)
        store = GradientStore.open(place / "s", "a")
        fill()
        again = GradientStore.open(place / "s")
        assert np.array_equal(again.rows(), rows)
        assert not list(place.rglob("*.partial"))
        del again
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="changing the user needs root; another user's folders are as good a test")
def test_a_read_only_folder():
    script = """
import os, sys
import numpy as np
from conftest import random_rows, write_store
from ooc_influence import GradientStore
from ooc_influence.errors import StoreWriteError
import ooc_influence.store.claim, ooc_influence.store.writer
import dask.delayed  # now: another user may not be allowed to read this Python
path = sys.argv[1] + "/s"
rows = random_rows(20, 4)
write_store(path, rows)
os.chmod(sys.argv[1], 0o755)
os.setuid(65534)
store = GradientStore.open(path)
assert np.array_equal(store.rows(), rows) and store.verify() == []
for act in (lambda s: s.append(rows, loss=np.zeros(20)), lambda s: s.drop([1]), lambda s: s.verify(repair=True)):
    try:
        act(GradientStore.open(path, "a"))
    except StoreWriteError as error:
        print("refused" if "\\n" not in str(error) else error)
"""
    with tempfile.TemporaryDirectory() as name:
        done = subprocess.run(
            [sys.executable, "-c", script, name],
            capture_output=True,
            text=True,
            env=os.environ | {"PYTHONPATH": str(HERE)},
        )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["refused", "refused"]  # there is nothing to repair


if __name__ == "__main__":
    import conftest  # noqa: F401 - loaded once, before the children are forked

    import ooc_influence.store  # noqa: F401

    run(int(sys.argv[1]), int(sys.argv[2]))
