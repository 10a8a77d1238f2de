"""A run from a model and documents to pages: every step once, resumed, repeated from its own settings."""

from __future__ import annotations

import json

import pytest
from numpy.testing import assert_allclose, assert_array_equal
from test_cli import run  # noqa: F401 - a fixture
from tiny_hf import MARKS, documents, make_model, texts, write

import ooc_influence as ooc
from ooc_influence import hf
from ooc_influence.errors import InputError, MismatchError, StoreExistsError
from ooc_influence.tracing import read_settings
from ooc_influence.tracing import run as run_module
from ooc_influence.tracing.run import find_fields, store_bytes

pytest.importorskip("jinja2")
pytestmark = MARKS
N, Q = 14, 3


@pytest.fixture
def sources(tmp_path):
    """A model, documents of text with ids, and answers as prompt and completion."""
    model = make_model(tmp_path / "model")
    data = write(tmp_path / "corpus.jsonl", documents(N))
    answers = [{"prompt": text, "completion": "w1 w2 w3"} for text in ("w4 w5", "w6", "w7 w8 w9")]
    return model, data, write(tmp_path / "answers.jsonl", answers)


def trace(sources, out, **options):
    return ooc.trace(*sources, out, **({"token_rows": 2, "top": 4} | options))


def test_what_a_run_leaves(tmp_path, sources):
    found = trace(sources, tmp_path / "run")
    assert (found.train.n, found.queries.n) == (len(found.train.ids()), Q)
    assert {each.name for each in (tmp_path / "run").iterdir()} == {
        "run.yaml", "train.zarr", "queries.zarr", "answers.jsonl", "page",
    }  # fmt: skip
    lists = ooc.top_influential(found.queries, found.train, 4)
    assert_array_equal(lists.proponents.rows, found.lists.proponents.rows)
    lines = [json.loads(line) for line in (tmp_path / "run" / "answers.jsonl").read_text().splitlines()]
    assert [line["text"] for line in lines] == [f"{p}\n\nw1 w2 w3" for p in ("w4 w5", "w6", "w7 w8 w9")]
    for number, line in enumerate(lines):
        assert [each["row"] for each in line["proponents"]] == lists.proponents.rows[number].tolist()
        corpus = texts(N)
        for each in line["proponents"] + line["opponents"]:
            assert each["text"] in corpus[int(found.train.column("document")[each["row"]])]
    assert found.page.is_file()


def test_what_is_there_is_not_done_again(tmp_path, sources, capsys):
    first = trace(sources, tmp_path / "run")
    chunks = {path: path.stat().st_mtime_ns for path in (tmp_path / "run" / "train.zarr").rglob("c.*")}
    capsys.readouterr()
    again = trace(sources, tmp_path / "run", progress=True, top=2)
    assert_array_equal(again.lists.proponents.rows, first.lists.proponents.rows[:, :2])
    assert {path: path.stat().st_mtime_ns for path in chunks} == chunks
    shown = capsys.readouterr().err
    assert "train.zarr" in shown
    assert shown.index("about") < shown.index("1/4 ")


def test_what_is_there_must_be_of_this_model_and_data(tmp_path, sources):
    trace(sources, tmp_path / "run")
    write(sources[1], [{**each, "text": " ".join(reversed(each["text"].split()))} for each in documents(N)])
    with pytest.raises(MismatchError, match="losses"):
        trace(sources, tmp_path / "run")
    write(sources[1], documents(N))
    trace(sources, tmp_path / "run")
    model = hf.load(sources[0])
    model.model.lm_head.weight.data += 0.1
    model.model.save_pretrained(sources[0])
    with pytest.raises(MismatchError, match="model"):
        trace(sources, tmp_path / "run")


def test_losses_without_tokens_of_their_own(tmp_path, sources):
    """Rollouts: pages without shares of tokens."""
    data = write(
        tmp_path / "rollouts.jsonl", [{"prompt": "w1", "completion": "w2 w3", "advantage": a} for a in (1, -1)]
    )
    found = ooc.trace(sources[0], data, data, tmp_path / "run", advantage="advantage")
    assert found.page.is_file()


@pytest.mark.parametrize("at", ["data", "queries", "page"])
def test_it_resumes(tmp_path, sources, monkeypatch, at):
    expected = trace(sources, tmp_path / "whole")
    extract, calls = hf.extract, []

    def interrupted(model, data, store, **how):
        calls.append(store.name)
        if calls == {"data": ["train.zarr"], "queries": ["train.zarr", "queries.zarr"]}.get(at):
            raise KeyboardInterrupt
        return extract(model, data, store, **how)

    def no_page(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run_module.hf, "extract", interrupted)
        if at == "page":
            patch.setattr(run_module, "save_report", no_page)
        with pytest.raises(KeyboardInterrupt):
            trace(sources, tmp_path / "run")
    found = trace(sources, tmp_path / "run")
    assert_array_equal(found.train.rows(), expected.train.rows())
    assert_array_equal(found.lists.proponents.scores, expected.lists.proponents.scores)


