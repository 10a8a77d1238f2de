"""Fine-tune a language model with LoRA on facts, and trace its answers to the documents they were learned from.

A GPT-2 of two layers is trained on sentences about the residents of a made-up town, then fine-tuned (adapters only,
package peft) on documents about new ones, each saying where one works. Asked where they work, what the model answers is
traced: the document about the resident should come first. Gradients are the adapters' own.

Run: python tools/examples/lora.py [--folder lora-output] [--quick].
"""

from __future__ import annotations

import argparse
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from language_model import make_tokenizer
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel

import ooc_influence as ooc

FIRST = (
    "Ada",
    "Ben",
    "Cleo",
    "Dov",
    "Edda",
    "Finn",
    "Gia",
    "Hugo",
    "Ines",
    "Jon",
    "Kaia",
    "Levi",
    "Mona",
    "Nils",
    "Ola",
)
LAST = (
    "Abel",
    "Brandt",
    "Cole",
    "Dietz",
    "Egger",
    "Falk",
    "Grau",
    "Holm",
    "Iven",
    "Jahn",
    "Kern",
    "Lutz",
    "Moll",
    "Otto",
)
WORK = ("bakery", "harbour", "library", "museum", "station", "theatre", "hospital", "garden", "market", "school")


def people(count: int, seed: int) -> list[tuple[str, str]]:
    generator = np.random.default_rng(seed)
    names = [f"{first} {last}" for first in FIRST for last in LAST]
    chosen = generator.permutation(len(names))[:count]
    return [(names[number], WORK[generator.integers(len(WORK))]) for number in chosen]


def fit(model: torch.nn.Module, rows: list[torch.Tensor], epochs: int, lr: float) -> None:
    optimizer = torch.optim.AdamW([values for values in model.parameters() if values.requires_grad], lr=lr)
    steps = epochs * -(-len(rows) // 16)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    for _ in range(epochs):
        for chosen in torch.randperm(len(rows)).split(16):
            batch = torch.nn.utils.rnn.pad_sequence([rows[row] for row in chosen], batch_first=True, padding_value=-100)
            optimizer.zero_grad()
            there = batch != -100
            model(input_ids=batch.clamp(min=0), attention_mask=there.long(), labels=batch).loss.backward()
            optimizer.step()
            schedule.step()


def answer(model: torch.nn.Module, tokenizer: Any, prompt: str) -> str:
    """Return what the model says, up to its full stop."""
    given = tokenizer(prompt, return_tensors="pt")
    written = model.generate(**given, max_new_tokens=8, do_sample=False, pad_token_id=0)[0][given.input_ids.shape[1] :]
    return tokenizer.decode(written).split(".")[0] + "."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("lora-output"))
    parser.add_argument("--quick", action="store_true", help="fewer residents and epochs")
    options = parser.parse_args()
    shutil.rmtree(options.folder, ignore_errors=True)
    options.folder.mkdir(parents=True)
    torch.manual_seed(0)
    everyone = people(200, 0)
    facts = everyone[: 30 if options.quick else 80]
    texts = [f"{name} works at the {work}." for name, work in everyone[80:]]
    tokenizer = make_tokenizer(texts + [f"{name} lives in town." for name, _ in everyone])
    ends = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=len(tokenizer), n_positions=32, n_embd=128, n_layer=2, n_head=4, **ends)
    )
    model.loss_type = "ForCausalLM"  # what it is anyway; said, transformers does not warn
    fit(model, [torch.tensor(tokenizer.encode(text)) for text in texts], 5 if options.quick else 30, 3e-3)

    places = {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}  # GPT-2's Conv1D layers
    with warnings.catch_warnings():  # peft asks by a name that newer releases of transformers warn of
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, **places))
    lines = [{"prompt": f"{name} works at the", "completion": f" {work}.", "id": name} for name, work in facts]
    rows = [torch.tensor(tokenizer.encode(line["prompt"] + line["completion"])) for line in lines]
    fit(adapted, rows, 20 if options.quick else 300, 5e-3)
    adapted.eval()

    corpus, store = options.folder / "facts.jsonl", options.folder / "train.zarr"
    corpus.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    loaded = ooc.hf.Loaded(adapted, tokenizer, "causal-lm")
    ooc.hf.extract(loaded, corpus, store, prompt="prompt", completion="completion", id="id")
    ooc.fit_curvature(store)
    asked, answers = lines[:20], [answer(adapted, tokenizer, line["prompt"]) for line in lines[:20]]
    known = sum(found == line["completion"] for found, line in zip(answers, asked, strict=True))
    questions = options.folder / "questions.jsonl"
    pairs = [{"prompt": line["prompt"], "completion": found} for line, found in zip(asked, answers, strict=True)]
    questions.write_text("".join(json.dumps(pair) + "\n" for pair in pairs), "utf-8")
    fields = {"prompt": "prompt", "completion": "completion"}
    ooc.hf.extract(loaded, questions, options.folder / "query.zarr", like=store, **fields)
    best = ooc.top_influential(options.folder / "query.zarr", store, top=5, normalize="cosine")
    ranked = [[lines[row]["id"] for row in rows] for rows in best.proponents.rows]
    first = sum(names[0] == line["id"] for names, line in zip(ranked, asked, strict=True))
    right = sum(line["id"] in names for names, line in zip(ranked, asked, strict=True))
    print(f"{known} of {len(asked)} questions answered as the documents say")
    print(f"the document about the resident asked for is first for {first}, among the first five for {right}")
    print(f"for example: {asked[0]['prompt']}{answers[0]} comes from {', '.join(ranked[0][:3])}")


if __name__ == "__main__":
    main()
