"""Fisher matrices of some rows, weighted, sampled, by module; updated, resumed; their facts and refusals."""

from __future__ import annotations

import json
import pickle
import signal
import subprocess
import sys
import textwrap
import warnings

import numpy as np
import pytest
from conftest import random_rows, whole_mask, write_store
from numpy.testing import assert_allclose
from test_top import force

from ooc_influence import GradientStore, fit_fisher, influence_scores, self_influence
from ooc_influence.cli.main import main
from ooc_influence.curvature import Curvature, fit_gram
from ooc_influence.curvature.eigen import spectrum_floor
from ooc_influence.errors import InputError, OocInfluenceWarning, StoreExistsError
from ooc_influence.store import LayerShape, Mask, ModuleMask


def oracle(rows, weights=None):
    """Σ w g gᵀ / m in float64."""
    rows = np.asarray(rows, np.float64)
    weights = np.ones(len(rows)) if weights is None else weights
    return (rows * weights[:, None]).T @ rows / len(rows)


def assert_near(found, expected, share=1e-6):
    assert_allclose(found, expected, rtol=0, atol=share * np.abs(expected).max())


def spread_rows(n, k, seed=0):
    """Random rows whose columns differ in size."""
    return random_rows(n, k, seed) * np.linspace(0.2, 2, k, dtype=np.float32)


@pytest.fixture
def train(tmp_path):
    store = write_store(tmp_path / "train.zarr", spread_rows(300, 12))
    return GradientStore.open(store.path)


@pytest.mark.parametrize(
    "rows", [(40, 210), slice(250, None), [7, 3, 250, 99, 100, 101, 5, 280, 11, 12, 13, 14, 15, 20, 30, 44]]
)
def test_rows(train, rows):
    numbers = np.arange(300)[slice(*rows) if isinstance(rows, tuple) else rows]
    found = fit_fisher(train, rows=rows)
    assert found.rows == len(numbers)
    assert_near(found.fisher(), oracle(train.rows()[numbers]))
    mask = np.isin(np.arange(300), numbers)
    assert_near(fit_fisher(train, rows=mask, name="mask").fisher(), found.fisher())


def test_weights(train):
    weights = np.random.default_rng(0).uniform(0, 3, 300)
    weights[5] = 0
    found = fit_fisher(train, weights=weights)
    assert_near(found.fisher(), oracle(train.rows(), weights))
    assert Curvature.open(found.path).attrs["weights"]["name"] == "array"
    again = fit_fisher(train)  # other weights are another fit
    assert_near(again.fisher(), oracle(train.rows()))


@pytest.mark.parametrize("name", ["ggn", "trak"])
def test_weights_by_loss(tmp_path, name):
    rows, loss = spread_rows(200, 8), np.random.default_rng(1).uniform(0.05, 3, 200).astype(np.float32)
    loss[3] = 0
    with GradientStore.create(tmp_path / "t.zarr", whole_mask(8), dtype="float32") as store:
        store.append(rows, loss=loss)
    store = GradientStore.open(tmp_path / "t.zarr")
    with pytest.raises(InputError, match="loss_kind"):
        fit_fisher(store, weights=name)
    held = np.maximum(loss.astype(np.float64), 1e-6)
    weights = 1 / np.expm1(held) if name == "ggn" else 1 / np.expm1(-held) ** 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", OocInfluenceWarning)
        found = fit_fisher(store, weights=name, force_weights=True)
    assert_near(found.fisher(), oracle(store.rows(), weights))
    assert found.attrs["clipped"] == 1


@pytest.mark.parametrize("blocks", [None, "diagonal"])
def test_sampling_error(train, blocks):
    whole = oracle(train.rows()) * (np.eye(12) if blocks else 1)
    found = [fit_fisher(train, sample=60, seed=seed, name=f"s{seed}", blocks=blocks) for seed in range(8)]
    errors = [np.linalg.norm(one.fisher() - whole) / np.linalg.norm(whole) for one in found]
    told = [one.facts()["sampling_error"] for one in found]
    assert_allclose(np.mean(told), np.sqrt(np.mean(np.square(errors))), rtol=0.35)
    assert found[0].rows == 60
    everything = fit_fisher(train, sample=300, refit=True, blocks=blocks)
    assert everything.attrs["sampling_error"] == 0
    assert_near(everything.fisher(), whole)


