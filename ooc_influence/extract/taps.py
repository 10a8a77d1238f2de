"""Taps on a model's layers: one forward and one activation-only backward show every layer's input and output gradient.

Each tapped layer's output passes through an identity in autograd that keeps the layer's input and, in the backward
pass, hands input and output gradient to a receiver. No parameter requires a gradient meanwhile, so autograd computes
activation gradients only, and none below the first tapped layer.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ooc_influence.errors import InputError, UnsupportedModelError
from ooc_influence.extract.batching import batch_size
from ooc_influence.extract.entries import FuncEntries, float_leaves
from ooc_influence.extract.entries.embedding import EmbeddingEntries
from ooc_influence.extract.layers import Use, find_uses
from ooc_influence.store import LayerShape

PerSampleLoss = Callable[[Any, Any], Tensor]
Receiver = Callable[[Use, Any, Any], None]


class _Tap(torch.autograd.Function):
    """Identity on a layer's output; its backward reports the layer's input and its output's gradient."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, x: Tensor, anchor: Tensor, taps: Taps, use: Use) -> Tensor:
        ctx.save_for_backward(x)  # not an attribute: autograd then notices if the model changes x in place
        ctx.taps, ctx.use = taps, use
        ctx.set_materialize_grads(False)
        return output.detach()  # no copy, and not a view to autograd: models may change it in place

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (delta,) = grads
        if delta is not None:
            (x,) = ctx.saved_tensors
            ctx.taps.receive(ctx.use, x, delta)
        return (delta if ctx.needs_input_grad[0] else None), None, None, None, None


class _ArgumentTap(torch.autograd.Function):
    """The same for a layer that is run again: any arguments, any number of outputs."""

    @staticmethod
    def forward(ctx: Any, arguments: Any, anchor: Tensor, taps: Taps, use: Use, *outputs: Tensor) -> Any:
        ctx.arguments, ctx.taps, ctx.use = arguments, taps, use
        ctx.set_materialize_grads(False)
        return tuple(output.detach() for output in outputs)

    @staticmethod
    def backward(ctx: Any, *deltas: Any) -> Any:
        if any(delta is not None for delta in deltas):
            ctx.taps.receive(ctx.use, ctx.arguments, list(deltas))
        return (None, None, None, None, *deltas)


