"""Taps on a model's layers: one forward and one activation-only backward give every kept entry of every sample.

Each tapped layer's output passes through an identity in autograd that keeps the layer's input and, in the backward
pass, hands input and output gradient to the gather. No parameter requires a gradient meanwhile, so autograd computes
activation gradients only, and none below the first tapped layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
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
    probe : bool
        Check on the first batch of several samples that they do not influence each other.

    Attributes
    ----------
    silent : set of str
        Tapped layers that have not received a gradient so far.
    """

    def __init__(self, mask: Mask, device: torch.device, *, probe: bool = False) -> None:
        self._mask, self._device = mask, device
        self._probe_pending = probe
        self._gathers = [EntryGather(module, device) for module in mask.modules]
        self._starts = [0]
        for gather in self._gathers:
            self._starts.append(self._starts[-1] + gather.entries)
        self._names = [module.layer.name for module in mask.modules]
        self._anchor = torch.zeros((), device=device, requires_grad=True)
        self._rows = torch.empty(0)
        self._probed: int | None = None
        self._active = False
        self._tapped = {name for name, gather in zip(self._names, self._gathers, strict=True) if gather.entries}
        self.silent = set(self._tapped)

    @property
    def all_silent(self) -> bool:
        """Whether no tapped layer has received a gradient so far."""
        return self.silent == self._tapped

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
        if not self._active:
            raise UnsupportedModelError(
                "expected a loss without gradients inside it; received one that differentiates the model: gradients "
                "of such losses need second derivatives"
            )
        b = len(self._rows)
        name = self._names[number] or "(the model)"
        if x.dim() < 2 or x.shape[0] != b:
            raise UnsupportedModelError(
                f"expected layer {name!r} to see a batch of {b} samples on axis 0; received an input of shape "
                f"{tuple(x.shape)}: leave the layer out with modules=, or keep the batch on axis 0"
            )
        with torch.no_grad():
            if self._probed is not None:
                reached = ((delta != 0) & delta.isfinite()).reshape(b, -1).any(1)
                reached[self._probed] = False
                if bool(reached.any()):
                    raise UnsupportedModelError(
                        f"expected each sample's loss to depend on that sample alone; received a gradient of sample "
                        f"{self._probed}'s loss at another place of axis 0 at layer {name!r}: remove what mixes "
                        "samples in a batch, or leave the layer out with modules="
                    )
                return
            self.silent.discard(self._names[number])
            columns = slice(self._starts[number], self._starts[number + 1])
            entries = self._gathers[number](x.reshape(b, -1, x.shape[-1]), delta.reshape(b, -1, delta.shape[-1]))
            self._rows[:, columns] += entries

    def losses(self, model: nn.Module, per_sample_loss: PerSampleLoss, batch: Any) -> Tensor:
        """Return the losses (b,) of a batch on the device, without gradients.

        Raises
        ------
        InputError
            If they are not a (b,) tensor.
        """
        with torch.inference_mode(False), torch.no_grad():
            return _check_losses(per_sample_loss(model, batch))

    def rows(self, model: nn.Module, per_sample_loss: PerSampleLoss, batch: Any) -> tuple[Tensor, Tensor]:
        """Return the losses (b,) and the compressed gradients (b, k) float32 of a batch on the device.

        Raises
        ------
        InputError
            If the loss is not a (b,) tensor that depends on a tapped layer.
        UnsupportedModelError
            If samples mix, a layer does not keep the batch on axis 0, or the loss differentiates the model.
        """
        with torch.inference_mode(False), torch.enable_grad():
            losses = _check_losses(per_sample_loss(model, batch))
            if not losses.requires_grad:
                raise InputError(
                    "expected the loss to depend on a tapped layer; received one that does not: it was detached, "
                    "computed under no_grad, or the selected layers are not used"
                )
            self._rows = torch.zeros((len(losses), self._mask.k), device=self._device)
            if self._probe_pending and len(losses) > 1:
                for sample in (0, len(losses) - 1):  # both ends: some models mix one way only
                    self._probed = sample
                    self._backward(losses[sample], keep_graph=True)
                self._probed, self._probe_pending = None, False
            self._backward(losses.sum(), keep_graph=False)
        rows, self._rows = self._rows, torch.empty(0)
        return losses.detach(), rows

    def _backward(self, value: Tensor, *, keep_graph: bool) -> None:
        self._active = True
        try:
            torch.autograd.grad(value, self._anchor, retain_graph=keep_graph, allow_unused=True)
        except RuntimeError as error:
            if "use_reentrant" not in str(error):
                raise
            raise UnsupportedModelError(
                "expected gradient checkpointing with use_reentrant=False; received the reentrant form, which cannot "
                "be differentiated with torch.autograd.grad: change it, or switch checkpointing off"
            ) from error
        finally:
            self._active = False


def _check_losses(losses: Any) -> Tensor:
    if not isinstance(losses, Tensor) or losses.dim() != 1 or not losses.is_floating_point():
        received = f"shape {tuple(losses.shape)}" if isinstance(losses, Tensor) else type(losses).__name__
        raise InputError(
            f"expected per_sample_loss to return a float tensor of shape (b,); received {received}: return one loss a "
            "sample (reduction='none'), not their mean"
        )
    return losses


@contextmanager
def tapped(model: nn.Module, mask: Mask, device: torch.device, *, probe: bool = False) -> Iterator[GradientTaps]:
    """Tap a model, in evaluation mode; afterwards it is as it was, also after an error.

    Hooks, ``requires_grad`` flags, training modes, the device and torch's fused attention switch are put back;
    ``.grad`` is never touched.

    Raises
    ------
    UnsupportedModelError
        For a model made in inference mode, which autograd cannot follow.
    """
    parameters = parameter_sequence(model)
    if any(parameter.is_inference() for parameter in parameters):
        raise UnsupportedModelError(
            "expected a model made outside torch.inference_mode; received one made inside: load it outside"
        )
    modules = dict(model.named_modules())
    home = parameters[0].device
    with ExitStack() as undo:
        undo.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
        for module in modules.values():
            undo.callback(setattr, module, "training", module.training)
        if home != device:
            undo.callback(model.to, home)
            model.to(device)
        torch.backends.mha.set_fastpath_enabled(False)  # the fused encoder layer does not call its linear layers
        model.eval()
        for parameter in parameters:
            undo.callback(parameter.requires_grad_, parameter.requires_grad)
            parameter.requires_grad_(False)
        taps = GradientTaps(mask, device, probe=probe)
        for number, kept in enumerate(mask.modules):
            if len(kept.rows):
                hook = modules[kept.layer.name].register_forward_hook(taps.hook(number), prepend=True, with_kwargs=True)
                undo.callback(hook.remove)
        yield taps


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
