"""The commands that make, look at and change stores, end to end."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from test_cli import run, stores  # noqa: F401 - fixtures

from ooc_influence import GradientStore, OocInfluenceWarning

INIT = "init --recipe my_recipe.py:recipe --split train --store s.zarr --k 200 --json"
SHARD = "extract --recipe my_recipe.py:recipe --split train --store s.zarr --k 200 --shard {}/3 --json"


def result(answer, code=0):
    assert answer[0] == code, answer
    return json.loads(answer[1])


def test_init_then_shards(run, stores):  # noqa: F811
    facts = result(run(INIT))
    assert (facts["rows"], facts["planned"], facts["missing"]) == (0, 50, [[0, 50]])
    assert (facts["ids"], facts["columns"]) == ("str", {"label": "int64"})
    assert result(run(INIT))["planned"] == 50  # again: nothing to do
    for index in (2, 0, 1, 0):
        facts = result(run(SHARD.format(index)))
    assert (facts["rows"], facts["missing"]) == (50, [])
    one = GradientStore.open("train.zarr")
    assert_array_equal(GradientStore.open("s.zarr").rows(), one.rows())
    code, out, _ = run("init --recipe my_recipe.py:recipe --split train --store s.zarr --k 200 --rows 80")
    assert (code, "80 rows planned" in out) == (0, True)
    facts = result(run("info s.zarr --json"))
    assert (facts["committed"], facts["planned"], facts["missing"]) == (50, 80, [[50, 80]])


def test_info_tells_how_far_each_writer_is(run, stores):  # noqa: F811
    run(INIT + " --dtype float32")
    store = GradientStore.open("s.zarr", "a")
    store.writer(0, 50)
    rows = np.zeros((20, 200), np.float32)
    store.append(rows, loss=np.zeros(20), ids=[f"i{row}" for row in range(20)], columns={"label": range(20)})
    store.flush()
    (writer,) = result(run("info s.zarr --json"))["writers"]
    assert (writer["rows"], writer["committed"], writer["state"]) == ("0-50", 20, "alive")
    code, out, _ = run("info s.zarr")
    assert code == 0
    assert all(word in out for word in ("alive", "[[20, 50]]", "first", "linear", "entries"))
    code, _, err = run(SHARD.format(2) + " --dtype float32")  # the one group of rows is the last writer's
    assert code == 2
    assert "expected no other writer" in err
    store.close()
    (writer,) = result(run("info s.zarr --json"))["writers"]
    assert writer["state"] == "stopped"


def test_verify_finds_and_repairs(run, stores):  # noqa: F811
    assert result(run("verify train.zarr --json")) == {"store": "train.zarr", "checked_rows": 50, "damage": []}
    assert "50 committed rows, nothing wrong" in run("verify train.zarr")[1]
    path = Path("train.zarr/gradients/c.0.0")
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    answer = run("verify train.zarr")
    assert answer[0] == 1
    assert "rows 0-50" in answer[1]
    assert "--repair" in answer[1]
    assert result(run("verify train.zarr --repair --workers 1 --json"), 1)["damage"][0]["stop"] == 50
    assert (
        result(run("extract --recipe my_recipe.py:recipe --split train --store train.zarr --k 200 --json"))["rows"]
        == 50
    )
    assert path.read_bytes() == whole
    assert result(run("info train.zarr --json"))["curvature"] == {"default": "up to date"}
    Path("train.zarr/commits/c.0").unlink()
    assert run("verify train.zarr")[0] == 1
    code, _, err = run("info train.zarr")
    assert (code, "verify" in err) == (2, True)


def test_ids_drop_compact_merge(run, stores, tmp_path):  # noqa: F811
    (line,) = result(run("ids train.zarr doc-7 --json"))["rows"]
    assert (line["row"], line["dropped"]) == (7, False)
    assert result(run("ids train.zarr doc-7 nobody --json"), 1)["rows"][1]["row"] is None
    assert "doc-7" in run("ids train.zarr doc-7")[1]
    assert result(run("drop train.zarr 3 10-12 --json"))["dropped"] == 4
    (tmp_path / "bad.txt").write_text("doc-40\n\ndoc-3\n")
    assert result(run("drop train.zarr --ids doc-41 --file bad.txt --json"))["dropped"] == 6
    assert result(run("info train.zarr --json"))["dropped"] == 6
    assert "before rows were dropped" in result(run("info train.zarr --json"))["curvature"]["default"]
    assert result(run("compact train.zarr small.zarr --json"))["rows"] == 44
    assert "doc-40" not in GradientStore.open("small.zarr").ids().tolist()
    assert (
        result(run("extract --recipe my_recipe.py:recipe --split test --store t2.zarr --like train.zarr --json"))[
            "rows"
        ]
        == 10
    )
    merged = result(run("merge t2.zarr test.zarr --out both.zarr --json"))
    assert (merged["rows"], merged["made_from"]) == (20, [str(tmp_path / "t2.zarr"), str(tmp_path / "test.zarr")])
    assert result(run("merge both.zarr --out moved.zarr --move --json"))["rows"] == 20
    assert not Path("both.zarr").exists()
    assert result(run("upgrade train.zarr --json")) == {"store": "train.zarr", "format": 3, "upgraded": False}


def test_reduce_and_rotate(run, stores):  # noqa: F811
    run("drop train.zarr 3")
    facts = result(run("reduce train.zarr r.zarr --dims 20 --pilot 40 --weights ggn --workers 2 --memory 8GiB --json"))
    assert (facts["rows"], facts["k"], facts["dropped"], facts["ids"]) == (50, 20, 1, "str")
    assert facts["compressor"]["reduce"] == {"r": 20, "pilot": 40, "weights": "ggn"}
    assert 0 < facts["reduction"]["left_out"] < facts["measured"]["left_out"] < 1
    code, out, err = run("reduce train.zarr r.zarr")  # nothing left to do
    assert (code, err) == (2, err)
    assert "the weights of the store" in err
    assert ", ggn; received none" in err
    code, out, err = run("reduce train.zarr r.zarr --weights ggn")
    assert (code, err) == (0, "")
    assert "20 of 200 directions leave out" in out
    assert "49 rows written" in out
    assert result(run("reduce test.zarr q.zarr --like r.zarr --json"))["rows"] == 10
    turned = result(run("reduce r.zarr t.zarr --rotate --dtype float32 --codec zstd --json"))
    assert (turned["dtype"], turned["codec"], turned["reduction"]["pilot_rows"]) == ("float32", "zstd", 49)
    assert result(run("reduce q.zarr tq.zarr --like t.zarr --json"))["k"] == 20
    for line in ("fisher t.zarr", "top tq.zarr t.zarr --top 2", "info t.zarr"):
        code, out, err = run(line)
        assert (code, err) == (0, "")
    assert all(word in out for word in ("reduction.left_out", "measured.left_out", "reduction.span_rows"))


def test_codec_and_another_model(run, stores):  # noqa: F811
    line = "extract --recipe my_recipe.py:as_tuple --store z.zarr --k 50 --dtype int8 --codec zstd --json"
    facts = result(run(line))
    assert (facts["codec"], facts["dtype"]) == ("zstd", "int8")
    recipe = Path("my_recipe.py")
    recipe.write_text(
        recipe.read_text().replace('return make(Mlp), loss, {"only"', 'return make(Mlp, seed=5), loss, {"only"')
    )
    assert "expected the model of" in run(line)[2]
    with pytest.warns(OocInfluenceWarning, match="--other-model"):
        code, out, _ = run("extract --recipe my_recipe.py:as_tuple --store q.zarr --like z.zarr --other-model --json")
    assert code == 0
    model = json.loads(out)["model"]
    assert model["fingerprint"] == facts["model"]["fingerprint"]
    assert len(model["other"]) == 1
    assert run("fisher z.zarr --cache ./cache --cache-size 1MiB")[0] == 0  # a local store needs no cache


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("verify nowhere.zarr", "no such path"),
        ("ids nowhere.zarr 1", "no such path"),
        ("drop train.zarr", "expected rows to drop"),
        ("drop train.zarr 12-3", "a range such as"),
        ("drop train.zarr x", "a range such as"),
        ("drop train.zarr 50", "row numbers in [0, 50)"),
        ("drop train.zarr --ids nobody", "which no row has"),
        ("compact train.zarr train.zarr", "expected nothing at"),
        ("merge train.zarr test.zarr --out m.zarr", "expected the ids and columns of"),
        ("merge train.zarr --out train.zarr", "one of them twice"),
        ("upgrade my_recipe.py", "expected a gradient store"),
        ("reduce train.zarr r.zarr --dims 51", "smaller r"),
        ("reduce train.zarr r.zarr --rotate", "reduce it first"),
        ("reduce train.zarr train.zarr", "another path"),
        ("reduce train.zarr r.zarr --like test.zarr", "reduced to an eigenbasis"),
        ("reduce train.zarr r.zarr --memory 1MiB", "--memory"),
        ("init --recipe my_recipe.py:recipe --split train --store train.zarr --k 200", "at most 50 rows"),
        ("init --recipe my_recipe.py:recipe --split train --store n.zarr --k 200 --rows 0", "rows >= 1"),
        ("extract --recipe my_recipe.py:recipe --split train --store t.zarr --k 200 --shard 3/3", "--shard I/N"),
        ("extract --recipe my_recipe.py:recipe --split train --store t.zarr --k 200 --shard x", "--shard I/N"),
        ("extract --recipe my_recipe.py:recipe --split train --store train.zarr --k 200 --shard 0/2", "planned rows"),
        ("extract --recipe my_recipe.py:recipe --split train --store train.zarr --k 200 --codec zstd", "codec"),
        ("fisher train.zarr --cache my_recipe.py", "cached chunks"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line(run, stores, line, message):  # noqa: F811
    code, out, err = run(line)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1
    assert "Traceback" not in err


def test_a_size_of_rows(run):  # noqa: F811
    line = "extract --recipe my_recipe.py:recipe --split train --store {} --row-bytes {} --json"
    facts = result(run(line.format("signs.zarr", "3kB")))
    assert facts["dtype"] == "sign"
    assert (facts["k"], facts["compressor"]["sampling"]) == (facts["p"], "grid")  # fewer entries than bits
    facts = result(run(line.format("numbers.zarr", "20")))
    assert (facts["dtype"], facts["reduction"]["columns"]) == ("int8", 15)
    for more, message in (
        ("--k 100", "without --k"),
        ("--dtype int8", "without --dtype"),
        ("--like signs.zarr", "--like"),
    ):
        code, _, err = run(line.format("x.zarr", "3kB").replace("--json", more))
        assert (code, message in err) == (2, True), err
