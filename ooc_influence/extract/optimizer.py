"""What an optimiser does at each step of a training whose rows are collected: :class:`~ooc_influence.store.StepRecord`.

Hooks on the optimiser read its gradients before a step and its state after it, at the kept entries only. Clipping and
the unscaling of a loss happen between a backward pass and the step: by what they multiplied the gradient is measured,
as the factor between the gradient's kept entries after the one and before the other.

Rows in a basis mix entries that Adam moves by rates of their own. On request a layer is taken to have one rate ρ, the
least-squares one: that which minimises the mean square of ρ g - g / (√v̂ + ε) over entries of variance v̂,

    ρ = Σ v̂ / (√v̂ + ε) / Σ v̂

Its steps are then those of SGD with momentum β₁ and dampening β₁, at the learning rate η ρ / (1 - β₁ᵗ).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ooc_influence.errors import InputError, MismatchError, UnsupportedModelError
from ooc_influence.extract.layers import Use, layer_parameters
from ooc_influence.fingerprint import json_digest
from ooc_influence.options import OptimizerMetric
from ooc_influence.store import SCALARS, LoggedColumns, Mask, Reduction, StepLogWriter, StepRecord, StorePath

_ALGORITHMS = {torch.optim.SGD: "sgd", torch.optim.Adam: "adam", torch.optim.AdamW: "adam"}
_PROBED = 1024  # entries of a parameter, at random, that stand for all where columns mix entries
_TOLERANCE = 0.02  # of the gradient: bfloat16 keeps eight bits
Indices = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class _Part:
    """A parameter of the optimiser, with what is read of it."""

    name: str
    value: nn.Parameter
    positions: Tensor  # in the flattened parameter, on its device
    columns: Indices  # the rows' columns that these are; empty where columns mix entries

    def read(self, tensor: Tensor | None) -> npt.NDArray[np.float64]:
        """Return a tensor of the parameter's shape at the positions; zeros for None."""
        if tensor is None:
            return np.zeros(len(self.positions))
        if tensor.is_sparse:
            raise UnsupportedModelError(
                f"expected dense gradients to record the optimiser of; received a sparse one of {self.name}: use "
                "sparse=False in its layer, or collect without optimizer="
            )
        return np.asarray(tensor.detach().reshape(-1)[self.positions].double().cpu().numpy())


