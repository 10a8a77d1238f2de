"""Time of a training step whose rows are collected, and of one that chooses its samples, against one without.

A decoder of 27 million parameters (6 layers of width 512, 8192 tokens, sequences of 128) is trained by AdamW on batches
of 16; rows of each step go to a store on disk. The steps are those of two copies of the model, in turns. Samples are
chosen by their scores on eight fixed queries, all of which are given weight 1 here. ``recorded`` steps have their
optimiser recorded too, for what rows did to the final weights.

``--memory`` measures the peak of anonymous memory instead, of a training in a process of its own, with rows and
without, next to 4 bytes for each number of a batch's rows.

Run: python tools/bench/collect.py [--k 4096 16384] [--rounds 15] [--width 512] [--memory STEPS]. The last line is JSON.
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import ooc_influence as ooc
from ooc_influence.memory import PeakMemory

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
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        self._generator = torch.Generator().manual_seed(1)

    def batch(self) -> torch.Tensor:
        return torch.randint(VOCABULARY, (BATCH, LENGTH), generator=self._generator)

    def step(self, tokens: torch.Tensor) -> None:
        self.model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

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


def measured(model: Any, k: int, rounds: int, folder: Path, *, recorded: bool = False) -> Ratios:
    """Compare steps that are collected with others."""
    plain, collected = Training(copy.deepcopy(model)), Training(copy.deepcopy(model))
    how: dict[str, Any] = {"compressor": ooc.Dropout(k=k), "optimizer": collected.optimizer if recorded else None}
    with ooc.collect(collected.model, folder / f"{k}{recorded}", **how) as collector:

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


def train_in_memory(k: int, width: int, steps: int) -> int:
    """Return the peak of anonymous memory of a training, whose rows of k numbers are collected unless k is 0."""
    training = Training(make_model(width))
    with tempfile.TemporaryDirectory() as folder, PeakMemory() as watch, ExitStack() as stack:
        collector = None
        if k:
            collector = stack.enter_context(ooc.collect(training.model, f"{folder}/s", compressor=ooc.Dropout(k=k)))
        for _ in range(steps):
            with nullcontext() if collector is None else collector.step(range(BATCH)):
                training.step(training.batch())
            training.update()
    return watch.peak


def added_memory(k: int, width: int, steps: int) -> int:
    """Return by how much collecting raises that peak, from a process for each."""
    peaks = []
    for each in (k, 0):
        command = [sys.executable, __file__, "--k", str(each), "--width", str(width), "--child", str(steps)]
        peaks.append(int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1]))
    return peaks[0] - peaks[1]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--k", type=int, nargs="+", default=[4096, 16384])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument(
        "--memory", type=int, metavar="STEPS", help="measure peak memory over this number of steps instead"
    )
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if options.child:
        print(train_in_memory(options.k[0], options.width, options.child))
        return
    found: dict[str, Any] = {"bench": "collect"}
    if options.memory:
        for k in options.k:
            found[f"added_mb_{k}"] = round(added_memory(k, options.width, options.memory) / 1e6, 1)
            found[f"rows_in_flight_mb_{k}"] = round(4 * k * BATCH / 1e6, 1)
        print(json.dumps(found))
        return
    model = make_model(options.width)
    found["parameters"] = sum(p.numel() for p in model.parameters())
    with tempfile.TemporaryDirectory() as folder:
        for k in options.k:
            ways = {"collected": measured, "recorded": partial(measured, recorded=True), "chosen": measured_choosing}
            for name, measure in ways.items():
                ratios = measure(model, k, options.rounds, Path(folder))
                found[f"{name}_{k}_over_training"] = median(clock for clock, _ in ratios)
                found[f"{name}_{k}_cpu_over_training"] = median(busy for _, busy in ratios)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
