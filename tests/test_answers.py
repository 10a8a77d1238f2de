"""Answers as servers write them: of the record's prompt or messages, the first answer is what is learned."""

from __future__ import annotations

import logging

import numpy as np
import pytest
from tiny_hf import MARKS, SMALL, make_model, make_tokenizer, samples, write

from ooc_influence import hf
from ooc_influence.corpus import first_answer, text_of
from ooc_influence.errors import InputError
from ooc_influence.hf.pretokenised import IGNORED
from ooc_influence.report.examples import Corpus, Examples, ImageFolder

pytestmark = MARKS
ASK = [{"role": "user", "content": "w1 w2"}]
REPLY = {"role": "assistant", "content": "w3"}
CHAT = {"messages": ASK, "choices": [{"index": 0, "message": {**REPLY, "refusal": None}, "finish_reason": "stop"}]}
TEXT = {"prompt": "w1 w2", "choices": [{"text": "w3", "finish_reason": "stop"}, {"text": "w9"}]}
VLLM = {"prompt": "w1 w2", "outputs": [{"index": 0, "text": "w3", "token_ids": [8], "finish_reason": "stop"}]}
PLAIN = {"q": "w1 w2", "a": "w3"}, {"prompt": "q", "completion": "a"}
FORMS = [
    (CHAT, {"messages": "messages", "completion": "choices"}, {"messages": [*ASK, REPLY]}, {"messages": "messages"}),
    (
        TEXT,
        {"prompt": "prompt", "completion": "choices"},
        {"q": "w1 w2", "a": "w3"},
        {"prompt": "q", "completion": "a"},
    ),
    (
        VLLM,
        {"prompt": "prompt", "completion": "outputs"},
        {"q": "w1 w2", "a": "w3"},
        {"prompt": "q", "completion": "a"},
    ),
]


@pytest.mark.parametrize(("record", "form", "plain", "fields"), FORMS)
def test_they_are_learned_as_if_written_out(tmp_path, record, form, plain, fields):
    found, expected = (
        samples(tmp_path / name, hf.Fields(**named), [row], template=True)
        for name, named, row in (("a", form, record), ("b", fields, plain))
        if (tmp_path / name).mkdir() is None
    )
    assert {name: found[0][name] for name in ("input_ids", "labels")} == {
        name: expected[0][name] for name in ("input_ids", "labels")
    }
    assert text_of(record, form) == text_of(plain, fields)
    assert found.text_digest.tolist() == expected.text_digest.tolist()


@pytest.mark.parametrize(("record", "form", "plain", "fields"), FORMS)
def test_they_are_recognised_and_shown(tmp_path, record, form, plain, fields, caplog):
    caplog.set_level(logging.INFO, "ooc_influence")
    loaded = hf.load(make_model(tmp_path / "model", template=True))
    data = write(tmp_path / "d.jsonl", [record])
    store = hf.extract(loaded, data, tmp_path / "s.zarr", compressor=SMALL)
    assert store.attrs["origin"]["fields"] == form
    assert any("fields of" in each.getMessage() for each in caplog.records)
    assert hf.job_of(store, loaded).samples.n_tokens.tolist() == [2]
    rows = np.arange(store.n)
    shown = Examples(store, Corpus(data), rows, ImageFolder(tmp_path, "x")).describe(rows)
    assert shown[0]["text"] == text_of(plain, fields)


@pytest.mark.parametrize(
    ("record", "fields"),
    [
        (TEXT | {"completion": "w2"}, {"prompt": "prompt", "completion": "completion"}),
        ({"text": "w1 w2", "prompt": "w1", "outputs": [{"text": "w3"}]}, {"text": "text"}),
        ({"messages": [*ASK, REPLY]}, {"messages": "messages"}),
    ],
)
def test_what_is_written_out_comes_first(tmp_path, record, fields):
    loaded = hf.load(make_model(tmp_path / "model", template=True))
    assert hf.prepare(loaded, [record]).samples.fields.all == fields


def test_an_answer_that_was_cut_has_no_end(tmp_path):
    cut = TEXT | {"choices": [{"text": "w3 w4", "finish_reason": "length"}]}
    found = samples(tmp_path, hf.Fields(prompt="prompt", completion="choices"), [cut])
    words = make_tokenizer()
    assert found[0]["input_ids"] == words("w1 w2 w3 w4")["input_ids"]
    assert found[0]["labels"] == [IGNORED] * 2 + words("w3 w4")["input_ids"]


def test_calls_of_tools_are_kept(tmp_path):
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "w7"}}]}
    words = make_tokenizer(template=True)
    words.chat_template = words.chat_template.replace("m.content", "m.content or m.tool_calls[0].function.name")
    data = hf.open_documents([{"messages": ASK, "choices": [{"message": call}]}])
    found = hf.Samples(data, words, hf.Fields(messages="messages", completion="choices"), 16)
    assert found[0]["input_ids"] == words("user: w1 w2 <eos> bot: w7 <eos>")["input_ids"]
    assert found.n_tokens.tolist() == [2]


@pytest.mark.parametrize(
    ("record", "match"),
    [
        (CHAT | {"choices": []}, r"no answer in field 'choices': .*skip"),
        (CHAT | {"choices": [{"message": {"role": "assistant", "content": None}}]}, "no answer in field 'choices'"),
        (CHAT | {"choices": None}, "null in field 'choices'"),
        (CHAT | {"choices": [{"delta": {}}]}, "text in field 'choices' of document 0; received list"),
        (CHAT | {"choices": 7}, "received int"),
        (CHAT | {"messages": "w1"}, "list of messages in document 0; received str"),
    ],
)
def test_what_is_no_answer_is_refused(tmp_path, record, match):
    with pytest.raises(InputError, match=match):
        samples(tmp_path, hf.Fields(messages="messages", completion="choices"), [record], template=True)


def test_other_values_are_no_answers():
    for value in ("text", None, 3, ["a"], {"text": "a"}):
        assert first_answer(value) == value
