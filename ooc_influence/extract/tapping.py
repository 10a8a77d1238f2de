"""Tapping a model: hooks on its layers, and everything as it was afterwards."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from ooc_influence.errors import UnsupportedModelError
from ooc_influence.extract.check import GradientCheck
from ooc_influence.extract.layers import find_uses
from ooc_influence.extract.selection import Trained
from ooc_influence.extract.taps import Taps
from ooc_influence.process import FUSED_ATTENTION
from ooc_influence.store import LayerShape, Mask


@contextmanager
def tapped(
    model: nn.Module,
    layers: Sequence[LayerShape],
    device: torch.device,
    *,
    skip: Container[int] = (),
    probe: bool = False,
    check: bool = False,
    mask: Mask | None = None,
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
        Check on the first batch of several samples that they do not influence each other; with ``check`` that is part
        of it.
    check : bool
        Compare what layers hand over with autograd (:mod:`.check`).
    mask : Mask, optional
        The kept entries, which are then compared too.

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
    uses = find_uses(model, layers)
    home = parameters[0].device
    checking = GradientCheck(uses, device, Trained.of(model), mask) if check else None
    with ExitStack() as undo:
        undo.enter_context(FUSED_ATTENTION.held(False))  # the fused encoder layer does not call its linear layers
        for module in model.modules():
            undo.callback(setattr, module, "training", module.training)
        if home != device:
            undo.callback(model.to, home)
            model.to(device)
        for context in _wrapper_contexts(model):
            undo.enter_context(context)
        model.eval()
        for module in model.modules():
            if isinstance(module, nn.RNNBase):  # cuDNN differentiates them in training mode only
                undo.callback(setattr, module, "dropout", module.dropout)
                module.dropout, module.training = 0.0, True
        for parameter in parameters:
            undo.callback(parameter.requires_grad_, parameter.requires_grad)
            parameter.requires_grad_(False)
        taps = Taps(model, uses, device, skip=skip, check=checking, probe=probe)
        for number, use in enumerate(uses):
            if use.layer in skip and not check:
                continue
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
