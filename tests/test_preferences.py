"""Preferences and rollouts: losses and gradients are those of the formulas, computed from single sequences."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from numpy.testing import assert_allclose
from tiny_hf import MARKS, make_model, make_tokenizer, samples, write

from ooc_influence import Dropout, hf
from ooc_influence.errors import InputError
from ooc_influence.hf import job_of
from ooc_influence.hf.pretokenised import IGNORED

pytestmark = MARKS
PAIRS = [
    {"q": "w1 w2", "c": "w3 w4 w5", "r": "w6"},
    {"q": "w7", "c": "w8", "r": "w9 w10 w11 w12"},
    {"q": "w1 w2 w3", "c": "w13", "r": "w14"},
]
TEXTS = {"prompt": "q", "chosen": "c", "rejected": "r"}


def log_probability(model, prompt, completion):
    """The sum over the completion's tokens and the end, of one sequence alone."""
    words = make_tokenizer()
    before = len(words(prompt)["input_ids"])
    ids = torch.tensor(words(f"{prompt} {completion} <eos>")["input_ids"])
    scores = model(ids[None]).logits[0, :-1].log_softmax(1)
    return scores[torch.arange(before - 1, len(ids) - 1), ids[before:]].sum()


def margin(model, pair):
    return log_probability(model, pair["q"], pair["c"]) - log_probability(model, pair["q"], pair["r"])


def gradient_of(model, value):
    parameters = [each for each in model.parameters() if each.requires_grad]
    return torch.cat([each.flatten() for each in torch.autograd.grad(value, parameters)]).double().numpy()


def everything(model):
    return Dropout(k=sum(each.numel() for each in model.parameters() if each.requires_grad))


def extract(model, rows, tmp_path, **options):
    settings = {"compressor": everything(model.model), "dtype": "float32"} | options
    return hf.extract(model, write(tmp_path / "pairs.jsonl", rows), tmp_path / "s.zarr", **settings)


def check_rows(store, model, values):
    """Losses, and the products of all rows' gradients, which do not depend on the order of entries."""
    assert_allclose(store.loss, [value.item() for value in values], rtol=1e-5, atol=1e-6)
    expected = np.stack([gradient_of(model, value) for value in values])
    found = store.rows().astype(np.float64)
    assert_allclose(found @ found.T, expected @ expected.T, rtol=1e-4, atol=1e-6 * np.square(expected).sum(1).max())


def adapted(tmp_path):
    """A small model with a LoRA adapter that is not at its beginning."""
    import peft

    loaded = hf.load(make_model(tmp_path / "model"))
    config = peft.LoraConfig(r=2, target_modules=["c_attn", "c_fc"], task_type="CAUSAL_LM", fan_in_fan_out=True)
    model = peft.get_peft_model(loaded.model, config)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return loaded._replace(model=model.eval())


@pytest.mark.parametrize("options", [{}, {"batch_size": 1}, {"tokens": 24}])
def test_plain_log_odds(tmp_path, options):
    loaded = hf.load(make_model(tmp_path / "model"))
    store = extract(loaded, PAIRS, tmp_path, **TEXTS, preference="log-odds", beta=0.7, **options)
    assert store.attrs["loss_kind"] == "preference_log_odds_0.7"
    assert store.column("n_tokens").tolist() == [6, 7, 4]
    values = [-F.logsigmoid(0.7 * margin(loaded.model, pair)) for pair in PAIRS]
    check_rows(store, loaded.model, values)
    assert store.attrs["verification"]["checked"] is not False


@pytest.mark.filterwarnings("ignore:.*fan_in_fan_out")
@pytest.mark.parametrize("options", [{}, {"batch_size": 1}])
def test_dpo_of_an_adapter(tmp_path, options):
    """The reference is the model without it, whose parameters are as they were afterwards."""
    loaded = adapted(tmp_path)
    before = [parameter.requires_grad for parameter in loaded.model.parameters()]
    store = extract(loaded, PAIRS, tmp_path, **TEXTS, **options)
    assert [parameter.requires_grad for parameter in loaded.model.parameters()] == before
    assert store.attrs["loss_kind"] == "preference_dpo_0.1"
    with torch.no_grad(), loaded.model.disable_adapter():
        reference = [margin(loaded.model, pair) for pair in PAIRS]
    for name, parameter in loaded.model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    values = [
        -F.logsigmoid(0.1 * (margin(loaded.model, pair) - known)) for pair, known in zip(PAIRS, reference, strict=True)
    ]
    assert max(abs(value.item() - math.log(2)) for value in values) > 1e-3
    check_rows(store, loaded.model, values)


