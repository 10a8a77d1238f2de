"""Score arrays after power cuts, kills and interruptions: whole chunks, and the same call ends with the same bits."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import zarr
from conftest import random_rows, write_store
from numpy.testing import assert_array_equal
from test_replay import Disk, Recorder, chooser, lay_out, losing

from ooc_influence import fit_fisher, influence_scores, module_influence
from ooc_influence.checkpoint import ResumableArray
from ooc_influence.errors import MismatchError
from ooc_influence.store import local

HERE = str(Path(__file__).parent)


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume")
    train = write_store(folder / "train.zarr", random_rows(300, 6))
    fit_fisher(train)
    return write_store(folder / "query.zarr", random_rows(20, 6, 1)), train


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr("ooc_influence.memory.BLOCK_BYTES", 64 * 4 * 6)  # 64 rows
    monkeypatch.setattr("ooc_influence.influence.scores.CHUNK_TARGET", 4 * 64 * 4)  # and 4 queries in a chunk
    monkeypatch.setattr("ooc_influence.influence.costs.QUERY_ROWS", 8)  # 8 queries a pass


@pytest.fixture
def recorded(tmp_path, monkeypatch, stores, small_blocks):
    """What writing scores asks of the operating system, and the scores."""
    root = tmp_path / "recorded"
    root.mkdir()
    recorder = Recorder(root)
    monkeypatch.setattr(local, "os", recorder)
    expected = influence_scores(*stores, out=root / "s")[...]
    monkeypatch.setattr(local, "os", os)
    recorder.note("returned")
    assert sum(event[0] == "rename" and event[2].startswith("s/c.") for event in recorder.events) == 25
    made = str(Path(recorder.events[0][1]).parent)  # by Zarr, not by the module that is recorded
    return [("mkdir", made), *recorder.events], expected


def check(path, expected, promised):
    """What is there is whole and right; what the attributes promise is there."""
    if not promised and not (path / "zarr.json").exists():
        return
    array = zarr.open_array(str(path), mode="r")
    for chunk in path.glob("c.*"):
        assert chunk.stat().st_size == 4 * 4 * 64
    found = array[...]
    missing = np.isnan(found)
    assert_array_equal(found[~missing], expected[~missing])
    assert array.attrs["complete"] or not promised
    if array.attrs["complete"]:
        assert not missing.any()


def replay(events, folder, expected, model, stores=None):
    held, promised, crashes = Disk(), False, 0
    for number, event in enumerate(events):
        if event[0] == "returned":
            promised = True
        else:
            held.apply(*event)
        if event[0] not in ("fsync", "rename", "returned"):
            continue
        out = folder / f"{model}-{number}"
        lay_out(held.survive(chooser(model, number)), out)
        check(out / "s", expected, promised)
        crashes += 1
        if stores is not None and crashes % 25 == 0:
            assert_array_equal(influence_scores(*stores, out=out / "s")[...], expected)
    return crashes


@pytest.mark.parametrize("model", ["lost", "names", "some"])
def test_chunks_after_a_power_cut_are_whole(recorded, tmp_path, model, stores):
    assert replay(recorded[0], tmp_path, recorded[1], model, stores) > 60


@pytest.mark.parametrize("kind", ["files", "folders"])
def test_a_missing_sync_would_be_found(recorded, tmp_path, kind):
    events = list(losing(recorded[0], kind))
    assert len(events) < len(recorded[0])
    with pytest.raises((AssertionError, OSError, ValueError)):  # whatever a lost file leads to
        replay(events, tmp_path, recorded[1], "names" if kind == "files" else "lost")


CHILD = f"import sys; sys.path.insert(0, {HERE!r})\n" + textwrap.dedent("""
    import time
    import ooc_influence as ooc
    import ooc_influence.influence.costs as costs
    import ooc_influence.influence.tiles as tiles, ooc_influence.memory as memory
    output = sys.modules["ooc_influence.influence.scores"]
    query, train, out, pause = *sys.argv[1:4], float(sys.argv[4])
    memory.BLOCK_BYTES, output.CHUNK_TARGET, costs.QUERY_ROWS = 64 * 4 * 6, 4 * 64 * 4, 8
    original = tiles.tick
    def slow(key, rows):
        time.sleep(pause)
        original(key, rows)
    tiles.tick = sys.modules["ooc_influence.influence.search"].tick = slow
    print("begun", flush=True)
    ooc.influence_scores(query, train, out=out, workers=2)
