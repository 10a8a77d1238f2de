"""Losses of a language model without its logits: the unembedding is applied to some positions at a time.

Logits of a whole batch are the largest tensor of many a model: positions times vocabulary. The model runs without them
(``logits_to_keep``), the last hidden states are taken from its backbone, and the unembedding, the loss and their
gradients are computed for a stretch of positions after the other; a backward pass computes a stretch's logits again
(:func:`torch.utils.checkpoint.checkpoint`). So memory holds the logits of one stretch, whatever the batch.

That is right where the logits are the unembedding of the backbone's output and nothing else: not where they are capped
or scaled, or where another layer comes between. It is tried out on the last position of every batch, whose logits the
model returns; a model that disagrees keeps its own logits.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any, NamedTuple
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ooc_influence.extract import active_draws, cross_entropy_at

LARGEST = 2**27  # bytes of logits up to which a batch has them whole
_AT_ONCE = 2**26  # bytes of a stretch's logits: glibc gives blocks beyond 32 MiB back to the system, and has no holes
_others: WeakSet[nn.Module] = WeakSet()  # models whose logits are something else


class Targets(NamedTuple):
    """The target tokens of a batch: which sample each belongs to, its position in the labels, the token; (T,) each."""

    sample: Tensor
    position: Tensor
    token: Tensor

    @classmethod
    def of(cls, labels: Tensor, ignored: int) -> Targets:
        """Return those of labels (b, t): all but the first of a row, and those that are ``ignored``."""
        sample, position = torch.nonzero(labels[:, 1:] != ignored, as_tuple=True)
        return cls(sample, position + 1, labels[sample, position + 1])


def target_losses(model: nn.Module, batch: dict[str, Tensor], targets: Targets) -> Tensor:
    """Return the loss of every target token, (T,) float32 or wider."""
    parts = _parts(model)
    if parts is not None and _logit_bytes(parts[1], batch["input_ids"]) > LARGEST and active_draws() is None:
        losses = _without_logits(model, *parts, batch, targets)
        if losses is not None:
            return losses
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    index = targets.sample * logits.shape[1] + targets.position - 1
    return cross_entropy_at(logits.flatten(0, 1), index, targets.token, targets.sample)


def _parts(model: nn.Module) -> tuple[nn.Module, nn.Module] | None:
    """Return a model's backbone and unembedding; None where the logits cannot be left to us."""
    wrapped: Any = getattr(model, "get_base_model", None)
    inner: Any = model if wrapped is None else wrapped()
    backbone = getattr(inner, str(getattr(inner, "base_model_prefix", "")) or " ", None)
    named: Any = getattr(inner, "get_output_embeddings", None)
    head = None if named is None else named()
    if not isinstance(backbone, nn.Module) or not isinstance(head, nn.Module) or backbone is inner:
        return None
    keeps = "logits_to_keep" in inspect.signature(inner.forward).parameters
    weight = getattr(head, "weight", None)
    whole = isinstance(weight, Tensor) and not hasattr(weight, "full_tensor")  # not sharded over processes
    return (backbone, head) if keeps and whole and model not in _others else None


def _logit_bytes(head: Any, tokens: Tensor) -> int:
    return int(tokens.numel() * head.weight.shape[0] * head.weight.element_size())


def _without_logits(
    model: nn.Module, backbone: nn.Module, head: nn.Module, batch: dict[str, Tensor], targets: Targets
) -> Tensor | None:
    """Return the losses; None, and remember the model, where its logits are not the head's of the hidden states."""
    states: list[Tensor] = []

    def keep(_: nn.Module, __: Any, output: Any) -> None:
        states.append(output[0])

    handle = backbone.register_forward_hook(keep)
    try:
        place = torch.tensor([batch["input_ids"].shape[1] - 1], device=batch["input_ids"].device)
        how = {"use_cache": False, "logits_to_keep": place}  # picked, and so contiguous: see below
        last = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], **how).logits
    finally:
        handle.remove()
    hidden = states[-1] if states else last
    if hidden.shape[:2] != batch["input_ids"].shape or not _agree(head, hidden, last):
        _others.add(model)
        return None
    found: Tensor = last.new_zeros(len(targets.token), dtype=torch.promote_types(last.dtype, torch.float32))
    for chosen, start, stop in _stretches(head, hidden, targets):
        part = Targets(*(values[chosen] for values in targets))

        def losses(states: Tensor, part: Targets = part, start: int = start) -> Tensor:
            index = part.sample * states.shape[1] + part.position - 1 - start
            return cross_entropy_at(head(states).flatten(0, 1), index, part.token, part.sample)

        states_here = hidden[:, start:stop].contiguous()  # others are multiplied sample by sample, slowly
        again = torch.is_grad_enabled() and states_here.requires_grad
        of_part = checkpoint(losses, states_here, use_reentrant=False) if again else losses(states_here)
        found = found.index_copy(0, chosen, of_part.to(found.dtype))
    return found


def _agree(head: nn.Module, hidden: Tensor, last: Tensor) -> bool:
    """Return whether the last position's logits are the head's."""
    with torch.no_grad():
        own, theirs = head(hidden[:, -1:].detach().contiguous()), last.detach()
    if own.shape != theirs.shape:
        return False
    rtol = 1e-4 if own.dtype in (torch.float32, torch.float64) else 2e-2
    scale = float(theirs.abs().max())
    return bool(torch.allclose(own.float(), theirs.float(), rtol=rtol, atol=rtol * scale))


def _stretches(head: Any, hidden: Tensor, targets: Targets) -> Iterator[tuple[Tensor, int, int]]:
    """Yield which targets are predicted in a stretch of positions, and the stretch; those without targets are left out.

    A stretch has all samples of the batch, on axis 0 as ever.
    """
    step = max(1, _AT_ONCE // max(1, len(hidden) * head.weight.shape[0] * head.weight.element_size()))
    origin = targets.position - 1
    for start in range(0, hidden.shape[1], step):
        (chosen,) = torch.nonzero((origin >= start) & (origin < start + step), as_tuple=True)
        if len(chosen):
            yield chosen, start, min(hidden.shape[1], start + step)
