"""Which layers of a model are tapped, and what share of its parameters the others hold.

By default every layer of a known kind is tapped; of a model that is partly frozen, the trained parameters. A parameter
that several modules use is one set of entries to which all of them contribute; if one of them is of an unknown kind,
the gradient would lack a part, so the parameter is left out.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from torch import nn

from ooc_influence.errors import UnsupportedModelError, listed, warn
from ooc_influence.extract.entries import KINDS, FuncEntries, computes_weights, own_parameters, uncalled
from ooc_influence.extract.entries.func import rows_of
from ooc_influence.extract.layers import describe, named_layers, restrict
from ooc_influence.store import LayerShape

ModuleSelection = str | Sequence[str] | Sequence[LayerShape] | Callable[[str, nn.Module], bool] | None
_NAMED = 8  # layers not covered, in the warning
_FOREIGN = "shares its parameters with a layer of an unknown kind"


@dataclass(frozen=True)
class Adjustments:
    """Changes to the selection that the first batch showed to be necessary (:mod:`.check`)."""

    without: Mapping[str, str] = field(default_factory=dict)  # layers that are left out, and why
    fallback: tuple[str, ...] = ()  # layers that go through the fallback although their class is of a known kind

    def __bool__(self) -> bool:
        return bool(self.without or self.fallback)

    @classmethod
    def of(cls, attributes: Mapping[str, Any] | None) -> Adjustments:
        """Return what a store recorded."""
        recorded = attributes or {}
        return cls(dict(recorded.get("without", {})), tuple(recorded.get("fallback", ())))

    def to_dict(self) -> dict[str, Any]:
        """Return what a store records."""
        return {"without": dict(self.without), "fallback": list(self.fallback)}


@dataclass(frozen=True)
class Trained:
    """Sizes of a model's parameters by identity: of all, and of those that are trained."""

    all: Mapping[int, int]
    trained: Mapping[int, int]

    @classmethod
    def of(cls, model: nn.Module) -> Trained:
        """Return those of a model: where no parameter requires a gradient, all count as trained."""
        sizes = {id(p): p.numel() for p in model.parameters()}
        trained = {id(p): p.numel() for p in model.parameters() if p.requires_grad}
        return cls(sizes, trained or sizes)

    def _sizes(self, some: set[int]) -> Mapping[int, int]:
        return self.trained if some & self.trained.keys() else self.all

    def total(self, parameters: Iterable[nn.Parameter]) -> int:
        """Return the size that :meth:`share` is relative to."""
        return sum(self._sizes({id(p) for p in parameters}).values())

    def share(self, parameters: Iterable[nn.Parameter]) -> float:
        """Return the share of the trained parameters that some are; of all, where none of them is trained."""
        some = {id(p) for p in parameters}
        sizes = self._sizes(some)
        total = sum(sizes.values())
        return sum(size for key, size in sizes.items() if key in some) / total if total else 1.0


class Selection(NamedTuple):
    """What is tapped."""

    layers: list[LayerShape]  # in the model's order
    share: float  # of the (trained) parameters, held by these layers
    missed: Mapping[str, tuple[str, float]]  # modules with other parameters: why, and their share of the parameters


@dataclass(frozen=True, eq=False)
class _Candidate:
    """A module with parameters."""

    name: str
    module: nn.Module
    shape: LayerShape | None  # its entry matrix; None if its kind is unknown
    parameters: dict[str, nn.Parameter]  # those of its entries; all that it owns if its kind is unknown
    used_in: str | None = None  # the class of the module that uses it without calling it

    @property
    def registers_only(self) -> bool:
        """Whether it may merely hold a parameter that a layer inside it uses."""
        return self.shape is None and any(True for _ in self.module.children())


