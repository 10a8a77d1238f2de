"""Sequence classifiers: a row's loss is the model's own of that text alone, and labels mean what their names say."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from tiny_hf import MARKS, datasets, transformers, words_tokenizer

from ooc_influence import Dropout, hf
from ooc_influence.errors import InputError
from ooc_influence.hf.extraction import prepare

pytestmark = MARKS
WORDS = [f"w{n}" for n in range(30)]
SIZES = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
         "intermediate_size": 24, "max_position_embeddings": 40}  # fmt: skip
GPT2 = {"vocab_size": 40, "n_positions": 40, "n_embd": 16, "n_layer": 1, "n_head": 2, "bos_token_id": 1,
        "eos_token_id": 2}  # fmt: skip
KINDS = {
    "bert": ("Bert", SIZES | {"pad_token_id": 0}),
    "bert-pad-7": ("Bert", SIZES | {"pad_token_id": 7}),
    "roberta": ("Roberta", SIZES | {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}),
    "distilbert": ("DistilBert", {"vocab_size": 40, "dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 24}),
    "gpt2": ("GPT2", GPT2 | {"pad_token_id": 2}),
    "gpt2-no-pad": ("GPT2", GPT2 | {"pad_token_id": None}),
    "llama": ("Llama", SIZES | {"pad_token_id": 3, "num_key_value_heads": 1}),
    "llama-no-pad": ("Llama", SIZES | {"pad_token_id": None}),
    "llama-pad-beyond": ("Llama", SIZES | {"pad_token_id": -1}),
    "xlnet": ("XLNet", {"vocab_size": 40, "d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 24}),
    "bart": ("Bart", {"vocab_size": 40, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1,
                      "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 24,
                      "decoder_ffn_dim": 24, "max_position_embeddings": 40, "pad_token_id": 1, "eos_token_id": 2}),
}  # fmt: skip


def make_tokenizer(*, special=True, side="right", length=20):
    """Words are tokens 10 and up; texts become <s> ... </s>, unless without special tokens."""
    vocabulary = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3} | {word: at + 10 for at, word in enumerate(WORDS)}
    return words_tokenizer(
        vocabulary, ends=special, bos_token="<s>", pad_token="<pad>", eos_token="</s>", unk_token="<unk>",
        truncation_side=side, model_max_length=length,
    )  # fmt: skip


def make(kind="bert", *, classes=3, **options):
    name, sizes = KINDS[kind]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**sizes, num_labels=classes, **options)
    model = getattr(transformers, f"{name}ForSequenceClassification")(config).eval()
    for parameter in model.parameters():  # far enough from zero for losses to differ
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def texts(n=9):
    generator = np.random.default_rng(0)
    return [" ".join(generator.choice(WORDS, size)) for size in generator.integers(2, 15, n)]


def job(model, labels, rows=None, tokenizer=None, **options):
    rows = texts(len(labels)) if rows is None else rows
    data = labels if isinstance(labels, datasets.Dataset) else datasets.Dataset.from_dict({"text": rows, "y": labels})
    loaded = hf.Loaded(model, tokenizer or make_tokenizer(), "classification")
    return prepare(loaded, data, text="text", label="y", **options)


def parts(made):
    return made.batches.cut(np.arange(len(made.samples)))


def losses(made):
    found = np.full(len(made.samples), np.nan)
    with torch.no_grad():
        for part in parts(made):
            found[part] = made.per_sample_loss(made.model, made.batches.load(part)).numpy()
    return found


def alone(model, tokenizer, rows, labels):
    """The oracle: transformers' own loss of one text at a time, nothing padded."""
    kept = dict(model.config.__dict__)
    with torch.no_grad():
        found = [
            model(**{name: value for name, value in tokenizer(text, return_tensors="pt", truncation=True).items()
                     if name != "token_type_ids"}, labels=torch.tensor([label])).loss.item()
            for text, label in zip(rows, labels, strict=True)
        ]  # fmt: skip
    model.config.__dict__.update(kept)  # it writes problem_type there
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_losses_are_those_of_each_text_alone(kind):
    model, labels = make(kind), [0, 1, 2] * 3
    before = model.config.to_dict()
    made = job(model, labels, tokens=64)
    assert len(parts(made)) < 9
    assert_allclose(losses(made), alone(model, make_tokenizer(), texts(), labels), rtol=2e-5)
    assert model.config.to_dict() == before
    assert made.loss_kind == "cross_entropy"


