"""Documents that are tokens already: which are targets, documents packed into a row, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from numpy.testing import assert_allclose, assert_array_equal
from tiny_hf import MARKS, make_model, make_tokenizer, samples, write

from ooc_influence import Dropout, hf
from ooc_influence.errors import InputError
from ooc_influence.hf import job_of
from ooc_influence.hf.pretokenised import IGNORED

pytestmark = MARKS
IDS = [5, 6, 7, 8, 9, 10, 11]


def rows_of(rows, length=16, **fields):
    return hf.Samples(hf.open_documents(rows), make_tokenizer(), hf.Fields(input_ids="ids", **fields), length)


def listed(found):
    return [(found[row]["input_ids"], found[row]["labels"]) for row in range(len(found))]


def test_tokens_are_those_of_their_text(tmp_path):
    """The rows are the same as those of the text, at any length."""
    texts = ["w1 w2 w3 w4 w5 w6 w7", "w9 w8", "w3"]
    tokens = [{"ids": make_tokenizer()(text)["input_ids"]} for text in texts]
    for length in (2, 3, 16):
        expected = samples(tmp_path, hf.Fields(text="text"), [{"text": text} for text in texts], length=length)
        found = rows_of(tokens, length)
        assert listed(found) == listed(expected)
        for name in ("document", "piece", "n_tokens", "lengths"):
            assert_array_equal(getattr(found, name), getattr(expected, name))
        assert found.without_target == 1


def test_labels_say_which_are_targets():
    labels = [5, IGNORED, 7, 8, IGNORED, 10, IGNORED]
    rows = [{"ids": IDS, "y": labels}, {"ids": IDS, "y": [IGNORED] * 7}, {"ids": [0, 0], "y": [0, 0]}]
    found = rows_of(rows, input_labels="y")
    assert listed(found)[0] == (IDS[:6], [IGNORED, IGNORED, 7, 8, IGNORED, 10])
    assert (found.n_tokens.tolist(), found.without_target) == ([3, 1], 1)
    short = rows_of(rows[:1], 3, input_labels="y")
    assert listed(short) == [([5, 6, 7], [IGNORED, IGNORED, 7]), ([7, 8, 9], [IGNORED, 8, IGNORED]),
                             ([9, 10], [IGNORED, 10])]  # fmt: skip
    assert short.n_tokens.tolist() == [1, 1, 1]


def test_padding_on_the_right_is_cut():
    found = rows_of([{"ids": [5, 6, 0, 0], "y": [5, 6, IGNORED, IGNORED]}], input_labels="y")
    assert listed(found) == [([5, 6], [IGNORED, 6])]


@pytest.mark.parametrize("length", [16, 3])
def test_packed_documents_are_rows_of_their_own(length):
    """They are those of the documents by themselves; names have the number of the piece."""
    documents = [[5, 6, 7, 8], [9, 10], [11], [12, 13, 14]]
    packed = [
        {"name": "a", "ids": [*range(5, 15)], "d": [3] * 4 + [0] * 2 + [7] + [1] * 3},
        {"name": "b", "ids": [5, 6], "d": [2, 2]},
    ]
    alone = rows_of([{"ids": each} for each in [*documents, [5, 6]]], length)
    found = rows_of(packed, length, doc_ids="d", id="name")
    assert listed(found) == listed(alone)
    assert found.columns()["doc_id"][:] == [[3, 0, 7, 1, 2][number] for number in alone.document]
    names = found.ids()[:]
    assert len(set(names)) == len(names)
    assert [name[0] for name in names] == ["a"] * (len(names) - 1) + ["b"]
    assert names[-1] == "b"
    assert found.without_target == 0


def test_padding_of_a_packed_row_is_no_document():
    row = {"ids": [5, 6, 7, 8, 0, 0], "y": [5, 6, 7, 8, IGNORED, IGNORED], "d": [0, 0, 1, 1, -1, -1]}
    found = rows_of([row], input_labels="y", doc_ids="d")
    assert listed(found) == [([5, 6], [IGNORED, 6]), ([7, 8], [IGNORED, 8])]


@pytest.mark.parametrize(
    ("row", "match"),
    [
        ({"ids": "5 6"}, "list of whole numbers in field 'ids' of document 1; received str"),
        ({"ids": [5.0, 6.0]}, "whole numbers in field 'ids' of document 1; received floats"),
        ({"ids": ["5"]}, "received a list of str"),
        ({"ids": [[5, 6], [7]]}, "received a list of list"),
        ({"ids": [True, False]}, "received booleans"),
        ({"ids": [5, 45]}, r"tokens from 0 to 44 in field 'ids' of document 1; received 45: .*--tokenizer"),
        ({"ids": [5, -1]}, "received -1"),
        ({"y": [5, 6]}, "one number a token, 3, in field 'y' of document 1; received 2"),
        ({"y": [6, 7, IGNORED]}, "at the same index or -100 in document 1; received 6 for token 0, which is 5"),
        ({"d": [1, 1]}, "one number a token, 3, in field 'd' of document 1; received 2"),
        ({"ids": [0, 5, 6], "y": [IGNORED, 5, 6]}, "without padding on the left in document 1; received 0"),
        ({"ids": None}, "null in field 'ids'"),
    ],
)
def test_what_is_refused(row, match):
    good = {"ids": [5, 6, 7], "y": [5, 6, 7], "d": [0, 0, 1]}
    with pytest.raises(InputError, match=match) as caught:
        rows_of([good, good | row], input_labels="y", doc_ids="d")
    assert "\n" not in str(caught.value)


def test_fields_that_go_with_tokens():
    with pytest.raises(InputError, match=r"input_labels \(--input-labels\) with input_ids"):
        hf.Fields(text="t", input_labels="y")
    with pytest.raises(InputError, match=r"doc_ids \(--doc-ids\) with input_ids"):
        hf.Fields(messages="t", doc_ids="y")
    for other in ({"text": "t"}, {"messages": "m"}, {"label": "l"}):
        with pytest.raises(InputError, match="or input_ids; received"):
            hf.Fields(input_ids="i", **other)


def test_rows_of_packed_documents(tmp_path):
    """Their losses and gradients are autograd's of each document by itself; the model is not asked for more."""
    loaded = hf.load(make_model(tmp_path / "model"))
    packed = {"i": [5, 6, 7, 8, 9, 10], "y": [5, 6, IGNORED, 8, 9, 10], "d": [0, 0, 0, 0, 1, 1]}
    entries = sum(p.numel() for p in loaded.model.parameters())
    store = hf.extract(loaded, write(tmp_path / "d.jsonl", [packed]), tmp_path / "s.zarr", input_ids="i",
                       input_labels="y", doc_ids="d", compressor=Dropout(k=entries), dtype="float32")  # fmt: skip
    assert store.column("doc_id").tolist() == [0, 1]
    assert store.ids().tolist() == ["0#0", "0#1"]
    for row, (ids, learned) in enumerate([([5, 6, 7, 8], [1, 3]), ([9, 10], [1])]):
        loaded.model.zero_grad()
        tokens = torch.tensor(ids)
        value = F.cross_entropy(loaded.model(tokens[None]).logits[0, [at - 1 for at in learned]], tokens[learned])
        value.backward()
        assert_allclose(store.loss[row], value.item(), rtol=1e-5)
        norm = np.sqrt(sum(float((p.grad**2).sum()) for p in loaded.model.parameters()))
        assert_allclose(store.grad_norm[row], norm, rtol=1e-4)
    assert_array_equal(job_of(store, loaded).samples.n_tokens, [2, 1])


def test_tokens_that_were_changed_meanwhile_are_noticed(tmp_path):
    found = samples(tmp_path, hf.Fields(input_ids="ids"), [{"ids": [5, 6, 7]}, {"ids": [7, 8, 9]}])
    write(tmp_path / "data.jsonl", [{"ids": [5, 6, 7]}, {"ids": [7, 8, 8]}])
    assert found[0]["input_ids"] == [5, 6, 7]
    with pytest.raises(InputError, match=r"document 1 of .* to be as it was"):
        found[1]
