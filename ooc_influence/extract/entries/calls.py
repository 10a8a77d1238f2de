"""A layer's call, and which parts of its arguments and outputs belong to which sample.

A layer of any class is run again with one sample's part of its arguments. Lengths alone do not determine that part: a
table of positions may be as long as the batch. So it is found by trying: a choice of axes holds if the first and the
last sample, run by themselves, yield their part of the layer's output for the whole batch.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple, Protocol
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from ooc_influence.errors import UnsupportedModelError

_TRIES = 64  # choices of axes before a layer is given up, and again as many where large tensors disagree
_TOLERANCE = {torch.float64: 1e-7, torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}


class Call(NamedTuple):
    """A layer's call, as it was made for a batch, everything in it detached."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: list[Tensor]  # the float ones, in pytree order
    samples: int = 0  # of the batch, b; 0 until the loss is known
    autocast: torch.dtype | None = None  # the dtype of autocast, if it was on

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: list[Tensor]) -> Call:
        """Return a call, everything in it detached."""
        detached: Any = pytree.tree_map(_detached, (args, kwargs))
        device = outputs[0].device.type if outputs else "cpu"
        cast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        return cls(detached[0], detached[1], [output.detach() for output in outputs], 0, cast)

    def tensors(self) -> list[Tensor]:
        """Return the tensors among the arguments, in pytree order."""
        return [v for v in pytree.tree_leaves((self.args, self.kwargs)) if isinstance(v, Tensor)]

    def shapes(self) -> str:
        """Return the shapes of arguments and outputs in words."""
        inputs, outputs = (", ".join(str(tuple(v.shape)) for v in values) for values in (self.tensors(), self.outputs))
        return f"arguments of shape {inputs} and outputs of shape {outputs}, no part of which is one sample's alone"


def _detached(value: Any) -> Any:
    """Return an argument as it is kept; not Hugging Face's caches, which the call has filled by then."""
    if isinstance(value, Tensor):
        return value.detach()
    return None if any(kind.__name__ == "Cache" for kind in type(value).__mro__) else value


class Part(Protocol):
    """Where each sample's part of a tensor is."""

    def take(self, value: Tensor, sample: int, b: int) -> Tensor:
        """Return the part of one of ``b`` samples, as a batch of one."""
        ...

    def reached(self, value: Tensor, b: int) -> Tensor:
        """Return which samples' parts hold a finite number that is not zero, (b,) bool."""
        ...


class Axis(NamedTuple):
    """Where a tensor's samples are: on an axis, one after the other, or (groups, samples, ...) folded into axis 0."""

    axis: int
    groups: int = 1

    def take(self, value: Tensor, sample: int, b: int) -> Tensor:
        """Return the part of one sample."""
        if self.groups > 1:
            return value.reshape(self.groups, b, -1, *value.shape[1:])[:, sample].flatten(0, 1)
        length = value.shape[self.axis] // b
        return value.narrow(self.axis, sample * length, length)

    def reached(self, value: Tensor, b: int) -> Tensor:
        """Return which samples' parts hold a finite number other than zero, (b,) bool."""
        nonzero = (value != 0) & value.isfinite()
        if self.groups > 1:
            return nonzero.reshape(self.groups, b, -1).any(2).any(0)
        return nonzero.movedim(self.axis, 0).reshape(b, -1).any(1)


class Layout(NamedTuple):
    """Where the samples are in a call's tensors, in pytree order; None for a tensor that all samples share."""

    inputs: tuple[Part | None, ...]  # of the tensors among the arguments
    outputs: tuple[Part | None, ...]  # of the float outputs; None only in a batch of one sample


_layouts_of: WeakKeyDictionary[nn.Module, dict[Any, Layout | None]] = WeakKeyDictionary()


def float_leaves(output: Any) -> list[Tensor]:
    """Return the float tensors of a layer's output, in pytree order."""
    return [v for v in pytree.tree_leaves(output) if isinstance(v, Tensor) and v.is_floating_point()]


def find_layout(
    module: nn.Module, call: Call, groups: int = 1, accept: Callable[[Layout], bool] | None = None
) -> Layout | None:
    """Return where a call's samples are; None if no choice of axes yields each sample's output from its part.

    Axis 0 may be folded into ``groups`` before the samples: experts that each see all tokens. A layout that ``accept``
    takes is searched for again, and remembered if there is one.
    """
    b, tensors = call.samples, call.tensors()
    if b == 1:
        return Layout((None,) * len(tensors), (None,) * len(call.outputs))
    inputs = [_options(value, b, groups) for value in tensors]
    outputs = [_options(value, b, groups) for value in call.outputs]
    if not any(inputs) or not all(outputs):
        return None
    spec = str(pytree.tree_structure((call.args, call.kwargs)))
    one_each = tuple(value.dim() > 0 and len(value) == b for value in tensors)
    key = (spec, *(tuple(axes) for axes in inputs), *(tuple(axes) for axes in outputs), one_each)
    layouts = _layouts_of.setdefault(module, {})
    if key not in layouts or accept is not None:
        earlier = list(dict.fromkeys(layout for layout in layouts.values() if layout is not None))
        valid = _valid_layouts(module, call, inputs, outputs, earlier)
        layout = next((layout for layout in valid if accept is None or accept(layout)), None)
        if layout is None and accept is not None:
            return None
        layouts[key] = layout
    return layouts[key]