@pytest.mark.parametrize("kind", ["gpt2-no-pad", "bert"])
def test_rows_do_not_depend_on_the_batch(tmp_path, kind):
    model, labels = make(kind), [0, 1, 2] * 3
    stores = [
        hf.extract(hf.Loaded(model, make_tokenizer(), "classification"),
                   datasets.Dataset.from_dict({"text": texts(), "y": labels}), tmp_path / f"{size}.zarr", label="y",
                   text="text", batch_size=size, compressor=Dropout(k=200), dtype="float32")
        for size in (1, 4)
    ]  # fmt: skip
    assert_allclose(stores[0].rows(), stores[1].rows(), atol=1e-5 * np.abs(stores[0].rows()).max())


def test_a_text_that_ends_with_what_the_tokenizer_pads_with():
    """A model that knows no padding token reads its last token, whichever that is."""
    model, rows = make("gpt2-no-pad"), ["w1 w2 <pad>", "w3 w4 w5 w6 </s>", "w3 w4 w5 w6 w7 w8 <unk>", "w1"]
    words = make_tokenizer(special=False)
    assert_allclose(losses(job(model, [0, 1, 2, 0], rows, words)), alone(model, words, rows, [0, 1, 2, 0]), rtol=2e-5)


def test_padding_that_changes_the_result_is_refused():
    """FNet mixes padding into a text; one text at a time it is right."""
    torch.manual_seed(0)
    config = transformers.FNetConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=1, intermediate_size=24, max_position_embeddings=40,
        num_labels=3, pad_token_id=3,
    )  # fmt: skip
    model = transformers.FNetForSequenceClassification(config).train()
    with pytest.raises(InputError, match=r"do not change with padding; received .* --batch-size 1"):
        job(model, [0, 1, 2])
    assert model.training
    assert all(module.training for module in model.modules())
    same = job(model.eval(), [0, 1], ["w1 w2", "w3 w4"])  # of one length: nothing to pad
    apart = [losses(job(model, [label], [row]))[0] for label, row in ((0, "w1 w2"), (1, "w3 w4"))]
    assert_allclose(losses(same), apart, rtol=1e-5)
    one = job(model, [0, 1, 2], batch_size=1)
    with torch.no_grad():
        expected = []
        for text, label in zip(texts(3), range(3), strict=True):
            ids = torch.tensor([make_tokenizer()(text)["input_ids"]])
            expected.append(model(input_ids=ids, labels=torch.tensor([label])).loss.item())
    assert_allclose(losses(one), expected, rtol=2e-5)


@pytest.mark.parametrize("kind", ["bert", "roberta", "llama", "gpt2"])
def test_an_empty_text(kind):
    """A row of special tokens, alone or beside others; without special tokens refused by its number."""
    model, rows = make(kind), ["w1 w2 w3", "", "w4"]
    expected = alone(model, make_tokenizer(), rows, [0, 1, 2])
    assert_allclose(losses(job(model, [0, 1, 2], rows)), expected, rtol=2e-5)
    assert_allclose(losses(job(model, [1], [""])), expected[1:2], rtol=2e-5)
    for rows in (["w1", "w2", ""], ["w1", "w2", " "]):
        with pytest.raises(InputError, match=r"a text to classify in document 2; received one .* no token"):
            job(model, [0, 1, 2], rows, make_tokenizer(special=False))


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("length", [3, 6])
def test_the_tokenizer_cuts(side, length, caplog):
    model, words = make("roberta"), make_tokenizer(side=side)
    rows = ["w1 w2 w3 w4 w5 w6 w7 w8 w9", "w1", "w5 w4 w3 w2 w1 w1"]
    made = job(model, [0, 1, 2], rows, words, max_length=length)
    with torch.no_grad():
        expected = [
            model(input_ids=torch.tensor([words(text, truncation=True, max_length=length)["input_ids"]]),
                  labels=torch.tensor([label])).loss.item()
            for label, text in enumerate(rows)
        ]  # fmt: skip
    model.config.problem_type = None
    assert_allclose(losses(made), expected, rtol=2e-5)
    assert made.samples[0]["input_ids"][-1] == 2
    assert made.samples.truncated == 2
    assert f"2 texts are cut to {length} tokens" in caplog.text
    kept = length - 2
    spans = list(zip(made.samples.char_start, made.samples.char_stop, strict=True))
    text = rows[0]
    want = (0, 3 * kept - 1) if side == "right" else (len(text) - 3 * kept + 1, len(text))
    assert spans[:2] == [want, (0, 2)]


