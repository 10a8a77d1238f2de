"""Which characters a row of a long document is made from, and whether a file is still the one it was made from."""

from __future__ import annotations

import json

import numpy as np
import pytest
from tiny_hf import MARKS, SMALL, documents, make_model, make_tokenizer, samples, texts, write

from ooc_influence import hf, merge_stores
from ooc_influence.corpus.documents import text_digest, text_of
from ooc_influence.errors import InputError, MismatchError
from ooc_influence.report import Corpus, write_report

pytestmark = MARKS


def shown(report):
    """Entries of a report's page of suspects, by row."""
    found = {}
    for path in (report / "data").glob("suspects-*.js"):
        text = path.read_text()
        found |= {entry["row"]: entry for entry in json.loads(text[text.index("[") : text.rindex("]") + 1])}
    return found


@pytest.mark.parametrize("length", [3, 7, 16])
def test_a_row_spans_the_characters_of_its_tokens(tmp_path, length):
    found, words = samples(tmp_path, hf.Fields(text="text"), length=length), make_tokenizer()
    for row in range(len(found)):
        text = texts()[found.document[row]]
        passage = text[found.char_start[row] : found.char_stop[row]]
        assert words(passage)["input_ids"] == found[row]["input_ids"]
        assert found.text_digest[row] == text_digest(text)
        if found.piece[row] < 0:
            assert passage == text


def test_of_a_pair_and_of_a_chat(tmp_path):
    rows = [{"q": "w1 w2 w3 w4 w5", "a": "w6 w7 w8 w9"}, {"q": "w1", "a": "w2"}]
    found = samples(tmp_path, hf.Fields(prompt="q", completion="a"), rows, length=4)
    text = "w1 w2 w3 w4 w5\n\nw6 w7 w8 w9"
    spans = list(zip(found.char_start.tolist(), found.char_stop.tolist(), strict=True))
    assert [text[start:stop] for start, stop in spans[:-1]] == ["w4 w5\n\nw6 w7", "w7 w8 w9"]
    assert spans[-1] == (0, len("w1\n\nw2"))
    turns = [{"role": "user", "content": "w1 w2 w3"}, {"role": "assistant", "content": "w4 w5 w6 w7"}]
    chat = samples(tmp_path, hf.Fields(messages="m"), [{"m": turns}], template=True, length=8)
    assert len(chat) > 1
    assert set(chat.char_start[1:]) == set(chat.char_stop[:-1]) == {-1}
    assert set(chat.text_digest) == {text_digest("user: w1 w2 w3\n\nassistant: w4 w5 w6 w7")}


def test_text_of_a_record():
    assert text_of({"text": 3}, {"text": "text"}) == "3"
    assert text_of({"a": "x"}, {"prompt": "a", "completion": "b"}) is None
    assert text_of({"m": "x"}, {"messages": "m"}) is None
    assert text_of({"m": [{"role": "user", "content": ["parts"]}]}, {"messages": "m"}) is None
    assert text_of({"a": "x"}, {}) is None
    assert -(2**63) <= text_digest("\ud800") < 2**63


@pytest.fixture
def store(tmp_path):
    """A store of pieces of documents with 16 tokens at most."""
    data = write(tmp_path / "data.jsonl", documents())
    return hf.extract(make_model(tmp_path / "model"), data, tmp_path / "s.zarr", id="name", compressor=SMALL)


def test_a_report_shows_the_passage(tmp_path, store):
    assert store.attrs["origin"] == {
        "model": str(tmp_path / "model"), "data": str(tmp_path / "data.jsonl"), "documents": 12,
        "fields": {"text": "text", "id": "name"}, "max_length": 16,
    }  # fmt: skip
    entries = shown(write_report(store, tmp_path / "r", data=tmp_path / "data.jsonl", curvature=False))
    assert len(entries) == store.n
    words, lengths = make_tokenizer(), store.column("n_tokens")
    for row, entry in entries.items():
        pieces = "#" in str(store.ids([row])[0])
        assert len(words(entry["text"])["input_ids"]) == lengths[row] + 1  # the first is context
        assert ("characters" in entry["more"]) == pieces
        assert not {"char_start", "text_digest"} & set(entry["more"])
    whole = shown(
        write_report(store, tmp_path / "r2", data=Corpus(tmp_path / "data.jsonl", text="text"), curvature=False)
    )
    assert {entry["text"] for entry in whole.values()} == {text for text in texts() if len(text.split()) > 1}