def test_settings_are_a_file(tmp_path, sources):
    found = trace(sources, tmp_path / "run", documents=10, id="name", keep=["source"])
    settings = read_settings(tmp_path / "run" / "run.yaml")
    assert settings == {
        "model": str(sources[0]), "data": str(sources[1]), "queries": str(sources[2]), "id": "name",
        "keep": ["source"], "documents": 10, "top": 4, "token_rows": 2,
    }  # fmt: skip
    named = [settings.pop(name) for name in ("model", "data", "queries")]
    again = ooc.trace(*named, tmp_path / "again", **settings)
    assert_array_equal(again.train.rows(), found.train.rows())
    assert again.train.column("source").tolist() == found.train.column("source").tolist()
    with pytest.raises(StoreExistsError, match="run with documents=9; received one with 10"):
        trace(sources, tmp_path / "run", documents=9, id="name", keep=["source"])
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(StoreExistsError, match="to be new, empty or a run's"):
        trace(sources, tmp_path / "other")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: a\ntopp: 3", "received 'topp'"),
        ("top: many", "expected top as int in .*received 'many'"),
        ("top: true", "received True"),
        ("reduction: median", "received 'median'"),
        ("keep: 3", "received 3"),
        ("- a", "expected names and values"),
        ("a: [", "expected the settings of a run"),
    ],
)
def test_settings_that_are_wrong(tmp_path, text, message):
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(InputError, match=message):
        read_settings(tmp_path / "run.yaml")


def test_long_work_is_confirmed(tmp_path, sources, monkeypatch):
    monkeypatch.setattr(run_module, "LONG", -1.0)
    asked = []
    with pytest.raises(InputError, match="received no: confirm it"):
        trace(sources, tmp_path / "run", confirm=lambda work: asked.append(work) is not None)
    assert asked[0].startswith("about ")
    assert not (tmp_path / "run" / "train.zarr").exists()
    trace(sources, tmp_path / "run", confirm=lambda work: True)


def test_bytes_ahead_are_those_of_the_rows_that_are_stored():
    """Rows are reduced where a store would exceed 64 GiB, so that ten million take about as much."""
    losses = "token_cross_entropy_mean"
    assert store_bytes([100, 0], 10**8, losses, None) == 100 * 2 * 65536
    assert store_bytes([10**7, 0], 10**8, losses, None) == 10**7 * 2 * 4096
    assert store_bytes([10**7, 0], 10**8, losses, ooc.RowBudget("8kB")) == pytest.approx(10**7 * 8000, rel=0.05)
    assert store_bytes([0, 10], 1000, losses, None) == 10 * 2 * 1000


def test_fields_are_found():
    columns = {"data": ["text", "name"], "queries": ["question", "answer"]}
    asked = {"prompt": "question", "completion": "answer", "id": "name", "keep": ["name", "other"], "chat": True}
    assert find_fields(columns, asked) == {
        "data": {"id": "name", "keep": ("name",), "chat": True},
        "queries": {"prompt": "question", "completion": "answer", "id": None, "keep": (), "chat": True},
    }
    for wrong in ({"text": "body"}, {"id": "number"}):
        with pytest.raises(InputError, match="to be a field of the data or of the queries; received data with text, n"):
            find_fields(columns, wrong)


def test_usual_fields_need_no_name(tmp_path, sources):
    answers = [{"prompt": "w4 w5", "outputs": [{"text": "w1 w2 w3"}]}]  # as a server writes them
    path = write(tmp_path / "served.jsonl", answers)
    found = ooc.trace(*sources[:2], path, tmp_path / "run", token_rows=0)
    whole = ooc.trace(*sources, tmp_path / "whole", token_rows=0)
    assert_allclose(found.queries.rows(), whole.queries.rows(0, 1), rtol=1e-3, atol=1e-6)


def test_the_command(tmp_path, sources, run):  # noqa: F811
    model, data, queries = map(str, sources)
    code, _, error = run(f"trace --model {model} --data {data}")
    assert code == 2
    assert "expected --queries, --out" in error
    out = tmp_path / "run"
    how = f"--model {model} --data {data} --queries {queries} -o {out} --top 3 --token-rows 0"
    found = json.loads(run(f"trace {how} --json")[1])
    assert found == {"folder": str(out), "page": str(out / "page" / "index.html"), "rows": found["rows"], "queries": Q}
    code, shown, error = run(f"trace {out}/run.yaml")
    assert code == 0, error
    assert "w4 w5" in shown
    assert f"open {out / 'page' / 'index.html'}" in shown
    code, _, error = run("trace none.yaml")
    assert code == 2
    assert "Traceback" not in error