def test_a_context_without_room_for_a_word():
    with pytest.raises(InputError, match="max_length > 2, the special tokens"):
        job(make("roberta"), [0], ["w1"], max_length=2)


def named(names, **options):
    return make("bert", classes=len(names), id2label=dict(enumerate(names)),
                label2id={name: at for at, name in enumerate(names)}, **options)  # fmt: skip


def classes(model, labels):
    made = job(model, labels)
    return [made.samples[row]["label"] for row in range(len(made.samples))]


def class_labels(names, numbers):
    features = datasets.Features({"text": datasets.Value("string"), "y": datasets.ClassLabel(names=names)})
    return datasets.Dataset.from_dict({"text": texts(len(numbers)), "y": numbers}, features=features)


def test_labels_of_one_class():
    for names, labels, expected in [
        (["NEG", "POS"], ["POS", "NEG", "pos ", "Neg"], [1, 0, 1, 0]),
        (["NEG", "POS"], [1, 0], [1, 0]),
        (["NEG", "POS"], ["1", "0"], [1, 0]),
        (["NEG", "POS"], ["1.0", "0.0"], [1, 0]),
        (["NEG", "POS"], [1.0, 0.0], [1, 0]),
        (["NEG", "POS"], [True, False], [1, 0]),
        (["NEG", "POS"], ["True", "false"], [1, 0]),
        (["true", "false"], [True, False], [0, 1]),
        (["LABEL_0", "LABEL_1", "LABEL_2"], ["LABEL_2", "1"], [2, 1]),
        (["1", "2", "3"], ["1", "3"], [0, 2]),  # text is a name first
        (["A", "a"], ["a", "A"], [1, 0]),
        (["NEG", "POS"], class_labels(["POS", "NEG"], [0, 1, 0]), [1, 0, 1]),
        (["NEG", "POS"], class_labels(["0", "1"], [0, 1]), [0, 1]),
        (["LABEL_0", "LABEL_1"], class_labels(["POS", "NEG"], [0, 1]), [0, 1]),
    ]:
        found = classes(named(names), labels)
        assert found == expected
        assert all(type(label) is int for label in found)


def test_labels_that_are_none_of_the_models():
    for names, labels, message in [
        (["NEG", "POS"], [0, 1, -1], r"'y' of document 2; received -1: leave documents without"),
        (["NEG", "POS"], [0, -100], r"2 labels \(NEG, POS\) in field 'y' of document 1; received -100"),
        (["NEG", "POS"], [2, 0], r"document 0; received 2: give the model that has this class"),
        (["NEG", "POS"], ["POS", "2"], r"document 1; received '2'"),
        (["NEG", "POS"], ["POS", "good"], r"document 1; received 'good': rename"),
        (["NEG", "POS"], [0.0, 0.5], r"document 1; received 0.5"),
        (["NEG", "POS"], [1, None], r"document 1; received None: leave the document out"),
        (["NEG", "POS"], [1.0, float("nan")], r"document 1; received"),
        (["NEG", "POS"], ["POS", ""], r"document 1; received ''"),
        (["a", "b", "c"], [True], r"document 0; received True"),
        (["1", "2"], [1], r"document 0; received 1: the model calls class 0 '1': write names as text"),
        (["A", "a", "b"], ["B", "Á"], r"document 1; received 'Á'"),
        (["NEG", "POS"], class_labels(["POS", "NEG", "MIXED"], [0, 2]), r"document 1; received 'MIXED', its number 2"),
        (["NEG", "POS"], class_labels(["POS", "NEG"], [0, -1]), r"document 1; received -1"),
    ]:
        with pytest.raises(InputError, match=message):
            job(named(names), labels)


def test_labels_are_checked_before_anything_runs():
    """The last of many is refused without a single forward pass."""
    model = named(["NEG", "POS"])
    model.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    with pytest.raises(InputError, match="document 4999"):
        job(model, [0, 1] * 2499 + [0, 5], ["w1"] * 5000)


def test_names_that_contradict_each_other():
    model = named(["NEG", "POS"])
    model.config.label2id = {"POS": 0, "NEG": 1}
    with pytest.raises(InputError, match=r"id2label and label2id .* to agree"):
        job(model, [0, 1])