""")


def chunks_in(path):
    return len(list(path.glob("c.*")))


def test_killed_until_it_is_whole(tmp_path, stores):
    generator = random.Random(7)
    query, train = (str(store.path) for store in stores)
    command = [sys.executable, "-c", CHILD, query, train, str(tmp_path / "s"), "0.06"]
    kills, last = 0, 0
    while True:  # every run writes at least a chunk, so this ends
        process = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert process.stdout.readline() == b"begun\n"
        enough = last + generator.randint(2, 6)
        while process.poll() is None and chunks_in(tmp_path / "s") < enough:
            time.sleep(0.005)
        time.sleep(generator.uniform(0, 0.1))  # for the kill to come anywhere in the work on the next ones
        done = process.poll() is not None
        process.kill()
        process.stdout.close()
        assert process.wait() in ((0,) if done else (0, -signal.SIGKILL))
        kills += process.returncode != 0
        assert chunks_in(tmp_path / "s") >= last  # what is written stays
        last = chunks_in(tmp_path / "s")
        if process.returncode == 0:
            break
    assert kills >= 2
    subprocess.run([*command[:-2], str(tmp_path / "whole"), "0"], check=True, stdout=subprocess.DEVNULL)
    assert process.returncode == 0
    files = [sorted(path.glob("*")) for path in (tmp_path / "s", tmp_path / "whole")]
    assert [file.name for file in files[0]] == [file.name for file in files[1]]  # nothing is left behind
    for file, other in zip(*files, strict=True):
        assert file.read_bytes() == other.read_bytes()


def test_ctrl_c_says_how_to_go_on(tmp_path, stores):
    query, train = (str(store.path) for store in stores)
    for out, name in ((tmp_path / "s", "score"), (None, "top")):
        code = CHILD.replace("def slow(key, rows):\n    time.sleep(pause)", textwrap.dedent("""
            import signal, threading
            interrupted, count = threading.Event(), [0]
            def interrupt(*given):
                interrupted.set()
                signal.default_int_handler(*given)
            signal.signal(signal.SIGINT, interrupt)
            def slow(key, rows):
                count[0] += 1
                if count[0] == 8:  # of 15 blocks
                    print("halfway", flush=True)
                if count[0] >= 8:
                    interrupted.wait(60)
                    time.sleep(pause)
        """).strip()).replace("ooc.influence_scores(query, train, out=out, workers=2)", textwrap.dedent("""
            from ooc_influence.cli.main import main
            main([*sys.argv[5:]])
        """))  # fmt: skip
        arguments = [name, query, train, *(["--out", str(out)] if out else [])]
        command = [sys.executable, "-c", code, query, train, str(out), "0.3", *arguments]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert [process.stdout.readline() for _ in range(2)] == ["begun\n", "halfway\n"]
        end = time.monotonic() + 60
        while out and not list(out.glob("c.*")) and time.monotonic() < end:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=120)
        assert process.returncode == 130
        wanted = "finished chunks stay; run the same command again" if out else "with --resume DIR it would continue"
        assert wanted in err
        assert "Traceback" not in err
    assert not zarr.open_array(str(tmp_path / "s")).attrs["complete"]
    assert 0 < len(list((tmp_path / "s").glob("c.*"))) < 25


def test_a_smaller_budget_than_it_was_begun_with_is_refused(tmp_path, stores, small_blocks, monkeypatch):
    monkeypatch.setattr(ResumableArray, "finish", lambda self, **facts: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        influence_scores(*stores, out=tmp_path / "s")
    monkeypatch.undo()
    next((tmp_path / "s").glob("c.2.*")).unlink()
    monkeypatch.setattr("ooc_influence.influence.costs.QUERY_ROWS", 2)
    with pytest.raises(MismatchError, match=r"room for 4 queries at a time.*give as much --memory"):
        influence_scores(*stores, out=tmp_path / "s")
    monkeypatch.undo()
    assert_array_equal(influence_scores(*stores, out=tmp_path / "s")[...], influence_scores(
        *stores, out=tmp_path / "again")[...])  # fmt: skip


def test_leading_axes_are_resumed_too(tmp_path, stores, small_blocks):
    options = {"damping": [0.1, 1.0], "workers": 2}
    expected = module_influence(*stores, out=tmp_path / "m", **options)
    assert expected.shape == (2, 1, 20, 300)
    whole = expected[...]
    stamp = (tmp_path / "m" / "c.0.0.0.0").stat().st_mtime_ns
    (tmp_path / "m" / "c.1.0.2.3").unlink()
    group = zarr.open_array(str(tmp_path / "m"), mode="r+")
    group.attrs["complete"] = False
    assert_array_equal(module_influence(*stores, out=tmp_path / "m", **options)[...], whole)
    assert (tmp_path / "m" / "c.0.0.0.0").stat().st_mtime_ns == stamp
