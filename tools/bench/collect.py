"""Time of a training step whose rows are collected, and of one that chooses its samples, against one without.

A decoder of 27 million parameters (6 layers of width 512, 8192 tokens, sequences of 128) is trained by AdamW on batches
of 16; rows of each step go to a store on disk. The steps are those of two copies of the model, in turns. Samples are
chosen by their scores on eight fixed queries, all of which are given weight 1 here.

Run: python tools/bench/collect.py [--k 4096 16384] [--rounds 15] [--width 512]. The last line is JSON.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import ooc_influence as ooc

BATCH, LENGTH, VOCABULARY = 16, 128, 8192


def make_model(width: int, layers: int = 6) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers,
        num_attention_heads=8, num_key_value_heads=8, max_position_embeddings=LENGTH,
    )  # fmt: skip
    return LlamaForCausalLM(config).train()


class Training:
    """A model that is trained on batches of random tokens."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self._optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        self._generator = torch.Generator().manual_seed(1)

    def batch(self) -> torch.Tensor:
        return torch.randint(VOCABULARY, (BATCH, LENGTH), generator=self._generator)

    def step(self, tokens: torch.Tensor) -> None:
        self.model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()

    def update(self) -> None:
        self._optimizer.step()
        self._optimizer.zero_grad()

    def whole_step(self) -> None:
        self.step(self.batch())
        self.update()


def seconds(call: Callable[[], object]) -> tuple[float, float]:
    """Return the seconds that a call takes, by the clock and of the processor."""
    began, busy = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - began, time.process_time() - busy


def sample_losses(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=tokens, use_cache=False).logits
    return ooc.token_cross_entropy(logits[:, :-1], tokens[:, 1:])


Ratios = list[tuple[float, float]]


def in_turns(one: Callable[[], object], other: Callable[[], object], rounds: int) -> Ratios:
    """Return the ratios of each round, by the clock and of processor time; the first calls are not counted."""
    one()
    other()
    ratios = []
    for _ in range(rounds):
        (clock, busy), (plain_clock, plain_busy) = seconds(one), seconds(other)
        ratios.append((clock / plain_clock, busy / plain_busy))
    return ratios


def measured(model: Any, k: int, rounds: int, folder: Path) -> Ratios:
    """Compare steps that are collected with others."""
    plain, collected = Training(copy.deepcopy(model)), Training(copy.deepcopy(model))
    with ooc.collect(collected.model, folder / f"{k}", compressor=ooc.Dropout(k=k)) as collector:

        def with_rows() -> None:
            tokens = collected.batch()
            with collector.step(range(BATCH)):
                collected.step(tokens)
            collected.update()

        ratios = in_turns(with_rows, plain.whole_step, rounds)
    pairs = zip(collected.model.parameters(), plain.model.parameters(), strict=True)
    assert all(torch.equal(mine, theirs) for mine, theirs in pairs)
    return ratios


def measured_choosing(model: Any, k: int, rounds: int, folder: Path) -> Ratios:
    """Compare steps that choose among their samples with others."""
    plain, choosing = Training(copy.deepcopy(model)), Training(copy.deepcopy(model))
    queries = [choosing.batch()[:8]]
    store = ooc.extract_gradients(
        choosing.model, sample_losses, queries, folder / f"queries{k}", compressor=ooc.Dropout(k=k), progress=False
    )
    selection = ooc.online_selection(store, lambda scores: scores.mean(0) > -1e30)
    with ooc.collect(choosing.model, folder / f"chosen{k}", select=selection) as collector:

        def chosen() -> None:
            tokens = choosing.batch()
            with collector.step(range(BATCH)) as step:
                losses = sample_losses(choosing.model, tokens)
                (step.select(losses) * losses).mean().backward()
            choosing.update()

        return in_turns(chosen, plain.whole_step, rounds)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--k", type=int, nargs="+", default=[4096, 16384])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--width", type=int, default=512)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    model = make_model(options.width)
    found: dict[str, Any] = {"bench": "collect", "parameters": sum(p.numel() for p in model.parameters())}
    with tempfile.TemporaryDirectory() as folder:
        for k in options.k:
            for name, measure in (("collected", measured), ("chosen", measured_choosing)):
                ratios = measure(model, k, options.rounds, Path(folder))
                found[f"{name}_{k}_over_training"] = median(clock for clock, _ in ratios)
                found[f"{name}_{k}_cpu_over_training"] = median(busy for _, busy in ratios)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
