"""Single samples of a batch, by themselves, and autograd's gradients of their losses for the self-check."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ooc_influence.errors import UnsupportedModelError
from ooc_influence.extract.check import GradientCheck

Plain = Callable[[Any], Tensor]  # a batch's losses, of the model without taps
_CLOSE, _CLOSE_COARSE = 1e-3, 5e-2  # losses of one sample alone and in its batch


def differentiate_samples(
    check: GradientCheck,
    plain: Plain,
    batch: Any,
    losses: Tensor,
    state: Any,
    *,
    alone: bool = True,
    layers: Container[int] | None = None,
) -> bool:
    """Have a check read autograd's gradients of a batch's first and last loss.

    Each sample is run by itself where that is asked for, its batch can be cut, and its loss is then the same; else the
    whole batch is run.

    Parameters
    ----------
    check : GradientCheck
        Reads the gradients.
    plain : callable batch -> (b,)
        The losses.
    batch : any
        The batch, on the device.
    losses : (b,) Tensor
        Its losses, of the tapped model.
    state : any
        The random state before they were computed (:func:`random_state`).
    alone : bool
        Run each sample by itself where possible.
    layers : container of int, optional
        Check these only.

    Returns
    -------
    bool
        False where the tapped model's losses are not the model's.
    """
    b = len(losses)
    samples = sorted({0, b - 1})
    check.start(samples, layers)
    with check.watching():
        left = []
        for index, sample in enumerate(samples):
            loss = _alone(plain, batch, sample, losses) if alone or len(losses) == 1 else None
            if loss is None:
                left.append((index, sample))
            else:
                with explained():
                    check.differentiate(loss, index)
            del loss
        if not left:
            return True
        set_random_state(state)
        whole = plain(batch)
        if not _close(whole, losses):
            return False
        for index, sample in left:
            with explained():
                check.differentiate(whole[sample], index, keep_graph=(index, sample) != left[-1])
    return True


def _alone(plain: Plain, batch: Any, sample: int, losses: Tensor) -> Tensor | None:
    """Return the loss of one sample, run by itself; None where it cannot be, or is another."""
    part = batch if len(losses) == 1 else one_sample(batch, sample, len(losses))
    if part is None:
        return None
    try:
        found = plain(part)
    except Exception:  # of the user's model, which may need its whole batch
        return None
    return found[0] if len(found) == 1 and _close(found, losses[sample : sample + 1]) else None


def _close(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape:
        return False
    coarse = one.dtype in (torch.bfloat16, torch.float16) or torch.is_autocast_enabled("cpu")
    share = _CLOSE_COARSE if coarse else _CLOSE
    one, other = one.detach().double(), other.detach().double()
    return bool(torch.allclose(one, other, rtol=share, atol=share * 1e-3, equal_nan=True))


def one_sample(batch: Any, sample: int, b: int) -> Any:
    """Return one sample of a batch of ``b``: of every tensor, array or list that has b entries the one it is.

    None where there is nothing to cut.
    """
    found, cut = _cut(batch, sample, b)
    return found if cut else None


def _cut(value: Any, sample: int, b: int) -> tuple[Any, bool]:
    if isinstance(value, (Tensor, np.ndarray)):
        here = value.ndim > 0 and len(value) == b
        return (value[sample : sample + 1] if here else value), here
    if isinstance(value, Mapping):
        parts = {key: _cut(each, sample, b) for key, each in value.items()}
        kept: Any = {key: each for key, (each, _) in parts.items()}
        return (kept if type(value) is dict else type(value)(kept)), any(cut for _, cut in parts.values())  # type: ignore[call-arg]
    if isinstance(value, (tuple, list)):
        each = [_cut(item, sample, b) for item in value]
        if any(cut for _, cut in each):
            items = [item for item, _ in each]
            return (type(value)._make(items) if hasattr(value, "_make") else type(value)(items)), True
        if len(value) == b and not hasattr(value, "_make"):
            return type(value)(value[sample : sample + 1]), True
    return value, False


def random_state(device: torch.device) -> Any:
    """Return the state of PyTorch's random numbers."""
    return torch.get_rng_state(), (device, torch.cuda.get_rng_state(device)) if device.type == "cuda" else None


def set_random_state(state: Any) -> None:
    """Set the state of PyTorch's random numbers, so that a model that draws some draws them again."""
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1][1], state[1][0])


@contextmanager
def explained() -> Any:
    """Say what to do about gradient checkpointing that cannot be differentiated so.

    Raises
    ------
    UnsupportedModelError
        For its reentrant form.
    """
    try:
        yield
    except RuntimeError as error:
        if "use_reentrant" not in str(error) and "not compatible with .grad()" not in str(error):
            raise
        raise UnsupportedModelError(
            "expected gradient checkpointing with use_reentrant=False; received the reentrant form, which cannot "
            "be differentiated with torch.autograd.grad: change it, or switch checkpointing off"
        ) from error