@pytest.mark.parametrize("kind", ["bert", "gpt2-no-pad"])
@pytest.mark.parametrize(
    ("labels", "marks"),
    [
        ([["a", "c"], [], ["b"]], [[1, 0, 1], [0, 0, 0], [0, 1, 0]]),
        ([[0, 2], [], [1]], [[1, 0, 1], [0, 0, 0], [0, 1, 0]]),
        ([[1, 0, 1], [0, 0, 0], [0, 1, 0]], [[1, 0, 1], [0, 0, 0], [0, 1, 0]]),
        ([[0, 1, 2], [1, 2], [2, 0]], [[1, 1, 1], [0, 1, 1], [1, 0, 1]]),
        ([[1.0, 0.0, 1.0], [0.0, 0.3, 0.0], [0.0, 1.0, 0.0]], [[1, 0, 1], [0, 0.3, 0], [0, 1, 0]]),
        ([[True, False, True], [False] * 3, [True] * 3], [[1, 0, 1], [0, 0, 0], [1, 1, 1]]),
    ],
)  # fmt: skip
def test_several_classes(kind, labels, marks):
    """Binary cross-entropies, their mean over a text's classes, as transformers has it."""
    names = {"id2label": {0: "a", 1: "b", 2: "c"}, "label2id": {"a": 0, "b": 1, "c": 2}}
    expected = alone(make(kind, problem_type="multi_label_classification"), make_tokenizer(), texts(3),
                     [[float(mark) for mark in row] for row in marks])  # fmt: skip
    for options in ({"problem_type": "multi_label_classification"}, {}):
        made = job(make(kind, **names, **options), labels)
        assert made.loss_kind == "binary_cross_entropy"
        assert_allclose(losses(made), expected, rtol=2e-5)


def test_several_classes_by_class_label():
    features = datasets.Features(
        {"text": datasets.Value("string"), "y": datasets.Sequence(datasets.ClassLabel(names=["POS", "NEG"]))}
    )
    data = datasets.Dataset.from_dict({"text": texts(3), "y": [[0], [1], [0, 1]]}, features=features)
    made = job(named(["NEG", "POS"], problem_type="multi_label_classification"), data)
    assert [made.samples[row]["label"] for row in range(3)] == [[0, 1], [1, 0], [1, 1]]


def test_lists_that_are_no_classes():
    for labels, message in [
        ([[0, 1], [1, 0]], "document 0; received .*look alike"),
        ([0, 1], "document 0; received 0: this model gives several labels"),
        (["a", "b"], "document 0; received 'a': this model gives several"),
        ([[0], None], "document 1; received None"),
        ([[0], [2]], "document 1; received .2.: give the model that has this class"),
        ([[1, 1], [0]], "document 1; received .0.: list distinct classes"),
        ([["a"], ["c"]], "document 1; received .'c'.: rename"),
        ([[0.5, 1.5]], "document 0"),
    ]:
        with pytest.raises(InputError, match=message):
            job(named(["a", "b"], problem_type="multi_label_classification"), labels)


@pytest.mark.parametrize("kind", ["bert", "llama"])
@pytest.mark.parametrize("labels", [[0.5, -2.0, 3.25], [1, 0, 7], ["0.5", "-2", "1e1"], [True, False, True]])
def test_regression(kind, labels):
    model = make(kind, classes=1)
    made = job(model, labels)
    assert made.loss_kind == "mean_squared_error"
    assert_allclose(losses(made), alone(model, make_tokenizer(), texts(3), [float(own) for own in labels]), rtol=2e-5)


def test_regression_of_several_numbers():
    model, labels = make(classes=2, problem_type="regression"), [[0.5, 1.0], [-1.0, 2.0], [0.0, 0.0]]
    made = job(model, labels)
    assert made.loss_kind == "mean_squared_error"
    assert_allclose(losses(made), alone(model, make_tokenizer(), texts(3), labels), rtol=2e-5)
    with pytest.raises(InputError, match=r"2 numbers in field 'y' of document 1; received .*: .* list them"):
        job(model, [[0.5, 1.0], [1.0]])


