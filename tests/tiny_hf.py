"""Tiny Hugging Face models, tokenizers and documents, and what every test with them needs."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

transformers = pytest.importorskip("transformers")
datasets = pytest.importorskip("datasets")
tokenizers = pytest.importorskip("tokenizers")

from ooc_influence import Dropout, hf  # noqa: E402

MARKS = [
    pytest.mark.filterwarnings("ignore:gradients cover"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning"),
]
WORDS = [f"w{n}" for n in range(40)]
SMALL = Dropout(k=300)


def words_tokenizer(vocabulary, *, ends=False, **options):
    """A tokenizer of words; with ``ends`` texts become <s> ... </s>."""
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    if ends:
        words.post_processor = tokenizers.processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", vocabulary["<s>"]), ("</s>", vocabulary["</s>"])]
        )
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, **options)


def make_tokenizer(*, template=False):
    vocabulary = {"<pad>": 0, "<eos>": 1, "<unk>": 2, "user:": 3, "bot:": 4}
    vocabulary |= {word: number + 5 for number, word in enumerate(WORDS)}
    made = words_tokenizer(vocabulary, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", model_max_length=16)
    if template:
        made.chat_template = (
            "{% for m in messages %}{{ 'user: ' if m.role == 'user' else 'bot: ' }}{{ m.content }}"
            "{{ ' <eos> ' }}{% endfor %}{% if add_generation_prompt %}{{ 'bot: ' }}{% endif %}"
        )
    return made


def make_model(folder, kind="gpt2", *, template=False):
    torch.manual_seed(0)
    if kind == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=45, n_positions=16, n_embd=8, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=1
        )
        model = transformers.GPT2LMHeadModel(config)
    else:
        config = transformers.BertConfig(
            vocab_size=45, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12,
            max_position_embeddings=16, num_labels=3, label2id={"bad": 0, "fine": 1, "good": 2},
            id2label={0: "bad", 1: "fine", 2: "good"},
        )  # fmt: skip
        model = transformers.BertForSequenceClassification(config)
    model.save_pretrained(folder)
    make_tokenizer(template=template).save_pretrained(folder)
    return str(folder)


def texts(n=12, seed=0):
    generator = np.random.default_rng(seed)
    return [" ".join(generator.choice(WORDS, size)) for size in generator.integers(1, 50, n)]


def documents(n=12):
    return [{"text": text, "name": f"doc{number}", "source": "ab"[number % 2], "score": number / 2}
            for number, text in enumerate(texts(n))]  # fmt: skip


def write(path, rows):
    if path.name.endswith(".jsonl"):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".txt":
        path.write_text("".join(row["text"] + "\n" for row in rows))
    else:
        frame = datasets.Dataset.from_list(rows)
        if path.suffix == ".csv":
            frame.to_csv(path)
        elif path.suffix == ".parquet":
            frame.to_parquet(path)
        else:
            frame.save_to_disk(path)
    return path


def samples(tmp_path, fields, rows=None, *, template=False, length=16, **options):
    path = write(tmp_path / "data.jsonl", documents() if rows is None else rows)
    return hf.Samples(hf.open_documents(path), make_tokenizer(template=template), fields, length, **options)
