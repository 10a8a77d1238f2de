"""Texts of a page token by token: pieces and their sums, what is cut, reports and typed queries with a model."""

from __future__ import annotations

import json
import threading
import time

import numpy as np
import pytest
from numpy.testing import assert_allclose
from test_cli import run  # noqa: F401 - a fixture
from test_report import data_of

import ooc_influence as ooc
from ooc_influence.corpus import answer_start, question_start
from ooc_influence.errors import InputError, MismatchError
from ooc_influence.report import Corpus, write_report
from ooc_influence.report.examples import TEXT_LIMIT
from ooc_influence.report.folder import to_script
from ooc_influence.report.tokens import token_pieces

pytest.importorskip("jinja2")
pytestmark = [pytest.mark.filterwarnings(f"ignore::{kind}") for kind in ("DeprecationWarning", "ResourceWarning")]
pytestmark.append(pytest.mark.filterwarnings("ignore:gradients cover"))


def total(found):
    return sum(share for _, share in found["pieces"]) + found["left_out"]


def text_of(found):
    return "".join(text for text, _ in found["pieces"])


def test_parts_of_a_character_are_one_piece():
    found = token_pieces(["a", "", "", "é", " b", ""], [1.0, 2.0, -0.5, 4.0, 8.0, 16.0], 100)
    assert found == {
        "pieces": [["a", 1.0], ["é", 5.5], [" b", 8.0], ["", 16.0]], "first": [0, 4], "before": 0, "after": 0,
        "left_out": 0,
    }  # fmt: skip


def test_neighbours_without_a_share_are_one_piece():
    texts = ["<user>", " what", "?", "<bot>", " yes", ".", "<end>", "<pad>"]
    found = token_pieces(texts, [0, 0, 0, 0, 0.25, -0.75, 0, 0], 100)
    assert found["pieces"] == [["<user> what?<bot>", 0], [" yes", 0.25], [".", -0.75], ["<end><pad>", 0]]


def strongest_by_hand(lengths, weights, limit):
    """All parts that fit, one token always; the strongest, the first of equals."""
    n, best = len(lengths), (-1.0, 0, 0)
    for start in range(n):
        stop = start + 1
        while stop < n and sum(lengths[start : stop + 1]) <= limit:
            stop += 1
        weight = float(np.sum(weights[start:stop]))
        if weight > best[0] + 1e-9:
            best = (weight, start, stop)
    return best[1:]


@pytest.mark.parametrize("seed", range(6))
def test_long_texts_are_cut_around_their_strongest_tokens(seed):
    generator = np.random.default_rng(seed)
    texts = ["x" * size for size in generator.integers(1, 40, 600)]
    texts[7] = "y" * 500  # longer than what is shown at first
    shares = generator.standard_normal(600) * (generator.random(600) < 0.3)
    shares[generator.integers(600)] = 40.0
    found = token_pieces(texts, shares, 100)
    lengths, weights = [len(text) for text in texts], abs(shares)
    start, stop = strongest_by_hand(lengths, weights, TEXT_LIMIT)
    assert (found["before"], found["after"]) == (sum(lengths[:start]), sum(lengths[stop:]))
    assert text_of(found) == "".join(texts[start:stop])
    assert len(text_of(found)) <= TEXT_LIMIT
    assert_allclose(total(found), shares.sum(), rtol=1e-3)
    low, high = strongest_by_hand(lengths[start:stop], weights[start:stop], 100)
    first = found["pieces"][slice(*found["first"])]
    assert "".join(text for text, _ in first) == "".join(texts[start + low : start + high])
    assert max(abs(share) for _, share in first) == pytest.approx(abs(shares).max(), rel=1e-3)


def test_texts_that_fit_are_whole_and_nothing_is_no_text():
    assert token_pieces(["ab", "cd"], [0.0, 0.0], 4)["pieces"] == [["abcd", 0]]
    assert token_pieces([], [], 4) == {"pieces": [], "first": [0, 0], "before": 0, "after": 0, "left_out": 0}


def test_no_token_leaves_its_string():
    hostile = ["</script>", "<script>alert(1)</script>", "\u202e", "\u2028", "שלום", '"', "\\", "\x00", "\ufffd"]
    script = to_script(token_pieces(hostile, np.arange(1.0, 10), 1000))
    assert "<" not in script
    assert script.isascii()
    assert [text for text, _ in json.loads(script)["pieces"]] == hostile