def _options(value: Tensor, b: int, groups: int) -> list[Axis]:
    axes = []
    if value.dim() and len(value) and len(value) % b == 0:
        axes.append(Axis(0))
    if groups > 1 and value.dim() and len(value) and len(value) % (b * groups) == 0:
        axes.append(Axis(0, groups))
    if value.dim() > 1 and value.shape[1] == b:
        axes.append(Axis(1))
    return axes


def _valid_layouts(
    module: nn.Module, call: Call, inputs: list[list[Axis]], outputs: list[list[Axis]], earlier: list[Layout]
) -> Iterator[Layout]:
    """Yield the layouts that hold: those of earlier calls first, for lengths may agree in several ways."""
    with torch.no_grad(), running(module, call):
        whole = float_leaves(module(*call.args, **call.kwargs))  # again: the model may have changed its output in place
    for layout in earlier:
        if _possible(layout.inputs, inputs) and _possible(layout.outputs, outputs):
            fixed: Any = [[axis] for axis in layout.outputs]
            if all(_matching_axes(module, call, layout.inputs, whole, fixed)):
                yield layout
    for choice in _choices(call, inputs):
        matching = _matching_axes(module, call, choice, whole, outputs)
        for axes in itertools.islice(itertools.product(*matching), _TRIES):
            yield Layout(choice, axes)


def _possible(parts: tuple[Part | None, ...], options: list[list[Axis]]) -> bool:
    fits = (part is None or part in axes for part, axes in zip(parts, options, strict=False))
    return len(parts) == len(options) and all(fits)


def _matching_axes(
    module: nn.Module, call: Call, inputs: tuple[Part | None, ...], whole: list[Tensor], outputs: list[list[Axis]]
) -> list[list[Axis]]:
    """Return the axes on which each output's parts of the first and last sample are what the layer yields for these."""
    with torch.no_grad(), running(module, call):
        for sample in (0, call.samples - 1):
            args, kwargs = part_of(call, inputs, sample)
            try:
                alone = float_leaves(module(*args, **kwargs))
            except Exception:  # a layer may raise anything when given what it does not expect
                return [[] for _ in outputs]
            if len(alone) != len(whole):
                return [[] for _ in outputs]
            outputs = [
                [axis for axis in axes if _alike(axis.take(value, sample, call.samples), part)]
                for value, part, axes in zip(whole, alone, outputs, strict=True)
            ]
    return outputs


def _choices(call: Call, options: list[list[Axis]]) -> Iterator[tuple[Axis | None, ...]]:
    """Yield choices of an axis for each tensor, from the most to the least likely.

    First those that tensors of three axes and more, such as query, key and value, agree on.
    """
    b, lengths = call.samples, {len(value) for value in call.outputs}
    likely: list[list[Axis | None]] = []
    for value, axes in zip(call.tensors(), options, strict=True):
        folded = Axis(0) in axes and len(value) > b and len(value) not in lengths
        likely.append([None, *axes] if folded else [*axes, None])
    large = [index for index, value in enumerate(call.tensors()) if value.dim() > 2 and len(likely[index]) > 1]
    agreed = list(dict.fromkeys(axis for index in large for axis in likely[index]))
    together = [{i: axis if axis in likely[i] else None for i in large} for axis in agreed]
    apart: list[list[dict[int, Axis | None]]] = [[{i: axis} for axis in axes] for i, axes in enumerate(likely)]
    small = [unit for index, unit in enumerate(apart) if index not in large]
    seen = set()
    for units in ([together, *small] if large else small, apart):
        for axes_of in itertools.islice(_by_deviation(units), _TRIES):
            choice = tuple(axes_of[index] for index in range(len(likely)))
            if any(choice) and choice not in seen:
                seen.add(choice)
                yield choice


def _by_deviation(units: list[list[dict[int, Axis | None]]]) -> Iterator[dict[int, Axis | None]]:
    """Yield one option of each unit, joined: the first of all, then those where one unit deviates, then two, ..."""
    for count in range(len(units) + 1):
        for deviating in itertools.combinations(range(len(units)), count):
            for options in itertools.product(*(units[index][1:] for index in deviating)):
                chosen = dict(zip(deviating, options, strict=True))
                joined: dict[int, Axis | None] = {}
                for index, unit in enumerate(units):
                    joined |= chosen.get(index, unit[0])
                yield joined


def _alike(expected: Tensor, received: Tensor) -> bool:
    if expected.shape != received.shape or expected.dtype != received.dtype:
        return False
    finite = expected.isfinite()
    scale = float(expected[finite].abs().max()) if bool(finite.any()) else 0.0
    tolerance = _TOLERANCE.get(expected.dtype, 5e-2) * scale
    return torch.allclose(expected.float(), received.float(), rtol=0.0, atol=tolerance, equal_nan=True)


