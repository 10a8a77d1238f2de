"""Every operation on object storage: on ``memory://`` here, and this file again on a real S3-protocol server.

The S3 run is a pytest of its own, in a process that has moto's server beside it: what its HTTP clients leave open at
the end would otherwise count as errors of this run.
"""

from __future__ import annotations

import importlib.util
import os
import pickle
import subprocess
import sys
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import zarr
from conftest import random_rows, whole_mask, write_store
from models import Mlp, batches, data, loss, make
from numpy.testing import assert_allclose, assert_array_equal
from upath import UPath

from ooc_influence import (
    ChunkCache,
    Dropout,
    GradientStore,
    Storage,
    compact_store,
    extract_gradients,
    fit_fisher,
    influence_scores,
    init_store,
    merge_stores,
    reduce_store,
    self_influence,
    sketch_store,
    top_influential,
)
from ooc_influence.compress import eigenbasis
from ooc_influence.errors import (
    InputError,
    OocInfluenceError,
    StoreBusyError,
    StoreDamagedError,
    StoreExistsError,
    StoreNotFoundError,
)
from ooc_influence.influence import tiles
from ooc_influence.store import paths
from ooc_influence.store.layout import Layout

ROWS = random_rows(90, 8)
ROOT = os.environ.get("OOC_INFLUENCE_TEST_ROOT", "memory://test")


@pytest.fixture
def root():
    return f"{ROOT}/{uuid.uuid4().hex}"


def write(path, **options):
    return write_store(path, ROWS, **({"dtype": "float16", "chunk_rows": 24} | options))


