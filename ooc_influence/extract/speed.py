"""How fast a model's gradients are: measured on a sample or two, to say beforehand how long an extraction takes."""

from __future__ import annotations

import time

import numpy as np

from ooc_influence.extract.data import BudgetBatches, to_device
from ooc_influence.extract.passes import ModelSetup
from ooc_influence.extract.selection import select_layers
from ooc_influence.extract.taps import tapped

_SAMPLES = 2


def measure_speed(setup: ModelSetup, batches: BudgetBatches) -> float:
    """Return the seconds that a token takes forwards and backwards, in a batch of two samples of median length.

    Larger batches take less for each token: what follows from it is rather too long than too short.
    """
    order = np.argsort(batches.lengths, kind="stable")
    middle = max(0, (len(order) - _SAMPLES) // 2)
    chosen = np.sort(order[middle : middle + _SAMPLES])
    layers = select_layers(setup.model, None)[0]
    batch = to_device(batches.load(chosen), setup.device)
    with tapped(setup.model, layers, setup.device) as taps:
        seconds = []
        for _ in range(2):  # the first one warms up
            began = time.perf_counter()
            taps.run(setup.per_sample_loss, batch, lambda b: lambda use, x, delta: None)
            seconds.append(time.perf_counter() - began)
    return seconds[-1] / max(1, batches.padded(chosen)[1])
