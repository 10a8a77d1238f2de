"""A row as long as the context runs, and, where positions end there, one token more does not."""

from __future__ import annotations

import re

import pytest
import torch
from tiny_hf import MARKS, datasets, transformers, words_tokenizer

from ooc_influence import hf
from ooc_influence.errors import InputError
from ooc_influence.hf.extraction import prepare
from ooc_influence.hf.padding import longest_row

pytestmark = MARKS
ENCODER = {"vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
           "intermediate_size": 16, "max_position_embeddings": 24}  # fmt: skip
DECODER = ENCODER | {"num_key_value_heads": 1}
SEQ2SEQ = {"vocab_size": 30, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
           "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16,
           "max_position_embeddings": 24}  # fmt: skip
PADDED = ENCODER | {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}


def build(name, sizes):
    torch.manual_seed(0)
    kind = re.match(r"(.*?)(LMHeadModel|For(Seq|Cau).*)", name)[1]
    return getattr(transformers, name)(getattr(transformers, f"{kind}Config")(**sizes)).eval()


def run(model, length):
    ids = torch.full((1, length), 5)
    ids[0, -1] = 2  # what BART and T5 end a text with
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


@pytest.mark.parametrize(
    ("name", "sizes", "expected"),
    [
        ("BertForSequenceClassification", ENCODER, 24),
        ("AlbertForSequenceClassification", ENCODER | {"embedding_size": 8}, 24),
        ("ElectraForSequenceClassification", ENCODER | {"embedding_size": 8}, 24),
        ("DistilBertForSequenceClassification",
         {"vocab_size": 30, "dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 16,
          "max_position_embeddings": 24}, 24),
        ("RobertaForSequenceClassification", PADDED, 22),
        ("RobertaForSequenceClassification", PADDED | {"pad_token_id": 4}, 19),
        ("RobertaForCausalLM", PADDED | {"is_decoder": True}, 22),
        ("XLMRobertaForSequenceClassification", PADDED, 22),
        ("CamembertForSequenceClassification", PADDED, 22),
        ("XmodForSequenceClassification", PADDED | {"languages": ["en"], "default_language": "en"}, 22),
        ("RobertaPreLayerNormForSequenceClassification", PADDED, 22),
        ("Data2VecTextForSequenceClassification", PADDED, 22),
        ("MPNetForSequenceClassification", PADDED, 22),
        ("EsmForSequenceClassification", PADDED | {"position_embedding_type": "absolute", "mask_token_id": 3}, 22),
        ("YosoForSequenceClassification", ENCODER | {"use_expectation": True, "hash_code_len": 2, "num_hash": 2}, 24),
        ("NystromformerForSequenceClassification",
         ENCODER | {"num_landmarks": 24, "segment_means_seq_len": 24, "conv_kernel_size": 3}, 24),
        ("FNetForSequenceClassification", ENCODER, 24),
        ("DebertaV2ForSequenceClassification", ENCODER | {"relative_attention": False}, 24),
        ("GPT2LMHeadModel", {"vocab_size": 30, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 24}, 24),
        ("GPTNeoForCausalLM", {"vocab_size": 30, "hidden_size": 16, "num_layers": 1, "num_heads": 2,
                               "attention_types": [[["global"], 1]], "max_position_embeddings": 24}, 24),
        ("OpenAIGPTLMHeadModel", {"vocab_size": 30, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 24}, 24),
        ("OPTForCausalLM", {"vocab_size": 30, "hidden_size": 16, "word_embed_proj_dim": 16, "num_hidden_layers": 1,
                            "num_attention_heads": 2, "ffn_dim": 16, "max_position_embeddings": 24}, 24),
        ("BioGptForCausalLM", ENCODER, 24),
        ("BartForSequenceClassification", SEQ2SEQ | {"pad_token_id": 1, "eos_token_id": 2}, 24),
        ("PLBartForSequenceClassification", SEQ2SEQ | {"pad_token_id": 1, "eos_token_id": 2}, 24),
        ("RoFormerForSequenceClassification", ENCODER | {"embedding_size": 16}, 24),
        ("CTRLForSequenceClassification",
         {"vocab_size": 30, "n_embd": 16, "n_layer": 1, "n_head": 2, "dff": 16, "n_positions": 24}, 24),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_tables_of_positions(name, sizes, expected):
    model = build(name, sizes)
    assert hf.context_length(model, None) == longest_row(model) == expected
    run(model, expected)
    with pytest.raises((IndexError, RuntimeError)):
        run(model, expected + 1)


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("T5ForSequenceClassification", {"vocab_size": 30, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1,
                                         "num_heads": 2, "eos_token_id": 2, "pad_token_id": 0,
                                         "decoder_start_token_id": 0, "n_positions": 24}),
        ("DebertaV2ForSequenceClassification", ENCODER | {"relative_attention": True, "position_biased_input": False,
                                                          "pos_att_type": ["p2c", "c2p"], "position_buckets": 8}),
        ("DebertaForSequenceClassification", ENCODER | {"relative_attention": True, "position_biased_input": False,
                                                        "pos_att_type": ["p2c", "c2p"]}),
        ("XLNetForSequenceClassification", {"vocab_size": 30, "d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 16}),
        ("FunnelForSequenceClassification", {"vocab_size": 30, "d_model": 16, "n_head": 2, "d_head": 8, "d_inner": 16,
                                             "block_sizes": [1, 1]}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_relative_positions_have_no_limit(name, sizes):
    model = build(name, sizes)
    assert longest_row(model) is None
    assert hf.context_length(model, None) == 4096
    run(model, 25)
    run(model, 600)


@pytest.mark.parametrize(
    ("scaling", "expected", "alone"),
    [
        (None, 24, 24),
        ({"rope_type": "linear", "factor": 4.0}, 96, 96),
        ({"rope_type": "dynamic", "factor": 4.0}, 24, 24),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}, 64, 64),
        ({"rope_type": "yarn", "factor": 1.5, "original_max_position_embeddings": 16}, 24, 24),
        ({"rope_type": "llama3", "factor": 3.0, "original_max_position_embeddings": 8, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0}, 24, 24),
        ({"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "factor": 3.0,
          "original_max_position_embeddings": 8}, 8, 24),
    ],
    ids=lambda value: str(value.get("rope_type")) if isinstance(value, dict) else "",
)  # fmt: skip
def test_rotations(scaling, expected, alone):
    """Nothing fails beyond these lengths; up to them, a row's numbers are its own beside others."""
    scaled = {} if scaling is None else {"rope_scaling": scaling | {"rope_theta": 10000.0}}
    model = build("LlamaForCausalLM", DECODER | scaled)
    assert longest_row(model) == hf.context_length(model, None) == expected
    assert longest_row(model, alone=True) == alone
    short = torch.arange(5, 10)[None]
    with torch.no_grad():
        first = model(input_ids=short).logits
        run(model, expected + 1)
        model(input_ids=short)
        longest = torch.cat([short, torch.full((1, expected - 5), 7)], 1)
        beside = model(input_ids=torch.cat([longest, longest.flip(1)])).logits[:1, :5]
    torch.testing.assert_close(beside, first, rtol=1e-5, atol=1e-6)


def test_rotations_without_a_limit_by_position():
    """ESM-2 rotates; its configuration says how long its texts were."""
    model = build("EsmForSequenceClassification", PADDED | {"position_embedding_type": "rotary", "mask_token_id": 3})
    length = longest_row(model)
    assert length == hf.context_length(model, None)
    run(model, length)


def test_the_tokenizer_may_say_less():
    class Words:
        model_max_length = 9

    class Endless:
        model_max_length = 10**30

    model = build("RobertaForSequenceClassification", PADDED)
    assert hf.context_length(model, Words()) == 9
    assert hf.context_length(model, Endless()) == 22
    assert longest_row(model) == 22


def job(model, texts, **options):
    vocabulary = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3} | {f"w{at}": at + 5 for at in range(20)}
    tokenizer = words_tokenizer(vocabulary, ends=True, pad_token="<pad>", eos_token="</s>")
    task = "classification" if hasattr(model, "num_labels") and "Sequence" in type(model).__name__ else "causal-lm"
    rows = {"text": texts} | ({"y": [0] * len(texts)} if task == "classification" else {})
    fields = {"text": "text"} | ({"label": "y"} if task == "classification" else {})
    return prepare(hf.Loaded(model, tokenizer, task), datasets.Dataset.from_dict(rows), **fields, **options)


@pytest.mark.parametrize("name", ["RobertaForSequenceClassification", "MPNetForSequenceClassification"])
def test_long_texts_beside_short_ones(name):
    """Without model_max_length, too; padding takes no further positions."""
    made = job(build(name, PADDED), ["w1 " * 60, "w2 w3"])
    assert made.samples.lengths.tolist() == [22, 4]
    with torch.no_grad():
        assert made.per_sample_loss(made.model, made.batches.load(made.batches.cut(torch.arange(2).numpy())[0])).shape
    with pytest.raises(InputError, match=r"expected max_length <= 22, the model's context; received 23$"):
        job(made.model, ["w1"], max_length=23)


def test_a_longer_row_alone():
    scaling = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "factor": 3.0,
               "rope_theta": 10000.0, "original_max_position_embeddings": 8}  # fmt: skip
    model = build("LlamaForCausalLM", DECODER | {"rope_scaling": scaling})
    with pytest.raises(InputError, match=r"max_length <= 8, .*; received 20: or batch_size=1 .* for up to 24$"):
        job(model, ["w1 " * 30], max_length=20)
    assert job(model, ["w1 " * 30], max_length=20, batch_size=1).samples.lengths.max() == 20


def test_a_prompt_takes_positions():
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=30, n_embd=16, n_layer=1, n_head=2, n_positions=24)
    prompt = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5, prompt_tuning_init="RANDOM")
    model = peft.get_peft_model(transformers.GPT2LMHeadModel(config), prompt).eval()
    assert longest_row(model) == 19
    run(model, 19)
    with pytest.raises((IndexError, RuntimeError)):
        run(model, 20)
