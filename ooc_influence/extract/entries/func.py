"""Any other layer: run again alone, sample by sample, and differentiated.

The layer runs once more for each sample with its own part of the arguments, and the gradient of its output is pulled
back to its parameters: Σ_y δ[s, y] ∂y(x_s)/∂θ. Where it multiplies by a weight, only the kept entries are computed;
otherwise that costs the full gradient, so it is used on request only. The entry matrix is (1, parameters), one
parameter after the other, or several such rows where there are more than 32-bit columns can count.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from ooc_influence.errors import UnsupportedModelError
from ooc_influence.extract.entries.base import Entries, Moments, Place, computes_weights, wide
from ooc_influence.extract.entries.calls import Axis, Call, Layout, Part, Patch, find_layout, pull_back
from ooc_influence.extract.entries.linear import LinearEntries
from ooc_influence.store import LayerShape, ModuleMask

_COLUMNS = 2**31 - 1  # that a mask's 32-bit numbers can count
_ROWS = 2**20  # up to which a divisor of the number of parameters is looked for
_CONTAINERS = (nn.ParameterDict, nn.ParameterList)


def uncalled(module: nn.Module) -> dict[str, nn.Module]:
    """Return the children whose parameters a module uses without calling them, by name.

    Containers of parameters; the projection of torch's attention; convolution and step projection of state space
    mixers, which are known by the decay that they learn.
    """
    names = {"out_proj"} if isinstance(module, nn.MultiheadAttention) else set()
    if "A_log" in module._parameters:
        names = {"conv1d", "dt_proj"}
    return {
        name: child for name, child in module.named_children() if name in names or isinstance(child, _CONTAINERS)
    }  # fmt: skip


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the float parameters that this kind covers: the module's own, and those it uses without calling a layer.

    None of a container's, which is never called: its owner covers them.
    """
    if isinstance(module, _CONTAINERS):
        return {}
    found = dict(module.named_parameters(recurse=computes_weights(module)))
    for name, child in uncalled(module).items():
        found |= {f"{name}.{inner}": p for inner, p in child.named_parameters()}
    return {name: p for name, p in found.items() if p.is_floating_point()}