@pytest.mark.parametrize("blocks", [None, "diagonal"])
@pytest.mark.parametrize("weights", [None, "array"])
def test_updates(train, weights, blocks, monkeypatch):
    given = None if weights is None else np.random.default_rng(0).uniform(0.5, 2, 340)
    fit_fisher(train, weights=None if given is None else given[:300], blocks=blocks)
    with GradientStore.open(train.path, "a") as store:
        store.append(spread_rows(40, 12, seed=9), loss=np.zeros(40))
        store.drop([0, 17, 299, 310])
    now = GradientStore.open(train.path)
    read = count_rows(monkeypatch)
    found = fit_fisher(now, weights=given, blocks=blocks)
    assert sum(read) == 43  # new rows, and those dropped since
    live = np.setdiff1d(np.arange(340), [0, 17, 299, 310])
    assert found.rows == len(live)
    matrix = found.fisher()
    expected = oracle(now.rows()[live], None if given is None else given[live])
    assert_near(matrix, expected * (np.eye(12) if blocks else 1))
    scratch = fit_fisher(now, weights=given, blocks=blocks, refit=True)
    assert_near(matrix, scratch.fisher())
    assert_near(found.eigenvalues, scratch.eigenvalues)


def count_rows(monkeypatch):
    import ooc_influence.linalg.rows as room

    read, original = [], room.read_blocks

    def counted(*args, **options):
        for block in original(*args, **options):
            read.append(block.stop - block.start)
            yield block

    monkeypatch.setattr(room, "read_blocks", counted)
    return read


def test_most_of_the_trace_dropped_is_a_fit_from_scratch(train, caplog):
    fit_fisher(train)
    with GradientStore.open(train.path, "a") as store:
        store.drop(np.arange(100))
    fit_fisher(GradientStore.open(train.path))
    with GradientStore.open(train.path, "a") as store:
        store.drop(np.arange(100, 200))
    now = GradientStore.open(train.path)
    found = fit_fisher(now)
    assert "more than half of the trace" in caplog.text
    assert found.attrs["taken"] == 0
    assert_near(found.fisher(), oracle(now.rows()[200:]))


def test_rows_appended_leave_a_closed_range_alone(train):
    found = fit_fisher(train, rows=(0, 200))
    with GradientStore.open(train.path, "a") as store:
        store.append(spread_rows(10, 12, seed=9), loss=np.zeros(10))
    now = GradientStore.open(train.path)
    assert fit_fisher(now, rows=(0, 200)).attrs["fit"] == found.attrs["fit"]
    self_influence(now)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"rows": (10, 5)}, "A < B"), ({"rows": (0, 301)}, "<= 300"), ({"rows": []}, "none"),
        ({"sample": 301}, "2 to 300"), ({"sample": 1}, "2 to 300"), ({"weights": np.ones(3)}, "shape"),
        ({"weights": -np.ones(300)}, "not negative"), ({"weights": "fisher"}, "'ggn'"), ({"blocks": "row"}, "module"),
    ],
)  # fmt: skip
def test_refusals(train, options, text):
    with pytest.raises(InputError, match=text):
        fit_fisher(train, **options)


def test_a_dimension_near_the_rows_is_told(tmp_path):
    with pytest.warns(OocInfluenceWarning, match="what the 3 rows"):
        fit_fisher(write_store(tmp_path / "t.zarr", np.eye(3, 200, dtype=np.float32)))
    with pytest.warns(OocInfluenceWarning, match="what the 3 stored columns"):
        fit_fisher(write_store(tmp_path / "u.zarr", np.tile(np.eye(3, dtype=np.float32), (2, 1))))


def test_lambda_is_relative_to_what_the_rows_can_span(tmp_path, modules):
    """min(columns, rows) in every curvature whose rank the rows bound; of a diagonal, its columns."""
    rows = random_rows(18, 30)
    train = write_store(tmp_path / "t.zarr", rows)
    with GradientStore.open(train.path, "a") as store:
        store.drop([3, 4])
    train = GradientStore.open(train.path)
    trace = np.trace(oracle(np.delete(rows, [3, 4], axis=0)))
    fits = [fit_fisher(train), fit_fisher(train, rank=5, name="top"), fit_gram(train)]
    for found in fits:
        assert_allclose(found.lambdas([0.1, 2.0]), [[0.1 * trace / 16], [2 * trace / 16]], rtol=1e-6)
        assert_allclose(Curvature.open(found.path).facts()["default_damping"], 0.1 * trace / 16, rtol=1e-6)
    assert_allclose(fit_fisher(train, blocks="diagonal", name="d").lambdas(), [[0.1 * trace / 30]], rtol=1e-6)
    six = modules.rows()[:6].astype(np.float64)
    found = fit_fisher(modules, blocks="module", rows=(0, 6))
    each = np.square(six).sum(0) / 6
    assert_allclose(found.lambdas(), [[0.1 * each[:4].sum() / 4, 0.1 * each[4:].sum() / 6]], rtol=1e-6)
    assert_allclose(found.damping_value(), (found.lambdas()[0] * [4, 8]).sum() / 12)