def test_dpo_with_a_reference(tmp_path):
    loaded = hf.load(make_model(tmp_path / "reference"))
    for parameter in loaded.model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3))
    loaded.model.save_pretrained(tmp_path / "model")
    loaded.tokenizer.save_pretrained(tmp_path / "model")
    reference = hf.load(tmp_path / "reference").model
    for file in (tmp_path / "reference").glob("token*"):  # it takes the model's tokens
        file.unlink()
    store = extract(loaded, PAIRS, tmp_path, **TEXTS, beta=0.5, reference=tmp_path / "reference")
    with torch.no_grad():
        known = [margin(reference, pair) for pair in PAIRS]
    values = [-F.logsigmoid(0.5 * (margin(loaded.model, pair) - each)) for pair, each in zip(PAIRS, known, strict=True)]
    check_rows(store, loaded.model, values)
    job = job_of(store, loaded)  # by what the store recorded
    batch = job.batches.load(np.arange(3))
    assert batch["input_ids"].shape == (3, 2, 6)
    assert_allclose(job.per_sample_loss(loaded.model, batch).detach(), store.loss, rtol=1e-5)
    with pytest.raises(InputError, match=r"language model as the reference; received .*bert, for classification"):
        extract(loaded, PAIRS, tmp_path, **TEXTS, reference=make_model(tmp_path / "bert", "bert"))
    with pytest.raises(InputError, match=r"expected a reference for DPO's loss .* \(--reference\)"):
        extract(loaded, PAIRS, tmp_path, **TEXTS)


def test_a_reference_of_fewer_tokens_is_refused(tmp_path):
    loaded = hf.load(make_model(tmp_path / "model"))
    small = hf.load(make_model(tmp_path / "small")).model
    small.resize_token_embeddings(40)
    small.save_pretrained(tmp_path / "small")
    with pytest.raises(InputError, match=r"vocabulary of 45 tokens; received .*small with 40"):
        extract(loaded, PAIRS, tmp_path, **TEXTS, reference=tmp_path / "small")


def test_in_float64(tmp_path):
    """The loss function itself, against the formula, far from zero too."""
    loaded = hf.load(make_model(tmp_path / "model"))
    model = loaded.model.double()
    found = samples(tmp_path, hf.Fields(**TEXTS), PAIRS)
    batch = hf.PairCollator(0)([found[row] for row in range(3)])
    for beta in (0.1, 30.0):
        losses = hf.PreferenceLoss(beta)(model, batch)
        assert losses.dtype == torch.float64
        expected = torch.stack([-F.logsigmoid(beta * margin(model, pair)) for pair in PAIRS])
        assert_allclose(losses.detach(), expected.detach(), rtol=1e-12, atol=1e-12)
    for beta in (0, -1, float("nan")):
        with pytest.raises(InputError, match="beta > 0"):
            hf.PreferenceLoss(beta)


def test_chats_are_compared_by_their_replies(tmp_path):
    ask, good, bad = ({"role": role, "content": text} for role, text in
                      (("user", "w1 w2"), ("assistant", "w3"), ("assistant", "w4 w5")))  # fmt: skip
    for rows, fields in (
        ([{"c": [ask, good], "r": [ask, bad]}], {}),
        ([{"q": [ask], "c": [good], "r": [bad]}], {"prompt": "q"}),
        ([{"q": "w1 w2", "c": "w3", "r": "w4 w5"}], {"prompt": "q", "chat": True}),
    ):
        found = samples(tmp_path, hf.Fields(chosen="c", rejected="r", **fields), rows, template=True)
        words = make_tokenizer()
        ids = [words(f"user: w1 w2 <eos> bot: {reply} <eos>")["input_ids"] for reply in ("w3", "w4 w5")]
        assert found[0]["input_ids"] == ids
        assert found[0]["labels"] == [[IGNORED] * 5 + each[5:] for each in ids]
        assert (found.n_tokens.tolist(), found.lengths.tolist()) == ([5], [16])


