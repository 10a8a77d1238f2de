"""The self-check: gathered entries compared with autograd's gradients of the caller's own loss.

Recognising a layer by its class is a guess. So the first and the last sample of the first batch, and of every batch
whose layers fold samples in a new way, are run once more, without taps, and an ordinary backward pass computes the
gradient of c_0 ℓ_0 + c_1 ℓ_1 with respect to the tapped layers' parameters, c_0 and c_1 being different powers of two.
A hook reads about a hundred entries of each, kept and not kept, and frees the gradient at once: the memory is that of
the largest weight. The entries gathered for both samples, times c_0 and c_1, must agree with it.

Tolerances follow the coarsest dtype that the model computes in. The largest differences measured of correct layers:
1.3e-4 in float32 (over the families of ``tools/bench/families.py``), 0.023 in bfloat16 (SmolLM2-135M).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ooc_influence.errors import UnsupportedModelError, listed
from ooc_influence.extract.data import samples_of
from ooc_influence.extract.entries import KINDS, Entries, is_coded, wide
from ooc_influence.extract.gather import MaskGatherer
from ooc_influence.extract.layers import Use, layer_parameters
from ooc_influence.extract.losses import repeating_samples
from ooc_influence.extract.selection import Trained
from ooc_influence.store import LayerShape, Mask, ModuleMask

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}
_POOL = 1024  # entries read of a parameter; of these the largest and some others are compared
_LARGEST, _OTHERS, _ROWS, _SEEN = 32, 16, 32, 8
# differences are relative to a parameter's largest gradient, or to these shares of its layer's and the model's: a
# gradient that is zero up to rounding (of the bias of attention's keys) has no scale of its own
_LAYER_FLOOR, _MODEL_FLOOR = 0.1, 1e-4
_NAMED = 6  # layers, in the error
Numbers = npt.NDArray[np.int64]
Receiver = Callable[[Use, Any, Any], None]


class Disagreement(NamedTuple):
    """A layer whose gathered entries are not autograd's."""

    name: str
    type: str  # its class
    error: float  # largest difference relative to the parameter's largest entry; inf where nothing could be gathered
    reason: str | None = None  # why it can only be left out; None if another way of computing it may help
    detail: str = ""  # what happened, where there is no difference to state


class LayersDisagreeError(UnsupportedModelError):
    """Layers whose entries differ from autograd's gradients."""

    final = False  # whether rows are stored already, so that the layers cannot be chosen again

    def __init__(self, message: str, layers: Sequence[Disagreement] = ()) -> None:
        super().__init__(message)
        self.layers = tuple(layers)

    @classmethod
    def of(cls, layers: Sequence[Disagreement]) -> LayersDisagreeError:
        """Return the error that names layers and what can be done."""
        worst = sorted(layers, key=lambda each: -each.error)
        described = (
            f"{each.name} ({each.type}): "
            + (each.reason or each.detail or f"a difference of {each.error:.2g} of the largest entry")
            for each in worst
        )
        return cls(
            "expected the entries gathered from each layer to be autograd's gradients of the loss; received others of "
            f"{listed(described, _NAMED, '; ')}: leave them out with modules= (--modules '!{worst[0].name}'), compute "
            "them by themselves with fallback=True (--fallback), or, if the difference is intended, skip this check "
            "with check_gradients=False (--no-check)",
            layers,
        )


@dataclass(eq=False)
class _Reference:
    """Autograd's gradient of the samples' losses at some entries of a parameter."""

    layer: int
    parameter: str
    positions: Numbers
    values: npt.NDArray[np.float64]
    columns: Numbers  # of the mask; -1 for entries that are not kept
    scale: float  # the largest of the values
    gathered: Numbers | None = None  # indices of these entries among those gathered to compare


