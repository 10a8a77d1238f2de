"""Any other layer: run again, sample by sample, and differentiated.

The layer runs once more for each sample with its own part of the arguments, and the gradient of its output is pulled
back to its parameters: Σ_y δ[s, y] ∂y(x_s)/∂θ. Where it multiplies by a weight, only the kept entries are computed;
otherwise that costs the full gradient, so it is used on request only. The entry matrix is (1, parameters), one
parameter after the other, or several such rows where there are more than 32-bit columns can count.

Kinds that run again by themselves: layers of PEFT's; ``nn.LSTM``, ``nn.GRU`` and ``nn.RNN``, from padded and from
packed sequences, whose samples are found on the batch axis of sequences, on axis 1 of states and, in packed sequences,
at every step's position of that sample.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from typing_extensions import override

from ooc_influence.errors import UnsupportedModelError
from ooc_influence.extract.entries.base import (
    Entries,
    Indices,
    Located,
    MaskIndices,
    Moments,
    computes_weights,
    square_sums,
    wide,
)
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

    A container is never called, so its owner covers its parameters.
    """
    if isinstance(module, _CONTAINERS):
        return {}
    parameters = dict(module.named_parameters(recurse=computes_weights(module)))
    for name, child in uncalled(module).items():
        parameters |= {f"{name}.{inner}": p for inner, p in child.named_parameters()}
    return {name: p for name, p in parameters.items() if p.is_floating_point()}


