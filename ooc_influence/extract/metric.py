"""Adam's geometry: dot products of gradients as the optimiser would weigh them.

Adam moves entry e by its gradient divided by √v̂_e + ε, with v̂ = exp_avg_sq / (1 − β₂^step). Dividing the entries of
both rows by (√v̂ + ε)^½ makes stored dot products gᵀ diag(1/(√v̂ + ε)) h (LESS, arXiv 2402.04333, applies the same metric
to one of them). Only kept entries of v are read, and the factors become part of the mask's weights, so that query
stores inherit them. An entry that the optimiser never updated has no v̂: training cannot have changed it, its weight is
0.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from ooc_influence.errors import InputError, MismatchError
from ooc_influence.extract.layers import clean_name, find_uses
from ooc_influence.store import Mask

_SAMPLED = 4096  # entries of all v, in the digest


@dataclass(frozen=True)
class _Moment:
    value: torch.Tensor  # exp_avg_sq
    correction: float  # 1 − β₂^step
    eps: float


class AdamMetric:
    """Second moments of an Adam optimiser, as a metric for gradients.

    Parameters
    ----------
    source : torch.optim.Optimizer, mapping, str or path
        The optimiser; its ``state_dict()``; a file of that (``optimizer.pt``); or a Hugging Face checkpoint folder.
    names : sequence of str, optional
        The parameters' names in the order of a state dict's numbers, if they do not follow from the model.

    Raises
    ------
    InputError
        If it holds no Adam state.
    """

    def __init__(
        self, source: torch.optim.Optimizer | Mapping[str, Any] | str | os.PathLike[str],
        names: Sequence[str] | None = None,
    ) -> None:  # fmt: skip
        self._optimiser = source if isinstance(source, torch.optim.Optimizer) else None
        state: Any = source
        if self._optimiser is not None:
            state = self._optimiser.state_dict()
        elif isinstance(source, (str, os.PathLike)):
            state = _load(Path(source))
        if not isinstance(state, Mapping) or "state" not in state or "param_groups" not in state:
            raise InputError(
                f"expected an optimiser, its state_dict, or a file of one; received {type(state).__name__}"
            )
        if not any("exp_avg_sq" in of_parameter for of_parameter in state["state"].values()):
            raise InputError(
                "expected the state of Adam or AdamW (exp_avg_sq); received another optimiser's, or one that made no "
                "step: the metric needs second moments"
            )
        self._state, self._names = state, names

    def moments(self, model: nn.Module) -> dict[str, _Moment]:
        """Return each parameter's second moment, by clean name."""
        moments = {}
        for number, name, group in self._named(model):
            state = self._state["state"].get(number)
            if state is None or "exp_avg_sq" not in state:
                continue
            value = state.get("max_exp_avg_sq", state["exp_avg_sq"])
            if not value.is_floating_point():
                raise InputError(
                    "expected second moments as floats; received 8-bit ones: dequantise the optimiser state"
                )
            correction = 1 - float(group["betas"][1]) ** float(state["step"])
            moments[name] = _Moment(value.detach().reshape(-1), correction, float(group["eps"]))
        return moments

    def _named(self, model: nn.Module) -> list[tuple[Any, str, Mapping[str, Any]]]:
        """Return (number, parameter name, group) of every parameter in the state."""
        groups = self._state["param_groups"]
        numbers = [number for group in groups for number in group["params"]]
        group_of = {number: group for group in groups for number in group["params"]}
        parameters = {clean_name(model, name): p for name, p in model.named_parameters()}
        for names in self._candidates(model, parameters, groups):
            if len(names) == len(numbers) and self._fits(parameters, numbers, names):
                return [(number, name, group_of[number]) for number, name in zip(numbers, names, strict=True)]
        raise MismatchError(
            f"expected optimiser state of this model's parameters; received {len(numbers)} of other shapes or in an "
            "order that does not follow from the model: give the optimiser itself, or names="
        )

    def _candidates(self, model: nn.Module, parameters: Mapping[str, nn.Parameter], groups: Any) -> list[list[str]]:
        if self._names is not None:
            return [list(self._names)]
        if self._optimiser is not None:
            by_id = {id(p): name for name, p in parameters.items()}
            listed = [p for group in self._optimiser.param_groups for p in group["params"]]
            return [[by_id.get(id(p), "") for p in listed]]
        if all("param_names" in group for group in groups):
            return [[clean_name(model, name) for group in groups for name in group["param_names"]]]
        plain = [[name for name, p in parameters.items() if p.requires_grad], list(parameters)]
        return [_decay_order(model, names) for names in plain] if len(groups) > 1 else plain

    def _fits(self, parameters: Mapping[str, nn.Parameter], numbers: Sequence[Any], names: Sequence[str]) -> bool:
        for number, name in zip(numbers, names, strict=True):
            moment = self._state["state"].get(number, {}).get("exp_avg_sq")
            if name not in parameters or (moment is not None and moment.numel() != parameters[name].numel()):
                return False
        return True

    def apply(self, mask: Mask, model: nn.Module) -> tuple[Mask, dict[str, Any]]:
        """Return the mask with weights times (√v̂ + ε)^-½, and what is recorded about the metric.

        Raises
        ------
        MismatchError
            If the state is not of this model's parameters.
        """
        moments = self.moments(model)
        uses = find_uses(model, [m.layer for m in mask.modules])
        own_uses = {use.layer: use for use in uses if use.shape.name == mask.modules[use.layer].layer.name}
        digest, never, modules = hashlib.sha256(), 0, []
        for number, kept in enumerate(mask.modules):
            use = own_uses[number]
            factor = np.zeros(len(kept.rows), np.float32)
            for parameter, entries, positions in use.kind.locate(kept.layer, use.module, kept.rows, kept.cols):
                moment = moments.get(f"{kept.layer.name}.{parameter}".lstrip("."))
                if moment is not None and len(entries):
                    factor[entries] = _factors(moment, positions)
            never += int((factor == 0).sum())
            digest.update(factor[:_SAMPLED].tobytes())
            modules.append(replace(kept, weight=kept.weight * factor))
        if never == mask.k:
            raise MismatchError("expected optimiser state of the tapped layers; received none: no entry was updated")
        facts = {"name": "adam", "digest": digest.hexdigest(), "never_updated": never}
        return Mask(tuple(modules), mask.pilot), facts


def _factors(moment: _Moment, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    values = moment.value[torch.from_numpy(positions).to(moment.value.device)].double().cpu().numpy()
    root = np.sqrt(values / max(moment.correction, 1e-30)) + moment.eps
    return np.where(values > 0, root**-0.5, 0).astype(np.float32)


def _decay_order(model: nn.Module, names: Sequence[str]) -> list[str]:
    """Return names as Hugging Face's Trainer groups them: with weight decay, then biases and norms without."""
    norms = tuple(
        f"{clean_name(model, name)}."
        for name, module in model.named_modules()
        if "norm" in type(module).__name__.lower()
    )
    without = {name for name in names if name.endswith("bias") or name.startswith(norms)}
    return [name for name in names if name not in without] + [name for name in names if name in without]


def _load(path: Path) -> Any:
    file = path / "optimizer.pt" if path.is_dir() else path
    if not file.is_file():
        raise InputError(f"expected optimiser state at {file}; received no such file")
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # pickle, zip and torch raise many kinds for a bad file
        raise InputError(f"expected optimiser state saved by torch.save in {file}; received {error}") from error