class FuncEntries(Entries):
    """A layer of any class whose samples do not depend on each other."""

    kind = "func"
    whole_call = True

    def __init__(self, kept: ModuleMask, module: nn.Module, device: torch.device) -> None:
        super().__init__(kept, module, device)
        self._parameters = self.parameters(module)
        self._kept: dict[str, tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]] = {}
        for name, at, places in self.locate(kept.layer, module, kept.rows, kept.cols):
            order = np.argsort(places, kind="stable")
            self._kept[name] = places[order], at[order]
        self._patches: dict[Patch, tuple[LinearEntries, Tensor] | None] = {}
        self._places = {
            name: (torch.from_numpy(places).to(device), torch.from_numpy(at).to(device))
            for name, (places, at) in self._kept.items()
        }

    @classmethod
    def parameters(cls, module: nn.Module) -> dict[str, nn.Parameter]:
        """See :class:`Entries`."""
        return own_parameters(module)

    @classmethod
    def describe(cls, name: str, module: nn.Module) -> LayerShape | None:
        """See :class:`Entries`."""
        numel = sum(p.numel() for p in cls.parameters(module).values())
        rows = rows_of(numel)
        return LayerShape(name, cls.kind, (rows, numel // rows), False) if rows else None

    @classmethod
    def layout(cls, module: nn.Module, call: Call, accept: Callable[[Layout], bool] | None = None) -> Layout | None:
        """Return where a call's samples are; None where they cannot be told apart, or ``accept`` takes no way."""
        return find_layout(module, call, accept=accept)

    @classmethod
    def batched(cls, module: nn.Module, x: Any, delta: Any, b: int) -> bool:
        """See :class:`Entries`: the first and the last sample, run alone, give their part of the output."""
        return cls.layout(module, x) is not None

    @classmethod
    def strays(cls, module: nn.Module, x: Any, delta: Any, b: int, sample: int) -> bool:
        """See :class:`Entries`; where several layouts hold, the one is taken in which δ is the sample's alone."""

        def alone(layout: Layout) -> bool:
            for part, place in zip(delta, layout.outputs, strict=True):
                if part is not None and place is not None:
                    reached = place.reached(part, b)
                    reached[sample] = False
                    if bool(reached.any()):
                        return False
            return True

        return not alone(cls.known_layout(module, x)) and cls.layout(module, x, alone) is None

    @classmethod
    def known_layout(cls, module: nn.Module, call: Call) -> Layout:
        """Return where a call's samples are, which :meth:`batched` has asked before."""
        layout = cls.layout(module, call)
        if layout is None:
            raise UnsupportedModelError(
                f"expected a batch for {type(module).__name__}; received {call.told()}: leave it out with modules="
            )
        return layout

    @classmethod
    def moments(cls, layer: LayerShape, module: nn.Module, x: Any, delta: Any) -> Moments:
        """See :class:`Entries`; exact in each column, since the whole gradient is there."""
        parameters, layout = cls.parameters(module), cls.known_layout(module, x)
        device = x.outputs[0].device
        sums = {name: torch.zeros(p.numel(), dtype=torch.float64, device=device) for name, p in parameters.items()}
        for sample in range(x.samples):
            for name, value in pull_back(module, parameters, x, layout, delta, sample).items():
                sums[name] += value.detach().reshape(-1).to(wide(value.dtype)).square()
        squares = torch.cat(list(sums.values())).view(layer.shape)
        rows = squares.mean(1) / squares.mean().clamp(min=torch.finfo(torch.float64).tiny)
        return Moments(rows * x.samples, squares.mean(0), x.samples)

    @classmethod
    def locate(
        cls, layer: LayerShape, module: nn.Module, rows: npt.NDArray[np.int32], cols: npt.NDArray[np.int32]
    ) -> list[Place]:
        """See :class:`Entries`."""
        places, first = [], 0
        flat = rows.astype(np.int64) * layer.shape[1] + cols
        for name, parameter in cls.parameters(module).items():
            last = first + parameter.numel()
            at = np.flatnonzero((flat >= first) & (flat < last))
            places.append(Place(name, at, flat[at] - first))
            first = last
        return places

    @classmethod
    def entries_at(
        cls, layer: LayerShape, module: nn.Module, parameter: str, positions: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """See :class:`Entries`."""
        first = 0
        for name, own in cls.parameters(module).items():
            if name == parameter:
                break
            first += own.numel()
        return (positions + first) // layer.shape[1], (positions + first) % layer.shape[1]

    def gather(self, x: Any, delta: Any) -> Tensor:
        """Return the entries, (b, m), of the layer's call x and the gradients of its outputs."""
        layout = self.known_layout(self._module, x)
        device = x.outputs[0].device
        out = torch.zeros((x.samples, self.entries), dtype=torch.float32, device=device)
        for sample, row in enumerate(out):

            def product(patch: Patch, a: Tensor, d: Tensor, row: Tensor = row) -> None:
                self._add_product(row, patch, a, d)

            found = pull_back(self._module, self._parameters, x, layout, delta, sample, product)
            for name, value in found.items():
                places, at = self._places[name]
                row.index_add_(0, at, value.reshape(-1).index_select(0, places).to(row.dtype))
        return out

    def _add_product(self, row: Tensor, patch: Patch, x: Tensor, delta: Tensor) -> None:
        if patch not in self._patches:
            self._patches[patch] = self._entries_of(patch, x.device)
        found = self._patches[patch]
        if found is not None:
            entries, at = found
            row.index_add_(0, at, entries.gather(x[None], delta[None])[0].to(row.dtype))

    def _entries_of(self, patch: Patch, device: torch.device) -> tuple[LinearEntries, Tensor] | None:
        """Return what gathers the kept entries of a weight, and where they are among all; None where none is kept."""
        places, at = self._kept[patch.parameter]
        (outputs, inputs), (down, along) = patch.shape, patch.strides
        stop = patch.offset + (outputs - 1) * down + (inputs - 1) * along + 1
        low, high = np.searchsorted(places, [patch.offset, stop])
        local, own = places[low:high] - patch.offset, at[low:high]
        if down >= along:
            rows, rest = np.divmod(local, max(1, down))
            cols, odd = np.divmod(rest, max(1, along))
        else:
            cols, rest = np.divmod(local, along)
            rows, odd = np.divmod(rest, max(1, down))
        inside = (odd == 0) & (rows < outputs) & (cols < inputs)
        if not inside.any():
            return None
        rows, cols, own = rows[inside], cols[inside], own[inside]
        order = np.lexsort((cols, rows))
        kept = ModuleMask(
            LayerShape(self.layer.name, LinearEntries.kind, patch.shape, False), rows[order].astype(np.int32),
            cols[order].astype(np.int32), np.ones(len(own), np.float32),
        )  # fmt: skip
        return LinearEntries(kept, self._module, device), torch.from_numpy(own[order]).to(device)


def rows_of(numel: int) -> int:
    """Return into how many rows entries are divided so that 32-bit columns suffice; 0 where there are none, or no way.

    One row wherever that is enough, as stores have always had it.
    """
    if numel <= _COLUMNS:
        return min(numel, 1)
    return next((rows for rows in range(2, _ROWS) if numel % rows == 0 and numel // rows <= _COLUMNS), 0)


_CALLED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding)  # layers of their own


class AdapterEntries(FuncEntries):
    """A layer of PEFT's, by the parameters of its active adapters."""

    kind = "adapter"

    @classmethod
    def parameters(cls, module: nn.Module) -> dict[str, nn.Parameter]:
        """See :class:`Entries`."""
        active: Any = getattr(module, "active_adapters", ())
        names: Any = getattr(module, "adapter_layer_names", ())
        wrapped = hasattr(module, "base_layer") and isinstance(names, (tuple, list))
        found: dict[str, nn.Parameter] = {}
        for name in names if wrapped else ():
            for adapter in active:
                held = _adapter(module._modules.get(name), adapter)
                if isinstance(held, nn.Parameter):
                    found[f"{name}.{adapter}"] = held
                elif held is not None and (not isinstance(held, _CALLED) or _decomposed(module, adapter)):
                    found |= {f"{name}.{adapter}.{inner}": p for inner, p in held.named_parameters()}
        return {name: p for name, p in found.items() if p.is_floating_point()}

    @classmethod
    def describe(cls, name: str, module: nn.Module) -> LayerShape | None:
        """See :class:`Entries`."""
        return super().describe(name, module) if hasattr(module, "adapter_layer_names") else None


def _adapter(container: nn.Module | None, name: str) -> nn.Module | nn.Parameter | None:
    """Return what a container holds for an adapter."""
    if not isinstance(container, (nn.ParameterDict, nn.ModuleDict)) or name not in container:
        return None
    found: nn.Module | nn.Parameter = container[name]
    return found


def _decomposed(module: nn.Module, adapter: str) -> bool:
    """Return whether an adapter's layers are called with something else than tokens (DoRA's norm of their product)."""
    return _adapter(module._modules.get("lora_magnitude_vector"), adapter) is not None


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
    def describe(cls, name: str, module: nn.Module) -> LayerShape | None:
        """See :class:`Entries`."""
        plain = isinstance(module, nn.RNNBase) and type(module).forward in _FORWARDS
        return super().describe(name, module) if plain else None

    @classmethod
    def layout(cls, module: nn.Module, call: Call, accept: Callable[[Layout], bool] | None = None) -> Layout | None:
        """See :class:`FuncEntries`."""
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
