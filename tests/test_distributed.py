"""The same calls on Dask clusters of real processes; skipped where distributed is not installed."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import dask
import numpy as np
import pytest
from conftest import random_rows, roomy, write_store
from numpy.testing import assert_allclose, assert_array_equal
from test_cli import run  # noqa: F401 - a fixture
from test_top import force

from ooc_influence import (
    Dropout,
    GradientStore,
    Storage,
    extract_shards,
    fit_curvature,
    fit_fisher,
    fit_gram,
    gram_matrix,
    group_influence,
    influence_scores,
    reduce_store,
    select_rows,
    self_influence,
    sketch_store,
    top_influential,
)
from ooc_influence.cli import cluster as cluster_room
from ooc_influence.errors import ClusterError, InputError
from ooc_influence.parallel import Stripe, ambient_client, check_workers, run_stripes, worker_memory
from ooc_influence.progress import TOPIC, Progress, tick, watched
from ooc_influence.store import LayerShape, Mask, ModuleMask
from ooc_influence.store.claim import read_claims

distributed = pytest.importorskip("distributed")
pytestmark = pytest.mark.filterwarnings("ignore")
HERE = str(Path(__file__).parent)


@pytest.fixture(scope="module")
def cluster():
    # a worker that was killed is given up after this time if it is away then, though it came back and was killed again
    with dask.config.set({"distributed.deploy.lost-worker-timeout": "1h"}):
        started = distributed.LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None)
        yield started
        with contextlib.suppress(KeyError):  # of its own record of workers, which lacks one killed as soon as it came
            started.close()


def wait_for_two_workers(client, without=()):
    """Until two workers answer, none of them a process in `without`: a killed worker is counted for a moment yet."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        client.wait_for_workers(2, timeout=60)
        answers = client.run(os.getpid, on_error="return").values()
        if len(answers) == 2 and all(isinstance(pid, int) and pid not in without for pid in answers):
            return
        time.sleep(0.05)
    raise AssertionError(f"expected two workers, none of them in {without}; received {answers}")


@pytest.fixture
def client(cluster):
    with distributed.Client(cluster, set_as_default=False) as client:
        wait_for_two_workers(client)
        yield client


@pytest.fixture(scope="module")
def long_pair(tmp_path_factory):
    """Several blocks of rows."""
    folder = tmp_path_factory.mktemp("long")
    train = write_store(folder / "train.zarr", random_rows(40_000, 24), chunk_rows=1000)
    fit_fisher(train)
    return write_store(folder / "query.zarr", random_rows(40, 24, 1)), train


def close(found, expected, tolerance=1e-6):
    assert_allclose(found, expected, rtol=0, atol=tolerance * np.nanmax(np.abs(expected)))


def test_two_workers_same_numbers(tmp_path, long_pair, client, monkeypatch):
    monkeypatch.setattr("ooc_influence.parallel.SENT_ONCE", 1000)  # bytes of the preconditioned queries are more
    query, train = long_pair
    dampings = [0.1, 1.0, 3.0, 5.0]
    calls = {
        "top": lambda: top_influential(query, train, top=20, damping=dampings, normalize="cosine").proponents.scores,
        "self": lambda: self_influence(train, damping=dampings),
        "group": lambda: group_influence(query, train, np.arange(train.n) % 9, damping=dampings).sums,
        "select": lambda: select_rows(query, train, "1%", redundancy=0.5).row_scores,
        "lazy": lambda: influence_scores(query, train).compute(),
    }
    with client.as_current():
        assert check_workers(None) == 2
        assert worker_memory("1GiB") == "1GiB"
        assert isinstance(worker_memory(None), int)
        curvature = fit_fisher(train, out=tmp_path / "there.zarr", progress=True)
        found = {name: call() for name, call in calls.items()}
        written = influence_scores(query, train, damping=dampings, out=tmp_path / "scores.zarr")[...]
    local = fit_fisher(train, out=tmp_path / "local.zarr", workers=1)
    close(curvature.fisher(), local.fisher(), 1e-7)
    for name, call in calls.items():
        close(found[name], call())
    close(written, influence_scores(query, train, damping=dampings).compute())