class _RotatedPart:
    """Some kept entries of a layer in a Kronecker basis, computed from autograd's gradient.

    Attributes
    ----------
    columns : (m,) int64
        Theirs in the mask.
    values : (m,) float64
        Summed over the layer's parameters that were read.
    """

    def __init__(self, kept: ModuleMask, some: Numbers, first: int) -> None:
        assert kept.basis is not None
        self.columns, self._width = first + some, kept.layer.shape[1]
        self._left = _vectors_at(kept.basis.left, kept.rows, some)
        self._right = _vectors_at(kept.basis.right, kept.cols, some)
        self.start()

    def start(self) -> None:
        """Forget what was read."""
        self.values = np.zeros(len(self.columns))

    def add(self, parameter: str, gradient: Tensor, kind: type[Entries]) -> None:
        """Add what a parameter's gradient contributes."""
        matrix = gradient.reshape(-1, 1) if parameter == "bias" else kind.weight_matrix(gradient)
        matrix = matrix.to(wide(matrix.dtype))
        left, right = self._left.to(matrix.device), self._right.to(matrix.device)
        rows = left.to(matrix.dtype) @ matrix if left.dim() == 2 else matrix[left]
        if parameter == "bias":
            last = right[:, -1] if right.dim() == 2 else right == self._width - 1
            values = rows[:, 0] * last
        elif right.dim() == 2:
            values = (rows * right[:, : matrix.shape[1]].to(matrix.dtype)).sum(1)
        else:
            inside = right < matrix.shape[1]
            values = rows.gather(1, right.clamp(max=matrix.shape[1] - 1)[:, None])[:, 0] * inside
        self.values += values.double().cpu().numpy()


def _vectors_at(vectors: npt.NDArray[np.float32] | None, indices: npt.NDArray[np.int32], some: Numbers) -> Tensor:
    """Return the eigenvectors of some entries, (m, size), or their indices, (m,), where a side is not rotated."""
    if vectors is None:
        return torch.from_numpy(indices[some]).long()
    columns = np.searchsorted(np.unique(indices), indices[some])
    return torch.from_numpy(np.ascontiguousarray(vectors[:, columns].T))


