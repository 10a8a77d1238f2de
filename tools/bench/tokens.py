"""Time of influence token by token, against a training step on the same documents, interleaved in one run.

Ten documents of one query, in a batch: the direction of the preconditioned query in parameter space, and the
derivatives of all token losses along it, against forward and backward with weight gradients. The model has the shape of
SmolLM2-135M with --layers of its 30, random weights; --adapter freezes all but a LoRA of rank 16, as fine-tuning would.

Run: python tools/bench/tokens.py [--layers 6] [--length 64] [--rounds 7] [--adapter]. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from vocabulary import VOCABULARY, make_model

import ooc_influence as ooc
from ooc_influence.extract import directional_derivatives, parameter_direction, tapped
from ooc_influence.hf.losses import CausalLoss

DOCUMENTS = 10


def with_adapter(model: Any) -> Any:
    import peft

    config = peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    return peft.get_peft_model(model, config)


def seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY)
    parser.add_argument("--adapter", action="store_true")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    model = make_model(options.layers, "float32", options.vocabulary)
    model = (with_adapter(model) if options.adapter else model).eval()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    tokens = torch.randint(options.vocabulary, (DOCUMENTS, options.length))
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens}
    loss = CausalLoss()
    with tempfile.TemporaryDirectory() as folder:
        kept = ooc.Dropout(k=4096, basis=ooc.KroneckerBasis(samples=DOCUMENTS))
        train = ooc.extract_gradients(model, loss, [batch], Path(folder) / "train", compressor=kept, dtype="float32")
        query = np.asarray(train.rows(0, 1)[0], np.float32)

        def train_step() -> None:
            torch.autograd.grad(loss(model, batch).mean(), trained, allow_unused=True)

        def by_tokens() -> None:
            direction = parameter_direction(model, train, query)
            with tapped(model, [], torch.device("cpu")):
                directional_derivatives(model, loss.of_tokens, batch, direction)

        calls: dict[str, Callable[[], None]] = {"train": train_step, "tokens": by_tokens}
        by_tokens()  # loads what forward mode needs
        found: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(options.rounds):
            for name, call in calls.items():
                found[name].append(seconds(call))
    ratios = [ours / theirs for ours, theirs in zip(found["tokens"], found["train"], strict=True)]
    result = {
        "bench": "tokens", "layers": options.layers, "length": options.length, "adapter": options.adapter,
        "tokens_over_training_step": round(median(ratios), 3),
        "rounds": [round(each, 3) for each in ratios],
    }  # fmt: skip
    print(json.dumps(result))


if __name__ == "__main__":
    main()