@pytest.mark.slow
def test_lists_by_a_sketch_on_two_workers(tmp_path, long_pair, client):
    """The same as here, whoever makes the sketch and measures with it."""
    query, train = long_pair
    options = {"top": 20, "damping": [0.1, 3.0], "normalize": "train"}
    with client.as_current():
        there = sketch_store(train, tmp_path / "there.zarr", 12)
        found = top_influential(query, train, sketch=there, prove=True, **options)
        whole = top_influential(query, train, sketch=there, recall=1, **options)
    here = sketch_store(train, tmp_path / "here.zarr", 12, workers=1)
    close(there.rows(), here.rows(), 1e-5)
    local = top_influential(query, train, sketch=there, prove=True, **options)
    assert_array_equal(found.proponents.rows, local.proponents.rows)
    close(found.opponents.scores, local.opponents.scores)
    assert found.search == local.search
    assert_array_equal(found.proven, local.proven)
    assert_array_equal(whole.opponents.rows, top_influential(query, train, **options).opponents.rows)
    assert whole.proven.all()


def topics(client):
    return client.run_on_scheduler(lambda dask_scheduler: set(dask_scheduler._broker._topics))


def test_runs_leave_one_topic_at_the_scheduler(long_pair, client):
    """Which keeps every topic for good; and two clients do not count each other's rows."""
    told = []
    before = topics(client)
    with client.as_current(), watched(lambda label, done, total: told.append((label, done, total))):
        for _ in range(3):
            self_influence(long_pair[1])
    assert topics(client) - before <= {TOPIC, "scheduler"}
    assert TOPIC in topics(client)
    assert max(done for _, done, _ in told) == 40_000


@pytest.mark.parametrize("way", ["tiles", *(pytest.param(way, marks=pytest.mark.slow) for way in ("sums", "rows"))])
def test_a_top_of_the_spectrum_survives_a_worker(tmp_path, long_pair, client, monkeypatch, way):
    """One of two workers is killed in the middle: the same numbers as here."""
    train, killed = long_pair[1], []
    force(monkeypatch, way)
    local = fit_fisher(train, rank=5, out=tmp_path / "local.zarr", workers=1)
    pids = client.run(os.getpid)
    client.run(slow_ticks, 0.05)

    def kill(progress, rows):
        if rows and not killed:
            killed.append(next(iter(pids.values())))
            os.kill(killed[0], signal.SIGKILL)

    monkeypatch.setattr("ooc_influence.parallel.SENT_ONCE", 1000)  # bytes of the basis are more
    monkeypatch.setattr(Progress, "advance", kill)
    with client.as_current():
        found = fit_fisher(train, rank=5, out=tmp_path / "there.zarr")
    assert len(killed) == 1
    assert found.attrs["way"] == way
    close(found.eigenvalues, local.eigenvalues)
    queries = random_rows(4, 24, 3)
    close(found.precondition(queries, [0.01]), local.precondition(queries, [0.01]), 1e-4)
    wait_for_two_workers(client, killed)
    client.run(normal_ticks)


@pytest.mark.parametrize("collected", [pytest.param(False, marks=pytest.mark.slow), True])
def test_what_is_sent_to_all_workers_survives_them(client, monkeypatch, collected):
    """Every worker is killed, and with them every copy: the tasks that are left are done with another one."""
    monkeypatch.setattr("ooc_influence.parallel.SENT_ONCE", 1000)
    everything, pids = np.arange(500.0), client.run(os.getpid).values()
    killers = [threading.Timer(1, os.kill, (pid, signal.SIGKILL)) for pid in pids]
    stripes, found = [Stripe(low, low + 100) for low in range(0, 500, 100)], {}
    how = {"on_result": found.__setitem__} if collected else {"reduce": np.add}
    for killer in killers:
        killer.start()
    with client.as_current(), Progress("sum", 500, None) as bar:
        total = run_stripes(slow_sum, stripes, bar, everything, slots=2, **how)
    wait_for_two_workers(client, set(pids))
    assert (sum(found.values()) if collected else total) == everything.sum()


def slow_sum(stripe, progress_key, values):
    time.sleep(0.6)
    return values[stripe.start : stripe.stop].sum()