class Taps:
    """A tapped model; made by :func:`tapped`.

    Attributes
    ----------
    silent : set of str
        Tapped layers that have not received a gradient so far.
    """

    def __init__(self, model: nn.Module, uses: Sequence[Use], device: torch.device, *, probe: bool) -> None:
        self._model, self._probe_pending = model, probe
        self._anchor = torch.zeros((), device=device, requires_grad=True)
        self._receiver: Receiver | None = None
        self._paused = False  # while a receiver runs a layer again
        self._size = 0  # samples of the batch
        self._size_told: bool | None = None  # whether a batch's first tensor tells its size
        self._shared_inputs: set[int] = set()  # uses whose input has no batch axis: positions
        self._embeds = any(use.kind is EmbeddingEntries for use in uses)
        self._tapped = {use.shape.name for use in uses}
        self.silent = set(self._tapped)

    @property
    def all_silent(self) -> bool:
        """Whether no tapped layer has received a gradient so far."""
        return self.silent == self._tapped

    def hook(self, number: int, use: Use) -> Callable[..., Any]:
        """Return the forward hook of a tapped module."""

        def forward_hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            if self._paused or not torch.is_grad_enabled():
                return output
            if use.kind is FuncEntries:
                return self._tap_arguments(use, (args, kwargs), output)
            x = args[0] if args else next(iter(kwargs.values()))
            if use.kind is EmbeddingEntries:
                x, output = self._spread(number, x, output)
            return _Tap.apply(output, x, self._anchor, self, use)

        return forward_hook

    def _tap_arguments(self, use: Use, arguments: Any, output: Any) -> Any:
        leaves, spec = pytree.tree_flatten(output)
        floats = float_leaves(output)
        kept = pytree.tree_map(lambda v: v.detach() if isinstance(v, Tensor) else v, arguments)
        tapped = iter(_ArgumentTap.apply(kept, self._anchor, self, use, *floats))
        return pytree.tree_unflatten([next(tapped) if any(v is f for f in floats) else v for v in leaves], spec)

    def _spread(self, number: int, x: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
        """Give every sample its own copy of positions that all of them share, so that gradients come apart."""
        alone = x.dim() == 1 or (x.dim() == 2 and x.shape[0] == 1)
        if number not in self._shared_inputs:
            if not alone or x.shape[0] == self._size:
                return x, output
            self._shared_inputs.add(number)
        if x.dim() == 1:
            x, output = x.unsqueeze(0), output.unsqueeze(0)
        return x.expand(self._size, *x.shape[1:]), output.expand(self._size, *output.shape[1:])

    def receive(self, use: Use, x: Any, delta: Any) -> None:
        """Take a layer's input and output gradient; calls add up."""
        if self._receiver is None:
            raise UnsupportedModelError(
                "expected a loss without gradients inside it; received one that differentiates the model: gradients "
                "of such losses need second derivatives"
            )
        if use.kind.flattens and x.dim() == 2 and len(x) > self._size and len(x) % self._size == 0:
            x, delta = x.view(self._size, -1, x.shape[-1]), delta.reshape(self._size, -1, delta.shape[-1])
        if not use.kind.batched(use.module, x, delta, self._size):
            shape = tuple(x.shape) if isinstance(x, Tensor) else "other than that"
            raise UnsupportedModelError(
                f"expected layer {use.name!r} to see a batch of {self._size} samples on axis 0; received an input of "
                f"shape {shape}: leave the layer out with modules=, or keep the batch on axis 0"
            )
        self._paused = True
        try:
            with torch.no_grad():
                self._receiver(use, x, delta)
        finally:
            self._paused = False
        self.silent.discard(use.shape.name)

    def losses(self, per_sample_loss: PerSampleLoss, batch: Any) -> Tensor:
        """Return the losses (b,) of a batch on the device, without gradients.

        Raises
        ------
        InputError
            If they are not a (b,) tensor.
        """
        with torch.inference_mode(False), torch.no_grad():
            return _check_losses(per_sample_loss(self._model, batch))

    def run(self, per_sample_loss: PerSampleLoss, batch: Any, receiver: Callable[[int], Receiver]) -> Tensor:
        """Run a batch forwards and backwards and return its losses (b,).

        Parameters
        ----------
        per_sample_loss : callable (model, batch) -> (b,)
            The loss.
        batch : any
            On the device.
        receiver : callable b -> callable (use, x, δ)
            Makes what every layer's input and output gradient are handed to.

        Raises
        ------
        InputError
            If the loss is not a (b,) tensor that depends on a tapped layer.
        UnsupportedModelError
            If samples mix, a layer does not keep the batch on axis 0, or the loss differentiates the model.
        """
        with torch.inference_mode(False), torch.enable_grad():
            self._size = self._expected_size(per_sample_loss, batch)
            losses = _check_losses(per_sample_loss(self._model, batch))
            self._size = len(losses)
            if not losses.requires_grad:
                raise InputError(
                    "expected the loss to depend on a tapped layer; received one that does not: it was detached, "
                    "computed under no_grad, or the selected layers are not used"
                )
            if self._probe_pending and len(losses) > 1:
                for sample in (0, len(losses) - 1):  # both ends: some models mix one way only
                    self._backward(losses[sample], _probe(sample, len(losses)), keep_graph=True)
                self._probe_pending = False
                self.silent = set(self._tapped)
            self._backward(losses.sum(), receiver(len(losses)), keep_graph=False)
        return losses.detach()

    def _expected_size(self, per_sample_loss: PerSampleLoss, batch: Any) -> int:
        """Return the samples of a batch, before the model has run, for models that look up positions."""
        told = batch_size(batch) or 0
        if not self._embeds or (self._size_told and told):
            return told
        losses = self.losses(per_sample_loss, batch)
        if self._size_told is None:
            self._size_told = told == len(losses)
        return len(losses)

    def _backward(self, value: Tensor, receiver: Receiver, *, keep_graph: bool) -> None:
        self._receiver = receiver
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
            self._receiver = None


def _probe(sample: int, b: int) -> Receiver:
    """Return a receiver that checks that one sample's loss depends on that sample alone."""

    def receive(use: Use, x: Any, delta: Any) -> None:
        for part in delta if isinstance(delta, list) else [delta]:
            if part is None:
                continue
            reached = ((part != 0) & part.isfinite()).reshape(b, -1).any(1)
            reached[sample] = False
            if bool(reached.any()):
                raise UnsupportedModelError(
                    f"expected each sample's loss to depend on that sample alone; received a gradient of sample "
                    f"{sample}'s loss at another place of axis 0 at layer {use.name!r}: remove what mixes samples in "
                    "a batch, or leave the layer out with modules="
                )

    return receive


def _check_losses(losses: Any) -> Tensor:
    if not isinstance(losses, Tensor) or losses.dim() != 1 or not losses.is_floating_point():
        received = f"shape {tuple(losses.shape)}" if isinstance(losses, Tensor) else type(losses).__name__
        raise InputError(
            f"expected per_sample_loss to return a float tensor of shape (b,); received {received}: return one loss a "
            "sample (reduction='none'), not their mean"
        )
    return losses


@contextmanager
def tapped(
    model: nn.Module,
    layers: Sequence[LayerShape],
    device: torch.device,
    *,
    skip: Container[int] = (),
    probe: bool = False,
) -> Iterator[Taps]:
    """Tap layers of a model, in evaluation mode; afterwards it is as it was, also after an error.

    Hooks, ``requires_grad`` flags, training modes, the device and torch's fused attention switch are put back;
    ``.grad`` is never touched. A compiled model runs uncompiled meanwhile: compiled code would not call the hooks.

    Parameters
    ----------
    model : nn.Module
        The model.
    layers : sequence of LayerShape
        What to tap.
    device : torch.device
        Where to run.
    skip : container of int
        Layers to leave alone, by their number: those nothing is kept of.
    probe : bool
        Check on the first batch of several samples that they do not influence each other.

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
    uses = [use for use in find_uses(model, layers) if use.layer not in skip]
    home = parameters[0].device
    with ExitStack() as undo:
        undo.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
        for module in model.modules():
            undo.callback(setattr, module, "training", module.training)
        if home != device:
            undo.callback(model.to, home)
            model.to(device)
        torch.backends.mha.set_fastpath_enabled(False)  # the fused encoder layer does not call its linear layers
        for context in _wrapper_contexts(model):
            undo.enter_context(context)
        model.eval()
        for parameter in parameters:
            undo.callback(parameter.requires_grad_, parameter.requires_grad)
            parameter.requires_grad_(False)
        taps = Taps(model, uses, device, probe=probe)
        for number, use in enumerate(uses):
            hook = use.module.register_forward_hook(taps.hook(number, use), prepend=True, with_kwargs=True)
            undo.callback(hook.remove)
        yield taps


def _wrapper_contexts(model: nn.Module) -> Iterable[AbstractContextManager[Any]]:
    """Yield contexts in which compiled models run uncompiled and DDP does not wait for gradients."""
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
        raise UnsupportedModelError(
            "expected a model sharded with torch.distributed.fsdp.fully_shard; received FullyShardedDataParallel, "
            "whose weights are gone in a backward pass without weight gradients: wrap it with fully_shard"
        )
    compiled = any(hasattr(m, "_orig_mod") or m._compiled_call_impl is not None for m in model.modules())
    if compiled:
        set_stance = getattr(torch.compiler, "set_stance", None)
        if set_stance is None:
            raise UnsupportedModelError(
                "expected PyTorch >= 2.6 to tap a compiled model; received an older one: pass the model from before "
                "torch.compile"
            )
        yield set_stance("force_eager")
    yield model.no_sync() if isinstance(model, nn.parallel.DistributedDataParallel) else nullcontext()


def parameter_sequence(model: nn.Module) -> Sequence[nn.Parameter]:
    """Return the model's parameters.

    Raises
    ------
    UnsupportedModelError
        If it has none.
    """
    parameters = list(model.parameters())
    if not parameters:
        raise UnsupportedModelError(
            "expected a model with parameters; received one without: there is nothing to attribute"
        )
    return parameters
