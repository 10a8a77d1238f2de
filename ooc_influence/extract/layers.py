"""A model's layers: their names, their kinds, and the modules that feed the entries of a mask.

A layer is known when one of the kinds in :mod:`.entries` describes it: when it computes that kind's function, not when
it merely inherits from its class.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor, nn

from ooc_influence.errors import MismatchError, warn
from ooc_influence.extract.entries import KINDS, BiasEntries, Entries, FuncEntries, computes_weights
from ooc_influence.extract.entries.embedding import EmbeddingEntries
from ooc_influence.store import LayerShape

_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")  # compile, FSDP, checkpointing
_PARALLEL = ("DistributedDataParallel", "DataParallel")  # hold the model as "module"


@dataclass(frozen=True, eq=False)
class Use:
    """One module that feeds a layer's entries: the layer itself, or another that shares a parameter with it.

    Attributes
    ----------
    layer : int
        Which of the mask's layers.
    shape : LayerShape
        The entry matrix of this very module.
    module : nn.Module
        The module.
    shared : mapping of str to str
        Of another module than the layer's own: which of the layer's parameters it shares, and by what name of its own.
    first : (LayerShape, nn.Module)
        The layer's own entry matrix and module.
    """

    layer: int
    shape: LayerShape
    module: nn.Module
    shared: Mapping[str, str]
    first: tuple[LayerShape, nn.Module]

    @property
    def kind(self) -> type[Entries]:
        """The module's kind."""
        return KINDS[self.shape.kind]

    @property
    def name(self) -> str:
        """Its name, for messages."""
        return self.shape.name or "(the model)"

    @property
    def own(self) -> bool:
        """Whether it is the layer's own module."""
        return self.module is self.first[1]


def clean_name(model: nn.Module, name: str) -> str:
    """Return a module's or tensor's name without what compiling, FSDP, DDP or checkpoint wrappers put into it."""
    if type(model).__name__ in _PARALLEL:
        name = name.removeprefix("module").removeprefix(".")
    for wrapper in _WRAPPERS:
        name = f"{name}.".replace(wrapper, "")[:-1] if name else name
    return name.rstrip(".")


def named_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules by clean name; of a wrapper and what it wraps, the inner one."""
    return {clean_name(model, name): module for name, module in model.named_modules()}


def describe(name: str, module: nn.Module, *, fallback: bool = False) -> LayerShape | None:
    """Return the entry matrix of a module of a known kind; None for another, and for one with computed weights."""
    if computes_weights(module):
        return FuncEntries.describe(name, module) if fallback else None
    for kind in KINDS.values():
        if kind is BiasEntries or (kind is FuncEntries and not fallback):
            continue
        found = kind.describe(name, module)
        if found is not None:
            return found
    return None


def restrict(shape: LayerShape, parameters: set[str]) -> LayerShape | None:
    """Return the entry matrix of some of a layer's parameters: all, the weight alone, the bias alone; None of others.

    Parameters
    ----------
    shape : LayerShape
        The whole layer's.
    parameters : set of str
        Names of the parameters that are to be kept.
    """
    if not shape.bias:
        return shape if "weight" in parameters else None
    if parameters == {"bias"}:
        return LayerShape(shape.name, BiasEntries.kind, (shape.shape[0], 1), True)
    if parameters == {"weight"}:
        return replace(shape, shape=(shape.shape[0], shape.shape[1] - 1), bias=False)
    return shape


def _described_as(layer: LayerShape, module: nn.Module) -> LayerShape | None:
    """Return the entry matrix of a module, as the kind that a mask has it by, and for the parameters that it has."""
    kind = KINDS.get(layer.kind)
    if kind is None or (computes_weights(module) and kind is not FuncEntries):
        return None
    found = kind.describe(layer.name, module)
    if found is not None and found.bias and not layer.bias:
        return restrict(found, {"weight"})
    return found


def find_uses(model: nn.Module, layers: Sequence[LayerShape]) -> list[Use]:
    """Return the modules that feed the entries a mask was drawn for.

    Raises
    ------
    MismatchError
        Naming the first that is missing or of another shape.
    """
    modules = named_layers(model)
    uses = []
    for number, layer in enumerate(layers):
        module = modules.get(layer.name)
        found = None if module is None else _described_as(layer, module)
        if module is None or found is None or replace(layer, tied=()) != found:
            raise MismatchError(
                f"expected layer {layer.name!r} of kind {layer.kind} with entries {layer.shape}, as in the train "
                f"store; received {f'{found.kind} {found.shape}' if found else 'none of that name and kind'}: use the "
                "model the train store was made with"
            )
        first = (found, module)
        uses.append(Use(number, found, module, {}, first))
        uses += [_tied(number, layer, name, modules.get(name), first) for name in layer.tied]
    return uses


def _tied(
    number: int, layer: LayerShape, name: str, other: nn.Module | None, first: tuple[LayerShape, nn.Module]
) -> Use:
    """Return the use of a layer's parameters by another module."""
    shape = None if other is None else describe(name, other, fallback=True)
    if other is not None and shape is not None:
        mine, theirs = layer_parameters(*first), KINDS[shape.kind].parameters(other)
        shared = {attr: own for attr, p in mine.items() for own, q in theirs.items() if p is q}
        if shared:
            return Use(number, shape, other, shared, first)
    raise MismatchError(
        f"expected layer {name!r} to share the weight of {layer.name!r}, as in the train store; received a model where "
        "it does not: tie them, or use the model the train store was made with"
    )


def layer_parameters(shape: LayerShape, module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that a layer's entries are of, by their names in its module."""
    kind = KINDS[shape.kind]
    found = kind.parameters(module)
    return found if shape.bias or kind.whole_call else {name: p for name, p in found.items() if name != "bias"}


def warn_if_training(model: nn.Module) -> None:
    """Say that a model in training mode is used in evaluation mode, where that makes a difference."""
    drops = [
        name for name, module in named_layers(model).items()
        if module.training and (
            isinstance(module, nn.modules.batchnorm._BatchNorm)
            or (isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0)
        )
    ]  # fmt: skip
    if drops:
        more = f" and {len(drops) - 1} more" if len(drops) > 1 else ""
        warn(
            f"the model is in training mode with layers that behave otherwise there ({drops[0]}{more}): gradients are "
            "those of evaluation mode"
        )


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
