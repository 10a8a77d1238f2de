"""What the gradient self-check costs, and how long a run with adapters takes before its second batch.

Two models with random weights: the decoder of extraction.py (27 M parameters) and a Llama of 135 M parameters (the shape
of SmolLM-135M; needs transformers), whole and with LoRA adapters (needs peft). Measured in turn, round by round:

    with, without   extract_gradients of one batch of two samples, check_gradients=True and False
    step            one ordinary forward+backward of the same two samples, with all gradients that training computes
    before          time from the call of extract_gradients to the request for the second batch (check_gradients=True)
    batch           time between the requests for later batches

Run: python tools/bench/selfcheck.py [--rounds 5] [--models decoder,llama,lora] [--tokens 128]. The last line is JSON
with ratios of medians: (with − without)/step, and before/batch. With --small the models are tiny: it only tries itself.
"""

from __future__ import annotations

import argparse
import inspect
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

CHECKS = "check_gradients" in inspect.signature(ooc.extract_gradients).parameters
LLAMA = {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
         "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True}  # fmt: skip
SMALL = {**LLAMA, "vocab_size": 512, "hidden_size": 36, "intermediate_size": 48, "num_hidden_layers": 2}
LATER = 4  # batches after the first
K = 1024


def llama_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    tokens, _ = batch
    logits = model(input_ids=tokens, use_cache=False).logits
    losses = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    return losses.view(len(tokens), -1).mean(1)


def make(name: str, tokens: int, *, small: bool) -> Case:
    """Return a model, its loss, and a batch of two samples."""
    if name == "decoder":
        return language(*((512, 32, 2, 2) if small else (8192, 512, 6, 8)), 2, tokens, torch.float32, "cpu")
    import transformers

    config = transformers.LlamaConfig(**(SMALL if small else LLAMA))
    config.max_position_embeddings = max(tokens, 256)
    model: nn.Module = transformers.LlamaForCausalLM(config)
    if name == "lora":
        import peft

        targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        model = peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules=targets, task_type="CAUSAL_LM"))
    return Case(model, llama_loss, (torch.randint(0, config.vocab_size, (2, tokens)), torch.zeros(2)))


def extract(case: Case, batches: Any, folder: Path, *, check: bool) -> None:
    options: dict[str, Any] = {"check_gradients": check} if CHECKS else {}
    store = folder / f"{time.perf_counter_ns()}.zarr"
    ooc.extract_gradients(case.model, case.loss, batches, store, compressor=ooc.Dropout(k=K), **options)


class Requests:
    """Batches that note when each is asked for."""

    def __init__(self, batch: Any, count: int) -> None:
        self._batch, self._count = batch, count
        self.times: list[float] = []

    def __call__(self, start_row: int) -> Iterator[Any]:
        for _ in range(start_row // 2, self._count):
            self.times.append(time.perf_counter())
            yield self._batch
        self.times.append(time.perf_counter())


def step(case: Case) -> None:
    case.model.zero_grad(set_to_none=True)
    case.loss(case.model, case.batch).sum().backward()


def cost_of_check(case: Case, folder: Path, rounds: int) -> dict[str, float]:
    """Return the check's time over that of a training step of two samples."""
    differences, steps = [], []
    case.model.eval()
    for number in range(rounds + 1):
        seconds = clock(lambda: step(case))
        case.model.zero_grad(set_to_none=True)
        checked = clock(lambda: extract(case, [case.batch], folder, check=True))
        plain = clock(lambda: extract(case, [case.batch], folder, check=False))
        if number:  # the first round warms up
            differences.append(checked - plain)
            steps.append(seconds)
    return {"check_over_step": round(statistics.median(differences) / statistics.median(steps), 3)}


def time_before_second(case: Case, folder: Path, rounds: int) -> dict[str, float]:
    """Return the time before the second batch over that of a batch."""
    before, later = [], []
    for number in range(rounds + 1):
        requests = Requests(case.batch, 1 + LATER)
        began = time.perf_counter()
        extract(case, requests, folder, check=True)
        asked = requests.times
        if number:
            before.append(asked[1] - began)
            later += [end - start for start, end in zip(asked[1:-1], asked[2:], strict=True)]
    batch = statistics.median(later)
    return {
        "before_second_over_batch": round(statistics.median(before) / batch, 2),
        "first_request_over_batch": round((statistics.median(before) - batch) / batch, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--models", default="decoder,llama,lora")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args()
    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    facts: dict[str, Any] = {"bench": "selfcheck", "rounds": options.rounds, "tokens": options.tokens, "checks": CHECKS}
    with tempfile.TemporaryDirectory() as temporary:
        for name in filter(None, options.models.split(",")):
            case = make(name, options.tokens, small=options.small)
            found = cost_of_check(case, Path(temporary), options.rounds) if CHECKS else {}
            if name == "lora":
                found |= time_before_second(case, Path(temporary), options.rounds)
            facts |= {f"{name}_{key}": value for key, value in found.items()}
            print(name, found, flush=True)
    print(json.dumps(facts | {"threads": torch.get_num_threads()}))


if __name__ == "__main__":
    main()