KILLED = """
import os, signal, sys
import numpy as np
import ooc_influence as ooc
from ooc_influence import checkpoint
from ooc_influence.linalg import rows
from ooc_influence.linalg import accumulate
checkpoint.INTERVAL, accumulate.FOLD_ROWS, checkpoint._SHARE = 0.0, 64, 0
original = rows.read_blocks
def killed(*args, **options):
    for number, block in enumerate(original(*args, **options)):
        if block.start >= int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)
        yield block
rows.read_blocks = killed
ooc.fit_fisher(sys.argv[1], memory="3GiB", workers=1, blocks=sys.argv[3] or None)
"""


@pytest.mark.parametrize("side", ["fisher", "gram"])
@pytest.mark.filterwarnings("ignore:.*effective dimension")
def test_small_eigenvalues_are_not_taken_for_rounding(tmp_path, side):
    """Rank 280 of 512 columns, eigenvalues falling to 2·10⁻⁵ of the largest: what is resolved is inside."""
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.normal(size=(512, 512)))[0]
    sizes = np.sqrt(280 * np.geomspace(1, 2e-5, 280))
    train = write_store(tmp_path / "t.zarr", (sizes[:, None] * basis[:280]).astype(np.float32))
    curvature = (fit_fisher if side == "fisher" else fit_gram)(train)
    assert curvature.eigenvalues[279] == pytest.approx(2e-5, rel=0.05)
    assert (curvature.eigenvalues > spectrum_floor(curvature.eigenvalues)).sum() == 280
    assert_allclose(curvature.outside_share(basis[[0, 100, 279, 300, 511]]), [0, 0, 0, 1, 1], atol=1e-3)


@pytest.mark.parametrize("blocks", [None, pytest.param("diagonal", marks=pytest.mark.slow)])
def test_a_killed_fit_goes_on(tmp_path, monkeypatch, blocks):
    store = write_store(tmp_path / "t.zarr", spread_rows(40000, 6))
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(KILLED), str(store.path), "20000", blocks or ""],
        check=False,
        capture_output=True,
    )
    assert done.returncode == -9, done.stderr.decode()
    assert (tmp_path / "t.zarr/curvature/.default.partial").is_dir()
    read = count_rows(monkeypatch)
    found = fit_fisher(store, memory="3GiB", workers=1, blocks=blocks)
    assert 0 < sum(read) < 35000
    assert found.rows == 40000
    assert_near(found.fisher(), oracle(store.rows()) * (np.eye(6) if blocks else 1))
    assert not (tmp_path / "t.zarr/curvature/.default.partial").exists()


INTERRUPTED = """
import sys, time
from ooc_influence import memory
from ooc_influence import checkpoint
from ooc_influence.linalg import rows
from ooc_influence.linalg import accumulate
checkpoint.INTERVAL, accumulate.FOLD_ROWS, checkpoint._SHARE, memory.BLOCK_BYTES = 0.0, 64, 0, 2**10
original, seen = rows.read_blocks, []
import signal, threading
interrupted = threading.Event()
def interrupt(*given):
    interrupted.set()
    signal.default_int_handler(*given)
signal.signal(signal.SIGINT, interrupt)
def slow(*args, **options):
    for block in original(*args, **options):
        seen.append(block.stop)
        if len(seen) == int(sys.argv[1]):
            print("begun", flush=True)
        if len(seen) >= int(sys.argv[1]):
            interrupted.wait(60)
            time.sleep(0.05)
        yield block
rows.read_blocks = slow
from ooc_influence.cli.main import main
main(sys.argv[2:])
"""


