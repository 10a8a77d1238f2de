"""Telling a batch's samples apart in every tapped layer, and finding out how where shapes leave it open."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ooc_influence.errors import UnsupportedModelError
from ooc_influence.extract.check import Disagreement
from ooc_influence.extract.entries import FuncEntries
from ooc_influence.extract.entries.embedding import EmbeddingEntries
from ooc_influence.extract.layers import Layout, Use, arrange, candidates, outside, time_major_modules, token_counts

RawReceiver = Callable[[int, Any, Any], None]  # the use's number, x and δ as the layer saw them
_Key = tuple[int, int]  # a use, and the number of axes of its input


class UnseparatedError(UnsupportedModelError):
    """A layer whose input has no axis of samples."""


class Separation:
    """What is known of where each use's samples are.

    Parameters
    ----------
    model : nn.Module
        The model.
    uses : sequence of Use
        The tapped modules.

    Attributes
    ----------
    shapes : list of (int, tuple)
        The inputs of this forward pass: use, shape.
    unseparated : dict of int to UnseparatedError
        On a checked batch: uses whose samples cannot be told apart.
    """

    def __init__(self, model: nn.Module, uses: Sequence[Use]) -> None:
        self._uses = uses
        major = time_major_modules(model)
        self._time_major = {number for number, use in enumerate(uses) if id(use.module) in major}
        self._layouts: dict[_Key, Layout] = {}
        self._shared: set[int] = set()  # embeddings whose ids are the same for all samples
        self._unspread: set[int] = set()  # of these, such that cannot be given to each sample by itself
        self._spread_now: set[int] = set()
        self._count = itertools.count()
        self.shapes: list[tuple[int, tuple[int, ...]]] = []
        self.unseparated: dict[int, UnseparatedError] = {}

    def begin(self) -> None:
        """Begin a forward pass."""
        self.shapes.clear()
        self._spread_now.clear()

    def spread(self, number: int, x: Tensor, output: Tensor, b: int) -> tuple[Tensor, Tensor]:
        """Give every sample its own copy of positions that all of them share, so that gradients come apart."""
        alone = x.dim() == 1 or (x.dim() == 2 and x.shape[0] == 1)
        if b <= 1 or not alone or number in self._unspread:
            return x, output
        if number not in self._shared:
            if x.shape[0] == b:
                return x, output
            self._shared.add(number)
        self._spread_now.add(number)
        if x.dim() == 1:
            x, output = x.unsqueeze(0), output.unsqueeze(0)
        return x.expand(b, *x.shape[1:]), output.expand(b, *output.shape[1:])

    def give_up_spreading(self) -> bool:
        """Leave shared positions as they are, where copies of them changed the model; return whether there were any."""
        self._unspread |= self._spread_now
        return bool(self._spread_now)

    def arrange(self, number: int, x: Any, delta: Any, b: int) -> tuple[Any, Any]:
        """Return x and δ with samples on axis 0.

        Raises
        ------
        UnseparatedError
            Where they cannot be told apart.
        """
        use = self._uses[number]
        if use.kind.whole_call:
            x = x._replace(samples=b)
            if not use.kind.batched(use.module, x, delta, b):
                raise self._refusal(number, x, b)
            return x, delta
        found = [] if number in self._unspread and b > 1 else self._candidates(number, x, b)
        if not found:
            raise self._refusal(number, x, b)
        key = (number, x.dim())
        layout = self._layouts.get(key, found[0])
        layout = layout if layout in found else found[0]
        if b > 1:
            self._layouts.setdefault(key, layout)
        arranged = arrange(use, x, delta, b, layout)
        if not use.kind.batched(use.module, *arranged, b):
            raise self._refusal(number, x, b)
        return arranged

    def _candidates(self, number: int, x: Tensor, b: int) -> list[Layout]:
        return candidates(self._uses[number], x, b, time_major=number in self._time_major)

    def _refusal(self, number: int, x: Any, b: int) -> UnseparatedError:
        use = self._uses[number]
        how = "run for one sample at a time of" if use.kind.whole_call else "see"
        shape = f"an input of shape {tuple(x.shape)}" if isinstance(x, Tensor) else x.told()
        return UnseparatedError(
            f"expected layer {use.name!r} to {how} a batch of {b} samples on axis 0; received {shape}: leave the layer "
            "out with modules=, keep the batch on axis 0, or use batches of one sample"
        )

    def folds(self, batch: Any, b: int) -> set[Any]:
        """Return the ways in which this forward pass's layers fold b samples with something else.

        Rows of features (b · m, f) whose m is no length that the batch or another layer has may be chosen by what the
        samples contain: each such batch is a way of its own.
        """
        if b == 1:
            return set()
        leaves = [leaf for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor)]
        known = token_counts(leaves, b) | {shape[1] for _, shape in self.shapes if len(shape) > 2 and shape[0] == b}
        found = set()
        for number, shape in self.shapes:
            if not shape or shape[0] <= b or shape[0] % b or self._layouts.get((number, len(shape))) == "second":
                continue
            ids = self._uses[number].kind is EmbeddingEntries
            chosen = len(shape) == 2 - ids and shape[0] // b not in known
            found.add((number, len(shape), ("chosen", next(self._count)) if chosen else shape[0] // b))
        return found

    def left_out(self) -> list[Disagreement]:
        """Return the layers whose samples cannot be told apart."""
        found = {}
        for number, error in self.unseparated.items():
            name = self._uses[number].first[0].name or "(the model)"
            alone = self._uses[number].kind.whole_call
            reason = "it cannot be run one sample at a time" if alone else "its input has no axis of samples"
            found[name] = Disagreement(name, type(self._uses[number].module).__name__, float("inf"), reason, str(error))
        return list(found.values())

    def probe(self, b: int) -> Probe:
        """Return what finds the samples' axis by the gradients of single samples' losses."""
        return Probe(self, b)


class Probe:
    """Gradients of one sample's loss reach that sample alone: which layouts of a use's input allow that.

    Parameters
    ----------
    separation : Separation
        What is known, and learns.
    b : int
        Samples of the batch.
    """

    def __init__(self, separation: Separation, b: int) -> None:
        self._separation, self._b = separation, b
        self._viable: dict[_Key, list[Layout]] = {}
        self._shapes: dict[_Key, tuple[int, ...]] = {}
        self._mixed: list[tuple[int, int]] = []  # (use, sample)
        self._changed = False  # whether a layer that is run again found its samples elsewhere

    def receiver(self, sample: int) -> RawReceiver:
        """Return what takes the gradients of one sample's loss."""

        def receive(number: int, x: Any, delta: Any) -> None:
            if isinstance(delta, list):
                self._look_at_call(number, x._replace(samples=self._b), delta, sample)
                return
            key = (number, x.dim())
            found = self._viable.get(key)
            if found is None:
                found = self._separation._candidates(number, x, self._b)
            viable = [layout for layout in found if not outside(delta, sample, self._b, layout)]
            self._viable[key], self._shapes[key] = viable, tuple(x.shape)
            if not viable:
                self._mixed.append((number, sample))

        return receive

    def _look_at_call(self, number: int, call: Any, delta: Any, sample: int) -> None:
        """See where a layer that is run again has its samples, which may be elsewhere than it seemed."""
        use, b = self._separation._uses[number], self._b
        if not use.kind.batched(use.module, call, delta, b):
            return
        if not issubclass(use.kind, FuncEntries):
            if use.kind.strays(use.module, call, delta, b, sample):
                self._mixed.append((number, sample))
            return
        before = use.kind.known_layout(use.module, call)
        if use.kind.strays(use.module, call, delta, b, sample):
            self._mixed.append((number, sample))
        self._changed |= use.kind.known_layout(use.module, call) is not before

    def conclude(self) -> bool:
        """Learn from the gradients; return whether another layout than the one assumed was found.

        Raises
        ------
        UnsupportedModelError
            If samples influence each other.
        """
        known, changed = self._separation, self._changed
        for key, viable in self._viable.items():
            number, dim = key
            if viable:
                changed |= known._layouts.get(key, viable[0]) not in viable
                if known._layouts.get(key) not in viable:
                    known._layouts[key] = viable[0]
                continue
            embedding = known._uses[number].kind is EmbeddingEntries
            if embedding and (dim == 1 or self._shapes[key][0] == 1) and number not in known._shared | known._unspread:
                known._shared.add(number)
                changed = True
            elif embedding or self._shapes[key][0] != self._b:
                known.unseparated[number] = UnseparatedError("its input has no axis of samples")
            else:
                continue
            self._mixed = [(other, sample) for other, sample in self._mixed if other != number]
        if self._mixed and not changed:
            number, sample = self._mixed[0]
            raise UnsupportedModelError(
                f"expected each sample's loss to depend on that sample alone; received a gradient of sample "
                f"{sample}'s loss at another place of axis 0 at layer {known._uses[number].name!r}: remove what mixes "
                "samples in a batch, or leave the layer out with modules="
            )
        return changed
