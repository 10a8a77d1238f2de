"""Any other layer, through ``torch.func``: the vector-Jacobian product of the layer alone, sample by sample.

The layer runs once more for each sample with its own inputs, and the gradient of its output is pulled back to its
parameters: Σ_y δ[s, y] ∂y(x_s)/∂θ. That costs the full gradient, so it is used on request only. The entry matrix is
(1, parameters), one parameter after the other.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ooc_influence.errors import UnsupportedModelError
from ooc_influence.extract.entries.base import Entries, Moments, Place, computes_weights, wide
from ooc_influence.store import LayerShape


class Call(NamedTuple):
    """A layer's call, as it was made for a batch.

    Attributes
    ----------
    args, kwargs : tuple, dict
        Its arguments, detached.
    outputs : list of Tensor
        Its float outputs, detached, in pytree order.
    samples : int
        Samples of the batch, b; 0 until the loss has told.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: list[Tensor]
    samples: int = 0

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: list[Tensor]) -> Call:
        """Return a call, everything in it detached."""
        kept = pytree.tree_map(lambda v: v.detach() if isinstance(v, Tensor) else v, (args, kwargs))
        return cls(*kept, [output.detach() for output in outputs])

    def tensors(self) -> list[Tensor]:
        """Return the tensors among the arguments, in pytree order."""
        return [v for v in pytree.tree_leaves((self.args, self.kwargs)) if isinstance(v, Tensor)]

    def told(self) -> str:
        """Return the shapes of arguments and outputs in words."""
        inputs, outputs = (", ".join(str(tuple(v.shape)) for v in values) for values in (self.tensors(), self.outputs))
        return f"{inputs} and an output of shape {outputs}"


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the float parameters that this kind covers: the module's own, and those its weights are computed from.

    Of torch's attention its projection's too, which it uses without calling the layer.
    """
    deep = isinstance(module, nn.MultiheadAttention) or computes_weights(module)
    return {name: p for name, p in module.named_parameters(recurse=deep) if p.is_floating_point()}


class FuncEntries(Entries):
    """A layer of any class that keeps the batch on axis 0 of its tensors."""

    kind = "func"
    whole_call = True

    @classmethod
    def parameters(cls, module: nn.Module) -> dict[str, nn.Parameter]:
        """See :class:`Entries`."""
        return own_parameters(module)

    @classmethod
    def reached(cls, module: nn.Module, x: Any, delta: Any, b: int) -> Tensor:
        """See :class:`Entries`."""
        parts = [((part != 0) & part.isfinite()).reshape(b, -1).any(1) for part in delta if part is not None]
        return torch.stack(parts).any(0)

    @classmethod
    def describe(cls, name: str, module: nn.Module) -> LayerShape | None:
        """See :class:`Entries`."""
        numel = sum(p.numel() for p in own_parameters(module).values())
        return LayerShape(name, cls.kind, (1, numel), False) if numel else None

    @classmethod
    def batched(cls, module: nn.Module, x: Any, delta: Any, b: int) -> bool:
        """See :class:`Entries`: some input and every output has the batch on axis 0."""
        inputs = [value for value in x.tensors() if value.dim()]
        outputs = [value for value in delta if value is not None]
        return any(len(value) == b for value in inputs) and all(value.dim() and len(value) == b for value in outputs)

    @classmethod
    def moments(cls, layer: LayerShape, module: nn.Module, x: Any, delta: Any) -> Moments:
        """See :class:`Entries`; exact, since the whole gradient is there."""
        rows = per_sample(module, x, delta)
        ones = torch.ones(1, dtype=torch.float64, device=rows.device)
        return Moments(ones * len(rows), rows.square().sum(0, dtype=torch.float64), len(rows))

    @classmethod
    def locate(
        cls, layer: LayerShape, module: nn.Module, rows: npt.NDArray[np.int32], cols: npt.NDArray[np.int32]
    ) -> list[Place]:
        """See :class:`Entries`."""
        places, first = [], 0
        for name, parameter in own_parameters(module).items():
            last = first + parameter.numel()
            at = np.flatnonzero((cols >= first) & (cols < last))
            places.append(Place(name, at, cols[at].astype(np.int64) - first))
            first = last
        return places

    @classmethod
    def entries_at(
        cls, layer: LayerShape, module: nn.Module, parameter: str, positions: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """See :class:`Entries`."""
        first = 0
        for name, own in own_parameters(module).items():
            if name == parameter:
                break
            first += own.numel()
        return np.zeros_like(positions), positions + first

    def gather(self, x: Any, delta: Any) -> Tensor:
        """Return the entries, (b, m), of the layer's arguments x and the gradients of its outputs."""
        return per_sample(self._module, x, delta).index_select(1, self._cols)


def per_sample(module: nn.Module, call: Call, deltas: list[Tensor | None]) -> Tensor:
    """Return the full per-sample gradients of a layer's parameters, (b, numel).

    Parameters
    ----------
    module : nn.Module
        The layer.
    call : Call
        What it was called with.
    deltas : list of Tensor or None
        The gradient of each of its float outputs, in pytree order.
    """
    parameters = {name: p.detach() for name, p in own_parameters(module).items()}
    leaves, spec = pytree.tree_flatten((call.args, call.kwargs))
    b = next(len(delta) for delta in deltas if delta is not None)
    split = [isinstance(leaf, Tensor) and leaf.dim() > 0 and len(leaf) == b for leaf in leaves]
    cotangents = [delta for delta in deltas if delta is not None]
    used = [delta is not None for delta in deltas]

    def one(batched: list[Tensor], pulled: list[Tensor]) -> dict[str, Tensor]:
        own = iter(batched)
        values = [next(own).unsqueeze(0) if cut else leaf for leaf, cut in zip(leaves, split, strict=True)]
        args, kwargs = pytree.tree_unflatten(values, spec)

        def outputs(found: dict[str, Tensor]) -> tuple[Tensor, ...]:
            result = torch.func.functional_call(module, found, args, kwargs)
            return tuple(value for value, wanted in zip(float_leaves(result), used, strict=True) if wanted)

        pull: Any = torch.func.vjp(outputs, parameters)[1]
        gradients: dict[str, Tensor] = pull(tuple(value.unsqueeze(0) for value in pulled))[0]
        return gradients

    batched = [leaf for leaf, cut in zip(leaves, split, strict=True) if cut]
    try:
        with torch.enable_grad():
            samples = [one([leaf[s] for leaf in batched], [value[s] for value in cotangents]) for s in range(b)]
    except (RuntimeError, ValueError, TypeError) as error:
        raise UnsupportedModelError(
            f"expected {type(module).__name__} to run for one sample at a time under torch.func; received "
            f"{type(error).__name__}: {error}: leave the layer out with modules="
        ) from error
    rows = [torch.cat([gradients[name].reshape(-1) for name in parameters]) for gradients in samples]
    return torch.stack([row.to(wide(row.dtype)) for row in rows])


def float_leaves(output: Any) -> list[Tensor]:
    """Return the float tensors of a layer's output, in pytree order."""
    return [v for v in pytree.tree_leaves(output) if isinstance(v, Tensor) and v.is_floating_point()]
