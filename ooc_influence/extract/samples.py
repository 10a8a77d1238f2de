"""Single samples of a batch, by themselves, and autograd's gradients of their losses for the self-check."""

from __future__ import annotations

import math
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

    The two samples are run by themselves where that is asked for, their batch can be cut, and their losses are then the
    same; else the whole batch is run.

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
        Run the samples by themselves where possible.
    layers : container of int, optional
        Check these only.

    Returns
    -------
    bool
        False where the tapped model's losses are not the model's.
    """
    factors = _factors(losses.detach())
    check.start(factors, layers)
    chosen = list(factors)
    if not chosen:
        return True  # nothing is finite: the run names the samples
    with check.watching():
        found = _alone(plain, batch, chosen, losses) if alone and len(chosen) < len(losses) else None
        if found is None:
            set_random_state(state)
            whole = plain(batch)
            if not _close(whole, losses):
                return False
            found = whole[chosen]
        with explained():
            check.differentiate(found)
    return True


def _factors(losses: Tensor) -> dict[int, float]:
    """Return the samples to look at, and different factors that bring their losses to a similar size.

    They are powers of two, by which numbers of few bits are multiplied without rounding.
    """
    values = {sample: float(losses[sample]) for sample in sorted({0, len(losses) - 1})}
    finite = [sample for sample, value in values.items() if math.isfinite(value)]
    if len(finite) < 2:
        return dict.fromkeys(finite, 1.0)
    first, last = (abs(values[sample]) + 1e-6 for sample in finite)
    power = min(max(round(math.log2(first / last)), -7), 7) or 1
    return {finite[0]: 1.0, finite[1]: -(2.0**power)}


def _alone(plain: Plain, batch: Any, chosen: list[int], losses: Tensor) -> Tensor | None:
    """Return the losses of some samples, run without the others; None where they cannot be, or are others then."""
    part = some_samples(batch, chosen, len(losses))
    if part is None:
        return None
    try:
        found = plain(part)
    except Exception:  # of the user's model, which may need its whole batch
        return None
    return found if _close(found, losses[chosen]) else None


def _close(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape:
        return False
    coarse = one.dtype in (torch.bfloat16, torch.float16) or torch.is_autocast_enabled("cpu")
    share = _CLOSE_COARSE if coarse else _CLOSE
    one, other = one.detach().double(), other.detach().double()
    return bool(torch.allclose(one, other, rtol=share, atol=share * 1e-3, equal_nan=True))


def some_samples(batch: Any, chosen: list[int], b: int) -> Any:
    """Return some samples of a batch of ``b``: of every tensor, array or list that has b entries the ones they are.

    None where there is nothing to cut.
    """
    found, cut = _cut(batch, chosen, b)
    return found if cut else None


def _cut(value: Any, chosen: list[int], b: int) -> tuple[Any, bool]:
    if isinstance(value, (Tensor, np.ndarray)):
        here = value.ndim > 0 and len(value) == b
        return (value[chosen] if here else value), here
    if isinstance(value, Mapping):
        parts = {key: _cut(each, chosen, b) for key, each in value.items()}
        kept: Any = {key: each for key, (each, _) in parts.items()}
        return (kept if type(value) is dict else type(value)(kept)), any(cut for _, cut in parts.values())  # type: ignore[call-arg]
    if isinstance(value, (tuple, list)):
        each = [_cut(item, chosen, b) for item in value]
        if any(cut for _, cut in each):
            items = [item for item, _ in each]
            return (type(value)._make(items) if hasattr(value, "_make") else type(value)(items)), True
        if len(value) == b and not hasattr(value, "_make"):
            return type(value)(value[sample] for sample in chosen), True
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