def select_layers(
    model: nn.Module, modules: ModuleSelection, *, fallback: bool = False, adjusted: Adjustments | None = None
) -> Selection:
    """Return the layers to tap, and the share of the model's parameters they hold; warn of others that are selected.

    Parameters
    ----------
    model : nn.Module
        The model.
    modules : str, sequence of str, callable, sequence of LayerShape or None
        Name patterns (``"encoder.*.fc?"``) or a predicate ``(name, module) -> bool``; None selects every supported
        layer or, in a model with frozen and trained parameters, the trained ones. A pattern that begins with ``!``
        leaves layers out of those selected by the other patterns, or by default. Layers that share a parameter with a
        selected one are tapped with it.
    fallback : bool
        Tap layers of unknown kinds too, through ``torch.func``.
    adjusted : Adjustments, optional
        Changes that the first batch showed to be necessary.
    """
    if isinstance(modules, (list, tuple)) and modules and all(isinstance(m, LayerShape) for m in modules):
        return Selection(list(modules), 1.0, {})
    adjusted = adjusted or Adjustments()
    candidates = list(_candidates(model, fallback, adjusted))
    wanted = _wanted(model, modules, candidates)
    layers, layer_of, blocked = _assign(candidates, wanted, adjusted)
    if not layers:
        kinds = sorted({type(m).__name__ for m in model.modules() if m._parameters}) or ["no layer with parameters"]
        raise UnsupportedModelError(
            f"expected at least one selected layer of a known kind ({', '.join(k for k in KINDS if k != 'func')}); "
            f"received modules={modules!r} on a model with {', '.join(kinds)}: widen the selection, or use "
            "fallback=True (--fallback)"
        )
    trained = Trained.of(model)
    tapped = [p for p in model.parameters() if id(p) in layer_of]
    missed = _missed(candidates, wanted, layer_of, blocked, adjusted, trained.total(tapped))
    share = trained.share(tapped)
    _warn_missed(missed, share)
    return Selection(layers, share, missed)


def _candidates(model: nn.Module, fallback: bool, adjusted: Adjustments) -> Iterator[_Candidate]:
    inside = _inside_others(model, None if fallback else adjusted.fallback)
    owners = {id(child): type(m).__name__ for m in model.modules() for child in uncalled(m).values()}
    for name, module in named_layers(model).items():
        if id(module) in inside:
            continue
        shape = None
        if name in adjusted.fallback:
            shape = FuncEntries.describe(name, module)
        elif name not in adjusted.without and id(module) not in owners:
            shape = describe(name, module, fallback=fallback)
        if shape is not None and shape.kind == FuncEntries.kind and _only_registers(module):
            shape = None
        if shape is not None:
            parameters = KINDS[shape.kind].parameters(module)
        elif computes_weights(module):
            parameters = own_parameters(module)
        else:
            parameters = {n: p for n, p in module._parameters.items() if p is not None}
        if parameters or shape is not None:
            yield _Candidate(name, module, shape, parameters, owners.get(id(module)))


def _only_registers(module: nn.Module) -> bool:
    """Return whether all that a module owns is also owned by modules inside it, as a head owns its decoder's bias."""
    own = {id(p) for p in module.parameters(recurse=False)}
    inside = {id(p) for child in module.children() for p in child.parameters()}
    return bool(own) and own <= inside


class _Wanted(NamedTuple):
    """What is selected: parameters by identity, and by name the layers whose quantised weights are too."""

    parameters: set[int]
    coded: set[str]


def _wanted(model: nn.Module, modules: ModuleSelection, candidates: Sequence[_Candidate]) -> _Wanted:
    selects, default = _parse(modules)
    trained = _trained(model) if default else None
    selected = [each for each in candidates if selects(each.name, each.module)]
    ids = {id(p) for each in selected for p in each.parameters.values() if trained is None or id(p) in trained}
    return _Wanted(ids, {each.name for each in selected if trained is None})


def _assign(
    candidates: Sequence[_Candidate], wanted: _Wanted, adjusted: Adjustments
) -> tuple[list[LayerShape], dict[int, int], set[int]]:
    """Return the layers; the layer that has each parameter's entries; and parameters left out for being shared."""
    blocked = _blocked(candidates, adjusted)
    layers: list[LayerShape] = []
    layer_of: dict[int, int] = {}
    for each in candidates:
        if each.shape is None:
            continue
        usable = {name: p for name, p in each.parameters.items() if id(p) in wanted.parameters and id(p) not in blocked}
        for number in dict.fromkeys(layer_of[id(p)] for p in usable.values() if id(p) in layer_of):
            if each.name != layers[number].name:
                layers[number] = replace(layers[number], tied=(*layers[number].tied, each.name))
        new = {name for name, p in usable.items() if id(p) not in layer_of}
        if KINDS[each.shape.kind].whole_call:
            shape = each.shape if new == set(each.parameters) else None
        else:
            codes = {"weight"} if each.name in wanted.coded and _has_codes(each) else set()
            shape = restrict(each.shape, new | codes)
            new |= codes
        if shape is not None and new:
            layer_of.update((id(p), len(layers)) for name, p in usable.items() if name in new)
            layers.append(shape)
    return layers, layer_of, blocked


def _has_codes(each: _Candidate) -> bool:
    """Return whether a layer's weight is not a parameter of that name: quantised."""
    assert each.shape is not None
    bias_only = each.shape.shape[1] == each.shape.bias
    return not bias_only and not KINDS[each.shape.kind].whole_call and "weight" not in each.parameters