class OptimizerRecorder:
    """Records an optimiser's steps beside the rows of a collector. A context.

    Parameters
    ----------
    optimizer : torch.optim.Optimizer
        ``SGD``, ``Adam`` or ``AdamW`` of torch.
    mask, reduction
        What the rows are.
    uses : list of Use
        The modules that the mask's layers are.
    every : int
        Second moments are recorded at each such step.
    metric : {"entries", "layer"}
        Whether Adam's second moments are each entry's own, or of a layer.

    Raises
    ------
    InputError
        For another optimiser, or rows of numbers that it does not act on one by one.
    MismatchError
        If it has none of the parameters.
    """

    def __init__(
        self, optimizer: Optimizer | Literal[True], mask: Mask, reduction: Reduction | None, uses: Sequence[Use],
        every: int, metric: OptimizerMetric,
    ) -> None:  # fmt: skip
        self._optimizer, self._algorithm, self._decoupled = _parse(optimizer, every)
        self._every = every
        self._k = mask.k if reduction is None else reduction.columns
        if metric not in get_args(OptimizerMetric):
            raise InputError(f"expected optimizer_metric 'entries' or 'layer'; received {metric!r}")
        self._layered = self._algorithm == "adam" and metric == "layer"
        mixing = reduction is not None or any(each.basis is not None and each.basis.rotates for each in mask.modules)
        if mixing and self._algorithm == "adam" and not self._layered:
            raise InputError(
                f"expected rows of the parameters' own entries to record {type(optimizer).__name__} at, which acts on "
                "each by itself; received rows in a basis or of projections: use Dropout without basis, or "
                "optimizer_metric='layer', which takes one rate for all entries of a layer"
            )
        mixing = mixing or self._layered
        self._owner: npt.NDArray[np.int32] = np.full(self._k, -1, np.int32)
        self._parts, self._together = self._find(mask, reduction is not None, uses, mixing)
        self._log: StepLogWriter | None = None
        self._before: npt.NDArray[np.float64] | None = None
        self._factor, self._total, self._batch_total = 1.0, 1.0, 0.0
        self._step: int | None = None
        self._inside = False
        self._seen: tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]] | None = None
        self._hooks = ExitStack()

    def _find(
        self, mask: Mask, reduced: bool, uses: Sequence[Use], mixing: bool
    ) -> tuple[list[_Part], list[list[int]]]:
        """Return the parts, and numbers of those that have to be stepped alike since columns mix them."""
        stepped = {id(p) for group in self._optimizer.param_groups for p in group["params"]}
        parts: list[_Part] = []
        together: list[list[int]] = []
        first = 0
        for number, kept in enumerate(mask.modules):
            use = next(use for use in uses if use.layer == number and use.own)
            columns = np.arange(first, first + len(kept.rows))
            first += len(kept.rows)
            if not len(columns):
                continue
            parameters = layer_parameters(kept.layer, use.module)
            whole = [(name, _spread(value.numel()), columns[:0]) for name, value in parameters.items()]
            located = use.kind.locate(kept.layer, use.module, kept.rows, kept.cols) if not mixing else []
            chosen = whole if mixing else [(each.parameter, each.positions, columns[each.entries]) for each in located]
            numbers: list[int] = []
            for name, positions, of_part in chosen:
                value = parameters[name]
                if id(value) in stepped:
                    numbers.append(len(parts))
                    self._owner[of_part] = len(parts)
                    on_device = torch.from_numpy(positions).to(value.device)
                    parts.append(_Part(f"{kept.layer.name}.{name}".lstrip("."), value, on_device, of_part))
            if mixing and len(numbers) < len(chosen) and (numbers or reduced):
                raise InputError(
                    f"expected all parameters of {kept.layer.name!r} in the optimiser, since the numbers of a row mix "
                    "their entries; received some: keep the parameters' own entries, or step all of them"
                )
            if mixing and numbers:
                together.append(numbers)
                if not reduced:
                    self._owner[columns] = numbers[0]
        if not parts:
            raise MismatchError(
                "expected an optimiser of the model's tapped layers; received one that has none of their parameters: "
                "give the one that trains this model"
            )
        if reduced:
            self._owner[:] = 0
            together = [list(range(len(parts)))]
        return parts, together

    @property
    def _facts(self) -> dict[str, Any]:
        return {
            "optimizer": type(self._optimizer).__name__,
            "algorithm": "sgd" if self._layered else self._algorithm,
            "metric": "layer" if self._layered else "entries",
            "every": self._every,
            "parameters": len(self._parts),
            "names": json_digest([part.name for part in self._parts]),
        }

    def open(self, store: StorePath) -> None:
        """Register hooks with the optimiser, and append to the records of a store."""
        self._log = StepLogWriter(store, LoggedColumns(self._facts, self._owner))
        self._hooks.callback(self._optimizer.register_step_pre_hook(self._before_step).remove)
        self._hooks.callback(self._optimizer.register_step_post_hook(self._after_step).remove)

    def close(self) -> None:
        """Remove the hooks."""
        self._hooks.close()

    def __len__(self) -> int:
        assert self._log is not None
        return len(self._log)

    def flush(self) -> None:
        """Make the records so far durable."""
        assert self._log is not None
        self._log.flush()

    def truncate(self, records: int) -> None:
        """Keep this many records and remove the later ones."""
        assert self._log is not None
        self._log.truncate(records)

    def start(self, step: int, *, collected: bool) -> None:
        """Note that a batch of a step begins."""
        if step != self._step:
            self._before, self._batch_total = None, 0.0
        self._step, self._inside = step, collected

    def end(self, total: float) -> None:
        """Note that a batch's backward pass is over, and the sum of its samples' weights."""
        self._inside = False
        self._before = self._gradients()
        self._batch_total += total

    def _gradients(self) -> npt.NDArray[np.float64]:
        return np.concatenate([part.read(part.value.grad) for part in self._parts])

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if any(callable(each) for each in (*args, *kwargs.values())):
            raise InputError("expected step() without a closure to record the optimiser; received one")
        if self._inside or self._step is None:
            raise InputError(
                "expected the optimiser's step after the collector's of the same batch; received it "
                f"{'inside' if self._inside else 'before any'}: call optimizer.step() behind the 'with' block"
            )
        if getattr(optimizer, "grad_scale", None) is not None:
            raise InputError(
                "expected gradients without the scale of the loss; received a fused optimiser that undoes it inside "
                "its step: call scaler.unscale_(optimizer) before scaler.step(optimizer)"
            )
        gradient = self._gradients()
        if self._before is not None:
            self._factor = _ratio(gradient, self._before)
            self._total = self._batch_total
        scalars = self._scalars()
        for numbers in [] if self._layered else self._together:
            if (scalars[numbers] != scalars[numbers[0]]).any():
                raise InputError(
                    "expected one learning rate, weight decay and momentum for all parameters whose entries a number "
                    f"of a row mixes; received several for {', '.join(self._parts[n].name for n in numbers[:4])}: give "
                    "them the same, or keep the parameters' own entries (Dropout without basis or reduction)"
                )
        if (
            self._algorithm == "adam" and not self._layered and scalars[:, 2].any()
        ):  # moments are those of the gradient with its decay
            decays = [line[2] * part.read(part.value) for line, part in zip(scalars, self._parts, strict=True)]
            gradient = gradient + np.concatenate(decays)
        self._seen = gradient, scalars

    def _scalars(self) -> npt.NDArray[np.float64]:
        """Return what :class:`StepRecord` has of each parameter, (P, SCALARS), but for Adam's count of steps."""
        group_of = {id(p): group for group in self._optimizer.param_groups for p in group["params"]}
        scalars = np.zeros((len(self._parts), SCALARS))
        for line, part in zip(scalars, self._parts, strict=True):
            group = group_of[id(part.value)]
            decay = float(group["weight_decay"])
            line[:3] = float(group["lr"]), decay * self._decoupled, decay * (not self._decoupled)
            if self._algorithm == "adam":
                line[3:6] = *map(float, group["betas"]), float(group["eps"])
            else:
                line[3:6] = float(group["momentum"]), float(group["dampening"]), bool(group["nesterov"])
            if part.value.grad is not None:
                buffer = self._optimizer.state.get(part.value, {}).get("momentum_buffer")
                line[6] = 1 if buffer is None else 2
        return scalars

    def _after_step(self, optimizer: Optimizer, _: Any, __: Any) -> None:
        assert self._log is not None
        assert self._seen is not None
        assert self._step is not None
        (gradient, scalars), self._seen = self._seen, None
        vectors = None
        if self._algorithm == "adam":
            for line, part in zip(scalars, self._parts, strict=True):
                line[6] *= float(optimizer.state.get(part.value, {}).get("step", 0))
            if self._layered:
                self._take_rates(scalars)
            elif len(self._log) % self._every == 0:
                vectors = self._vectors(gradient)
        self._log.append(StepRecord(self._step, self._factor, self._total, scalars, vectors))
        self._before = None

    def _take_rates(self, scalars: npt.NDArray[np.float64]) -> None:
        """Replace Adam's settings by those of SGD at the layers' mean rates, in place; the first parameter's hold."""
        for numbers in self._together:
            lr, decay, coupled, beta1, beta2, eps, count = scalars[numbers[0]]
            part_of_all = [self._parts[number] for number in numbers]
            moments = [part.read(self._optimizer.state.get(part.value, {}).get("exp_avg_sq")) for part in part_of_all]
            sizes = [part.value.numel() / max(1, len(part.positions)) for part in part_of_all]
            weights = np.concatenate([np.full(len(v), size) for v, size in zip(moments, sizes, strict=True)])
            second = np.concatenate(moments) / max(1 - beta2**count, 1e-300)
            total = float(weights @ second)
            if not count or not total:
                scalars[numbers] = 0.0  # nothing has moved
                continue
            rate = lr * float(weights @ (second / (np.sqrt(second) + eps))) / total / (1 - beta1**count)
            scalars[numbers] = rate, decay * lr / rate if rate else 0.0, coupled, beta1, beta1, 0.0, 2.0

    def _vectors(self, gradient: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
        """Return first and second moments, and the gradient before them, at the kept entries: (3, k)."""
        vectors = np.zeros((3, self._k), np.float32)
        first = 0
        for part in self._parts:
            state, columns = self._optimizer.state.get(part.value, {}), part.columns
            vectors[0, columns] = part.read(state.get("exp_avg"))
            vectors[1, columns] = part.read(state.get("exp_avg_sq"))
            vectors[2, columns] = gradient[first : first + len(columns)]
            first += len(columns)
        return vectors

    @property
    def flush_due(self) -> bool:
        """Whether records wait that fill a file."""
        assert self._log is not None
        return self._log.full


def _parse(optimizer: Optimizer | Literal[True], every: int) -> tuple[Optimizer, str, bool]:
    """Return an optimiser, its algorithm, and whether its weight decay is apart from its gradient."""
    if optimizer is True:
        raise InputError("expected the optimiser itself as optimizer=; received True, which is for a Trainer's own")
    algorithm = _ALGORITHMS.get(type(optimizer))
    if algorithm is None:
        raise InputError(
            f"expected torch's SGD, Adam or AdamW to record the steps of; received {type(optimizer).__name__}: what a "
            "step of it does to a weight is not known here; collect without optimizer="
        )
    if every < 1:
        raise InputError(f"expected optimizer_every >= 1; received {every}")
    for group in optimizer.param_groups:
        on = [name for name in ("amsgrad", "maximize") if group.get(name)]
        if on:
            raise InputError(f"expected {type(optimizer).__name__} without {on[0]} to record the steps of; received it")
    decoupled = {
        algorithm == "adam" and (isinstance(optimizer, torch.optim.AdamW) or bool(group.get("decoupled_weight_decay")))
        for group in optimizer.param_groups
    }
    if len(decoupled) > 1:
        raise InputError("expected one kind of weight decay in all parameter groups; received decoupled and coupled")
    return optimizer, algorithm, decoupled.pop()


def _spread(numel: int) -> Indices:
    if numel <= _PROBED:
        return np.arange(numel)
    return np.unique(np.random.default_rng(0).integers(0, numel, _PROBED))


def _ratio(after: npt.NDArray[np.float64], before: npt.NDArray[np.float64]) -> float:
    """Return the factor between a gradient before and after clipping and unscaling.

    Raises
    ------
    InputError
        If it is not a multiple.
    """
    square = float(before @ before)
    if square == 0:
        return 1.0
    factor = float(after @ before) / square
    if not np.linalg.norm(after - factor * before) <= _TOLERANCE * np.linalg.norm(after):
        raise InputError(
            "expected the optimiser's gradient to be a multiple of the one after the last collected backward pass "
            "(clipped as a whole, a loss scale undone); received another: put all backward passes of a step into "
            "collector.step(...), and clip all parameters together by their norm"
        )
    return factor