@pytest.fixture(scope="module")
def modules(tmp_path_factory):
    """A store of two modules, of losses that weights can be made of, and rows to append to it."""
    entries = np.arange(12, dtype=np.int32)
    parts = tuple(
        ModuleMask(LayerShape(name, "linear", (1, 12), False), 0 * entries, entries, np.ones(12, np.float32))
        for name in ("one", "two")
    )
    rows = random_rows(30_000, 24)
    path = tmp_path_factory.mktemp("modules") / "train.zarr"
    options = {"dtype": "float32", "storage": Storage(1000, 3), "attributes": {"loss_kind": "cross_entropy"}}
    with GradientStore.create(path, Mask(parts), **options) as store:
        store.append(rows[:24_000], loss=np.linspace(0.1, 3, 24_000))
    return path, rows[24_000:]


def test_kinds_of_curvature_by_two_workers(tmp_path, modules, client):
    """By module, weighted, by the Gram matrix; then rows appended and dropped: the numbers of one process."""
    path, more = modules
    kinds = {
        "weighted": (fit_fisher, {"weights": "ggn"}),
        "by array": (fit_fisher, {"weights": np.linspace(0, 2, 24_000)}),
        "module": (fit_fisher, {"blocks": "module", "weights": "trak"}),
        "sample": (fit_fisher, {"sample": 9000, "seed": 3}),
        "gram": (fit_gram, {"rows": (100, 400), "weights": "ggn"}),
        "auto": (fit_curvature, {"rows": [5, 17, 9000], "method": "auto"}),
    }
    assert len(client.run(os.getpid)) == 2

    def compare():
        train = GradientStore.open(path)
        for name, (fit, options) in kinds.items():
            with client.as_current():
                there = fit(train, out=tmp_path / f"{name}.there", **options)
            here = fit(train, out=tmp_path / f"{name}.here", workers=1, **options)
            assert there.kind == here.kind
            close(there.fisher(), here.fisher(), 1e-6)
            value = here.damping_value()
            close(there.precondition(more[:5], [value]), here.precondition(more[:5], [value]), 1e-5)
            assert there.rows == here.rows

    compare()
    with GradientStore.open(path, "a") as store:
        store.append(more, loss=np.full(6000, 0.5))
        store.flush()
        store.drop([3, 17, 200, 25_000])
    del kinds["by array"]
    compare()
    with client.as_current():
        matrix = gram_matrix(path, tmp_path / "k.zarr", rows=(0, 300))[...]
    close(matrix, gram_matrix(path, tmp_path / "l.zarr", rows=(0, 300), workers=1)[...])


@pytest.mark.slow
def test_a_worker_killed_in_a_gram_fit(tmp_path):
    """Another one writes the tiles that it had not: none is computed twice by those that lived."""
    train = write_store(tmp_path / "train.zarr", random_rows(400, 500))
    with (
        distributed.LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None) as cluster,
        distributed.Client(cluster) as client,
        client.as_current(),
        pytest.MonkeyPatch.context() as patch,
    ):
        client.register_plugin(_DieAtATile(str(tmp_path / "died")))
        patch.setattr("ooc_influence.curvature.dual.KEPT_BYTES", 0)
        patch.setattr("ooc_influence.linalg.accumulate.TILE", 64)
        found = fit_gram(train)
    assert (tmp_path / "died").exists()
    g = train.rows().astype(np.float64)
    close(found.gram[...], g @ g.T, 1e-9)
    close(found.fisher(), g.T @ g / 400, 1e-9)
    written = [line.split()[1] for line in (tmp_path / "died.log").read_text().splitlines()]
    assert sorted(set(written)) == sorted(written)  # what was there when its worker died stays
    assert len(written) == 28  # 7 strips


class _DieAtATile(distributed.WorkerPlugin):
    """Log tiles that are made; let the first of the workers to get to its third one die before it is."""

    def __init__(self, mark):
        self.mark = mark

    def setup(self, worker):
        kernel = importlib.import_module("ooc_influence.curvature.dual")
        real, count, mark = kernel._multiply, [0], Path(self.mark)

        def dying(tile, how):
            count[0] += 1
            if count[0] == 3 and not mark.exists():
                mark.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            with Path(f"{mark}.log").open("a") as log:
                log.write(f"{os.getpid()} {tile.number}\n")
            return real(tile, how)

        kernel._multiply = dying


