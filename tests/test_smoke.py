"""The main way from a model to scores, against the oracle: what ``tools/package`` runs in every environment it makes.

Short, and it touches what the lowest and newest dependencies may break: every module, the store, Dask, SciPy, click.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import pkgutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import oracle
import pytest
from models import Mlp, batches, data, loss, make
from numpy.testing import assert_allclose

import ooc_influence as ooc

MODULES = [found.name for found in pkgutil.walk_packages(ooc.__path__, "ooc_influence.")]
EXTRAS = {"transformers", "datasets", "tokenizers", "triton"}  # modules of extras may want these at once


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    folder = tmp_path_factory.mktemp("smoke")
    model, (x, y) = make(Mlp), data(Mlp, 60)
    train = ooc.extract_gradients(
        model, loss, batches(x[:50], y[:50], 8), folder / "train.zarr", compressor=ooc.Dropout(k=64)
    )
    query = ooc.extract_gradients(model, loss, batches(x[50:], y[50:], 8), folder / "query.zarr", like=train)
    return query, train


def test_every_public_name_is_listed_and_found_from_the_package_alone():
    """In a process that has imported nothing else: modules of the package are names of it only once they are loaded."""
    script = (
        "import ooc_influence as ooc\n"
        "for name in dir(ooc):\n"
        "    assert name == 'hf' or getattr(ooc, name) is not None\n"  # hf: an extra
        "ooc.report.write_report, ooc.evaluate.lds, ooc.plot.spectrum, ooc.plan"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {"evaluate", "hf", "plot", "report"} < set(dir(ooc))


def test_every_module_is_there():
    assert len(MODULES) > 80
    missing = {}
    for name in MODULES:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            missing[name] = error.name
    assert set(missing.values()) <= EXTRAS, missing


def test_from_a_model_to_scores(stores):
    query, train = stores
    curvature = ooc.fit_fisher(train)
    rows, asked = train.rows().astype(np.float64), query.rows().astype(np.float64)
    value = oracle.damping(oracle.fisher(rows), rows=len(rows))
    expected = oracle.scores(asked, rows, value)
    scores = ooc.influence_scores(query, train, curvature=curvature).compute()
    assert_allclose(scores, expected, atol=1e-5 * abs(expected).max())
    found = ooc.top_influential(query, train, top=3)
    assert (found.proponents.rows[:, 0] == expected.argmax(1)).all()
    own = oracle.self_influence(rows, value)
    assert_allclose(ooc.self_influence(train), own, atol=1e-5 * own.max())
    assert train.verify() == []


def test_the_command_is_installed(stores):
    query, train = stores
    command = [Path(sys.executable).with_name("ooc-influence")]
    said = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True).stdout
    assert importlib.metadata.version("ooc_influence") in said
    ooc.fit_fisher(train)
    done = subprocess.run(
        [*command, "top", query.path, train.path, "--top", "2", "--json"], capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout)
