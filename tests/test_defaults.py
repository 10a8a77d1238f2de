"""What is taken where the caller does not say: the unit of scores, the reduction, and what is printed about both."""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import random_rows, roomy, write_store
from numpy.testing import assert_allclose, assert_array_equal

from ooc_influence import (
    KroneckerBasis,
    RowBudget,
    fit_fisher,
    group_influence,
    influence_scores,
    module_influence,
    reduce_store,
    top_influential,
)
from ooc_influence.cli.main import cli
from ooc_influence.compress import LARGEST_STORE, DefaultDropout, Dropout, Eigenbasis
from ooc_influence.errors import InputError
from ooc_influence.report import describe_scoring, write_report
from ooc_influence.store import Encoding

K = 24


def stores(tmp_path, kind):
    rows, queries = random_rows(60, K), random_rows(4, K, seed=1)
    rows[7] *= 30  # a row that is first for every query unless it is divided by its norm
    attributes = {"loss_kind": kind}
    train = write_store(tmp_path / "train", rows, attributes=attributes)
    query = write_store(tmp_path / "query", queries, attributes=attributes)
    fit_fisher(train, memory=roomy())
    return query, train


@pytest.mark.parametrize("kind", ["token_cross_entropy_mean", "token_cross_entropy", "cross_entropy", None])
def test_lists_of_language_models_are_divided_by_the_train_rows_norms(tmp_path, kind):
    query, train = stores(tmp_path, kind)
    tokens = kind is not None and kind.startswith("token")
    lists = top_influential(query, train, top=5, memory=roomy())
    expected = top_influential(query, train, top=5, normalize="train" if tokens else "none", memory=roomy())
    assert_array_equal(lists.proponents.rows, expected.proponents.rows)
    assert_array_equal(lists.proponents.scores, expected.proponents.scores)
    assert lists.settings["normalize"] == ("train" if tokens else "none")
    other = top_influential(query, train, top=5, normalize="none" if tokens else "train", memory=roomy())
    assert not np.array_equal(other.proponents.rows, expected.proponents.rows)
    modules = module_influence(query, train, top=5, memory=roomy())
    assert [each.settings["normalize"] for each in modules.values()] == [lists.settings["normalize"]]
    # arrays and sums are not, since they are added up
    plain = influence_scores(query, train, normalize="none", memory=roomy()).compute()
    assert_array_equal(influence_scores(query, train, memory=roomy()).compute(), plain)
    groups = group_influence(query, train, "id", memory=roomy())
    assert_allclose(groups.sums, plain, rtol=1e-5, atol=1e-6)
    assert groups.settings["normalize"] == "none"


def test_what_scores_were_computed_with_is_shown(tmp_path):
    query, train = stores(tmp_path, "token_cross_entropy_mean")
    path = str(train.path / "curvature" / "default")

    def output(*arguments):
        result = CliRunner().invoke(cli, [*arguments, "--memory", "2GiB"])
        assert result.exit_code == 0, result.output
        return result.stdout

    top = output("top", str(query.path), str(train.path), "--top", "2")
    assert top.endswith(f"scores: curvature {path}, relative damping 0.1, divided by the train row's norm\n")
    several = output(
        "top", str(query.path), str(train.path), "--damping", "0.2", "--damping", "3", "--normalize", "none"
    )
    assert several.endswith(f"scores: curvature {path}, relative damping 0.2, 3, not normalised\n")
    dot = output("groups", str(query.path), str(train.path), "--by", "id", "--dot")
    assert dot.endswith("scores: no curvature (dot products), not normalised\n")
    written = output("score", str(query.path), str(train.path), "--out", str(tmp_path / "s.zarr"))
    assert "absolute damping" in written
    assert written.endswith("not normalised\n")
    lists = top_influential(query, train, top=2, damping=[0.2, 3.0], memory=roomy())
    assert lists.at(1).settings["damping"] == 3.0
    assert describe_scoring(lists.at(1).settings).count("3,") == 1
    page = write_report(train, tmp_path / "report", query, memory=roomy())
    assert any('"normalize":"train"' in file.read_text() for file in page.parent.rglob("*.js"))