class GradientCheck:
    """Compares gathered entries, and the kept ones of ``mask``, with autograd's gradients."""

    def __init__(self, uses: Sequence[Use], device: torch.device, trained: Trained, mask: Mask | None = None) -> None:
        self._layers = {use.layer: use.first for use in uses if use.own}
        self._device, self._trained, self._mask = device, trained, mask
        self._random = np.random.Generator(np.random.PCG64(0))
        self._watched: list[tuple[int, str, nn.Parameter]] = []
        self.unverifiable: dict[int, str] = {}
        self._sharded: dict[int, dict[str, nn.Parameter]] = {}  # of layers whose weights are whole during a pass only
        for number, (shape, module) in self._layers.items():
            self._watch(number, shape, module)
        weights = [] if mask is None else [kept.weight for kept in mask.modules]
        self._weights = np.concatenate([np.empty(0, np.float32), *weights])
        self._kept: dict[tuple[int, str], tuple[Numbers, Numbers]] = {}
        self._rotated: dict[int, _RotatedPart] = {}
        if mask is not None:
            self._choose_kept(mask)
        self._dtypes = {p.dtype for _, _, p in self._watched}
        self.errors: dict[int, float] = {}
        self._reached: set[tuple[int, str]] = set()  # parameters that autograd had a gradient of
        self._references: list[_Reference] = []
        self._samples: list[int] = []
        self._factors: npt.NDArray[np.float64] = np.empty(0)
        self._active: list[int] = []
        self._followed = self._watched

    def _watch(self, number: int, shape: LayerShape, module: nn.Module) -> None:
        parameters = layer_parameters(shape, module)
        floats = {name: p for name, p in parameters.items() if not is_coded(p)}
        if any(hasattr(p, "full_tensor") for p in parameters.values()):
            self.unverifiable[number] = "sharded over processes"
            self._sharded[number] = parameters
            return
        no_weight = "weight" not in parameters and shape.shape[1] > shape.bias and not KINDS[shape.kind].whole_call
        if len(floats) < len(parameters) or no_weight:
            self.unverifiable[number] = "quantised: autograd has no gradient of its codes"
        self._watched += [(number, name, p) for name, p in floats.items()]

    def _choose_kept(self, mask: Mask) -> None:
        """Choose kept entries of each parameter, by columns in the mask and positions in the parameter, or rotated."""
        first = 0
        for number, kept in enumerate(mask.modules):
            if number in self._layers:
                shape, module = self._layers[number]
                rotated = kept.basis is not None and kept.basis.rotates
                count = _LARGEST + _OTHERS if rotated else _POOL
                some = np.sort(self._random.permutation(len(kept.rows))[:count]) if len(kept.rows) else np.empty(0, int)
                some = some[kept.weight[some] != 0]
                if rotated:
                    self._rotated[number] = _RotatedPart(kept, some, first)
                    some = some[:0]
                for each in KINDS[shape.kind].locate(shape, module, kept.rows[some], kept.cols[some]):
                    self._kept[number, each.parameter] = (first + some[each.entries], each.positions)
            first += len(kept.rows)

    @property
    def verifiable(self) -> bool:
        """Whether autograd has a gradient of any layer."""
        return bool(self._watched)

    @property
    def tolerance(self) -> float:
        """The largest difference allowed, relative to a parameter's largest entry."""
        return max((TOLERANCE.get(dtype, 0.0) for dtype in self._dtypes), default=TOLERANCE[torch.float32])

    def see(self, *values: Any) -> None:
        """Note the dtypes that the model computes in."""
        leaves = pytree.tree_leaves(values)
        self._dtypes |= {leaf.dtype for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()}

    def start(self, factors: Mapping[int, float], layers: Container[int] | None = None) -> None:
        """Begin a check of some samples of a batch, with the factor of each loss; of some layers only, or of all."""
        self._samples, self._factors = list(factors), np.array(list(factors.values()))
        self._references = []
        for part in self._rotated.values():
            part.start()
        self._active = [number for number in sorted(self._layers) if layers is None or number in layers]
        self._followed = [each for each in self._watched if layers is None or each[0] in layers]

    def differentiate(self, losses: Tensor) -> None:
        """Read autograd's gradients of the samples' losses, times their factors."""
        loss = (losses * torch.from_numpy(self._factors).to(losses)).sum()
        parameters = [p for _, _, p in self._followed]
        if not parameters or not loss.requires_grad:
            return
        with self._reading():
            torch.autograd.backward(loss, inputs=parameters)

    @contextmanager
    def following(self) -> Iterator[None]:
        """Read the gradients of a backward pass of the caller's, which parameters then receive as ever.

        Of layers sharded over processes, those of this process's own samples: of the whole weights, which their
        modules have when they are called.
        """
        self._followed = [each for each in self._followed if each[2].requires_grad]
        reached: set[tuple[int, str]] = set()
        handles = [p.register_hook(partial(self._note, number, name, reached)) for number, name, p in self._followed]
        for number in sorted(self._sharded.keys() & set(self._active)):
            follow = partial(self._follow_whole, number, reached, handles)
            handles.append(self._layers[number][1].register_forward_pre_hook(follow))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        self._note_missing(reached)

    def _follow_whole(self, number: int, reached: Any, handles: list[Any], module: nn.Module, _: Any) -> None:
        """Follow the parameters that a sharded layer has while it is called."""
        if self.unverifiable.pop(number, None) is None or not torch.is_grad_enabled():
            return  # it was called before
        for name, parameter in layer_parameters(self._layers[number][0], module).items():
            self._dtypes.add(parameter.dtype)
            self._watched.append((number, name, self._sharded[number][name]))
            if parameter.requires_grad:
                self._followed.append((number, name, parameter))
                handles.append(parameter.register_hook(partial(self._note, number, name, reached)))

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Have autograd follow the parameters meanwhile."""
        flags = [p.requires_grad for _, _, p in self._followed]
        try:
            for _, _, parameter in self._followed:
                parameter.requires_grad_(True)
            yield
        finally:
            for flag, (_, _, parameter) in zip(flags, self._followed, strict=True):
                parameter.requires_grad_(flag)

    @contextmanager
    def _reading(self) -> Iterator[None]:
        grads = [p.grad for _, _, p in self._followed]
        reached: set[tuple[int, str]] = set()
        handles = []
        try:
            for number, name, parameter in self._followed:
                parameter.grad = None
                read = partial(self._read, number, name, reached)
                handles.append(parameter.register_post_accumulate_grad_hook(read))
            yield
        finally:
            for handle in handles:
                handle.remove()
            for grad, (_, _, parameter) in zip(grads, self._followed, strict=True):
                parameter.grad = grad
        self._note_missing(reached)

    def _note_missing(self, reached: set[tuple[int, str]]) -> None:
        self._reached |= reached
        for number, name, parameter in self._followed:
            if (number, name) not in reached:  # autograd never reached it: its gradient is zero
                positions = self._random.integers(0, parameter.numel(), _OTHERS)
                not_kept = np.full(_OTHERS, -1)
                self._references.append(_Reference(number, name, positions, np.zeros(_OTHERS), not_kept, 0.0))

    def _read(self, number: int, name: str, reached: set[tuple[int, str]], parameter: nn.Parameter) -> None:
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None
        self._note(number, name, reached, gradient)

    def _note(self, number: int, name: str, reached: set[tuple[int, str]], gradient: Tensor) -> None:
        reached.add((number, name))
        gradient = gradient.detach()
        gradient = gradient.to_dense() if gradient.layout != torch.strided else gradient
        if number in self._rotated:
            self._rotated[number].add(name, gradient, KINDS[self._layers[number][0].kind])
        flat = gradient.reshape(-1)
        rows = flat.view(len(gradient), -1) if gradient.dim() > 1 else flat.view(-1, 1)
        columns, kept = self._kept.get((number, name), (np.empty(0, np.int64), np.empty(0, np.int64)))
        some = self._random.integers(0, flat.numel(), min(_POOL, 4 * flat.numel()))
        chosen = self._choose(flat, kept)
        positions = np.concatenate([kept[chosen], some[self._choose(flat, some)], self._of_rows(rows)])
        values = flat[torch.from_numpy(positions).to(flat.device)].double().cpu().numpy()
        scale = float(np.abs(values).max())
        of_mask = np.full(len(positions), -1)
        of_mask[: len(chosen)] = columns[chosen]
        self._references.append(_Reference(number, name, positions, values, of_mask, scale))

    def _choose(self, flat: Tensor, positions: Numbers) -> Numbers:
        """Return which of some positions to compare: those with the largest gradients, and a few others."""
        if len(positions) <= _LARGEST + _OTHERS:
            return np.arange(len(positions))
        values = flat[torch.from_numpy(positions).to(flat.device)].abs().float().cpu().numpy()
        order = np.argsort(-values, kind="stable")
        others = self._random.permutation(order[_LARGEST:])[:_OTHERS]
        return np.concatenate([order[:_LARGEST], others]).astype(np.int64)

    def _of_rows(self, rows: Tensor) -> Numbers:
        """Return positions in rows that have a gradient: few, of an embedding."""
        thin = rows[:, :: max(1, rows.shape[1] // _SEEN)]  # a pass over all of a large gradient would take a while
        peaks = thin.abs().amax(1)
        top = peaks.float().topk(min(_ROWS // 4, len(peaks))).indices.cpu().numpy()
        moved = torch.nonzero(peaks).flatten().cpu().numpy()
        some = np.concatenate([top, self._random.permutation(moved)[:_ROWS]])
        strongest = rows[torch.from_numpy(some).to(rows.device)].abs().argmax(1).cpu().numpy()
        return np.asarray(some * rows.shape[1] + strongest, np.int64)

    def gather_into(self, b: int) -> tuple[Receiver, Callable[[], Tensor]]:
        """Return a receiver (use, x, δ) of the entries to compare, and what returns them, (m,), times their factors."""
        placeholder = next(iter(self._layers.values()))[0]  # of layers that are not tapped
        none = np.empty(0, np.int32)
        modules = [ModuleMask(placeholder, none, none, np.empty(0, np.float32))] * (max(self._layers) + 1)
        first = 0
        for number in self._active:
            modules[number] = self._entries_of(number, first)
            first += len(modules[number].rows)
        mask = Mask(tuple(modules))
        gatherer, samples = MaskGatherer(mask, self._device), self._samples
        factors = torch.from_numpy(self._factors).to(self._device)
        rows = torch.zeros((len(samples), mask.k), device=self._device)

        def receive(use: Use, x: Any, delta: Any) -> None:
            self.see(x, delta)
            if not use.kind.whole_call and len(x) == b:
                gatherer.add(rows, use, x[samples], delta[samples])
            else:
                part = torch.zeros((b, mask.k), device=self._device)
                gatherer.add(part, use, x, delta)
                rows.add_(part[samples])

        return receive, lambda: factors @ rows.double()

    def _entries_of(self, number: int, first: int) -> ModuleMask:
        """Return the entries of a layer to compare, in order, each once; ``first`` others are gathered before them."""
        (shape, module), references = self._layers[number], self._of_layer(number)
        flat = []
        for each in references:
            rows, cols = KINDS[shape.kind].entries_at(shape, module, each.parameter, each.positions)
            flat.append(rows * shape.shape[1] + cols)
        distinct = np.unique(np.concatenate([np.empty(0, np.int64), *flat]))
        for each, entries in zip(references, flat, strict=True):
            each.gathered = first + np.searchsorted(distinct, entries)
        rows, cols = np.divmod(distinct, shape.shape[1])
        return ModuleMask(shape, rows.astype(np.int32), cols.astype(np.int32), np.ones(len(distinct), np.float32))

    def _of_layer(self, number: int) -> list[_Reference]:
        return [each for each in self._references if each.layer == number]

    def compare(self, entries: Tensor, rows: Tensor | None) -> list[Disagreement]:
        """Compare gathered entries (m,), and kept ones (b, k), with autograd's; return layers that differ."""
        gathered, disagree = entries.cpu().numpy(), []
        errors: dict[int, float] = {}
        scales = self._scales()
        for number in self._active:
            error, silent = self._difference(number, gathered, rows, scales)
            if error is None:
                continue
            if number not in self.unverifiable:
                errors[number] = max(error, self.errors.get(number, 0.0))
            if not error <= self.tolerance:
                shape, module = self._layers[number]
                reason = "its weight is used without calling the layer" if silent else None
                disagree.append(Disagreement(shape.name or "(the model)", type(module).__name__, error, reason))
        if not disagree:  # otherwise the batch is compared in another way, which decides
            self.errors |= errors
        return disagree

    def _difference(
        self, number: int, gathered: npt.NDArray[np.float64], rows: Tensor | None,
        scales: Mapping[tuple[int, str], float],
    ) -> tuple[float | None, bool]:  # fmt: skip
        """Return a layer's largest difference, and whether it gathered nothing; None if nothing is finite."""
        errors, some, missing = [], False, 0.0
        for each in self._of_layer(number):
            scale = scales[each.layer, each.parameter]
            if not np.isfinite(scale):
                continue  # a sample is not finite, which is reported where its row is stored
            pairs = [(gathered[each.gathered], each.values)]
            if rows is not None and self._mask is not None:
                pairs.append(self._kept_pair(each, rows))
            some |= any(bool(mine.any()) for mine, _ in pairs)
            missing = max(missing, float(np.abs(each.values).max(initial=0.0)) / scale)
            errors += [float(np.abs(mine - theirs).max(initial=0.0)) / scale for mine, theirs in pairs]
        if errors and rows is not None and number in self._rotated:
            errors.append(self._rotated_error(number, rows, scales))
        if not errors:
            return None, False
        error = max(errors, key=lambda value: np.inf if np.isnan(value) else value)
        return error, not some and missing > self.tolerance

    def _kept_pair(self, each: _Reference, rows: Tensor) -> tuple[Any, Any]:
        kept = each.columns >= 0
        return self._unweighted(rows, each.columns[kept]), each.values[kept]

    def _rotated_error(self, number: int, rows: Tensor, scales: Mapping[tuple[int, str], float]) -> float:
        """Return the largest difference of a layer's entries in a Kronecker basis, on the scale of all its entries."""
        part = self._rotated[number]
        scale = max(value for (layer, _), value in scales.items() if layer == number)
        scale = max(_LAYER_FLOOR * scale, float(np.abs(part.values).max(initial=0.0)))
        return float(np.abs(self._unweighted(rows, part.columns) - part.values).max(initial=0.0)) / scale

    def _unweighted(self, rows: Tensor, columns: Numbers) -> npt.NDArray[np.float64]:
        """Return kept entries of the samples, times their factors, without the mask's weights."""
        values = rows[self._samples][:, torch.from_numpy(columns).to(rows.device)].double().cpu().numpy()
        return np.asarray(self._factors @ values / self._weights[columns])

    def _scales(self) -> Mapping[tuple[int, str], float]:
        """Return what each difference is relative to: the parameter's largest gradient, unless that is rounding."""
        finite = [each for each in self._references if np.isfinite(each.scale)]
        of_model = max((each.scale for each in finite), default=0.0)
        of_layer: dict[int, float] = {}
        for each in finite:
            of_layer[each.layer] = max(each.scale, of_layer.get(each.layer, 0.0))
        least = max(_MODEL_FLOOR * of_model, float(np.finfo(np.float32).tiny))
        return {
            (each.layer, each.parameter): max(each.scale, _LAYER_FLOOR * of_layer.get(each.layer, 0.0), least)
            for each in self._references
        }

    def facts(self) -> dict[str, Any]:
        """Return what a store records: the verified share of the trained parameters, the largest difference."""
        right = [number for number, error in self.errors.items() if error <= self.tolerance]
        worst = max(right, key=lambda number: self.errors[number], default=None)
        names = {number: shape.name or "(the model)" for number, (shape, _) in self._layers.items()}
        verified = [p for number, name, p in self._watched if number in right and (number, name) in self._reached]
        unreached = {
            f"{names[number]}.{name}": "the loss of the samples compared does not depend on it"
            for number, name, _ in self._watched
            if number in right and (number, name) not in self._reached
        }
        unverified = {names[number]: reason for number, reason in self.unverifiable.items()}
        return {
            "checked": True,
            "share": self._trained.share(verified),
            "worst_error": None if worst is None else self.errors[worst],
            "worst_layer": None if worst is None else names[worst],
            "tolerance": self.tolerance,
            "unverified": unverified | unreached,
        }


