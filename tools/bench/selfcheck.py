"""Cost of the gradient self-check, and the time before the second batch of a run with adapters.

Two models with random weights: the decoder of extraction.py (27 M parameters) and a Llama of 135 M parameters (the
shape of SmolLM-135M; needs transformers), whole and with LoRA adapters (needs peft). Measured round by round:

    step      one ordinary forward+backward of two samples, with the gradients that training computes
    checked   the first batch of an extraction, checked: taps set up, forward, backward, gather, compare with autograd
    plain     the same without the check
    before    time from the call of extract_gradients to the request for the second batch
    batch     time between the requests for later batches

Run: python tools/bench/selfcheck.py [--rounds 5] [--models decoder,llama,lora] [--tokens 128]. The last line is JSON
with ratios of medians: (checked - plain)/step, and before/batch. --small: tiny models, to try the script itself.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from extraction import Case, clock, language
from torch import Tensor, nn

import ooc_influence as ooc
from ooc_influence.extract.passes import RowGatherer
from ooc_influence.extract.selection import select_layers
from ooc_influence.extract.taps import tapped

LLAMA = {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
         "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True}  # fmt: skip
SMALL = {**LLAMA, "vocab_size": 512, "hidden_size": 36, "intermediate_size": 48, "num_hidden_layers": 2}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LATER = 4  # batches after the first
K = 16384


def llama_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    tokens, _ = batch
    logits = model(input_ids=tokens, use_cache=False).logits
    losses = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    return losses.view(len(tokens), -1).mean(1)


def make(name: str, samples: int, tokens: int, *, small: bool) -> Case:
    """Return a model, its loss, and a batch."""
    if name == "decoder":
        return language(*((512, 32, 2, 2) if small else (8192, 512, 6, 8)), samples, tokens, torch.float32, "cpu")
    import transformers

    config = transformers.LlamaConfig(**(SMALL if small else LLAMA))
    model: nn.Module = transformers.LlamaForCausalLM(config)
    if name == "lora":
        import peft

        model = peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules=TARGETS, task_type="CAUSAL_LM"))
        for parameter_name, parameter in model.named_parameters():
            if "lora_B" in parameter_name:
                nn.init.normal_(parameter, std=0.02)
    batch = (torch.randint(0, config.vocab_size, (samples, tokens)), torch.zeros(samples))
    return Case(model.eval(), llama_loss, batch)


def cost_of_check(case: Case, rounds: int) -> dict[str, float]:
    """Return the time that the check adds to the first batch, over that of a training step of two samples."""
    layers = select_layers(case.model, None).layers
    mask = ooc.Dropout(k=min(K, sum(layer.entries for layer in layers) - 1)).draw(layers)
    pair = tuple(part[:2] for part in case.batch)

    def step() -> None:
        case.loss(case.model, pair).sum().backward()
        case.model.zero_grad(set_to_none=True)

    def first_batch(check: bool) -> None:
        device = case.batch[0].device
        with tapped(case.model, layers, device, skip=mask.empty_modules, check=check, mask=mask) as taps:
            RowGatherer(mask, device)(taps, case.loss, case.batch)

    differences, steps, plain = [], [], []
    for number in range(rounds + 1):
        took = clock(step), clock(lambda: first_batch(False)), clock(lambda: first_batch(True))
        gc.collect()
        if number:  # the first round warms up
            steps.append(took[0])
            plain.append(took[1])
            differences.append(took[2] - took[1])
    return {
        "check_over_step": round(statistics.median(differences) / statistics.median(steps), 3),
        "check_over_batch": round(statistics.median(differences) / statistics.median(plain), 3),
    }


class Requests:
    """Batches that note when each is asked for."""

    def __init__(self, batch: tuple[Tensor, Tensor]) -> None:
        self._batch = batch
        self.times: list[float] = []

    def __call__(self, start_row: int) -> Iterator[Any]:
        for _ in range(start_row // len(self._batch[0]), 1 + LATER):
            self.times.append(time.perf_counter())
            yield self._batch
        self.times.append(time.perf_counter())


def time_before_second(case: Case, folder: Path, rounds: int) -> dict[str, float]:
    """Return the time before the second batch, and the part of it before the first, over that of a batch."""
    before, first, later = [], [], []
    for number in range(rounds + 1):
        requests = Requests(case.batch)
        began = time.perf_counter()
        ooc.extract_gradients(
            case.model, case.loss, requests, folder / f"{number}.zarr", compressor=ooc.Dropout(k=1024)
        )
        if number:
            first.append(requests.times[0] - began)
            before.append(requests.times[1] - began)
            later += [end - start for start, end in itertools.pairwise(requests.times[1:])]
    batch = statistics.median(later)
    return {
        "before_first_over_batch": round(statistics.median(first) / batch, 2),
        "before_second_over_batch": round(statistics.median(before) / batch, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--models", default="decoder,llama,lora")
    parser.add_argument("--samples", type=int, default=4, help="of a batch")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args()
    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    facts: dict[str, Any] = {"bench": "selfcheck"}
    facts |= {name: getattr(options, name) for name in ("rounds", "samples", "tokens")}
    with tempfile.TemporaryDirectory() as temporary:
        for name in filter(None, options.models.split(",")):
            case = make(name, options.samples, options.tokens, small=options.small)
            found = cost_of_check(case, options.rounds)
            if name == "lora":
                found |= time_before_second(case, Path(temporary), options.rounds)
            facts |= {f"{name}_{key}": value for key, value in found.items()}
            print(name, found, flush=True)
    print(json.dumps(facts | {"threads": torch.get_num_threads()}))


if __name__ == "__main__":
    main()