class FuncEntries(Entries):
    """A layer of any class whose samples do not depend on each other."""

    kind = "func"
    whole_call = True

    def __init__(self, kept: ModuleMask, module: nn.Module, device: torch.device) -> None:
        super().__init__(kept, module, device)
        self._parameters = self.parameters(module)
        self._kept: dict[str, tuple[Indices, Indices]] = {}  # by parameter: sorted positions, and the entries there
        for name, entries, positions in self.locate(kept.layer, module, kept.rows, kept.cols):
            order = np.argsort(positions, kind="stable")
            self._kept[name] = positions[order], entries[order]
        self._patches: dict[Patch, tuple[LinearEntries, Tensor] | None] = {}
        self._positions = {
            name: (torch.from_numpy(positions).to(device), torch.from_numpy(entries).to(device))
            for name, (positions, entries) in self._kept.items()
        }

    @classmethod
    @override
    def parameters(cls, module: nn.Module) -> dict[str, nn.Parameter]:
        return own_parameters(module)

    @classmethod
    @override
    def describe(cls, name: str, module: nn.Module) -> LayerShape | None:
        numel = sum(p.numel() for p in cls.parameters(module).values())
        rows = rows_of(numel)
        return LayerShape(name, cls.kind, (rows, numel // rows), False) if rows else None

    @classmethod
    def layout(cls, module: nn.Module, call: Call, accept: Callable[[Layout], bool] | None = None) -> Layout | None:
        """Return where a call's samples are; None if they cannot be told apart, or ``accept`` takes no layout."""
        return find_layout(module, call, accept=accept)

    @classmethod
    @override
    def batched(cls, module: nn.Module, x: Any, delta: Any, b: int) -> bool:
        return cls.layout(module, x) is not None

    @classmethod
    @override
    def strays(cls, module: nn.Module, x: Any, delta: Any, b: int, sample: int) -> bool:
        # of several possible layouts, one is chosen in which δ is the sample's alone

        def alone(layout: Layout) -> bool:
            for value, part in zip(delta, layout.outputs, strict=True):
                if value is not None and part is not None:
                    reached = part.reached(value, b)
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
                f"expected a batch for {type(module).__name__}; received {call.shapes()}: leave it out with modules="
            )
        return layout

    @classmethod
    @override
    def moments(cls, layer: LayerShape, module: nn.Module, x: Any, delta: Any) -> Moments:
        # exact in each column, since the whole gradient is there
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
    @override
    def locate(cls, layer: LayerShape, module: nn.Module, rows: MaskIndices, cols: MaskIndices) -> list[Located]:
        located, first = [], 0
        flat = rows.astype(np.int64) * layer.shape[1] + cols
        for name, parameter in cls.parameters(module).items():
            last = first + parameter.numel()
            entries = np.flatnonzero((flat >= first) & (flat < last))
            located.append(Located(name, entries, flat[entries] - first))
            first = last
        return located

    @classmethod
    @override
    def entries_at(
        cls, layer: LayerShape, module: nn.Module, parameter: str, positions: Indices
    ) -> tuple[Indices, Indices]:
        first = 0
        for name, value in cls.parameters(module).items():
            if name == parameter:
                break
            first += value.numel()
        return (positions + first) // layer.shape[1], (positions + first) % layer.shape[1]

    def gather(self, x: Any, delta: Any) -> Tensor:
        """Return the entries, (b, m), of the layer's call x and the gradients of its outputs."""
        layout = self.known_layout(self._module, x)
        device = x.outputs[0].device
        out = torch.zeros((x.samples, self.entries), dtype=torch.float32, device=device)
        for sample, row in enumerate(out):

            def product(patch: Patch, a: Tensor, d: Tensor, row: Tensor = row) -> None:
                self._add_product(row, patch, a, d)

            gradients = pull_back(self._module, self._parameters, x, layout, delta, sample, product)
            for name, value in gradients.items():
                positions, entries = self._positions[name]
                row.index_add_(0, entries, value.reshape(-1).index_select(0, positions).to(row.dtype))
        return out

    def _add_product(self, row: Tensor, patch: Patch, x: Tensor, delta: Tensor) -> None:
        if patch not in self._patches:
            self._patches[patch] = self._entries_of(patch, x.device)
        gatherer = self._patches[patch]
        if gatherer is not None:
            linear, entries = gatherer
            row.index_add_(0, entries, linear.gather(x[None], delta[None])[0].to(row.dtype))

    def _entries_of(self, patch: Patch, device: torch.device) -> tuple[LinearEntries, Tensor] | None:
        """Return what gathers the kept entries of a weight, and which of all entries they are; None if none is kept."""
        positions, entries = self._kept[patch.parameter]
        (outputs, inputs), (down, along) = patch.shape, patch.strides
        stop = patch.offset + (outputs - 1) * down + (inputs - 1) * along + 1
        low, high = np.searchsorted(positions, [patch.offset, stop])
        local, entries = positions[low:high] - patch.offset, entries[low:high]
        if down >= along:
            rows, rest = np.divmod(local, max(1, down))
            cols, odd = np.divmod(rest, max(1, along))
        else:
            cols, rest = np.divmod(local, along)
            rows, odd = np.divmod(rest, max(1, down))
        inside = (odd == 0) & (rows < outputs) & (cols < inputs)
        if not inside.any():
            return None
        rows, cols, entries = rows[inside], cols[inside], entries[inside]
        order = np.lexsort((cols, rows))
        kept = ModuleMask(
            LayerShape(self.layer.name, LinearEntries.kind, patch.shape, False), rows[order].astype(np.int32),
            cols[order].astype(np.int32), np.ones(len(order), np.float32),
        )  # fmt: skip
        return LinearEntries(kept, self._module, device), torch.from_numpy(entries[order]).to(device)


def rows_of(numel: int) -> int:
    """Return into how many rows entries are divided so that 32-bit columns suffice; 0 if that is impossible.

    One row wherever that is enough, as in all earlier stores.
    """
    if numel <= _COLUMNS:
        return min(numel, 1)
    return next((rows for rows in range(2, _ROWS) if numel % rows == 0 and numel // rows <= _COLUMNS), 0)


_CALLED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding)  # layers of their own


class AdapterEntries(FuncEntries):
    """A layer of PEFT's, by the parameters of its active adapters."""

    kind = "adapter"

    @classmethod
    @override
    def parameters(cls, module: nn.Module) -> dict[str, nn.Parameter]:
        active: Any = getattr(module, "active_adapters", ())
        names: Any = getattr(module, "adapter_layer_names", ())
        wrapped = hasattr(module, "base_layer") and isinstance(names, (tuple, list))
        # DoRA calls its adapters' layers with something else than tokens, for the norm of their product
        decomposed = partial(_adapter, module._modules.get("lora_magnitude_vector"))
        parameters: dict[str, nn.Parameter] = {}
        for name in names if wrapped else ():
            for adapter in active:
                value = _adapter(module._modules.get(name), adapter)
                if isinstance(value, nn.Parameter):
                    parameters[f"{name}.{adapter}"] = value
                elif value is not None and (not isinstance(value, _CALLED) or decomposed(adapter) is not None):
                    parameters |= {f"{name}.{adapter}.{inner}": p for inner, p in value.named_parameters()}
        return {name: p for name, p in parameters.items() if p.is_floating_point()}

    @classmethod
    @override
    def describe(cls, name: str, module: nn.Module) -> LayerShape | None:
        return super().describe(name, module) if hasattr(module, "adapter_layer_names") else None


def _adapter(container: nn.Module | None, name: str) -> nn.Module | nn.Parameter | None:
    """Return what a container holds for an adapter."""
    if not isinstance(container, (nn.ParameterDict, nn.ModuleDict)) or name not in container:
        return None
    value: nn.Module | nn.Parameter = container[name]
    return value


_FORWARDS = (nn.LSTM.forward, nn.GRU.forward, nn.RNN.forward)


class Steps(NamedTuple):
    """The steps of each sample in the data of a packed sequence."""

    indices: tuple[Tensor, ...]

    def take(self, value: Tensor, sample: int, b: int) -> Tensor:
        """Return the part of one sample."""
        return value.index_select(0, self.indices[sample].to(value.device))

    def reached(self, value: Tensor, b: int) -> Tensor:
        """Return which samples' parts hold a finite number other than zero, (b,) bool."""
        nonzero = ((value != 0) & value.isfinite()).flatten(1).any(1)
        return torch.stack([nonzero[indices.to(nonzero.device)].any() for indices in self.indices])


class Constant(NamedTuple):
    """What a packed sequence of one sample holds: ``fill``, ``lengths[sample]`` times."""

    fill: int
    lengths: tuple[int, ...]

    def take(self, value: Tensor, sample: int, b: int) -> Tensor:
        """Return the part of one sample."""
        return value.new_full((self.lengths[sample],), self.fill)

    def reached(self, value: Tensor, b: int) -> Tensor:
        """Not needed: this is never an output."""
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
            indices = _step_indices(sequence)
            steps = tuple(len(of_sample) for of_sample in indices)
            first: list[Part | None] = [Steps(indices), Constant(1, steps)]  # the data; how many samples have each step
            first += [Constant(0, (1,) * len(steps))] * sum(order is not None for order in sequence[2:])
            fits = len(indices) == b
        else:
            axis = Axis(0 if module.batch_first else 1)
            first = [axis]
            fits = sequence.dim() == 3 and sequence.shape[axis.axis] % b == 0
        inputs = [*first, *[Axis(1)] * (len(tensors) - len(first))]
        layout = Layout(tuple(inputs), (first[0], *states))
        return layout if fits and (accept is None or accept(layout)) else None


def _step_indices(packed: PackedSequence) -> tuple[Tensor, ...]:
    """Return the indices of each sample's steps in the data, for the samples in the order of the batch."""
    sizes = packed.batch_sizes.cpu()
    starts = sizes.cumsum(0) - sizes
    ranks = range(int(sizes[0])) if packed.unsorted_indices is None else packed.unsorted_indices.tolist()
    return tuple((starts + rank)[sizes > rank] for rank in ranks)


_EXPERT_ROWS = 2**20  # runs of entries whose second moments a pilot tells apart, where the weights' widths allow it
_SORTED = ("expert_size", "tokens_per_expert", "batch_size")  # arguments of experts that see tokens sorted by expert
_ROUTERS = ("router", "gate", "gating")


class ExpertEntries(FuncEntries):
    """Fused mixture-of-experts weights, (experts, out, in) or (experts, in, out), and routers of Hugging Face models.

    One call uses them with the tokens of all samples, (samples · tokens, features), and the experts they are routed to.
    The module runs again for each sample's tokens; at every product by an expert's weight the kept entries are gathered
    as those of a linear layer. The entry matrix is (rows, C): the parameters one after the other, in runs of C entries.
    """

    kind = "experts"

    @classmethod
    @override
    def describe(cls, name: str, module: nn.Module) -> LayerShape | None:
        if not (_experts(module) or _router(module)):
            return None
        parameters = cls.parameters(module).values()
        numel = sum(p.numel() for p in parameters)
        width = math.gcd(*(p.shape[-1] for p in parameters))
        fits = (run for run in range(1, width + 1) if width % run == 0 and numel // run <= _EXPERT_ROWS)
        run = next(fits, width)
        return LayerShape(name, cls.kind, (numel // run, run), False) if numel // run < 2**31 else None

    @classmethod
    @override
    def layout(cls, module: nn.Module, call: Call, accept: Callable[[Layout], bool] | None = None) -> Layout | None:
        # tokens may be repeated for every expert (Llama 4)
        first = next(iter(cls.parameters(module).values()))
        return find_layout(module, call, len(first) if first.dim() == 3 else 1, accept)

    @classmethod
    @override
    def moments(cls, layer: LayerShape, module: nn.Module, x: Any, delta: Any) -> Moments:
        # for every weight the product of the squares of δ and x, averaged over each run
        parameters, layout = cls.parameters(module), cls.known_layout(module, x)
        sums = _Squares(x.outputs[0].device)
        rows = torch.zeros(layer.shape[0], dtype=torch.float64, device=x.outputs[0].device)
        starts, first = {}, 0
        for name, parameter in parameters.items():
            starts[name] = first
            first += parameter.numel()
        for sample in range(x.samples):
            for name, value in pull_back(module, parameters, x, layout, delta, sample, sums.add).items():
                squares = value.detach().reshape(-1, layer.shape[1]).to(wide(value.dtype)).square()
                row = starts[name] // layer.shape[1]
                rows[row : row + len(squares)] += squares.mean(1, dtype=torch.float64)
        sums.add_to(rows, starts, layer.shape[1])
        return Moments(rows, rows.new_full((layer.shape[1],), float(x.samples)), x.samples)


class _Squares:
    """Sums of squares at every product, in the form of a linear layer's moments."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._sums: dict[Patch, tuple[Tensor, Tensor, int]] = {}

    def add(self, patch: Patch, x: Tensor, delta: Tensor) -> None:
        """Add a product's factors."""
        outputs, inputs, tokens = self._sums.get(patch, (0.0, 0.0, 0))
        self._sums[patch] = square_sums(delta, 0) + outputs, square_sums(x, 0) + inputs, tokens + len(x)

    def add_to(self, rows: Tensor, starts: dict[str, int], run: int) -> None:
        """Add the mean of every run of entries to its row."""
        for patch, (outputs, inputs, tokens) in self._sums.items():
            start, (down, along) = starts[patch.parameter] + patch.offset, patch.strides
            major, minor, step, wide_step = outputs, inputs, along, down
            if down < along:
                major, minor, step, wide_step = inputs, outputs, down, along
            first = torch.arange(len(major), device=self._device)[:, None]
            if step == 1 and start % run == 0 and wide_step % run == 0 and len(minor) % run == 0:
                means = torch.outer(major, minor.view(-1, run).mean(1)) / tokens
                offsets = torch.arange(len(minor) // run, device=self._device)
                index = start // run + first * (wide_step // run) + offsets
            else:
                means = torch.outer(major, minor) / (tokens * run)
                offsets = torch.arange(len(minor), device=self._device) * step
                index = (start + first * wide_step + offsets) // run
            rows.index_add_(0, index.flatten(), means.flatten())


def _experts(module: nn.Module) -> bool:
    """Return whether a module holds the weights of many experts and sees the tokens in the samples' order."""
    own = [p for p in module._parameters.values() if p is not None]
    if "expert" not in type(module).__name__.lower() or not any(p.dim() == 3 for p in own):
        return False
    experts = {len(p) for p in own if p.dim()}
    if len(experts) != 1 or any(p.dim() not in (2, 3) or not p.is_floating_point() for p in own):
        return False
    return not set(_SORTED) & set(inspect.signature(type(module).forward).parameters)


def _router(module: nn.Module) -> bool:
    """Return whether a module routes tokens to experts with a weight of its own."""
    own = {name: p for name, p in module._parameters.items() if p is not None}
    if not type(module).__name__.lower().endswith(_ROUTERS) or any(True for _ in module.children()):
        return False
    weight = own.get("weight")
    return weight is not None and weight.dim() == 2 and hasattr(module, "num_experts") and hasattr(module, "top_k")