def test_where_answers_begin():
    prompt = {"prompt": "q", "completion": "a"}
    record = {"q": "Why?", "a": "Because.", "chat": [{"role": "user", "content": "Hi"}]}
    assert answer_start(record, prompt) == len("Why?\n\n")
    assert answer_start({"q": "Why?"}, prompt) is None
    assert answer_start(record, {"text": "q"}) is None
    assert answer_start(record, {"messages": "chat"}) is None  # nobody replied
    record["chat"].append({"role": "assistant", "content": "Hello"})
    assert answer_start(record, {"messages": "chat"}) == len("user: Hi\n\n")
    assert question_start(record, {"messages": "chat"}) == len("user: ")
    assert question_start(record, prompt) is None  # no chat: the prompt is all of the question
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    as_turns = {"q": turns, "a": "Because."}
    assert question_start(as_turns, prompt) == len("system: Be brief.\n\nuser: ")
    assert question_start({"chat": record["chat"][1:]}, {"messages": "chat"}) is None  # nothing was asked


@pytest.fixture(scope="module")
def traced(tmp_path_factory):
    """A tiny language model, documents (one of several rows), questions with answers, and their stores."""
    pytest.importorskip("transformers")
    pytest.importorskip("datasets")
    from tiny_hf import make_model

    from ooc_influence import hf

    folder = tmp_path_factory.mktemp("traced")
    make_model(folder / "model")
    texts = [" ".join(f"w{(row * 7 + place) % 40}" for place in range(10)) for row in range(30)]
    texts.append(" ".join(texts[:3]))
    (folder / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    pairs = [{"prompt": "w1 w2 w3", "completion": f" w{row} w{row + 4}"} for row in range(4)]
    (folder / "answers.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    train = hf.extract(folder / "model", folder / "corpus.jsonl", folder / "t.zarr", compressor=ooc.Dropout(k=300),
                       dtype="float32")  # fmt: skip
    ooc.fit_fisher(train)
    query = hf.extract(folder / "model", folder / "answers.jsonl", folder / "q.zarr", like=train, dtype="float32",
                       prompt="prompt", completion="completion")  # fmt: skip
    return folder, train, query


def write(traced, out, **options):
    folder, train, query = traced
    return write_report(train, out, query, data=folder / "corpus.jsonl", query_data=folder / "answers.jsonl",
                        top=4, **options)  # fmt: skip


def test_shares_add_up_to_the_scores_of_the_lists(traced, tmp_path):
    report = write(traced, tmp_path / "r", model=traced[0] / "model", token_rows=3)
    file = data_of(report, "queries-0")
    for query in file["queries"]:
        scores = dict(map(tuple, [*query["proponents"][:3], *query["opponents"][:3]]))
        assert {int(row) for row in query["tokens"]["rows"]} == set(scores)
        for row, found in query["tokens"]["rows"].items():
            assert_allclose(total(found), scores[int(row)], rtol=1e-3)
            assert text_of(found) == file["examples"][row]["text"]
        own = query["tokens"]["query"]
        assert_allclose(total(own), sum(score for _, score in query["proponents"][:3]), rtol=1e-3)
        answer = query["text"][query["answer"] :]
        assert own["pieces"][0] == ["w1 w2 w3", 0]  # the prompt has no loss
        assert text_of(own).split() == query["text"].split() + ["<eos>"] * text_of(own).count("<eos>")
        assert answer.split() == query["text"].split()[3:]


def test_an_interrupted_report_continues_with_the_next_query(traced, tmp_path, monkeypatch):
    from ooc_influence.influence.tokens import Shares

    model, compute, done = traced[0] / "model", Shares.of, []

    def interrupted(shares, queries):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.extend(queries)
        return compute(shares, queries)

    def counted(shares, queries):
        done.extend(queries)
        return compute(shares, queries)

    monkeypatch.setattr(Shares, "of", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(traced, tmp_path / "r", model=model)
    assert [path.name for path in tmp_path.iterdir()] == [".r.partial"]
    monkeypatch.setattr(Shares, "of", counted)
    report = write(traced, tmp_path / "r", model=model)
    assert done == [0, 1, 2, 3]
    assert [path.name for path in tmp_path.iterdir()] == ["r"]
    again = write(traced, tmp_path / "again", model=model)
    name = "data/queries-0.js"
    assert (again / name).read_bytes() == (report / name).read_bytes()


def test_parts_of_other_settings_do_not_count(traced, tmp_path, monkeypatch):
    from ooc_influence.influence.tokens import Shares

    model, compute, done = traced[0] / "model", Shares.of, []

    def interrupted(shares, queries):
        done.extend(queries)
        if len(done) == 3:
            raise KeyboardInterrupt
        return compute(shares, queries)

    monkeypatch.setattr(Shares, "of", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(traced, tmp_path / "r", model=model)
    report = write(traced, tmp_path / "r", model=model, damping=1.0)
    assert done == [0, 1, 2, 0, 1, 2, 3]
    fresh = write(traced, tmp_path / "fresh", model=model, damping=1.0)
    name = "data/queries-0.js"
    assert (fresh / name).read_bytes() == (report / name).read_bytes()


def test_without_a_model_or_rows_pages_are_as_they_were(traced, tmp_path):
    plain = write(traced, tmp_path / "plain")
    none = write(traced, tmp_path / "none", model=traced[0] / "model", token_rows=0)
    files = sorted(path.name for path in (plain / "data").iterdir())
    assert files == sorted(path.name for path in (none / "data").iterdir())
    for name in set(files) - {"index.js"}:  # it says when
        assert (plain / "data" / name).read_bytes() == (none / "data" / name).read_bytes()
    assert all("tokens" not in query for query in data_of(plain, "queries-0")["queries"])


def test_documents_are_found_where_the_store_recorded_them(traced, tmp_path):
    """Without any of the report, and where those of the report are matched by id."""
    folder, train, query = traced
    bare = write_report(train, tmp_path / "bare", query, top=2, model=folder / "model")
    found = data_of(bare, "queries-0")["queries"][0]
    assert found["text"] is None
    assert text_of(found["tokens"]["query"]).startswith("w1 w2 w3")
    names = train.ids()
    texts = [f"another text {row}" for row in range(train.n)]
    records = [{"name": str(name), "text": text} for name, text in zip(names, texts, strict=True)][::-1]
    (tmp_path / "named.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    named = write_report(train, tmp_path / "named", query, top=2, model=folder / "model",
                         data=Corpus(tmp_path / "named.jsonl", id="name"))  # fmt: skip
    assert data_of(named, "queries-0")["queries"][0]["tokens"] == found["tokens"]


def test_another_model_or_no_queries_are_refused(traced, tmp_path):
    from tiny_hf import make_model
    from transformers import GPT2LMHeadModel

    folder, train, _ = traced
    with pytest.raises(InputError, match=r"expected queries \(--queries\) with --model"):
        write_report(train, tmp_path / "r", model=folder / "model")
    make_model(tmp_path / "other")
    model = GPT2LMHeadModel.from_pretrained(tmp_path / "other")
    model.transformer.wte.weight.data += 0.5
    model.save_pretrained(tmp_path / "other")
    with pytest.raises(MismatchError, match="name the model that the store was extracted with"):
        write(traced, tmp_path / "r", model=tmp_path / "other")
    assert not (tmp_path / "r").exists()


def test_the_command_takes_a_model(traced, run, tmp_path):  # noqa: F811
    folder, train, query = traced
    line = f"report {train.path} --queries {query.path} --data {folder / 'corpus.jsonl'} --top 3 -o out"
    assert run(f"{line} --model {folder / 'model'} --model-dtype float32 --token-rows 1")[0] == 0
    found = data_of("out", "queries-0")["queries"][0]
    assert len(found["tokens"]["rows"]) == 2
    code, _, err = run(f"{line} --token-rows 2 --model-dtype float32")
    assert (code, len(err.splitlines())) == (2, 1)
    assert "expected --model with --model-dtype and --token-rows; received none" in err
    code, _, err = run(f"report {train.path} -o out2 --model {folder / 'model'}")
    assert (code, "expected queries (--queries) with --model" in err) == (2, True)


def finished(server, values):
    job = server.jobs.submit(values)["job"]
    end = time.monotonic() + 120
    while server.jobs.state(job)["state"] in ("waiting", "running") and time.monotonic() < end:
        time.sleep(0.02)
    return server.jobs.state(job)


def answer(server, values):
    state = finished(server, values)
    assert state["state"] == "done", state
    return state["result"]["query"]


def test_typed_queries_come_with_tokens(traced):
    from ooc_influence.report.live_query import HuggingFaceModel
    from ooc_influence.report.server import live_report

    folder, train, _ = traced
    model = HuggingFaceModel(folder / "model", "prompt")
    with live_report(train, model=model, data=folder / "corpus.jsonl", top=3, token_rows=2) as server:
        found = answer(server, {"prompt": "w1 w2", "completion": "w3 w4 w5"})
        scores = dict(map(tuple, [*found["proponents"][:2], *found["opponents"][:2]]))
        assert {int(row): pytest.approx(total(own), rel=1e-3) for row, own in found["tokens"]["rows"].items()} == scores
        assert found["text"][found["answer"] :] == "w3 w4 w5"
        assert found["tokens"]["query"]["pieces"][0] == ["w1 w2", 0]
    with live_report(train, model=HuggingFaceModel(folder / "model"), top=3) as server:
        found = answer(server, {"text": " ".join(f"w{place % 40}" for place in range(40))})
        assert "tokens" not in found
        assert "pieces are averaged" in found["no_tokens"]
    with live_report(train, model=HuggingFaceModel(folder / "model"), top=3, token_rows=0) as server:
        found = answer(server, {"text": "w1 w2 w3"})
        assert not {"tokens", "no_tokens"} & set(found)


def test_stored_queries_have_a_reports_tokens_when_asked_for(traced, tmp_path):
    from ooc_influence.report.live_query import HuggingFaceModel
    from ooc_influence.report.server import live_report

    folder, train, query = traced
    model = HuggingFaceModel(folder / "model")
    written = data_of(write(traced, tmp_path / "r", model=folder / "model", token_rows=2), "queries-0")["queries"]
    places = {"data": folder / "corpus.jsonl", "query_data": folder / "answers.jsonl"}
    with live_report(train, query, model=model, top=4, token_rows=2, **places) as server:
        assert data_of(server.folder, "index")["ask"]["tokens"] is True
        assert all("tokens" not in own for own in data_of(server.folder, "queries-0")["queries"])
        for number in (2, 0):
            found = finished(server, {"stored": number})["result"]
            assert json.loads(to_script(found["tokens"])) == written[number]["tokens"]
        for other in (4, -1, "1", True):
            job = finished(server, {"stored": other})
            assert (job["state"], "one of 4 queries that have tokens" in job["error"]) == ("failed", True)
    with live_report(train, query, model=model, top=4, token_rows=0, **places) as server:
        assert data_of(server.folder, "index")["ask"]["tokens"] is False
        assert finished(server, {"stored": 0})["state"] == "failed"
    with live_report(train, model=model, top=4) as server:
        assert data_of(server.folder, "index")["ask"]["tokens"] is False


def test_why_a_stored_query_has_no_tokens_is_said(traced, tmp_path):
    from ooc_influence import hf
    from ooc_influence.report.live_query import HuggingFaceModel
    from ooc_influence.report.server import live_report

    folder, train, _ = traced
    answers = tmp_path / "gone.jsonl"
    answers.write_bytes((folder / "answers.jsonl").read_bytes())
    query = hf.extract(folder / "model", answers, tmp_path / "q.zarr", like=train, prompt="prompt",
                       completion="completion")  # fmt: skip
    answers.unlink()
    with live_report(train, query, model=HuggingFaceModel(folder / "model"), top=4) as server:
        found = finished(server, {"stored": 0})["result"]
        assert set(found) == {"no_tokens"}
        assert "gone.jsonl" in found["no_tokens"]


def test_the_page_asks_for_the_tokens_of_a_stored_query(page, traced):
    from ooc_influence.report.live_query import HuggingFaceModel
    from ooc_influence.report.server import live_report

    folder, train, query = traced
    places = {"data": folder / "corpus.jsonl", "query_data": folder / "answers.jsonl"}
    with live_report(train, query, model=HuggingFaceModel(folder / "model"), top=4, **places) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            page.open(server.url, "queries/1")
            page.wait("return document.querySelectorAll('.card').length === 8")
            assert page.count(".t") == 0
            page.find("#compute-tokens").click()
            page.wait("return document.querySelectorAll('.query .tokens .t').length")
            assert page.count(".card .tokens") == 8
            assert page.run("return document.getElementById('show-tokens').checked") is True
            assert page.count("#compute-tokens") == 0
            page.go("queries/2")
            page.wait("return document.querySelector('.query h2')?.innerText === 'Query 2'")
            assert page.count("#compute-tokens") == 1
            page.go("queries/1")  # and back: they are still there
            page.wait("return document.querySelectorAll('.query .tokens .t').length")
            assert page.logs() == []
        finally:
            server.shutdown()
            thread.join()


def test_a_typed_query_is_answered_where_tokens_cannot_be(traced, tmp_path):
    """Of train documents that are no longer there, the lists alone are shown, and why."""
    from ooc_influence import hf
    from ooc_influence.report.live_query import HuggingFaceModel
    from ooc_influence.report.server import live_report

    folder = traced[0]
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_bytes((folder / "corpus.jsonl").read_bytes())
    train = hf.extract(folder / "model", corpus, tmp_path / "t.zarr", compressor=ooc.Dropout(k=300))
    ooc.fit_fisher(train)
    corpus.unlink()
    with live_report(train, model=HuggingFaceModel(folder / "model"), top=3) as server:
        found = answer(server, {"text": "w1 w2 w3"})
        assert found["proponents"]
        assert "tokens" not in found
        assert "corpus.jsonl" in found["no_tokens"]