def _blocked(candidates: Sequence[_Candidate], adjusted: Adjustments) -> set[int]:
    """Return parameters that several modules use, one of them of an unknown kind, or left out."""
    users: dict[int, list[_Candidate]] = {}
    for each in candidates:
        for parameter in each.parameters.values():
            users.setdefault(id(parameter), []).append(each)
    return {
        key
        for key, several in users.items()
        if len(several) > 1
        and any(e.shape is None and (e.name in adjusted.without or not e.registers_only) for e in several)
    }


def _missed(
    candidates: Sequence[_Candidate], wanted: _Wanted, layer_of: Mapping[int, int], blocked: set[int],
    adjusted: Adjustments, total: int,
) -> dict[str, tuple[str, float]]:  # fmt: skip
    missed: dict[str, tuple[str, float]] = {}
    counted: set[int] = set()
    for each in candidates:
        parameters = (p for p in each.parameters.values() if id(p) in wanted.parameters and id(p) not in layer_of)
        left = {id(p): p.numel() for p in parameters}
        sizes = [size for key, size in left.items() if key not in counted]
        if not left or (not sizes and each.name not in adjusted.without):
            continue
        counted |= left.keys()
        missed[each.name or "(the model)"] = (_reason(each, left.keys(), blocked, adjusted), sum(sizes) / max(1, total))
    return missed


def _reason(each: _Candidate, left: Any, blocked: set[int], adjusted: Adjustments) -> str:
    if each.name in adjusted.without:
        return adjusted.without[each.name]
    if each.used_in is not None and each.shape is None:
        return f"used inside {each.used_in} without being called"
    if computes_weights(each.module):
        return "its weight is computed from other parameters"
    if each.shape is not None and left & blocked:
        return _FOREIGN
    numel = sum(p.numel() for p in own_parameters(each.module).values())
    if numel and not rows_of(numel):
        return f"{type(each.module).__name__}, whose {numel} parameters no matrix with 32-bit rows and columns holds"
    return type(each.module).__name__


def _warn_missed(missed: Mapping[str, tuple[str, float]], share: float) -> None:
    if not missed:
        return
    by_share = sorted(missed, key=lambda name: -missed[name][1])
    described = (f"{name} ({missed[name][0]}, {missed[name][1]:.1%})" for name in by_share)
    warn(
        f"gradients cover {share:.1%} of the model's parameters; not covered: {listed(described, _NAMED)}: "
        "fallback=True (--fallback) covers layers of unknown kinds at the cost of their full gradients"
    )


def _trained(model: nn.Module) -> set[int] | None:
    """Return the trained parameters of a model of which some are frozen; None for another."""
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    return trained if trained and len(trained) < len(list(model.parameters())) else None


def _inside_others(model: nn.Module, fallback: Collection[str] | None) -> set[int]:
    """Return the modules that belong to another layer: that compute its weight, or that it uses without calling them.

    ``fallback``: layers that go through it, None for all.
    """
    inside = {id(child) for m in model.modules() if computes_weights(m) for child in m.modules() if child is not m}
    for name, module in named_layers(model).items():
        shape = describe(name, module, fallback=fallback is None or name in fallback)
        if shape is not None and KINDS[shape.kind].whole_call:
            inside |= _covered(module, {id(p) for p in KINDS[shape.kind].parameters(module).values()})
    return inside


def _covered(module: nn.Module, covered: set[int]) -> set[int]:
    """Return the modules inside one whose parameters it covers."""
    modules = set()
    for child in module.modules():
        own = {id(p) for p in child.parameters(recurse=False)}
        partly = isinstance(child, nn.ParameterDict) and own & covered  # the rest belongs to inactive adapters
        if child is not module and own and (own <= covered or partly):
            modules.add(id(child))
    return modules


def _parse(modules: ModuleSelection) -> tuple[Callable[[str, nn.Module], bool], bool]:
    """Return what selects layers, and whether that is the default selection, perhaps with some layers left out."""
    if callable(modules):
        return modules, False
    patterns: list[Any] = [modules] if isinstance(modules, str) else list(modules or ())
    named = [pattern for pattern in patterns if not pattern.startswith("!")]
    left_out = [pattern[1:] for pattern in patterns if pattern.startswith("!")]
    default = modules is None or bool(left_out and not named)

    def selects(name: str, module: nn.Module) -> bool:
        selected = default or any(fnmatch.fnmatchcase(name, pattern) for pattern in named)
        return selected and not any(fnmatch.fnmatchcase(name, pattern) for pattern in left_out)

    return selects, default