def test_a_file_that_is_not_the_one_extracted_is_refused(tmp_path, store):
    rows = documents()
    write(tmp_path / "reversed.jsonl", rows[::-1])
    write(tmp_path / "more.jsonl", [*rows, rows[0]])
    for name, expected in (("reversed", "received another text"), ("more", "each of 12 documents .* received 13")):
        with pytest.raises(MismatchError, match=expected):
            write_report(store, tmp_path / "r", data=tmp_path / f"{name}.jsonl", curvature=False)
    entries = shown(
        write_report(store, tmp_path / "r", data=Corpus(tmp_path / "reversed.jsonl", id="name"), curvature=False)
    )
    numbers = store.column("document")
    assert all(entry["text"] in texts()[numbers[row]] for row, entry in entries.items())


def test_of_merged_stores_each_document_is_checked(tmp_path, store):
    rows = [{"text": text, "name": f"other{number}"} for number, text in enumerate(texts(5, seed=1))]
    write(tmp_path / "other.jsonl", rows)
    other = hf.extract(tmp_path / "model", tmp_path / "other.jsonl", tmp_path / "o.zarr", id="name", like=store)
    both = merge_stores([store, other], tmp_path / "m.zarr")
    assert both.attrs["origin"]["documents"] is None
    with pytest.raises(MismatchError, match="received another text"):  # document 0 of two files
        write_report(both, tmp_path / "r", data=tmp_path / "data.jsonl", curvature=False)
    write(tmp_path / "both.jsonl", [{"text": row["text"], "name": row["name"]} for row in [*documents(), *rows]])
    entries = shown(
        write_report(both, tmp_path / "r", data=Corpus(tmp_path / "both.jsonl", id="name"), curvature=False)
    )
    assert len(entries) == store.n + other.n
    assert all(entry["text"] for entry in entries.values())


@pytest.mark.parametrize("kind", ["csv", "tsv", "txt", "json", "parquet", "folder"])
def test_every_kind_that_is_extracted_can_be_shown(tmp_path, kind):
    rows = [{"text": text} for text in texts()] if kind == "txt" else [
        {"prompt": f"w{n % 9} w3", "completion": f"{n}.50", "id": str(n)} for n in range(12)
    ]  # fmt: skip
    data = tmp_path / ("folder" if kind == "folder" else f"d.{kind}")
    if kind in ("csv", "tsv"):
        separator = "," if kind == "csv" else "\t"
        lines = [separator.join(row.values()) for row in rows]
        data.write_text("\n".join([separator.join(rows[0]), *lines]) + "\n")
    elif kind == "json":
        data.write_text(json.dumps(rows))
    else:
        write(data, rows)
    fields = {} if kind == "txt" else {"prompt": "prompt", "completion": "completion"}
    store = hf.extract(make_model(tmp_path / "model"), data, tmp_path / "s.zarr", compressor=SMALL, **fields)
    entries = shown(write_report(store, tmp_path / "r", data=data, curvature=False))
    assert len(entries) == store.n
    expected = set(texts()) if kind == "txt" else {f"w{n % 9} w3" for n in range(12)}
    for entry in entries.values():
        if kind == "txt":
            assert any(entry["text"] in text for text in expected)
        else:
            assert entry["text"].split("\n\n")[0] in expected


def test_fields_are_those_extracted(tmp_path):
    rows = [{"question": f"w{n} w2", "answer": "w3"} for n in range(6)]
    data = write(tmp_path / "qa.jsonl", rows)
    store = hf.extract(
        make_model(tmp_path / "model"), data, tmp_path / "s.zarr", prompt="question", completion="answer",
        compressor=SMALL,
    )  # fmt: skip
    entries = shown(write_report(store, tmp_path / "r", data=data, curvature=False))
    assert entries[2]["text"] == "w2 w2\n\nw3"
    with pytest.raises(InputError, match=r"field .picture. .--image"):
        write_report(store, tmp_path / "r2", data=Corpus(data, image="picture"), curvature=False)


def test_a_store_from_before_there_were_spans_goes_on(tmp_path, monkeypatch):
    data, model = write(tmp_path / "data.jsonl", documents()), make_model(tmp_path / "model")
    with monkeypatch.context() as patch:
        columns = hf.Samples.columns
        patch.setattr(hf.Samples, "columns", lambda self: {
            name: values for name, values in columns(self).items() if name in ("document", "n_tokens")
        })  # fmt: skip
        before = hf.extract(model, data, tmp_path / "s.zarr", compressor=SMALL)
    again = hf.extract(model, data, tmp_path / "s.zarr", compressor=SMALL)
    assert again.layout.columns == before.layout.columns
    assert np.array_equal(again.rows(), before.rows())
    assert len(shown(write_report(again, tmp_path / "r", data=data, curvature=False))) == again.n