def test_chats_that_differ_earlier(tmp_path):
    def chat(*texts):
        return [{"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(texts)]

    rows = [{"c": chat("w1", "w2", "w3", "w4"), "r": chat("w1", "w5", "w3", "w6")}]
    with pytest.raises(InputError, match=r"differ in the last reply in document 0; .*\(--turns all\)"):
        samples(tmp_path, hf.Fields(chosen="c", rejected="r"), rows, template=True)
    found = samples(tmp_path, hf.Fields(chosen="c", rejected="r", turns="all"), rows, template=True)
    assert found.n_tokens.tolist() == [8]


@pytest.mark.parametrize(
    ("row", "fields", "match"),
    [
        ({"c": "w1"}, {}, r"texts with a prompt \(--prompt\), or lists of messages, in document 1; received c str"),
        ({"q": "w1", "c": [{"role": "assistant", "content": "w1"}]}, {"prompt": "q"}, "c list, r str, q str"),
        ({"r": None}, {"prompt": "q"}, "null in field 'r'"),
        ({"c": 7}, {"prompt": "q"}, "received c int, r str, q str"),
        ({"c": "w1 " * 20}, {"prompt": "q"}, "at most 16 tokens; received 23 in document 1"),
    ],
)
def test_pairs_that_are_refused(tmp_path, row, fields, match):
    reply = {name: [{"role": "assistant", "content": "w1"}] for name in "cr"}
    rows, named = [PAIRS[0] | ({} if fields else reply), PAIRS[0] | row], hf.Fields(chosen="c", rejected="r", **fields)
    with pytest.raises(InputError, match=match) as caught:
        samples(tmp_path, named, rows, template=True)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"chosen": "c"}, "chosen and rejected, or input_ids; received chosen='c'"),
        ({"chosen": "c", "rejected": "r", "completion": "d"}, "received completion='d', chosen='c', rejected='r'"),
        ({"chosen": "c", "rejected": "r", "advantage": "a"}, "received it with chosen and rejected"),
        ({"text": "c", "label": "r", "advantage": "a"}, "received it with label"),
    ],
)
def test_fields_that_do_not_go_together(fields, match):
    with pytest.raises(InputError, match=match):
        hf.Fields(**fields)


def test_options_that_do_not_go_together(tmp_path):
    loaded = hf.load(make_model(tmp_path / "model"))
    for options, match in (
        ({"preference": "log-odds"}, r"preference \(--preference\) with chosen and rejected"),
        ({"beta": 0.2}, r"beta \(--beta\) with"),
        ({"reference": "x"}, r"reference \(--reference\) with"),
        (TEXTS | {"preference": "other"}, "'dpo' or 'log-odds'"),
        (TEXTS | {"preference": "log-odds", "reference": "x"}, "received log-odds, which has none"),
        (TEXTS | {"preference": "log-odds", "labels": "sampled"}, "labels='dataset'"),
        ({"advantage": "a", "labels": "sampled"}, "labels='dataset'"),
    ):
        asked = {"text": "q"} | options if "chosen" not in options else options
        with pytest.raises(InputError, match=match):
            extract(loaded, PAIRS, tmp_path, **asked)
    for options in (TEXTS | {"preference": "log-odds"}, {"text": "q", "advantage": "a"}):
        with pytest.raises(InputError, match=r"output='curvature'; received (preferences|advantages)"):
            hf.prepare(loaded, PAIRS, output="curvature", **options)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_rollouts(tmp_path, reduction):
    """Rows are -A times the gradient of the log-probability; a column has the advantage."""
    loaded = hf.load(make_model(tmp_path / "model"))
    rows = [pair | {"a": value} for pair, value in zip(PAIRS, (1.5, -2, 0.25), strict=True)]
    store = extract(loaded, rows, tmp_path, prompt="q", completion="c", advantage="a", reduction=reduction)
    assert store.attrs["loss_kind"] == f"policy_gradient_{reduction}"
    assert store.column("advantage").tolist() == [1.5, -2, 0.25]
    counts = [1 if reduction == "sum" else len(row["c"].split()) + 1 for row in rows]
    check_rows(store, loaded.model, [
        -row["a"] * log_probability(loaded.model, row["q"], row["c"]) / count
        for row, count in zip(rows, counts, strict=True)
    ])  # fmt: skip
    job = job_of(store, loaded)
    batch = job.batches.load(np.arange(3))
    tokens = job.per_sample_loss.of_tokens(loaded.model, batch).sum(1)
    assert_allclose(tokens.detach(), store.loss, rtol=1e-5)


@pytest.mark.parametrize(
    ("value", "said"),
    [(None, "none"), (True, "True"), ("high", "'high'"), (float("nan"), "nan"), ([1.0], r"\[1.0\]")],
)
def test_advantages_that_are_no_numbers(tmp_path, value, said):
    with pytest.raises(InputError, match=rf"finite number as the advantage \(--advantage\) of document 1; .* {said}"):
        samples(tmp_path, hf.Fields(text="q", advantage="a"), [PAIRS[0] | {"a": 1}, PAIRS[0] | {"a": value}])
