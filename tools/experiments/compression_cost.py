"""What compressing a batch costs: time over a training step of the same model, and memory, by method, p and k.

Models: stacks of linear layers on 8 x 64 token vectors (p = 0.2 to 3 million), and the 27 M-parameter decoder of
tools/bench/extraction.py (8 x 128 tokens). "step" is a forward and a backward pass with weight gradients. A method's
batch is what extraction does: forward, backward with respect to activations, gather, project; measured before and after
as many steps, medians of all. "over a step" is their ratio, "extra MiB" the largest anonymous memory over that before.
Dense projections whose matrix takes more than a gigabyte are generated anew for every batch: on the decoder they are
measured at k = 256 only, once. LoGra stores about k numbers: √(k / layers) a side.

Run: python tools/experiments/compression_cost.py [--folder cost-output] [--quick] [--status].
"""

from __future__ import annotations

import math
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))

import torch
from common import Result, Runs, arguments, report
from extraction import make
from torch import nn

import ooc_influence as ooc
from ooc_influence.extract.layers import select_layers
from ooc_influence.extract.rows import RowGatherer
from ooc_influence.extract.taps import tapped
from ooc_influence.memory import PeakMemory

COLUMNS = ("model", "p", "k", "method", "stored", "over a step", "extra MiB")
DENSE = ("Gaussian", "Rademacher")


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


def cost(name: str, k: int, method: str, rounds: int) -> Result:
    model, loss, batch = load(name)
    layers = select_layers(model, None).layers
    chosen = compressor(method, k, sum(layer.kind == "linear" for layer in layers))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ooc.OocInfluenceWarning)
        mask = chosen.draw(layers)
    device = torch.device("cpu")
    reduction = None if isinstance(chosen, ooc.Dropout) else chosen.generated(mask)

    def step() -> None:
        for values in model.parameters():
            values.grad = None
        loss(model, batch).mean().backward()

    def timed(call: Callable[[], object]) -> float:
        began = time.perf_counter()
        call()
        return time.perf_counter() - began

    for values in model.parameters():
        values.requires_grad_(True)
    with PeakMemory(interval=0.002) as watch:
        gatherer = RowGatherer(mask, device, reduction)
        with tapped(model, [module.layer for module in mask.modules], device, skip=mask.empty_modules) as taps:
            ours = lambda: gatherer(taps, loss, batch)  # noqa: E731
            stored = int(ours()[1].shape[1])
            taken = [timed(ours) for _ in range(rounds)]
    extra = (watch.peak - watch.start) / 2**20
    step()
    limits = [timed(step) for _ in range(max(3, rounds))]
    again = []
    with tapped(model, [module.layer for module in mask.modules], device, skip=mask.empty_modules) as taps:
        for _ in range(rounds):  # before and after the steps, against drift
            again.append(timed(lambda: gatherer(taps, loss, batch)))
    ratio = median(taken + again) / median(limits)
    p = sum(layer.entries for layer in layers)
    return dict(zip(COLUMNS, [name, p, k, method, stored, ratio, round(extra)], strict=True))


def jobs(quick: bool) -> list[tuple[str, int, str, int]]:
    """Return (model, k, method, rounds) of every run."""
    methods = ("dropout", "LoGra", "GraSS", "SJLT", *DENSE)
    if quick:
        return [("linear 128", 256, method, 3) for method in methods]
    found = [(f"linear {width}", k, method, 5) for width in (256, 512, 1024) for k in (256, 1024, 4096)
             for method in methods if not (method in DENSE and width == 1024 and k == 4096)]  # fmt: skip
    found += [("decoder", k, method, 3) for k in (1024, 4096, 16384) for method in methods if method not in DENSE]
    return found + [("decoder", 256, method, 1) for method in methods]


def main() -> None:
    options = arguments(__doc__, "cost-output").parse_args()
    runs = Runs(options.folder)
    for name, k, method, rounds in jobs(options.quick):
        settings = {"model": name, "k": k, "method": method, "rounds": rounds}
        runs.add(f"{name} / {k} / {method}", settings,
                 lambda job=(name, k, method, rounds): cost(*job))  # fmt: skip
    if options.status:
        print("\n".join(runs.missing()) or "nothing is missing")
        return
    print(f"{len(runs.missing())} runs to do", file=sys.stderr)
    found = runs.finish()

    def plot(axes: Any) -> None:
        for method in dict.fromkeys(result["method"] for result in found):
            own = sorted((r["p"], r["over a step"]) for r in found if r["method"] == method)
            axes.loglog([p for p, _ in own], [ratio for _, ratio in own], "o", label=method)
        axes.set(xlabel="p", ylabel="time of a batch over a training step")
        axes.legend(fontsize=7)

    report("compression_cost", options.folder, found, COLUMNS, plot)


if __name__ == "__main__":
    main()