def test_a_second_pass_by_two_workers(tmp_path, long_pair, client):
    query, train = long_pair
    storage = Storage(chunk_rows=1000, group_chunks=2)
    with client.as_current():
        reduced = reduce_store(train, tmp_path / "r", 8, rows=20_000, dtype="float32", storage=storage, progress=True)
        rotated = reduce_store(reduced, tmp_path / "t", rotate=True, storage=storage)
        asked = reduce_store(query, tmp_path / "q", like=rotated, dtype="float32")
    local = reduce_store(train, tmp_path / "l", 8, rows=20_000, dtype="float32", storage=storage, workers=1)
    assert_allclose(reduced.reduction.eigenvalues, local.reduction.eigenvalues, rtol=1e-5)
    assert_allclose(reduced.rows(), local.rows(), atol=1e-4 * np.abs(local.rows()).max())
    for found, source in ((reduced, train), (rotated, train), (asked, query)):
        expected = source.rows() @ found.reduction.vectors
        assert_allclose(found.rows(), expected, atol=1e-5 * np.abs(expected).max())
        assert (found.verify(), found.layout.planned_rows) == ([], None)
    F = rotated.rows().T.astype(np.float64) @ rotated.rows() / train.n
    assert np.abs(F - np.diag(np.diag(F))).max() < 1e-6 * F[0, 0]
    assert len({owner.record["pid"] for _, owner in read_claims(tmp_path / "r").values()} - {os.getpid()}) == 2


@pytest.mark.slow
def test_a_worker_that_dies_in_a_second_pass(tmp_path, long_pair):
    """Its rows are written by another one: the same numbers."""
    _, train = long_pair
    wide = reduce_store(train, tmp_path / "whole", 8, rows=1000, dtype="float32")
    with (
        distributed.LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None) as cluster,
        distributed.Client(cluster) as client,
        client.as_current(),
    ):
        client.run(_die_once, str(tmp_path / "died"))
        found = reduce_store(train, tmp_path / "s", like=wide, dtype="float32", storage=Storage(1000, 2))
    assert (tmp_path / "died").exists()
    assert_allclose(found.rows(), wide.rows(), atol=1e-6)
    assert found.verify() == []


def _die_once(mark):
    """Let the first of the workers to get to its third block die."""
    from ooc_influence.compress import eigenbasis

    real, count = eigenbasis._append, [0]

    def dying(*given):
        count[0] += 1
        if count[0] == 3 and not Path(mark).exists():
            Path(mark).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*given)

    eigenbasis._append = dying


def test_progress_crosses_the_cluster(long_pair, client, monkeypatch):
    seen = []
    monkeypatch.setattr(Progress, "advance", lambda self, rows: seen.append(rows))
    with client.as_current():
        self_influence(long_pair[1])
        end = time.monotonic() + 60  # events come after the results
        while sum(seen) < 40_000 and time.monotonic() < end:
            time.sleep(0.02)
    assert sum(seen) == 40_000
    assert len(seen) >= 5  # block by block


ROOMS = (
    "influence.self_scores", "influence.tiles", "influence.search", "curvature.sums", "curvature.primal",
    "linalg.spectrum",
)  # fmt: skip


def slow_ticks(seconds):
    """Make every block take a while, on a worker."""
    for name in ROOMS:
        importlib.import_module(f"ooc_influence.{name}").tick = lambda key, rows: (time.sleep(seconds), tick(key, rows))


def normal_ticks():
    for name in ROOMS:
        importlib.import_module(f"ooc_influence.{name}").tick = tick


@pytest.mark.parametrize("what", ["scores", "top", "self"])
def test_a_worker_killed_in_the_middle(tmp_path, long_pair, client, monkeypatch, what):
    query, train = long_pair
    killed = []

    def kill(progress, rows):
        if not killed:
            killed.append(next(iter(pids.values())))
            os.kill(killed[0], signal.SIGKILL)

    calls = {
        "scores": lambda: influence_scores(query, train, out=tmp_path / "scores.zarr")[...],
        "top": lambda: top_influential(query, train, top=5).proponents.scores,
        "self": lambda: self_influence(train),
    }
    expected = self_influence(train) if what == "self" else influence_scores(query, train).compute()
    if what == "top":
        expected = -np.sort(-expected, axis=1)[:, :5]
    pids = client.run(os.getpid)
    client.run(slow_ticks, 0.15)
    monkeypatch.setattr(Progress, "advance", kill)
    with client.as_current():
        found = calls[what]()
    monkeypatch.undo()
    assert len(killed) == 1
    close(found, expected)
    wait_for_two_workers(client, killed)
    client.run(normal_ticks)


