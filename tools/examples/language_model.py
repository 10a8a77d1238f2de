"""Train a small language model on a text, let it write, and see which passages of the text it has that from.

The text is cut into documents at blank lines (joined up to some 600 characters). A byte-pair tokenizer and a GPT-2 of
two layers are trained on them and saved as a Hugging Face folder; gradients are extracted from that folder as
``ooc-influence extract --model`` does it. The query is what the model writes after a prompt. Without a file the text is
one that ships with Python: pydoc's topics.

Run: python tools/examples/language_model.py [TEXT] [--prompt TEXT] [--folder language-model-output] [--quick].
"""

from __future__ import annotations

import argparse
import json
import pydoc_data.topics
import shutil
from pathlib import Path

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

import ooc_influence as ooc

CONTEXT = 128


def documents(text: str, most: int) -> list[str]:
    """Cut a text at blank lines into documents of about 600 characters."""
    found, held = [], ""
    for part in text.split("\n\n"):
        if held and len(held) + len(part) > 600:
            found.append(held)
            held = ""
        held = f"{held}\n\n{part}" if held else part
    return [each for each in [*found, held] if each.strip()][:most]


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(texts, vocab_size=1024, special_tokens=["<end>"], show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=trained._tokenizer, eos_token="<end>", pad_token="<end>")


def train(tokenizer: PreTrainedTokenizerFast, texts: list[str], epochs: int, width: int) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    sizes = {"n_positions": CONTEXT, "n_embd": width, "n_layer": 2, "n_head": 4}
    ends = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **sizes, **ends))
    model.loss_type = "ForCausalLM"  # what it is anyway; said, transformers does not warn
    stream = torch.tensor([code for text in texts for code in [*tokenizer.encode(text), 0]])
    rows = stream[: len(stream) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    steps = epochs * -(-len(rows) // 16)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for epoch in range(epochs):
        for chosen in torch.randperm(len(rows)).split(16):
            optimizer.zero_grad()
            batch = rows[chosen]  # no padding in it
            loss = model(input_ids=batch, attention_mask=torch.ones_like(batch), labels=batch).loss
            loss.backward()
            optimizer.step()
            schedule.step()
        print(f"epoch {epoch + 1} of {epochs}: loss {loss.item():.2f}")
    return model.eval()


def write_lines(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", type=Path, nargs="?", help="a text file; default: pydoc's topics")
    parser.add_argument("--prompt", default="The assert statement", help="what the model goes on from")
    parser.add_argument("--folder", type=Path, default=Path("language-model-output"))
    parser.add_argument("--quick", action="store_true", help="few documents, one epoch")
    options = parser.parse_args()
    text = options.text.read_text("utf-8") if options.text else "\n\n".join(pydoc_data.topics.topics.values())
    texts = documents(text, 60 if options.quick else 2000)
    if len(texts) < 2:
        parser.error("expected a text of several paragraphs, blank lines between them")
    shutil.rmtree(options.folder, ignore_errors=True)
    options.folder.mkdir(parents=True)

    tokenizer = make_tokenizer(texts)
    model = train(tokenizer, texts, 1 if options.quick else 12, 32 if options.quick else 128)
    place = options.folder / "model"
    model.save_pretrained(place)
    tokenizer.save_pretrained(place)

    prompt = tokenizer(options.prompt, return_tensors="pt")
    torch.manual_seed(0)
    written = model.generate(**prompt, max_new_tokens=40, do_sample=True, top_k=20, pad_token_id=0)[0]
    answer = tokenizer.decode(written[prompt.input_ids.shape[1] :])
    print(f"\n{options.prompt} ->{answer}\n")

    corpus = write_lines(options.folder / "corpus.jsonl", texts)
    question = options.folder / "question.jsonl"
    question.write_text(json.dumps({"prompt": options.prompt, "completion": answer}) + "\n", "utf-8")
    store = options.folder / "train.zarr"
    ooc.hf.extract(place, corpus, store)
    ooc.hf.extract(place, question, options.folder / "query.zarr", like=store, prompt="prompt", completion="completion")
    ooc.fit_curvature(store)
    best = ooc.top_influential(options.folder / "query.zarr", store, top=3, normalize="cosine")
    of_row = ooc.GradientStore.open(store).column("document")
    for row, score in zip(best.proponents.rows[0], best.proponents.scores[0], strict=True):
        place_of = int(of_row[row])
        print(f"document {place_of}, cosine {score:.2f}: {' '.join(texts[place_of].split())[:160]}")


if __name__ == "__main__":
    main()