_CLOSE, _CLOSE_COARSE = 1e-3, 5e-2  # relative difference of the losses of one sample alone and in its batch


def differentiate_samples(
    check: GradientCheck, plain: Callable[[Any], Tensor], batch: Any, losses: Tensor, state: Any, *,
    alone: bool = True, layers: Container[int] | None = None,
) -> bool:  # fmt: skip
    """Have a check read autograd's gradients of a batch's first and last loss, of some layers only, or of all.

    The two samples are run by themselves if that is asked for (``alone``), the batch can be cut, and their losses stay
    the same; otherwise the whole batch is run. ``plain`` computes losses (b,) with the model without taps; ``losses``
    are those of the tapped model, before which the random state was ``state``. Returns False if these are not the
    model's losses.
    """
    factors = _factors(losses.detach())
    check.start(factors, layers)
    chosen = list(factors)
    if not chosen:
        return True  # nothing is finite, which is reported where the rows are stored
    with check.watching():
        checked = _alone(plain, batch, chosen, losses) if alone and len(chosen) < len(losses) else None
        if checked is None:
            set_random_state(state)
            with repeating_samples(range(len(losses))):
                whole = plain(batch)
            if not _close(whole, losses):
                return False
            checked = whole[chosen]
        with explained():
            check.differentiate(checked)
    return True