@pytest.mark.slow
@pytest.mark.skipif("OOC_INFLUENCE_TEST_ROOT" in os.environ, reason="this is the run on S3")
def test_all_of_it_on_s3(tmp_path):
    for name in ("s3fs", "moto", "flask"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"needs {name}: pip install 's3fs' 'moto[server]'")
    script = """
import os, sys, pytest
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
host, port = server.get_host_and_port()
os.environ["AWS_ENDPOINT_URL"] = f"http://{host}:{port}"
import s3fs
s3fs.S3FileSystem().mkdir("bucket")
code = pytest.main([sys.argv[1], "-q", "-p", "no:cacheprovider", "-p", "no:unraisableexception", "-W", "ignore"])
sys.stdout.flush()
os._exit(code)
"""
    environment = os.environ | {
        "OOC_INFLUENCE_TEST_ROOT": "s3://bucket", "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]),
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", script, __file__], capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
    assert "failed" not in done.stdout


def test_scores_are_those_of_a_local_copy(root, tmp_path):
    stores = []
    for where in (root, str(tmp_path)):
        train = write(f"{where}/train", ids=None)
        write_store(f"{where}/query", ROWS[:9] * 2, dtype="float16")
        with GradientStore.open(train.path, "a") as store:
            store.drop([4])
        fit_fisher(train.path if where == str(tmp_path) else f"{where}/train")
        stores.append((f"{where}/query", f"{where}/train"))
    (remote, local) = stores
    expected = influence_scores(*local).compute()
    written = influence_scores(*remote, out=f"{root}/scores")
    assert_array_equal(written[...], expected)
    assert written.attrs["complete"] is True
    assert_array_equal(influence_scores(*remote).compute(scheduler="threads"), expected)
    with pytest.raises(StoreExistsError):
        influence_scores(*remote, damping=2.0, out=f"{root}/scores")
    assert_array_equal(self_influence(remote[1]), self_influence(local[1]))
    assert_array_equal(top_influential(*remote).proponents.rows, top_influential(*local).proponents.rows)
    assert fit_fisher(remote[1]).attrs["fit"] == fit_fisher(remote[1]).attrs["fit"]  # up to date: not fitted again
    fit_fisher(remote[1], refit=True, out=f"{root}/elsewhere")
    assert_array_equal(self_influence(remote[1], curvature=f"{root}/elsewhere"), self_influence(local[1]))
    again = pickle.loads(pickle.dumps(GradientStore.open(remote[1])))
    assert_array_equal(again.rows(), GradientStore.open(local[1]).rows())


def test_a_sketch_asks_for_the_chunks_of_candidates_only(root, tmp_path):
    """A sketch here of rows in object storage, and one beside them."""
    rows = random_rows(4000, 8) * np.geomspace(1, 0.01, 8, dtype=np.float32)
    write_store(f"{root}/train", rows, chunk_rows=20)
    query = write_store(tmp_path / "query", rows[:3])
    fit_fisher(f"{root}/train")
    options = {"top": 5, "damping": 10.0, "normalize": "none"}
    expected = top_influential(query, f"{root}/train", **options)
    for path in (str(tmp_path / "sketch"), f"{root}/sketch"):
        sketch_store(f"{root}/train", path, 4)
        top_influential(query, f"{root}/train", sketch=path, **options)  # measures
        cache = ChunkCache(tmp_path / f"cache-{path.rpartition('/')[0].replace('/', '-')}", 2**30)
        train = GradientStore.open(f"{root}/train", cache=cache)
        found = top_influential(query, train, sketch=path, **options)
        assert_array_equal(found.proponents.rows, expected.proponents.rows)
        assert_allclose(found.opponents.scores, expected.opponents.scores, rtol=1e-5)
        assert 0 < cache.misses <= 3 * 2 * found.search["candidates"]
        assert cache.misses < 100  # of 200
        whole = top_influential(query, train, sketch=path, recall=1, **options)
        assert_array_equal(whole.opponents.rows, expected.opponents.rows)
        assert whole.proven.all()


def test_interrupted_scores_and_lists_go_on(root, monkeypatch):
    monkeypatch.setattr("ooc_influence.memory.BLOCK_BYTES", 64 * 4 * 8)  # blocks of 64 rows
    write(f"{root}/train", ids=None)
    fit_fisher(f"{root}/train")
    calls = {
        "scores": lambda: influence_scores(f"{root}/train", f"{root}/train", out=f"{root}/scores")[...],
        "parts": lambda: self_influence(f"{root}/train", resume=f"{root}/parts"),
    }
    original = tiles.tick
    for room, name in ((tiles, "scores"), (sys.modules["ooc_influence.influence.self_scores"], "parts")):
        monkeypatch.setattr(tiles, "_PART_BYTES", 64)

        def stop(key, rows):
            raise KeyboardInterrupt

        monkeypatch.setattr(room, "tick", stop)
        with pytest.raises(KeyboardInterrupt):
            calls[name]()
        monkeypatch.setattr(room, "tick", original)
        found = calls[name]()
        assert np.isfinite(found).all()
    assert zarr.open_array(f"{root}/scores", mode="r").attrs["complete"]
    assert not paths.exists(UPath(f"{root}/parts"))
    (UPath(f"{root}/scores") / "c.0.1").unlink()
    array = zarr.open_array(f"{root}/scores", mode="r+")
    array.attrs["complete"] = False
    assert_array_equal(calls["scores"](), influence_scores(f"{root}/train", f"{root}/train").compute())


def test_an_interrupted_extraction_goes_on(root, tmp_path):
    calls = []

    def failing(model, batch):
        calls.append(1)
        if len(calls) == 6:
            raise RuntimeError("interrupted")
        return loss(model, batch)

    def extract(where, function=loss):
        source = batches(*data(Mlp, 60), 7)
        return extract_gradients(
            make(Mlp), function, source, where, compressor=Dropout(k=60), storage=Storage(10, 2), ids=list(range(60))
        )

    with pytest.raises(RuntimeError, match="interrupted"):
        extract(f"{root}/s", failing)
    assert 0 < GradientStore.open(f"{root}/s").n < 60
    store = extract(f"{root}/s")
    assert_array_equal(store.rows(), extract(tmp_path / "s").rows())
    assert_array_equal(store.records, GradientStore.open(tmp_path / "s").records)


def test_shards_fill_one_store(root, tmp_path):
    options = {"compressor": Dropout(k=60), "storage": Storage(10, 1)}
    source = batches(*data(Mlp, 60), 7)
    init_store(make(Mlp), f"{root}/s", 60, **options)
    for index in (1, 0, 2, 1):
        store = extract_gradients(make(Mlp), loss, source, f"{root}/s", shard=(index, 3), **options)
    whole = extract_gradients(make(Mlp), loss, source, tmp_path / "s", **options)
    assert (store.n, store.verify()) == (60, [])
    assert_array_equal(store.rows(), whole.rows())


def test_damage_is_found_and_repaired(root):
    path = f"{root}/s"
    with GradientStore.create(path, whole_mask(8), dtype="float32", storage=Storage(8, 2, "zstd")) as store:
        store.append(ROWS, loss=np.zeros(90))
    expected = GradientStore.open(path).rows_digest()
    files = UPath(path)
    assert GradientStore.open(path).verify() == []
    (files / "gradients" / "c.2.0").unlink()
    changed = bytearray((files / "loss" / "c.3").read_bytes())
    changed[33] ^= 1
    (files / "loss" / "c.3").write_bytes(bytes(changed))
    (files / "gradients" / "c.9.0").write_bytes((files / "gradients" / "c.9.0").read_bytes()[:-5])
    with pytest.raises(StoreDamagedError, match=r"c\.2\.0"):
        GradientStore.open(path).rows()
    found = GradientStore.open(path, "a").verify(repair=True)
    assert [part.start for part in found] == [16, 56, 72]
    with GradientStore.open(path, "a") as store:
        while store.writer().next_row < 90:
            start, room = store.writer().next_row, store.writer().rows_left
            stop = min(90, start + (room or 90))
            store.append(ROWS[start:stop], loss=np.zeros(stop - start))
    assert GradientStore.open(path).rows_digest() == expected
    assert GradientStore.open(path).verify() == []


def test_merge_and_compact_across(root, tmp_path):
    first = write(f"{root}/a")
    with GradientStore.open(first.path, "a") as store:
        store.drop([0, 50])
    local = compact_store(first, tmp_path / "c")
    remote = compact_store(tmp_path / "c", f"{root}/c")
    for made in (local, remote):
        assert_array_equal(made.rows(), np.delete(first.rows(), [0, 50], axis=0))
    with pytest.raises(InputError, match="is that of rows"):
        merge_stores([local, remote], f"{root}/twice")
    assert not paths.exists(paths.parse_path(f"{root}/twice"))
    moved = merge_stores([remote], f"{root}/m", move=True)
    assert (moved.n, moved.verify(), moved.find([51]).tolist()) == (88, [], [49])
    with pytest.raises(StoreNotFoundError):
        GradientStore.open(f"{root}/c")


def test_reduce_and_rotate_across(root, tmp_path, monkeypatch):
    wide = write(f"{root}/wide", dtype="float32")
    local = reduce_store(wide, tmp_path / "local", 5, dtype="float32")
    with monkeypatch.context() as patch:
        patch.setattr(eigenbasis, "_append", lambda *given: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            reduce_store(wide, f"{root}/s", 5, dtype="float32")
    with monkeypatch.context() as patch:
        patch.setattr("ooc_influence.compress.reduce.fit_eigenbasis", None)  # its basis is there
        found = reduce_store(wide, f"{root}/s", 5, dtype="float32", workers=2)
    assert_allclose(found.rows(), local.rows(), atol=1e-5)
    assert (found.verify(), found.layout.planned_rows) == ([], None)
    turned = reduce_store(local, f"{root}/t", rotate=True)
    assert_allclose(turned.rows(), wide.rows() @ turned.reduction.vectors, atol=1e-5)
    query = reduce_store(write(f"{root}/q"), tmp_path / "q", like=f"{root}/t")
    assert query.columns_digest == turned.columns_digest


def test_chunks_are_cached_within_a_limit(root, tmp_path):
    write(f"{root}/s", dtype="float32", chunk_rows=8)
    cache = ChunkCache(tmp_path / "cache", 8 * 8 * 4 * 100)
    for _ in range(2):
        store = GradientStore.open(f"{root}/s", cache=cache)
        fit_fisher(store, refit=True)
    assert (cache.misses, cache.hits) == (12, 12)
    assert len(list((tmp_path / "cache").iterdir())) == 12
    with GradientStore.open(f"{root}/s", "a") as more:  # chunk 11 is rewritten with more rows
        more.append(ROWS[:3], loss=np.zeros(3))
    again = GradientStore.open(f"{root}/s", cache=cache)
    blocks = [raw.copy() for _, raw in again.raw_chunks()]
    assert_array_equal(np.concatenate(blocks), np.concatenate([ROWS, ROWS[:3]]))
    small = ChunkCache(tmp_path / "small", 8 * 8 * 4 * 5)
    for _ in range(2):
        assert sum(len(raw) for _, raw in GradientStore.open(f"{root}/s", cache=small).raw_chunks()) == 93
        assert 0 < sum(path.stat().st_size for path in (tmp_path / "small").iterdir()) <= small.limit
    assert pickle.loads(pickle.dumps(again)).cache.folder == tmp_path / "cache"


def test_a_cache_touches_its_own_files_only(tmp_path):
    """A folder that holds something else, such as somebody's home."""
    folder = tmp_path / "home"
    (folder / "papers").mkdir(parents=True)
    others = [folder / "thesis.tex", folder / "papers" / "notes.txt", folder / "x.chunk", folder / ".bashrc"]
    for path in others:
        path.write_bytes(bytes(10_000))
        os.utime(path, (0, 0))
    (folder / f"{0:032x}-0-{0:016x}.chunk").symlink_to(others[0])
    write("memory://own/s", dtype="float32", chunk_rows=8)
    cache = ChunkCache(folder, 8 * 8 * 4 * 5)
    for _ in range(2):
        store = GradientStore.open("memory://own/s", cache=cache)
        assert_array_equal(np.concatenate([raw.copy() for _, raw in store.raw_chunks()]), ROWS)
    assert [path.read_bytes() for path in others] == [bytes(10_000)] * 4
    own = [path for path in folder.glob("*-*-*.chunk") if not path.is_symlink()]
    assert 0 < sum(path.stat().st_size for path in own) <= cache.limit


def test_a_store_of_a_strange_name_is_not_cached(tmp_path):
    """The name is what somebody wrote into its attributes."""
    write("memory://strange/s", dtype="float32", chunk_rows=8)
    store = GradientStore.open("memory://strange/s", cache=ChunkCache(tmp_path / "a" / "cache"))
    store._attrs["created"]["id"] = "../../outside"
    assert_array_equal(np.concatenate([raw.copy() for _, raw in store.raw_chunks()]), ROWS)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_one_writer_a_range(root):
    write(f"{root}/s")
    first = GradientStore.open(f"{root}/s", "a")
    first.append(ROWS[:1], loss=[0.0])
    with pytest.raises(StoreBusyError, match="process"):
        GradientStore.open(f"{root}/s", "a").append(ROWS[:1], loss=[0.0])
    (claim,) = [name for name in paths.names(first.path / "commits") if name.startswith(".claim")]
    record = (first.path / "commits" / claim).read_text()
    dead = record.replace(f'"pid": {os.getpid()}', '"pid": 4194305')  # above any pid there can be
    assert dead != record
    (first.path / "commits" / claim).write_text(dead)
    with GradientStore.open(f"{root}/s", "a") as second:  # a dead owner on this machine: taken over at once
        second.append(ROWS[:2], loss=[0.0, 0.0])
    first._claim._heard -= 1000
    with pytest.raises(StoreBusyError, match="took over"):
        first.close()
    assert GradientStore.open(f"{root}/s").n == 92
    assert GradientStore.open(f"{root}/s").verify() == []


def test_of_several_that_create_one_wins(root):
    path = paths.parse_path(f"{root}/new")
    with ThreadPoolExecutor(8) as threads:
        won = list(threads.map(lambda number: paths.create_file(path, b"%d" % number), range(8)))
    assert sorted(won) == [False] * 7 + [True]
    assert paths.read_bytes(path) == b"%d" % won.index(True)
    GradientStore.create(f"{root}/s", whole_mask(8))
    with pytest.raises(StoreExistsError):
        GradientStore.create(f"{root}/s", whole_mask(8))


def test_a_store_is_not_built_over_one_being_built(root, monkeypatch):
    """An interrupted one, whose root is missing, is removed first; not so the claim on building a new one."""
    write(f"{root}/s")
    paths.remove_file(paths.parse_path(f"{root}/s/zarr.json"))
    original = Layout.create_arrays

    def create_again(layout, group):
        with monkeypatch.context() as patch:
            patch.setattr(Layout, "create_arrays", original)
            with pytest.raises(StoreBusyError, match="no other writer"):
                GradientStore.create(f"{root}/s", whole_mask(5))
        original(layout, group)

    with monkeypatch.context() as patch:
        patch.setattr(Layout, "create_arrays", create_again)
        with GradientStore.create(f"{root}/s", whole_mask(8), dtype="float32") as store:
            store.append(ROWS, loss=np.zeros(90))
    assert_array_equal(GradientStore.open(f"{root}/s").rows(), ROWS)


def test_places_that_are_not_there(root):
    with pytest.raises(StoreNotFoundError, match="no such path"):
        GradientStore.open(f"{root}/nowhere")
    with pytest.raises(OocInfluenceError):
        GradientStore.open("nonsense://bucket/s")
    if ROOT.startswith("s3"):
        for options in ({"endpoint_url": "http://127.0.0.1:9"}, {"key": "x", "secret": "y", "token": "z"}):
            wrong = UPath(f"{root}/s", config_kwargs={"retries": {"max_attempts": 1}, "connect_timeout": 2}, **options)
            with pytest.raises(OocInfluenceError) as caught:
                GradientStore.open(wrong)
            assert "\n" not in str(caught.value)


def test_options_travel_with_the_store(root):
    if not ROOT.startswith("s3"):
        pytest.skip("memory:// has no options")
    endpoint = os.environ.pop("AWS_ENDPOINT_URL")
    try:
        path = UPath(f"{root}/s", endpoint_url=endpoint)
        store = write(path)
        fit_fisher(store)
        assert_array_equal(pickle.loads(pickle.dumps(store)).rows(), store.rows())
        assert_allclose(influence_scores(store, store).compute(), influence_scores(store, store, out=path / "x")[...])
    finally:
        os.environ["AWS_ENDPOINT_URL"] = endpoint


def test_memory_is_refused_on_other_processes(root, monkeypatch):
    if ROOT.startswith("s3"):
        pytest.skip("S3 is there for all")
    from ooc_influence import parallel

    class Client:
        def scheduler_info(self, workers):
            return {"workers": {"tcp://127.0.0.1:1": {}}}

        def nthreads(self):
            return {"tcp://127.0.0.1:1": 1}

    store = write(f"{root}/s")
    monkeypatch.setattr(parallel, "ambient_client", Client)
    for act in (fit_fisher, GradientStore.verify):
        with pytest.raises(InputError, match="in this process only"):
            act(store)
