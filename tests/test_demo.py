"""The demo finds wrong labels, explains a mistake, and grows to any size."""

from __future__ import annotations

import json

import numpy as np
import pytest
from conftest import roomy
from numpy.testing import assert_array_equal
from scipy.stats import spearmanr

from ooc_influence import GradientStore, Storage, fit_fisher, influence_scores
from ooc_influence.cli.demo import FLIPPED_SHARE, TRAIN, load_digits, run_demo
from ooc_influence.cli.main import main
from ooc_influence.errors import MissingExtraError

pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    return folder, run_demo(str(folder), rows=None, k=512, memory=str(roomy()), progress=False)


def test_wrong_labels_are_found(folder):
    _, result = folder
    found = result["mislabelled"]
    assert found["self-influence"]["auc"] > 0.97
    assert found["self-influence"]["found_at_20%"] > 0.9
    assert abs(found["random"]["auc"] - 0.5) < 0.1
    assert set(found) == {"self-influence", "loss", "random"}


def test_a_mistake_is_explained(folder):
    path, result = folder
    explained = result["explained"]
    assert explained["label"] != explained["predicted"]
    assert all(entry["score"] > 0 and entry["label"] == explained["label"] for entry in explained["proponents"])
    assert all(entry["score"] < 0 and entry["label"] != explained["label"] for entry in explained["opponents"])
    pytest.importorskip("matplotlib")
    assert (path / "explained.png").read_bytes().startswith(b"\x89PNG")


def test_eight_bits_rank_as_thirty_two(folder, tmp_path):
    path, _ = folder
    scores = {}
    for dtype in ("float32", "int8", "int4"):
        for name in ("train", "test"):
            source = GradientStore.open(path / f"{name}-k512.zarr")
            storage = Storage(chunk_rows=256)
            with GradientStore.create(
                tmp_path / f"{name}-{dtype}", source.mask, dtype=dtype, storage=storage, attributes=source.attrs
            ) as store:
                store.append(source.rows(), loss=source.loss)
        fit_fisher(tmp_path / f"train-{dtype}", memory=roomy())
        scores[dtype] = influence_scores(tmp_path / f"test-{dtype}", tmp_path / f"train-{dtype}").compute().ravel()
    assert len(scores["int8"]) > 100_000
    assert spearmanr(scores["int8"], scores["float32"]).statistic >= 0.999
    assert spearmanr(scores["int4"], scores["float32"]).statistic >= 0.88


def test_the_store_grows_from_there(folder, capsys):
    path, before = folder
    with pytest.raises(SystemExit) as stopped:
        main(["demo", "--out", str(path), "--rows", "4000", "--k", "512", "--memory", "2GiB", "--json"])
    assert not stopped.value.code
    result = json.loads(capsys.readouterr().out)
    assert result["rows"] == 4000
    assert result["mislabelled"]["self-influence"]["auc"] > 0.9
    assert GradientStore.open(path / "train-k512.zarr").verify() == []
    assert before["rows"] == TRAIN


def test_rows_do_not_depend_on_how_they_are_read():
    digits = load_digits()
    images, labels = digits.train_batch(0, 3 * TRAIN)
    parts = list(digits.train_batches(3 * TRAIN, start=2000))
    assert_array_equal(np.concatenate([part for part, _ in parts]), images[2000:])
    assert_array_equal(labels[:TRAIN], digits.labels[:TRAIN])
    assert digits.flipped.sum() == round(TRAIN * FLIPPED_SHARE)
    assert (images[TRAIN : 2 * TRAIN] != images[:TRAIN]).any(axis=1).all()


def test_without_scikit_learn_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sklearn.datasets", None)
    with pytest.raises(
        MissingExtraError, match=r"install the extra 'demo' \(in the clone: pip install '\.\[demo\]'\)$"
    ):
        load_digits()