def test_small_corpora_are_not_reduced():
    rows = LARGEST_STORE // Encoding.of("float16", 65536).row_bytes
    wide, tokens = Dropout(65536, basis="kronecker"), "token_cross_entropy_mean"
    assert DefaultDropout().sized(rows, "float16", tokens)(10**9) == wide
    assert DefaultDropout().sized(rows + 1, "float16", tokens)(10**9) == replace(wide, reduce=Eigenbasis(r=4096))
    assert DefaultDropout(reduce=False).sized(rows + 1, "float16", tokens)(10**9) == wide
    asked = Eigenbasis(7)
    assert DefaultDropout(reduce=asked).sized(5, "float16", tokens)(10**9) == replace(wide, reduce=asked)
    assert DefaultDropout().sized(rows + 1, "int8", tokens)(10**9) == wide
    assert DefaultDropout().sized(10, "float16", tokens)(500) == replace(wide, k=500)
    assert DefaultDropout(k=70, seed=3).sized(10, "float16", tokens)(500) == replace(wide, k=70, seed=3)


def test_adapters_have_one_lambda_for_all_layers():
    sizes = 10, "float16", "token_cross_entropy"
    kept = DefaultDropout().sized(*sizes, adapter=True)(500)
    assert kept == Dropout(500, "grid", basis=KroneckerBasis(damping=0.3, damping_scope="model", list_damping=3000.0))
    kept = DefaultDropout(damping=0.1).sized(*sizes, adapter=True)(500)
    assert kept == Dropout(500, "grid", basis=KroneckerBasis(damping=0.1))
    assert DefaultDropout(basis="parameters").sized(*sizes, adapter=True)(500) == Dropout(500, "importance")


def test_language_models_are_kept_in_the_kronecker_basis():
    sizes = 10, "float16"
    assert DefaultDropout().sized(*sizes, "cross_entropy")(500) == Dropout(500, "importance")
    assert DefaultDropout(basis="parameters").sized(*sizes, "token_cross_entropy")(500) == Dropout(500, "importance")
    kept = DefaultDropout(basis="kronecker", sampling="importance").sized(*sizes, "cross_entropy")(500)
    assert kept == Dropout(500, "importance", basis="kronecker")


def test_queries_that_lose_much_are_told_of(tmp_path, caplog):
    rows = random_rows(300, K)
    train = write_store(tmp_path / "train", rows)
    query = write_store(tmp_path / "query", random_rows(9, K, seed=1))
    with caplog.at_level(logging.WARNING, "ooc_influence"):
        whole = reduce_store(train, tmp_path / "whole", K - 1, memory=roomy())
        reduce_store(query, tmp_path / "q1", like=whole, memory=roomy())
    assert not caplog.messages
    with caplog.at_level(logging.WARNING, "ooc_influence"):
        small = reduce_store(train, tmp_path / "small", 3, memory=roomy())
        reduce_store(query, tmp_path / "q2", like=small, memory=roomy())
    assert len(caplog.messages) == 2
    assert all("--dims 0" in message for message in caplog.messages)


@pytest.mark.parametrize("size", [16, "512", 2000, 2999, 3000, "8kB", "33 kB"])
def test_a_size_of_rows_is_kept_and_used(size):
    budget = RowBudget(size)
    made = budget(10**7)
    columns = made.k if made.reduce is None else made.reduce.r
    used = Encoding.of(budget.dtype, columns).row_bytes + 4
    assert budget.size - (145 if budget.size >= 3000 else 17) < used <= budget.size
    assert (budget.dtype, made.reduce is None) == (("sign", True) if budget.size >= 3000 else ("int8", False))
    assert made.kronecker is not None


def test_sizes_of_rows_of_small_models_and_adapters():
    assert RowBudget("8kB")(5000).k == 5000
    assert RowBudget(1000)(700).reduce is None  # fewer entries than numbers
    chosen = KroneckerBasis(damping=0.1)
    assert RowBudget(512).for_adapter()(9000).kronecker.list_damping == 3000
    assert RowBudget(512, basis=chosen).for_adapter()(9000).kronecker == chosen
    with pytest.raises(InputError, match="at least 16 bytes"):
        RowBudget(15)