def part_of(call: Call, inputs: tuple[Part | None, ...], sample: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of one sample."""
    leaves, spec = pytree.tree_flatten((call.args, call.kwargs))
    axes = iter(inputs)

    def part(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        axis = next(axes)
        return leaf if axis is None else axis.take(leaf, sample, call.samples)

    args, kwargs = pytree.tree_unflatten([part(leaf) for leaf in leaves], spec)
    return args, kwargs


@contextmanager
def running(module: nn.Module, call: Call) -> Iterator[None]:
    """Run a layer again as it ran in the model, with its autocast, but experts one at a time and without cuDNN's RNNs.

    Other implementations of Hugging Face's experts copy weights for every token; cuDNN does not differentiate a
    recurrent layer in evaluation mode.
    """
    config: Any = getattr(module, "config", None)
    internal = hasattr(config, "_experts_implementation_internal")  # the other one also sets configurations inside
    name = "_experts_implementation_internal" if internal else "_experts_implementation"
    implementation = getattr(config, name, None)
    device = call.outputs[0].device.type if call.outputs else "cpu"
    cast: AbstractContextManager[Any] = nullcontext()
    if call.autocast is not None:
        cast = torch.autocast(device, call.autocast)
    plain = torch.backends.cudnn.flags(enabled=False) if isinstance(module, nn.RNNBase) else nullcontext()
    if implementation is not None:
        setattr(config, name, "eager")
    try:
        with cast, plain:
            yield
    finally:
        if implementation is not None:
            setattr(config, name, implementation)


_RIGHT = {  # operations whose last factor may be a weight (in, out): index of the other factor
    torch.matmul: 0, Tensor.matmul: 0, Tensor.__matmul__: 0, torch.mm: 0, Tensor.mm: 0, torch.bmm: 0, Tensor.bmm: 0,
    torch.addmm: 1, Tensor.addmm: 1, torch.baddbmm: 1, Tensor.baddbmm: 1,
}  # fmt: skip


class Patch(NamedTuple):
    """A weight (out, in) inside a flattened parameter."""

    parameter: str
    offset: int  # of its first entry
    shape: tuple[int, int]  # outputs, inputs
    strides: tuple[int, int]  # distances of entries of neighbouring outputs and inputs


Product = Callable[[Patch, Tensor, Tensor], None]


class _ProductTap(torch.autograd.Function):
    """Identity on a product; its backward reports the factor that is not the weight, and the product's gradient."""

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
        index = 0 if func is F.linear else _RIGHT.get(func)
        if index is not None and len(args) >= index + 2 and not {"alpha", "out"} & kwargs.keys():
            x, weight = args[index : index + 2]
            patches = self._patches(func, x, weight)
            if patches:
                output = func(*args[: index + 1], weight.detach(), *args[index + 2 :], **kwargs)
                if output.shape[-1] == patches[0].shape[0]:
                    return _ProductTap.apply(output, x.detach(), self._anchor, patches, self._product)
        return func(*args, **kwargs)

    def _patches(self, func: Any, x: Any, weight: Any) -> list[Patch]:
        """Return which weights a factor holds: one, or one for each of a stack; none if it is not a leaf's."""
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
    """Return the gradients of a sample's part of a layer's outputs with respect to parameters, where there are any.

    Parameters
    ----------
    module, parameters, call, layout
        The layer, its parameters by name, its call, and where the samples are.
    deltas : list of Tensor or None
        The gradient of each of its float outputs, in pytree order.
    sample : int
        Which sample.
    product : callable (patch, x, δ), optional
        Takes products by weights, x (t, in) and δ (t, out): the weight's gradient δᵀx is then not returned.
    """
    leaves = {name: p.detach().requires_grad_() for name, p in parameters.items()}
    anchor = torch.zeros((), device=call.outputs[0].device, requires_grad=True)
    args, kwargs = part_of(call, layout.inputs, sample)
    pulled = [
        delta if delta is None or axis is None else axis.take(delta, sample, call.samples)
        for delta, axis in zip(deltas, layout.outputs, strict=True)
    ]
    tapping = nullcontext() if product is None else _Products(leaves, anchor, product)
    try:
        with torch.enable_grad(), running(module, call):
            with tapping:
                result = torch.func.functional_call(module, leaves, args, kwargs)
            pairs = [
                (value, delta.to(value.dtype))
                for value, delta in zip(float_leaves(result), pulled, strict=True)
                if delta is not None and value.requires_grad
            ]
            if not pairs:
                return {}
            outputs, cotangents = zip(*pairs, strict=True)
            gradients = torch.autograd.grad(outputs, [*leaves.values(), anchor], cotangents, allow_unused=True)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise UnsupportedModelError(
            f"expected {type(module).__name__} to run for one sample at a time; received {type(error).__name__}: "
            f"{error}: leave the layer out with modules="
        ) from error
    return {name: value for name, value in zip(leaves, gradients[:-1], strict=True) if value is not None}