@pytest.mark.parametrize(("rank", "blocks", "workers"), [(None, 30, 2), (3, 60, 1)])
def test_ctrl_c_says_how_to_go_on(tmp_path, monkeypatch, rank, blocks, workers):
    """A pass over the 3000 rows is 47 blocks."""
    store = write_store(tmp_path / "t.zarr", spread_rows(3000, 90))
    monkeypatch.setattr("ooc_influence.memory.BLOCK_BYTES", 2**10)
    monkeypatch.setattr("ooc_influence.linalg.spectrum.PRODUCT_ROWS", 64)
    code = INTERRUPTED if rank is None else INTERRUPTED.replace("original, seen", ONLY_ROWS + "original, seen")
    command = ["fisher", str(store.path), "--workers", str(workers), *([] if rank is None else ["--rank", str(rank)])]
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(blocks), *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "begun\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "interrupted: sums and passes saved so far stay; run the same command again, it continues from there" in err
    assert "partial results of the fit are kept in" in err
    assert "Traceback" not in err
    if rank is not None:
        force(monkeypatch, "rows", patient=False)
    read = count_rows(monkeypatch)
    found = fit_fisher(store, workers=workers, rank=rank)
    gone_on = sum(read)
    read.clear()
    again = fit_fisher(store, workers=workers, rank=rank, refit=True)
    assert 0 < gone_on < sum(read)
    assert_near(found.eigenvalues, again.eigenvalues)


ONLY_ROWS = """
from ooc_influence.curvature import costs
from ooc_influence.linalg import spectrum
spectrum.PRODUCT_ROWS, costs.EXTRA, plain = 64, 16, costs.low_rank_plans
costs.low_rank_plans = lambda *a, **o: [plan for plan in plain(*a, **o) if plan.name == "rows"]
"""


@pytest.fixture
def modules(tmp_path):
    """Two modules, of 4 and 8 entries."""
    layers = [LayerShape(name, "linear", shape, False) for name, shape in (("a", (2, 2)), ("b", (2, 4)))]
    parts = [
        ModuleMask(
            layer,
            *(index.ravel().astype(np.int32) for index in np.indices(layer.shape)),
            np.ones(layer.entries, np.float32),
        )
        for layer in layers
    ]
    with GradientStore.create(tmp_path / "m.zarr", Mask(tuple(parts)), dtype="float32") as store:
        store.append(spread_rows(90, 12), loss=np.zeros(90))
    return GradientStore.open(tmp_path / "m.zarr")


def test_blocks_by_module(modules, monkeypatch):
    found = fit_fisher(modules, blocks="module")
    rows = modules.rows().astype(np.float64)
    expected = oracle(rows)
    expected[:4, 4:] = expected[4:, :4] = 0
    assert_near(found.fisher(), expected)
    lambdas = found.lambdas()
    damped = expected + np.diag(
        np.repeat([0.1 * np.trace(expected[:4, :4]) / 4, 0.1 * np.trace(expected[4:, 4:]) / 8], [4, 8])
    )
    exact = np.linalg.solve(damped, rows.T).T
    again = pickle.loads(pickle.dumps(found))
    assert_near(again.precondition(rows, lambdas)[0], exact)
    assert_near(found.self_influence(rows.astype(np.float32), lambdas)[0], (rows * exact).sum(1), 1e-5)
    assert_near(self_influence(modules), (rows * exact).sum(1), 1e-5)
    plain = np.linalg.solve(expected + 0.5 * np.eye(12), rows.T).T
    assert_near(found.precondition(rows, found.lambdas(0.5, "absolute"))[0], plain)
    with GradientStore.open(modules.path, "a") as store:
        store.drop([3, 60])
    read = count_rows(monkeypatch)
    updated = fit_fisher(GradientStore.open(modules.path), blocks="module")
    assert sum(read) == 2
    expected = oracle(np.delete(rows, [3, 60], axis=0))
    expected[:4, 4:] = expected[4:, :4] = 0
    assert_near(updated.fisher(), expected)


def test_scores_of_a_lambda_for_each_block_are_not_gone_on_with_by_one_for_all(modules, tmp_path):
    """The two are equal as numbers."""
    found = fit_fisher(modules, blocks="module")
    value = found.damping_value()
    influence_scores(modules, modules, out=tmp_path / "scores.zarr")
    influence_scores(modules, modules, out=tmp_path / "scores.zarr")
    with pytest.raises(StoreExistsError, match="another call"):
        influence_scores(modules, modules, damping=value, damping_mode="absolute", out=tmp_path / "scores.zarr")


def test_the_command(train, capsys):
    command = ["fisher", str(train.path), "--rows", "0:200", "--sample", "50", "--seed", "3", "--json"]
    with pytest.raises(SystemExit) as stopped:
        main(command)
    assert stopped.value.code == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["rows"] == 50
    assert facts["sampling_error"] > 0
    assert facts["selection"]["of"]["stop"] == 200
