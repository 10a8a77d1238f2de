"""``nn.LSTM``, ``nn.GRU`` and ``nn.RNN``, run again sample by sample, from padded and from packed sequences.

Where a sample is follows from the layer: the batch axis of sequences, axis 1 of states, and of packed sequences every
step's place of that sample. The entry matrix is (1, parameters), one parameter after the other; the cost is that of the
layer's full gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from typing_extensions import override

from ooc_influence.extract.entries.calls import Axis, Call, Layout, Part
from ooc_influence.extract.entries.func import FuncEntries
from ooc_influence.store import LayerShape

_FORWARDS = (nn.LSTM.forward, nn.GRU.forward, nn.RNN.forward)


class Steps(NamedTuple):
    """The steps of each sample in the data of a packed sequence."""

    places: tuple[Tensor, ...]

    def take(self, value: Tensor, sample: int, b: int) -> Tensor:
        """See :class:`Part`."""
        return value.index_select(0, self.places[sample].to(value.device))

    def reached(self, value: Tensor, b: int) -> Tensor:
        """See :class:`Part`."""
        there = ((value != 0) & value.isfinite()).flatten(1).any(1)
        return torch.stack([there[places.to(there.device)].any() for places in self.places])


class Sizes(NamedTuple):
    """How many samples have each step, of a packed sequence: of one sample one."""

    places: tuple[Tensor, ...]

    def take(self, value: Tensor, sample: int, b: int) -> Tensor:
        """See :class:`Part`."""
        return value.new_ones(len(self.places[sample]))

    def reached(self, value: Tensor, b: int) -> Tensor:
        """See :class:`Part`; no output is one."""
        raise NotImplementedError


class Order(NamedTuple):
    """How samples were sorted by length: one is by itself."""

    def take(self, value: Tensor, sample: int, b: int) -> Tensor:
        """See :class:`Part`."""
        return value.new_zeros(1)

    def reached(self, value: Tensor, b: int) -> Tensor:
        """See :class:`Part`; no output is one."""
        raise NotImplementedError


class RecurrentEntries(FuncEntries):
    """``nn.LSTM``, ``nn.GRU``, ``nn.RNN``: any number of layers and directions, projections, states in and out."""

    kind = "recurrent"

    @classmethod
    @override
    def describe(cls, name: str, module: nn.Module) -> LayerShape | None:
        plain = isinstance(module, nn.RNNBase) and type(module).forward in _FORWARDS
        return super().describe(name, module) if plain else None

    @classmethod
    @override
    def layout(cls, module: nn.Module, call: Call, accept: Callable[[Layout], bool] | None = None) -> Layout | None:
        b, tensors = call.samples, call.tensors()
        if b == 1:
            return Layout((None,) * len(tensors), (None,) * len(call.outputs))
        sequence: Any = call.args[0] if call.args else call.kwargs["input"]
        states: list[Part | None] = [Axis(1)] * (len(call.outputs) - 1)
        if isinstance(sequence, PackedSequence):
            places = _places(sequence)
            first: list[Part | None] = [Steps(places), Sizes(places)]
            first += [Order()] * sum(order is not None for order in sequence[2:])
            fits = len(places) == b
        else:
            axis = Axis(0 if module.batch_first else 1)
            first = [axis]
            fits = sequence.dim() == 3 and sequence.shape[axis.axis] % b == 0
        inputs = [*first, *[Axis(1)] * (len(tensors) - len(first))]
        layout = Layout(tuple(inputs), (first[0], *states))
        return layout if fits and (accept is None or accept(layout)) else None


def _places(packed: PackedSequence) -> tuple[Tensor, ...]:
    """Return where each sample's steps are in the data, for the samples in the order of the batch."""
    sizes = packed.batch_sizes.cpu()
    starts = sizes.cumsum(0) - sizes
    ranks = range(int(sizes[0])) if packed.unsorted_indices is None else packed.unsorted_indices.tolist()
    return tuple((starts + rank)[sizes > rank] for rank in ranks)
