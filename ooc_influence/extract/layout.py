"""Where the samples of a batch are in a layer's input x and output gradient δ.

Models keep them on axis 0, on axis 1 (time-major: ``batch_first=False``), or folded into axis 0 with something else
(tokens, windows, frames: (b · m, ...), sample by sample). Shapes alone cannot always tell; a guess is checked against
autograd (:mod:`.check`), and where it was wrong, gradients of single samples' losses tell which axis is the samples'.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from ooc_influence.extract.entries.embedding import EmbeddingEntries
from ooc_influence.extract.layers import Use

Layout = Literal["samples", "folded", "second"]


def candidates(use: Use, x: Tensor, b: int, *, time_major: bool) -> list[Layout]:
    """Return the layouts that an input's shape allows, the likeliest first; none where samples cannot be told apart.

    Parameters
    ----------
    use : Use
        The layer.
    x : Tensor
        Its input.
    b : int
        Samples of the batch.
    time_major : bool
        Whether the layer belongs to a module with ``batch_first=False``.
    """
    if x.dim() == 0:
        return []
    if b == 1:
        return ["samples" if x.shape[0] == 1 else "folded"]  # nothing can mix
    axes = x.dim() - (use.kind is not EmbeddingEntries)  # the last one is the features'
    second = axes >= 2 and x.shape[1] == b and not use.kind.channels_first(use.module)
    there: dict[Layout, bool] = {"samples": x.shape[0] == b, "folded": fold_of(x, b) is not None, "second": second}
    order: tuple[Layout, ...] = ("second", "samples", "folded") if time_major else ("samples", "folded", "second")
    return [layout for layout in order if there[layout]]


def arrange(use: Use, x: Tensor, delta: Tensor, b: int, layout: Layout) -> tuple[Tensor, Tensor]:
    """Return x and δ with the samples on axis 0.

    Folded inputs of layers whose features are on axis 1 (convolutions) stay (b · m, ...): the entries of m consecutive
    ones add up to a sample's.
    """
    if layout == "second":
        return x.transpose(0, 1), delta.transpose(0, 1)
    if layout == "samples":
        return x, delta
    if use.kind.channels_first(use.module):
        whole = getattr(use.module, "kernel_size", ())
        if b == 1 and whole and x.dim() == len(whole) + 1:  # one sample without a batch axis
            return x.unsqueeze(0), delta.unsqueeze(0)
        return x, delta
    return unfold(x, b), unfold(delta, b)


def unfold(value: Tensor, b: int) -> Tensor:
    """Return (b · m, ...) as (b, m, ...)."""
    return value.reshape(b, len(value) // b, *value.shape[1:])


def outside(delta: Tensor, sample: int, b: int, layout: Layout) -> bool:
    """Return whether δ of one sample's loss has a gradient at other samples."""
    reached = (delta != 0) & delta.isfinite()
    if layout == "second":
        reached = reached.transpose(0, 1)
    elif layout == "folded":
        reached = unfold(reached, b)
    at = reached.reshape(len(reached), -1).any(1)
    at[sample] = False
    return bool(at.any())


def time_major_modules(model: nn.Module) -> set[int]:
    """Return the modules, by identity, that belong to one with ``batch_first=False``: itself, siblings, children."""
    found: set[int] = set()
    for parent in model.modules():
        children = list(parent.children())
        if any(getattr(child, "batch_first", None) is False for child in children):
            found.update(id(module) for child in children for module in child.modules())
    return found


def fold_of(x: Tensor, b: int) -> int | None:
    """Return m of an input folded as (b · m, ...), None of another."""
    return x.shape[0] // b if x.dim() and x.shape[0] > b and x.shape[0] % b == 0 else None


def token_counts(batch_leaves: list[Tensor], b: int) -> set[int]:
    """Return the lengths of axis 1 that a batch's own tensors have."""
    return {value.shape[1] for value in batch_leaves if value.dim() > 1 and len(value) == b}
