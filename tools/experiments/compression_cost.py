"""What compressing a batch costs: time over a training step of the same model, and memory, by method, p and k.

Models: stacks of linear layers on 8 x 64 token vectors (p = 0.2 to 3 million), and the 27 M-parameter decoder of
tools/bench/extraction.py (8 x 128 tokens). A step is a forward and a backward pass with weight gradients. A method's
batch is what extraction does: forward, backward with respect to activations, gather, project. "over a step" is the
median ratio of alternating turns, "extra MiB" the anonymous memory that the first batch adds. Every run is a process.
Dense projections whose matrix takes more than a gigabyte are generated anew for every batch: they are timed once, on
the decoder only a Gaussian one at k = 256, and none at k = 4096. LoGra stores about k numbers: √(k / layers) a side.

Run: python tools/experiments/compression_cost.py [--folder cost-output] [--quick] [--status].
"""

from __future__ import annotations

import math
import multiprocessing
import sys
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))

import torch
from common import Result, Runs, arguments, report
from extraction import make
from torch import nn

import ooc_influence as ooc
from ooc_influence.extract.passes import RowGatherer
from ooc_influence.extract.selection import select_layers
from ooc_influence.extract.taps import tapped
from ooc_influence.memory import PeakMemory

COLUMNS = ("model", "p", "k", "method", "stored", "over a step", "extra MiB")
DENSE = ("Gaussian", "Rademacher")
STEP = "training step"
TURNS = 7  # of a method and of training steps, alternating


def linear_stack(width: int) -> tuple[nn.Module, Any, Any]:
    model = nn.Sequential(*(nn.Linear(width, width) for _ in range(3)))
    batch = torch.randn(8, 64, width)
    return model, lambda found, given: found(given).square().mean((1, 2)), batch


def load(name: str) -> tuple[nn.Module, Any, Any]:
    torch.manual_seed(0)
    if name == "decoder":
        case = make("decoder")
        return case.model.eval(), case.loss, case.batch
    return linear_stack(int(name.split()[-1]))


def compressor(method: str, k: int, layers: int) -> Any:
    side = max(1, math.isqrt(k // layers))
    return {
        "dropout": lambda: ooc.Dropout(k=k),
        "SJLT": lambda: ooc.Sjlt(k),
        "GraSS": lambda: ooc.Grass(k, kept=4 * k),
        "LoGra": lambda: ooc.LoGra(side, side),
        "Gaussian": lambda: ooc.Gaussian(k),
        "Rademacher": lambda: ooc.Rademacher(k),
    }[method]()


def cost(name: str, k: int, method: str, seconds: float) -> Result:
    """Measure one method: its first batch's memory, then turns of its batches and of training steps."""
    model, loss, batch = load(name)
    layers = select_layers(model, None).layers
    p = sum(layer.entries for layer in layers)

    def step() -> None:
        for values in model.parameters():
            values.grad = None
        loss(model, batch).mean().backward()

    if method == STEP:
        return dict(zip(COLUMNS, [name, p, k, method, p, 1.0, round(extra(step))], strict=True))
    mask, reduction = drawn(method, k, layers)
    gatherer = RowGatherer(mask, torch.device("cpu"), reduction)

    def batches(count: int, measure: Callable[[Callable[[], Any]], float]) -> float:
        """Measure so many batches after a first one, in which the taps count the samples; for 0 that one alone."""
        chosen = [module.layer for module in mask.modules]
        with tapped(model, chosen, torch.device("cpu"), skip=mask.empty_modules) as taps:
            if count:
                gatherer(taps, loss, batch)
            return measure(lambda: [gatherer(taps, loss, batch) for _ in range(max(1, count))])

    memory = batches(0, extra)
    once, of_step = batches(1, timed), min(timed(step), timed(step))
    count, steps = (max(1, math.ceil(seconds / TURNS / taken)) for taken in (once, of_step))
    ratios = (
        [once / of_step]
        if once > seconds
        else [
            batches(count, timed) / count / (timed(lambda: [step() for _ in range(steps)]) / steps)
            for _ in range(TURNS)
        ]
    )
    stored = mask.k if reduction is None else reduction.columns
    return dict(zip(COLUMNS, [name, p, k, method, stored, median(ratios), round(memory)], strict=True))


def drawn(method: str, k: int, layers: Any) -> tuple[Any, Any]:
    chosen = compressor(method, k, sum(layer.kind == "linear" for layer in layers))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ooc.OocInfluenceWarning)
        mask = chosen.draw(layers)
    return mask, None if isinstance(chosen, ooc.Dropout) else chosen.generated(mask)


def timed(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def extra(call: Callable[[], object]) -> float:
    """Return the MiB of anonymous memory that a first call adds at most."""
    with PeakMemory(interval=0.001) as watch:
        call()
    return (watch.peak - watch.start) / 2**20


def alone(*job: Any) -> Result:
    """Run a job in a process of its own, as memory that an earlier one has had is not seen to be taken again."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(cost, *job).result()


def jobs(quick: bool) -> list[tuple[str, int, str, float]]:
    """Return (model, k, method, seconds for each side) of every run."""
    methods = ("dropout", "LoGra", "GraSS", "SJLT", *DENSE)
    if quick:
        return [("linear 128", 256, method, 0.7) for method in (STEP, *methods)]
    found: list[tuple[str, int, str, float]] = []
    for width in (256, 512, 1024):
        found.append((f"linear {width}", 0, STEP, 0))
        found += [(f"linear {width}", k, method, 2) for k in (256, 1024, 4096) for method in methods
                  if not (method in DENSE and k == 4096)]  # fmt: skip
    found += [("decoder", 0, STEP, 0), *(("decoder", 256, method, 8) for method in methods[:5])]
    return found + [("decoder", k, method, 8) for k in (1024, 4096, 16384) for method in methods[:4]]


def main() -> None:
    options = arguments(__doc__, "cost-output").parse_args()
    runs = Runs(options.folder)
    for job in jobs(options.quick):
        name, k, method, seconds = job
        settings = {"model": name, "k": k, "method": method, "seconds": seconds}
        runs.add(f"{name} / {k} / {method}", settings, partial(alone, *job))
    if options.status:
        print("\n".join(runs.missing()) or "nothing is missing")
        return
    print(f"{len(runs.missing())} runs to do", file=sys.stderr)
    found = runs.finish()

    def plot(axes: Any) -> None:
        for method in dict.fromkeys(result["method"] for result in found if result["method"] != STEP):
            own = sorted((r["p"], r["over a step"]) for r in found if r["method"] == method)
            axes.loglog([p for p, _ in own], [ratio for _, ratio in own], "o", label=method)
        axes.set(xlabel="p", ylabel="time of a batch over a training step")
        axes.legend(fontsize=7)

    report("compression_cost", options.folder, found, COLUMNS, plot)


if __name__ == "__main__":
    main()
