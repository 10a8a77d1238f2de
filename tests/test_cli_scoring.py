"""The scoring commands' options, end to end: each does what its library argument does."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import zarr
from numpy.testing import assert_allclose, assert_array_equal
from test_cli import run, stores  # noqa: F401 - fixtures

from ooc_influence import group_influence, influence_scores, module_influence, self_influence, top_influential

PAIR = ("test.zarr", "train.zarr")


def result(answer, code=0):
    assert answer[0] == code, answer
    return json.loads(answer[1])


def test_options_of_scores(run, stores, tmp_path):  # noqa: F811
    np.save("rows.npy", np.arange(0, 50, 2))
    cases = {
        "--damping 0.1 --damping 2": {"damping": [0.1, 2.0]},
        "--dot --normalize cosine": {"curvature": False, "normalize": "cosine"},
        "--normalize train --device cpu": {"normalize": "train", "device": "cpu"},
        "--average-queries": {"average_queries": True},
        "--rows rows.npy --damping 3 --damping-mode absolute": {
            "rows": np.arange(0, 50, 2), "damping": 3.0, "damping_mode": "absolute",
        },
        "--also test.zarr train.zarr --rows rows.npy --rows all --curvature default": {
            "query": [PAIR[0]] * 2, "train": [PAIR[1]] * 2, "rows": [np.arange(0, 50, 2), None],
        },
    }  # fmt: skip
    for number, (line, options) in enumerate(cases.items()):
        facts = result(run(f"score test.zarr train.zarr --out s{number}.zarr --json {line}"))
        assert len(facts["outside_share"]) == facts["queries"]
        query, train = (options.pop(name, path) for name, path in zip(("query", "train"), PAIR, strict=True))
        expected = influence_scores(query, train, **options).compute()
        assert_allclose(zarr.open_array(f"s{number}.zarr")[...], expected, atol=1e-5 * np.nanmax(np.abs(expected)))
    code, out, _ = run("score test.zarr train.zarr --out s0.zarr --damping 0.1 --damping 2")
    assert (code, out.splitlines()[0]) == (0, "s0.zarr: 2 dampings x 10 queries x 50 rows")


def test_lists_groups_and_modules(run, stores):  # noqa: F811
    found = result(run("top test.zarr train.zarr --top 4 --damping 0.1 --damping 2 --normalize cosine --json"))
    expected = top_influential(*PAIR, top=4, damping=[0.1, 2.0], normalize="cosine")
    for level, own in enumerate(found["by_damping"]):
        rows = [[row["row"] for row in query["proponents"]] for query in own["queries"]]
        assert rows == expected.proponents.rows[level].tolist()
        assert own["queries"][0]["outside_share"] == pytest.approx(expected.outside_share[0])
    code, out, err = run("top test.zarr train.zarr --top 2 --damping 0.1 --damping 2 --resume parts")
    assert (code, err, Path("parts").exists()) == (0, "", False)
    assert [line for line in out.splitlines() if line.startswith("damping ")] == [
        f"damping {value}" for value in expected.damping
    ]
    assert "outside the training spectrum)" in out

    counts = np.sum(influence_scores(*PAIR, normalize="cosine").compute() > 0, axis=1)
    code, out, err = run("top test.zarr train.zarr --top 100000 --normalize cosine")
    assert (code, err) == (0, "")
    for part, count in zip(out.split("\n\n")[:-1], counts, strict=True):
        lines = [re.split("  +", line) for line in part.splitlines()[3:-1]]
        assert len(lines) == max(count, 50 - count)
        assert all(float(line[1]) > 0 for line in lines[:count])
        assert all(float(line[-1]) < 0 for line in lines[: 50 - count])
        end = f"only {count} proponents, only {50 - count} opponents: no other row has a score of that sign"
        assert part.splitlines()[-1] == end
    assert "only" not in run("top test.zarr train.zarr --top 3")[1]

    found = result(run("groups test.zarr train.zarr --by label --json"))
    sums = group_influence(*PAIR, "label")
    assert found["groups"] == sums.names.tolist()
    assert_allclose(found["sums"], sums.sums)
    code, out, _ = run("groups test.zarr train.zarr --by label --average-queries --top 2 --damping 0.1 --damping 1")
    lines = out.splitlines()
    assert code == 0
    titles = [line.removeprefix("damping ").partition(", query mean") for line in lines if line.startswith("damping")]
    assert [float(title[0]) for title in titles] == pytest.approx([expected.damping[0], 10 * expected.damping[0]])
    assert lines[1].split() == ["label", "rows", "sum", "mean"]
    assert len(lines) == 2 * (1 + 2 + 2) + 1 + 2  # with what was used

    found = result(run("modules test.zarr train.zarr --top 3 --json"))
    by_module = module_influence(*PAIR, top=3)
    assert list(found) == list(by_module) == ["first", "second", "last"]
    assert [row["row"] for row in found["last"]["queries"][0]["opponents"]] == (
        by_module["last"].opponents.rows[0].tolist()
    )
    assert "module second\n\nquery 0" in run("modules test.zarr train.zarr --top 3")[1]
    facts = result(run("modules test.zarr train.zarr --out m.zarr --json"))
    assert facts["modules"] == ["first", "second", "last"]
    assert zarr.open_array("m.zarr").shape == (3, 10, 50)
    assert "m.zarr: 3 modules x 10 queries x 50 rows" in run("modules test.zarr train.zarr --out m.zarr")[1]


def test_self_influence_of_several(run, stores):  # noqa: F811
    expected = self_influence(["train.zarr"] * 2, damping=[0.1, 2.0])
    found = result(run(
        "self-influence train.zarr --also train.zarr --damping 0.1 --damping 2 --top 3 --out v.npy --json"
    ))  # fmt: skip
    assert_array_equal(np.load("v.npy"), expected)
    assert (found["n"], found["damping"]) == (50, [0.1, 2.0])
    assert [row["row"] for row in found["by_damping"][1]] == np.argsort(-expected[1])[:3].tolist()
    out = run("self-influence train.zarr --damping 0.1 --damping 2 --top 3")[1]
    assert out.count("self-influence") == 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("score test.zarr train.zarr --out s --dot --damping 1", "no damping without a curvature"),
        ("score test.zarr train.zarr --out s --dot --curvature default", "--dot or --curvature; received both"),
        ("score test.zarr train.zarr --out s --average-queries --average-by label", "received both"),
        ("score test.zarr train.zarr --out s --average-by label", "expected one of id to group"),
        ("score test.zarr train.zarr --out s --rows none.npy", "a .npy file; received none.npy"),
        ("score test.zarr train.zarr --out s --rows all --rows all", "--rows once for each of 1 checkpoints"),
        ("score test.zarr train.zarr --out s --also test.zarr train.zarr --rows all", "--rows once for each of 2"),
        ("score test.zarr train.zarr --out s --dot --also test.zarr test.zarr", "the same rows in every checkpoint"),
        ("score test.zarr train.zarr --out s --device nonsense", "expected a device such as"),
        ("groups test.zarr train.zarr --by colour", "expected one of id, label to group"),
        ("modules test.zarr train.zarr", "either top= or out="),
        ("top test.zarr train.zarr --resume train.zarr", "something else: choose another path"),
        ("top test.zarr train.zarr --resume my_recipe.py/x", "a folder for partial results"),
        ("verify train.zarr --memory 1MiB", "verify needs"),
    ],
)
def test_a_mistake_is_one_line(run, stores, line, message):  # noqa: F811
    code, out, err = run(line)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1