@pytest.mark.usefixtures("interruptible")
def test_an_interrupted_call_cancels_its_tasks(long_pair, client, monkeypatch):
    train = long_pair[1]
    client.run(slow_ticks, 1.0)
    begun = threading.Event()
    monkeypatch.setattr(Progress, "advance", lambda self, rows: begun.set())

    def interrupt():
        begun.wait(60)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with client.as_current(), pytest.raises(KeyboardInterrupt):
        self_influence(train)
    thread.join()
    end = time.monotonic() + 60
    while any(client.run(executing).values()) and time.monotonic() < end:
        time.sleep(0.05)
    assert not any(client.run(executing).values())
    client.run(normal_ticks)
    with client.as_current():
        close(self_influence(train), self_influence(train, workers=1))


def executing(dask_worker):
    return len(dask_worker.state.executing) + len(
        [t for t in dask_worker.state.tasks.values() if t.state == "cancelled"]
    )


def dying(stripe, key):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_task_that_kills_its_worker_again_and_again_is_given_up(client, cluster, monkeypatch):
    monkeypatch.setattr(cluster.scheduler, "allowed_failures", 0)
    with client.as_current(), Progress("dying", None, None) as bar, pytest.raises(ClusterError, match="stay alive"):
        run_stripes(dying, [Stripe(0, 1)], bar, slots=1)


def test_a_cluster_without_workers_is_refused(long_pair, monkeypatch, run):  # noqa: F811
    monkeypatch.setattr(cluster_room, "PATIENCE", 0.3)
    train = long_pair[1].path
    with distributed.LocalCluster(n_workers=0, processes=False, dashboard_address=None, protocol="tcp") as cluster:
        with (
            distributed.Client(cluster) as client,
            client.as_current(),
            pytest.raises(InputError, match="without: start a worker"),
        ):
            fit_fisher(train, refit=True)
        code, _, err = run(f"self-influence {train} --scheduler {cluster.scheduler_address}")
        assert code == 2
        assert "received none in 0 s: start some with 'dask worker" in err
    monkeypatch.setattr(cluster_room, "ANSWER", 1.0)  # where nobody answers, ten seconds show no more than one
    for options, message in (
        ("--scheduler tcp://127.0.0.1:9", "expected a Dask scheduler at tcp://127.0.0.1:9"),
        ("--scheduler gopher", "expected a Dask scheduler at gopher, as in tcp://host:8786; received none (missing"),
        ("--scheduler gopher://127.0.0.1:9", "unknown address scheme"),
        ("--scheduler tls://127.0.0.1:9", "expected a Dask scheduler at tls://127.0.0.1:9"),
        ("--scheduler-file nowhere.json", "expected a scheduler's file at nowhere.json"),
        ("--scheduler a --scheduler-file b", "received both"),
    ):
        code, _, err = run(f"self-influence {train} {options}")
        assert code == 2
        assert message in err
        assert err.count("\n") == 1
        assert ambient_client() is None  # whether or not the failed client has been collected
        assert dask.config.get("scheduler", None) is None


@pytest.mark.parametrize("address", ["nonsense", "gopher://127.0.0.1:9", "tls://127.0.0.1:9", "tcp://127.0.0.1:9"])
def test_an_address_where_nobody_answers_is_one_line(address):
    """Nothing follows the message: a client that failed to connect used to end, 20 s later, in a traceback."""
    script = f"""if True:
        from ooc_influence.cli import cluster, main
        cluster.ANSWER = 1.0
        main.main(["self-influence", "nowhere.zarr", "--scheduler", {address!r}])
    """
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(
        f"error: expected a Dask scheduler at {address}, as in tcp://host:8786; received none"
    )
    assert done.stderr.count("\n") == 1


