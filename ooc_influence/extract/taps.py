"""Taps on a model's layers: one forward and one activation-only backward give every kept entry of every sample.

Each tapped layer's output passes through an identity in autograd that keeps the layer's input and, in the backward
pass, hands input and output gradient to the gather. No parameter requires a gradient meanwhile, so autograd computes
activation gradients only, and none below the first tapped layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ooc_influence.errors import InputError, UnsupportedModelError
from ooc_influence.extract.gather import EntryGather
from ooc_influence.store import Mask

PerSampleLoss = Callable[[Any, Any], Tensor]


class _Tap(torch.autograd.Function):
    """Identity on a layer's output; its backward reports the layer's input and its output's gradient."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, x: Tensor, anchor: Tensor, taps: GradientTaps, number: int) -> Tensor:
        ctx.save_for_backward(x)  # not an attribute: autograd then notices if the model changes x in place
        ctx.taps, ctx.number = taps, number
        ctx.set_materialize_grads(False)
        return output.detach()  # no copy, and not a view to autograd: models may change it in place

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (delta,) = grads
        if delta is not None:
            (x,) = ctx.saved_tensors
            ctx.taps.receive(ctx.number, x, delta)
        return (delta if ctx.needs_input_grad[0] else None), None, None, None, None


class GradientTaps:
    """Sampled per-sample gradients of a tapped model; made by :func:`tapped`.

    Parameters
    ----------
    mask : Mask
        The kept entries, k in all.
    device : torch.device
        Where batches go and rows are gathered.

    Attributes
    ----------
    silent : set of str
        Tapped layers that have not received a gradient so far.
    """

    def __init__(self, mask: Mask, device: torch.device) -> None:
        self._mask, self._device = mask, device
        self._gathers = [EntryGather(module, device) for module in mask.modules]
        self._starts = [0]
        for gather in self._gathers:
            self._starts.append(self._starts[-1] + gather.entries)
        self._names = [module.layer.name for module in mask.modules]
        self._anchor = torch.zeros((), device=device, requires_grad=True)
        self._rows = torch.empty(0)
        self._probing = False
        self.silent = {name for name, gather in zip(self._names, self._gathers, strict=True) if gather.entries}

    def hook(self, number: int) -> Callable[..., Tensor]:
        """Return the forward hook of tapped layer ``number``."""

        def forward_hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
            if not torch.is_grad_enabled():
                return output
            x = args[0] if args else kwargs["input"]
            result: Tensor = _Tap.apply(output, x, self._anchor, self, number)
            return result

        return forward_hook

    def receive(self, number: int, x: Tensor, delta: Tensor) -> None:
        """Take layer ``number``'s input (b, ..., in) and output gradient (b, ..., out); calls add up."""
        b = len(self._rows)
        name = self._names[number] or "(the model)"
        if x.dim() < 2 or x.shape[0] != b:
            raise UnsupportedModelError(
                f"expected layer {name!r} to see a batch of {b} samples on axis 0; received an input of shape "
                f"{tuple(x.shape)}: leave the layer out with modules=, or keep the batch on axis 0"
            )
        with torch.no_grad():
            if self._probing:
                if b > 1 and bool((delta[1:] != 0).any()):
                    raise UnsupportedModelError(
                        f"expected each sample's loss to depend on that sample alone; received a gradient of sample "
                        f"0's loss in other samples at layer {name!r}: remove what mixes samples in a batch"
                    )
                return
            self.silent.discard(self._names[number])
            columns = slice(self._starts[number], self._starts[number + 1])
            entries = self._gathers[number](x.reshape(b, -1, x.shape[-1]), delta.reshape(b, -1, delta.shape[-1]))
            self._rows[:, columns] += entries

    def rows(
        self, model: nn.Module, per_sample_loss: PerSampleLoss, batch: Any, *, size: int | None = None, probe: bool
    ) -> tuple[Tensor, Tensor]:
        """Return the losses (b,) and the compressed gradients (b, k) float32 of a batch on the device.

        Parameters
        ----------
        size : int or None
            Samples of the batch, where known.
        probe : bool
            Also check that samples do not influence each other (one more backward pass).

        Raises
        ------
        InputError
            If the loss is not a (b,) tensor that depends on a tapped layer.
        UnsupportedModelError
            If samples mix, or a layer does not keep the batch on axis 0.
        """
        with torch.enable_grad():
            losses = per_sample_loss(model, batch)
            if not isinstance(losses, Tensor) or losses.dim() != 1 or not losses.is_floating_point():
                received = f"shape {tuple(losses.shape)}" if isinstance(losses, Tensor) else type(losses).__name__
                raise InputError(
                    f"expected per_sample_loss to return a float tensor of shape (b,); received {received}: "
                    "return one loss a sample (reduction='none'), not their mean"
                )
            if not losses.requires_grad:
                raise InputError(
                    "expected the loss to depend on a tapped layer; received one that does not: it was detached, "
                    "computed under no_grad, or the selected layers are not used"
                )
            if size is not None and size != len(losses):
                raise InputError(
                    f"expected one loss for each of the batch's {size} samples; received {len(losses)}: the first "
                    "tensor of a batch must have one entry a sample on axis 0"
                )
            self._rows = torch.zeros((len(losses), self._mask.k), device=self._device)
            if probe and len(losses) > 1:
                self._probing = True
                try:
                    torch.autograd.grad(losses[0], self._anchor, retain_graph=True, allow_unused=True)
                finally:
                    self._probing = False
            torch.autograd.grad(losses.sum(), self._anchor, allow_unused=True)
        rows, self._rows = self._rows, torch.empty(0)
        return losses.detach(), rows


@contextmanager
def tapped(model: nn.Module, mask: Mask, device: torch.device) -> Iterator[GradientTaps]:
    """Tap a model, in evaluation mode; afterwards it is as it was, also after an error.

    Hooks, ``requires_grad`` flags, training modes, the device and torch's fused attention switch are put back;
    ``.grad`` is never touched.
    """
    modules = dict(model.named_modules())
    training = {module: module.training for module in model.modules()}
    required = {parameter: parameter.requires_grad for parameter in model.parameters()}
    home = next(iter(required)).device
    fused = torch.backends.mha.get_fastpath_enabled()
    handles: list[Any] = []
    try:
        if home != device:
            model.to(device)
        torch.backends.mha.set_fastpath_enabled(False)  # the fused encoder layer does not call its linear layers
        model.eval()
        for parameter in required:
            parameter.requires_grad_(False)
        taps = GradientTaps(mask, device)
        for number, module in enumerate(mask.modules):
            if len(module.rows):
                handles.append(
                    modules[module.layer.name].register_forward_hook(taps.hook(number), prepend=True, with_kwargs=True)
                )
        yield taps
    finally:
        for handle in handles:
            handle.remove()
        for parameter, flag in required.items():
            parameter.requires_grad_(flag)
        for target, mode in training.items():
            target.training = mode
        torch.backends.mha.set_fastpath_enabled(fused)
        if home != device:
            model.to(home)


def parameter_sequence(model: nn.Module) -> Sequence[nn.Parameter]:
    """Return the model's parameters.

    Raises
    ------
    UnsupportedModelError
        If it has none.
    """
    parameters = list(model.parameters())
    if not parameters:
        raise UnsupportedModelError("expected a model with parameters; received one without")
    return parameters
