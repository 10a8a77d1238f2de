"""Telling a batch's samples apart in every tapped layer, and finding out how where shapes alone do not tell."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, Literal

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ooc_influence.errors import UnsupportedModelError
from ooc_influence.extract.check import Disagreement
from ooc_influence.extract.entries import FuncEntries
from ooc_influence.extract.entries.base import reaches_others
from ooc_influence.extract.entries.embedding import EmbeddingEntries
from ooc_influence.extract.layers import Use

RawReceiver = Callable[[int, Any, Any], None]  # the use's number, x and δ as the layer saw them
SampleAxis = Literal["samples", "folded", "second"]  # axis 0; axis 0, folded with something else; axis 1
_Key = tuple[int, int]  # a use, and the number of axes of its input


class UnseparatedError(UnsupportedModelError):
    """A layer whose input has no axis of samples."""


class Separation:
    """Where each use's samples are, as far as that is known."""

    def __init__(self, model: nn.Module, uses: Sequence[Use]) -> None:
        self.uses = uses
        self.axes: dict[_Key, SampleAxis] = {}
        self.shared: set[int] = set()  # embeddings whose ids are the same for all samples
        self.unspread: set[int] = set()  # of these, those that cannot be copied for each sample
        self._spread_now: set[int] = set()
        time_major = time_major_modules(model)
        self._time_major = {number for number, use in enumerate(uses) if id(use.module) in time_major}
        self._count = itertools.count()
        self.shapes: list[tuple[int, tuple[int, ...]]] = []  # the inputs of this forward pass: use, shape
        self.unseparated: dict[int, UnseparatedError] = {}  # on a checked batch: uses that cannot be separated

    def begin(self) -> None:
        """Begin a forward pass."""
        self.shapes.clear()
        self._spread_now.clear()

    def spread(self, number: int, x: Tensor, output: Tensor, b: int) -> tuple[Tensor, Tensor]:
        """Give every sample its own copy of positions that all samples share, so that their gradients are separate."""
        alone = x.dim() == 1 or (x.dim() == 2 and x.shape[0] == 1)
        if b <= 1 or not alone or number in self.unspread:
            return x, output
        if number not in self.shared:
            if x.shape[0] == b:
                return x, output
            self.shared.add(number)
        self._spread_now.add(number)
        if x.dim() == 1:
            x, output = x.unsqueeze(0), output.unsqueeze(0)
        copies = self._sequences(b, x.shape[1])
        return x.expand(copies, *x.shape[1:]), output.expand(copies, *output.shape[1:])

    def _sequences(self, b: int, length: int) -> int:
        """Return how many sequences of a length this forward pass has so far: b, or more where samples have several."""
        shapes = (shape for number, shape in reversed(self.shapes) if self.uses[number].kind is EmbeddingEntries)
        counts = (shape[0] for shape in shapes if len(shape) == 2 and shape[1] == length)
        return next((count for count in counts if count > b and count % b == 0), b)

    def give_up_spreading(self) -> bool:
        """Leave shared positions as they are, where copies of them changed the model; return whether there were any."""
        self.unspread |= self._spread_now
        return bool(self._spread_now)

    def arrange(self, number: int, x: Any, delta: Any, b: int) -> tuple[Any, Any]:
        """Return x and δ with samples on axis 0; raise UnseparatedError if they cannot be told apart."""
        use = self.uses[number]
        if use.kind.whole_call:
            arranged = x._replace(samples=b), delta
        else:
            axes = [] if number in self.unspread and b > 1 else self.candidates(number, x, b)
            if not axes:
                raise self._refusal(number, x, b)
            key = (number, x.dim())
            axis = self.axes.get(key, axes[0])
            axis = axis if axis in axes else axes[0]
            if b > 1:
                self.axes.setdefault(key, axis)
            arranged = _arrange(use, x, delta, b, axis)
        if not use.kind.batched(use.module, *arranged, b):
            raise self._refusal(number, arranged[0] if use.kind.whole_call else x, b)
        return arranged

    def candidates(self, number: int, x: Tensor, b: int) -> list[SampleAxis]:
        """Return the axes of samples that an input's shape allows, the likeliest first."""
        use = self.uses[number]
        if x.dim() == 0:
            return []
        if b == 1:
            return ["samples" if x.shape[0] == 1 else "folded"]  # nothing can mix
        axes = x.dim() - (use.kind is not EmbeddingEntries)  # the last one is the features'
        allowed: dict[SampleAxis, bool] = {
            "samples": x.shape[0] == b,
            "folded": x.shape[0] > b and x.shape[0] % b == 0,
            "second": axes >= 2 and x.shape[1] == b and not use.kind.channels_first(use.module),
        }
        order: tuple[SampleAxis, ...] = ("samples", "folded", "second")
        if number in self._time_major:
            order = ("second", "samples", "folded")
        return [axis for axis in order if allowed[axis]]

    def _refusal(self, number: int, x: Any, b: int) -> UnseparatedError:
        use = self.uses[number]
        how = "run for one sample at a time of" if use.kind.whole_call else "see"
        shape = f"an input of shape {tuple(x.shape)}" if isinstance(x, Tensor) else x.shapes()
        return UnseparatedError(
            f"expected layer {use.name!r} to {how} a batch of {b} samples on axis 0; received {shape}: leave the layer "
            "out with modules=, keep the batch on axis 0, or use batches of one sample"
        )

    def folds(self, batch: Any, b: int) -> set[Any]:
        """Return the ways in which this forward pass's layers fold b samples with something else.

        Rows of features (b · m, f) whose m is not a length of the batch or of another layer may be chosen by what the
        samples contain: each such batch counts as a new way.
        """
        if b == 1:
            return set()
        lengths = {shape[1] for _, shape in self.shapes if len(shape) > 2 and shape[0] == b}
        for leaf in pytree.tree_leaves(batch):
            if isinstance(leaf, Tensor) and leaf.dim() > 1 and len(leaf) == b:
                lengths.add(leaf.shape[1])
        folds = set()
        for number, shape in self.shapes:
            if not shape or shape[0] <= b or shape[0] % b or self.axes.get((number, len(shape))) == "second":
                continue
            ids = self.uses[number].kind is EmbeddingEntries
            chosen = len(shape) == 2 - ids and shape[0] // b not in lengths
            folds.add((number, len(shape), ("chosen", next(self._count)) if chosen else shape[0] // b))
        return folds

    def left_out(self) -> list[Disagreement]:
        """Return the layers whose samples cannot be told apart."""
        layers = {}
        for number, error in self.unseparated.items():
            use = self.uses[number]
            name = use.first[0].name or "(the model)"
            alone = use.kind.whole_call
            reason = "it cannot be run one sample at a time" if alone else "its input has no axis of samples"
            layers[name] = Disagreement(name, type(use.module).__name__, float("inf"), reason, str(error))
        return list(layers.values())


def _arrange(use: Use, x: Tensor, delta: Tensor, b: int, axis: SampleAxis) -> tuple[Tensor, Tensor]:
    """Return x and δ with the samples on axis 0.

    Folded inputs of layers whose features are on axis 1 (convolutions) stay (b · m, ...): the entries of m consecutive
    ones add up to a sample's.
    """
    if axis == "second":
        return x.transpose(0, 1), delta.transpose(0, 1)
    if axis == "samples":
        return x, delta
    if use.kind.channels_first(use.module):
        kernel = getattr(use.module, "kernel_size", ())
        if b == 1 and kernel and x.dim() == len(kernel) + 1:  # one sample without a batch axis
            return x.unsqueeze(0), delta.unsqueeze(0)
        return x, delta
    return x.unflatten(0, (b, -1)), delta.unflatten(0, (b, -1))


def time_major_modules(model: nn.Module) -> set[int]:
    """Return the modules, by identity, that belong to one with ``batch_first=False``: itself, siblings, children."""
    time_major: set[int] = set()
    for parent in model.modules():
        children = list(parent.children())
        if any(getattr(child, "batch_first", None) is False for child in children):
            time_major.update(id(module) for child in children for module in child.modules())
    return time_major


class Probe:
    """Finds the samples' axis: the gradients of one sample's loss reach that sample alone.

    It learns what :class:`Separation` knows, of a batch of ``b`` samples.
    """

    def __init__(self, separation: Separation, b: int) -> None:
        self._separation, self._b = separation, b
        self._viable: dict[_Key, list[SampleAxis]] = {}
        self._shapes: dict[_Key, tuple[int, ...]] = {}
        self._mixed: list[tuple[int, int]] = []  # (use, sample)
        self._changed = False  # whether a layer that is run again found its samples elsewhere

    def receiver(self, sample: int) -> RawReceiver:
        """Return a receiver for the gradients of one sample's loss."""

        def receive(number: int, x: Any, delta: Any) -> None:
            if isinstance(delta, list):
                self._receive_call(number, x._replace(samples=self._b), delta, sample)
                return
            key = (number, x.dim())
            axes = self._viable.get(key)
            if axes is None:
                axes = self._separation.candidates(number, x, self._b)
            viable = [axis for axis in axes if not _reaches_others(delta, sample, self._b, axis)]
            self._viable[key], self._shapes[key] = viable, tuple(x.shape)
            if not viable:
                self._mixed.append((number, sample))

        return receive

    def _receive_call(self, number: int, call: Any, delta: Any, sample: int) -> None:
        """Find where a layer that is run again has its samples, which may be elsewhere than it seemed."""
        use, b = self._separation.uses[number], self._b
        if not use.kind.batched(use.module, call, delta, b):
            return
        layout = use.kind.known_layout if issubclass(use.kind, FuncEntries) else lambda module, call: None
        before = layout(use.module, call)
        if use.kind.strays(use.module, call, delta, b, sample):
            self._mixed.append((number, sample))
        self._changed |= layout(use.module, call) is not before

    def conclude(self) -> bool:
        """Learn from the gradients; return whether an axis differs from the one assumed; refuse mixed samples."""
        separation, changed = self._separation, self._changed
        for key, viable in self._viable.items():
            number, dim = key
            if viable:
                changed |= separation.axes.get(key, viable[0]) not in viable
                if separation.axes.get(key) not in viable:
                    separation.axes[key] = viable[0]
                continue
            embedding = separation.uses[number].kind is EmbeddingEntries
            new = number not in separation.shared | separation.unspread
            if embedding and (dim == 1 or self._shapes[key][0] == 1) and new:
                separation.shared.add(number)
                changed = True
            elif embedding or self._shapes[key][0] != self._b:
                separation.unseparated[number] = UnseparatedError("its input has no axis of samples")
            else:
                continue
            self._mixed = [(other, sample) for other, sample in self._mixed if other != number]
        if self._mixed and not changed:
            number, sample = self._mixed[0]
            raise UnsupportedModelError(
                f"expected each sample's loss to depend on that sample alone; received a gradient of sample "
                f"{sample}'s loss at another index of axis 0 at layer {separation.uses[number].name!r}: remove what "
                "mixes samples in a batch, or leave the layer out with modules="
            )
        return changed


def _reaches_others(delta: Tensor, sample: int, b: int, axis: SampleAxis) -> bool:
    """Return whether δ of one sample's loss has a gradient at other samples."""
    if axis == "second":
        delta = delta.transpose(0, 1)
    elif axis == "folded":
        delta = delta.unflatten(0, (b, -1))
    return reaches_others(delta, sample)