@pytest.mark.parametrize("labels", [[1.0, None], [1.0, float("inf")], ["1", "x"], class_labels(["a", "b"], [0, 1])])
def test_labels_that_are_no_numbers(labels):
    with pytest.raises(InputError, match=r"a number in field 'y' of document [01]; received"):
        job(make(classes=1), labels)


def test_a_classifier_of_one_class():
    model = make(classes=1)
    model.config.problem_type = "single_label_classification"
    with pytest.raises(InputError, match="at least two classes"):
        job(model, [0, 0])


def test_the_store_records_which_loss(tmp_path):
    model = make(problem_type="multi_label_classification")
    data = datasets.Dataset.from_dict({"text": texts(3), "y": [[0], [1, 2], []]})
    loaded = hf.Loaded(model, make_tokenizer(), "classification")
    store = hf.extract(loaded, data, tmp_path / "s.zarr", text="text", label="y", compressor=Dropout(k=100))
    assert store.attrs["loss_kind"] == "binary_cross_entropy"
    expected = alone(model, make_tokenizer(), texts(3), [[1.0, 0.0, 0.0], [0.0, 1.0, 1.0], [0.0, 0.0, 0.0]])
    assert_allclose(store.loss[:], expected, rtol=1e-4)


def test_a_label_from_a_file(tmp_path):
    folder = tmp_path / "model"
    named(["NEG", "POS"]).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    rows = [{"text": text, "y": name} for text, name in zip(texts(4), ["POS", "neg", "1", "0"], strict=True)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = prepare(str(folder), tmp_path / "d.jsonl", text="text", label="y")
    assert [made.samples[row]["label"] for row in range(4)] == [1, 0, 1, 0]


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("d.csv", "text,y\nw1 w2,POS\nw3,neg\nw4,1\nw5 w6,0.0\n", [1, 0, 1, 0]),
        ("d.jsonl", '{"text": "w1", "y": "POS"}\n{"text": null, "y": 7}\n{"text": "w2", "y": true}\n', [1, 1]),
    ],
)
def test_labels_of_files(tmp_path, name, text, expected):
    """What the file says; documents that are left out need no label."""
    (tmp_path / name).write_text(text)
    loaded = hf.Loaded(named(["NEG", "POS"]), make_tokenizer(), "classification")
    made = prepare(loaded, tmp_path / name, text="text", label="y", on_missing="skip")
    assert [made.samples[row]["label"] for row in range(len(made.samples))] == expected


def test_lists_of_labels_in_a_file(tmp_path):
    """They say that a model without problem_type gives several classes."""
    (tmp_path / "d.jsonl").write_text('{"text": "w1", "y": ["NEG", "POS"]}\n{"text": "w2", "y": []}\n')
    loaded = hf.Loaded(named(["NEG", "POS"]), make_tokenizer(), "classification")
    made = prepare(loaded, tmp_path / "d.jsonl", text="text", label="y")
    assert made.loss_kind == "binary_cross_entropy"
    assert [made.samples[row]["label"] for row in range(2)] == [[1.0, 1.0], [0.0, 0.0]]


@pytest.mark.parametrize(
    ("options", "label", "typed"),
    [
        ({}, ["POS"], [("POS", 1), ("neg", 0), ("1", 1)]),
        ({"problem_type": "multi_label_classification"}, [["POS"]], [("POS", [0.0, 1.0]), ("neg, POS", [1.0, 1.0])]),
    ],
)
def test_typed_queries(tmp_path, options, label, typed):
    """What is typed as a label means what it means in a file; several are separated by commas."""
    from ooc_influence.report.live_query import HuggingFaceModel

    model = named(["NEG", "POS"], **options)
    model.save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    data = datasets.Dataset.from_dict({"text": ["w1 w2"], "y": label})
    train = hf.extract(tmp_path / "model", data, tmp_path / "t.zarr", text="text", label="y", compressor=Dropout(k=50))
    asked = HuggingFaceModel(tmp_path / "model")
    asked.check(train)
    for number, (text, meant) in enumerate(typed):
        store = asked.extract({"text": "w3 w4 w5", "label": text}, train, tmp_path / f"{number}.zarr")
        expected = alone(model, make_tokenizer(), ["w3 w4 w5"], [meant])
        assert_allclose(store.loss[:], expected, rtol=1e-4)
    with pytest.raises(InputError, match=r"field 'label' of document 0; received .*bad"):
        asked.extract({"text": "w1", "label": "bad"}, train, tmp_path / "x.zarr")