@pytest.fixture(scope="module")
def by_hand(tmp_path_factory):
    """The file of a scheduler, started with two workers as separate processes, as docs/howto/cluster.md says."""
    folder = tmp_path_factory.mktemp("by-hand")
    file = folder / "scheduler.json"
    dask = [sys.executable, "-m", "dask"]
    python_path = os.pathsep.join([HERE, str(Path(HERE).parent), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": python_path}
    commands = [[*dask, "scheduler", "--port", "0", "--no-dashboard", "--scheduler-file", str(file)]]
    commands += [
        [*dask, "worker", "--scheduler-file", str(file), "--nthreads", "1", "--no-dashboard", "--resources", "shard=1",
         "--local-directory", str(folder)]
    ] * 2  # fmt: skip
    with (folder / "log").open("w") as log:
        processes = [
            subprocess.Popen(command, stdout=log, stderr=log, env=environment, cwd=folder) for command in commands
        ]
        try:
            yield file
        finally:
            for process in reversed(processes):
                process.terminate()
            for process in processes:
                process.wait(30)


@pytest.mark.slow
def test_commands_on_processes_started_by_hand(tmp_path, by_hand, long_pair, run):  # noqa: F811
    query, train = long_pair
    scheduler = f"--scheduler-file {by_hand} --json"
    lines = [
        f"extract --recipe my_recipe.py:recipe --split train --store train.zarr --k 200 --shards 3 {scheduler}",
        f"extract --recipe my_recipe.py:recipe --split test --store test.zarr --like train.zarr --shards 1 {scheduler}",
        f"fisher train.zarr {scheduler}",
        f"score test.zarr train.zarr --out scores.zarr {scheduler}",
        f"verify train.zarr {scheduler}",
        f"groups test.zarr train.zarr --by label --damping 0.1 --damping 1 {scheduler}",
        f"top {query.path} {train.path} --top 3 --memory {roomy()} {scheduler}",
    ]
    found = []
    for line in lines:
        code, out, err = run(line)
        assert (code, err) == (0, ""), line
        found.append(json.loads(out))
    assert (found[0]["rows"], found[1]["rows"], found[0]["missing"]) == (50, 10, [])
    alone = "extract --recipe my_recipe.py:recipe --split train --store alone.zarr --k 200"
    assert run(alone)[0] == 0
    assert_array_equal(GradientStore.open("train.zarr").rows(), GradientStore.open("alone.zarr").rows())
    close(influence_scores("test.zarr", "train.zarr").compute(), influence_scores(
        "test.zarr", "train.zarr", out="scores.zarr")[...])  # fmt: skip
    assert found[4]["damage"] == []
    assert np.shape(found[5]["sums"]) == (2, 10, 5)
    assert [row["row"] for row in found[6]["queries"][0]["proponents"]] == (
        top_influential(query, train, top=3).proponents.rows[0].tolist()
    )
    code, _, err = run(f"extract --recipe my_recipe.py:recipe --split train --store t.zarr --shard 0/2 {scheduler}")
    assert code == 2
    assert "received both" in err


SLOW = """
import os, time
from models import Mlp, batches, data, loss, make
from ooc_influence import Recipe

def slow(model, batch):
    with open("log", "a") as file:
        file.write(f"{os.getpid()} {len(batch[0])}\\n")
    time.sleep(0.05)
    return loss(model, batch)

def recipe():
    return Recipe(make(Mlp), slow, {"train": batches(*data(Mlp, 200), 4)})
"""


@pytest.mark.slow
def test_shards_resume_where_a_worker_died(tmp_path, client, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "slow_recipe.py").write_text(SLOW)
    client.run(os.chdir, str(tmp_path))
    monkeypatch.setattr("ooc_influence.extract.recipe._POLL", 0.2)
    options = {"storage": Storage(chunk_rows=4, group_chunks=2), "dtype": "float32", "compressor": Dropout(k=100)}
    store = tmp_path / "s.zarr"
    victim = next(iter(client.run(os.getpid).values()))

    def kill():
        while not store.exists() or GradientStore.open(store).committed < 60:
            time.sleep(0.05)
        os.kill(victim, signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    with client.as_current():
        found = extract_shards("slow_recipe.py:recipe", store, shards=4, **options)
    thread.join()
    assert (found.n, found.committed) == (200, 200)
    alone = extract_shards("slow_recipe.py:recipe", tmp_path / "alone.zarr", **options)
    assert_array_equal(found.rows(), alone.rows())
    assert found.verify() == []
    wait_for_two_workers(client, [victim])
    with client.as_current():
        before = (tmp_path / "log").stat().st_size
        assert extract_shards("slow_recipe.py:recipe", store, shards=4, **options).n == 200
        assert (tmp_path / "log").stat().st_size == before  # finished: the model does not run again
        with pytest.raises(InputError, match="no such file"):
            extract_shards("none.py:recipe", tmp_path / "none.zarr")
        with pytest.raises(InputError, match="shards >= 1"):
            extract_shards("slow_recipe.py:recipe", store, shards=0)