def _factors(losses: Tensor) -> dict[int, float]:
    """Return the samples to check, and different factors that bring their losses to a similar size.

    The factors are powers of two, which multiply numbers of few bits without rounding.
    """
    values = {sample: float(losses[sample]) for sample in sorted({0, len(losses) - 1})}
    finite = [sample for sample, value in values.items() if math.isfinite(value)]
    if len(finite) < 2:
        return dict.fromkeys(finite, 1.0)
    first, last = (abs(values[sample]) + 1e-6 for sample in finite)
    power = min(max(round(math.log2(first / last)), -7), 7) or 1
    return {finite[0]: 1.0, finite[1]: -(2.0**power)}


def _alone(plain: Callable[[Any], Tensor], batch: Any, chosen: list[int], losses: Tensor) -> Tensor | None:
    """Return the losses of some samples, run without the others; None if that is impossible or changes them."""
    part, cut = samples_of(batch, chosen, len(losses))
    if not cut:
        return None
    try:
        with repeating_samples(chosen):
            alone = plain(part)
    except Exception:  # of the user's model, which may need its whole batch
        return None
    return alone if _close(alone, losses[chosen]) else None


def _close(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape:
        return False
    coarse = one.dtype in (torch.bfloat16, torch.float16) or torch.is_autocast_enabled("cpu")
    share = _CLOSE_COARSE if coarse else _CLOSE
    one, other = one.detach().double(), other.detach().double()
    return bool(torch.allclose(one, other, rtol=share, atol=share * 1e-3, equal_nan=True))


def random_state(device: torch.device) -> Any:
    """Return the state of PyTorch's random numbers."""
    return torch.get_rng_state(), (device, torch.cuda.get_rng_state(device)) if device.type == "cuda" else None


def set_random_state(state: Any) -> None:
    """Set the state of PyTorch's random numbers, so that a model draws the same ones again."""
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1][1], state[1][0])


@contextmanager
def explained() -> Any:
    """Explain errors of reentrant gradient checkpointing, which ``torch.autograd.grad`` cannot differentiate."""
    try:
        yield
    except RuntimeError as error:
        if "use_reentrant" not in str(error) and "not compatible with .grad()" not in str(error):
            raise
        raise UnsupportedModelError(
            "expected gradient checkpointing with use_reentrant=False; received the reentrant form, which cannot "
            "be differentiated with torch.autograd.grad: change it, or switch checkpointing off"
        ) from error
