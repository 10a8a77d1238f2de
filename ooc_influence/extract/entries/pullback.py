"""A layer run again for one sample, and the gradient of its outputs pulled back to its parameters.

The parameters are leaves of autograd meanwhile, so whatever the layer does with them is differentiated. Where it
multiplies by one, or by a view of one (an expert's weight), the product is tapped instead: its input and its output's
gradient are handed on, and no gradient of the weight's size is made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ooc_influence.errors import UnsupportedModelError
from ooc_influence.extract.entries.calls import Call, Layout, float_leaves, part_of, running

_RIGHT = {  # operations whose last factor may be a weight (in, out): place of the other factor
    torch.matmul: 0, Tensor.matmul: 0, Tensor.__matmul__: 0, torch.mm: 0, Tensor.mm: 0, torch.bmm: 0, Tensor.bmm: 0,
    torch.addmm: 1, Tensor.addmm: 1, torch.baddbmm: 1, Tensor.baddbmm: 1,
}  # fmt: skip


class Patch(NamedTuple):
    """A weight (out, in) inside a flattened parameter.

    Attributes
    ----------
    parameter : str
        Which parameter.
    offset : int
        The place of its first entry.
    shape : (int, int)
        Outputs and inputs.
    strides : (int, int)
        How far apart entries of neighbouring outputs and inputs are.
    """

    parameter: str
    offset: int
    shape: tuple[int, int]
    strides: tuple[int, int]


Product = Callable[[Patch, Tensor, Tensor], None]


class _ProductTap(torch.autograd.Function):
    """Identity on a product; its backward hands on the factor that is no weight, and the product's gradient."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, x: Tensor, anchor: Tensor, patches: list[Patch], product: Product) -> Tensor:
        ctx.save_for_backward(x)
        ctx.patches, ctx.product = patches, product
        return output.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (delta,), (x,), patches = grads, ctx.saved_tensors, ctx.patches
        with torch.no_grad():
            if len(patches) == 1:
                xs, deltas = [x.reshape(-1, x.shape[-1])], [delta.reshape(-1, delta.shape[-1])]
            else:
                xs, deltas = list(x), list(delta)
            for patch, a, d in zip(patches, xs, deltas, strict=True):
                if len(a):
                    ctx.product(patch, a, d)
        return (delta if ctx.needs_input_grad[0] else None), None, None, None, None


class _Products(TorchFunctionMode):
    """Taps products by views of leaves."""

    def __init__(self, leaves: Mapping[str, Tensor], anchor: Tensor, product: Product) -> None:
        super().__init__()
        self._anchor, self._product = anchor, product
        self._leaves = {
            leaf.untyped_storage().data_ptr(): (name, leaf) for name, leaf in leaves.items() if leaf.is_contiguous()
        }

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        place = 0 if func is F.linear else _RIGHT.get(func)
        if place is not None and len(args) >= place + 2 and not {"alpha", "out"} & kwargs.keys():
            x, weight = args[place : place + 2]
            patches = self._patches(func, x, weight)
            if patches:
                output = func(*args[: place + 1], weight.detach(), *args[place + 2 :], **kwargs)
                if output.shape[-1] == patches[0].shape[0]:
                    return _ProductTap.apply(output, x.detach(), self._anchor, patches, self._product)
        return func(*args, **kwargs)

    def _patches(self, func: Any, x: Any, weight: Any) -> list[Patch]:
        """Return which weights a factor holds: one, or one for each of a stack; none if it is no leaf's."""
        if not isinstance(x, Tensor) or not isinstance(weight, Tensor) or not weight.requires_grad:
            return []
        name, leaf = self._leaves.get(weight.untyped_storage().data_ptr(), (None, None))
        if name is None or leaf is None or weight.dtype != leaf.dtype or weight.numel() == 0:
            return []
        if weight is not leaf and weight._base is not leaf:
            return []
        stacked = weight.dim() == x.dim() == 3 and len(weight) == len(x)
        matrices = [weight] if weight.dim() == 2 else list(weight) if stacked else []
        if func is not F.linear:
            matrices = [matrix.t() for matrix in matrices]
        first = leaf.storage_offset()
        return [Patch(name, int(m.storage_offset()) - first, tuple(m.shape), m.stride()) for m in matrices]  # type: ignore[arg-type]


def pull_back(
    module: nn.Module,
    parameters: Mapping[str, Tensor],
    call: Call,
    layout: Layout,
    deltas: list[Tensor | None],
    sample: int,
    product: Product | None = None,
) -> dict[str, Tensor]:
    """Return the gradients of a sample's part of a layer's outputs with respect to parameters.

    Parameters
    ----------
    module : nn.Module
        The layer.
    parameters : mapping of str to Tensor
        Its parameters, by name.
    call, layout
        What it was called with, and where the samples are.
    deltas : list of Tensor or None
        The gradient of each of its float outputs, in pytree order.
    sample : int
        Which sample.
    product : callable (patch, x, δ), optional
        Takes products by weights, x (t, in) and δ (t, out): the weight's gradient δᵀx is then not in what is returned.

    Returns
    -------
    dict of str to Tensor
        Of parameters that received a gradient otherwise.

    Raises
    ------
    UnsupportedModelError
        If the layer does not run for one sample.
    """
    leaves = {name: p.detach().requires_grad_() for name, p in parameters.items()}
    anchor = torch.zeros((), device=call.outputs[0].device, requires_grad=True)
    args, kwargs = part_of(call, layout.inputs, sample)
    pulled = [
        delta if delta is None or axis is None else axis.take(delta, sample, call.samples)
        for delta, axis in zip(deltas, layout.outputs, strict=True)
    ]
    try:
        with torch.enable_grad(), running(module, call):
            if product is None:
                result = torch.func.functional_call(module, leaves, args, kwargs)
            else:
                with _Products(leaves, anchor, product):
                    result = torch.func.functional_call(module, leaves, args, kwargs)
            pairs = [
                (value, delta.to(value.dtype))
                for value, delta in zip(float_leaves(result), pulled, strict=True)
                if delta is not None and value.requires_grad
            ]
            if not pairs:
                return {}
            outputs, cotangents = zip(*pairs, strict=True)
            found = torch.autograd.grad(outputs, [*leaves.values(), anchor], cotangents, allow_unused=True)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise UnsupportedModelError(
            f"expected {type(module).__name__} to run for one sample at a time; received {type(error).__name__}: "
            f"{error}: leave the layer out with modules="
        ) from error
    return {name: value for name, value in zip(leaves, found[:-1], strict=True) if value is not None}
