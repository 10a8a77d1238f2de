"""What extraction stores of a family, entry by entry, against float64 autograd one sample at a time."""

from __future__ import annotations

import copy
import re
import tempfile
import time
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import ooc_influence as ooc
from families.base import Case, Family
from ooc_influence.errors import OocInfluenceError, StoreNotFoundError
from ooc_influence.extract.layers import find_uses

MODES = ("default", "fallback")
TOLERANCE = 2e-4  # of a layer's largest entry: float32 against float64
# A layer is measured against its own largest entry, unless that is below these multiples of what autograd loses in
# float32, and such a part of the sample's largest entry of all.
_NOISE, _FLOOR = 1e5, 2e-3
_MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None  # stores are small and many


class Sample(dict[str, np.ndarray]):
    """One sample's gradients in float64 by parameter, with how far autograd is from them in float32."""

    noise: Mapping[str, float] = {}


Gradients = list[Sample]


@dataclass
class Finding:
    """What came out of one family in one mode.

    Attributes
    ----------
    outcome : str
        right, refused (before a row was stored), refused late, wrong, overclaimed (more parameters are claimed as
        covered than are stored right), frozen (entries of frozen parameters), or crashed.
    share : float
        Of the trainable parameters' entries, those that are stored and right.
    claimed : float or None
        What the store says: the verified share, or what it covers where nothing was verified.
    worst, worst_layer
        The largest error of the entries of a layer, relative to its largest entry, and the layer with its class.
    message : str
        The error's first line, or what is wrong.
    missing : dict
        Trainable parameters that are not stored, by layer: their share, and whether the loss depends on them.
    """

    family: str
    field: str
    mode: str
    parameters: int = 0
    outcome: str = "right"
    share: float = 0.0
    claimed: float | None = None
    worst: float = 0.0
    worst_layer: str = ""
    message: str = ""
    missing: dict[str, Any] = field(default_factory=dict)
    warned: list[str] = field(default_factory=list)
    left_out: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def oracle(case: Case) -> list[Gradients]:
    """Return the gradients of every batch's samples, each in a batch by itself, in float64 where the model can."""
    single = _autograd(case, torch.float32)
    try:
        double = _autograd(case, torch.float64)
    except (RuntimeError, ValueError) as error:
        if not re.search("dtype|Double|double|Float", str(error)):
            raise
        return single
    if not all(np.isfinite(value).all() for batch in double for sample in batch for value in sample.values()):
        return single  # a model that uses float32's most negative number in float64
    for sample, rounded in zip(chain(*double), chain(*single), strict=True):
        sample.noise = {name: float(np.abs(value - rounded[name]).max(initial=0)) for name, value in sample.items()}
    return double


def _autograd(case: Case, dtype: torch.dtype) -> list[Gradients]:
    def to(value: Any) -> Any:
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    found = []
    for batch in case.batches:
        samples = []
        for sample in range(_samples(case, batch)):
            model = copy.deepcopy(case.model).to(dtype)  # each time: some models keep what they computed
            trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
            alone = pytree.tree_map(to, case.cut(batch, sample))
            losses = case.loss(model, alone)
            assert losses.dim() == 1, losses.shape
            values = torch.autograd.grad(losses[0], list(trained.values()), allow_unused=True)
            pairs = zip(trained.items(), values, strict=True)
            flat = ((n, (torch.zeros_like(p) if g is None else g).flatten().double().numpy()) for (n, p), g in pairs)
            samples.append(Sample(flat))
        found.append(samples)
    return found


def _samples(case: Case, batch: Any) -> int:
    with torch.no_grad():
        return len(case.loss(copy.deepcopy(case.model), batch))


def examine(family: Family, mode: str, case: Case | None = None, expected: list[Gradients] | None = None) -> Finding:
    """Extract everything of a family twice, once with the batch of b = t first; return the worse finding."""
    case = family.case() if case is None else case
    expected = oracle(case) if expected is None else expected
    orders = [list(range(len(case.batches)))]
    orders.append([1, 0, *orders[0][2:]])
    began, findings = time.perf_counter(), []
    for order in orders:
        finding = Finding(family.name, family.field, mode)
        finding.parameters = sum(p.numel() for p in case.model.parameters() if p.requires_grad)
        _extract(finding, case, [case.batches[i] for i in order], [row for i in order for row in expected[i]])
        findings.append(finding)
    worse = max(findings, key=lambda each: (_RANK.index(each.outcome), each.worst))
    worse.seconds = round(time.perf_counter() - began, 2)
    worse.worst = float(worse.worst)
    return worse


_RANK = ("right", "refused", "refused late", "overclaimed", "frozen", "crashed", "wrong")


def _extract(finding: Finding, case: Case, batches: list[Any], expected: Gradients) -> None:
    store, late, model = None, False, copy.deepcopy(case.model)
    with tempfile.TemporaryDirectory(dir=_MEMORY) as folder, warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        path = Path(folder, "s.zarr")
        options = {"compressor": ooc.Identity(), "dtype": "float32", "progress": False, **case.options}
        try:
            store = ooc.extract_gradients(
                model, case.loss, batches, path, fallback=finding.mode == "fallback", **options
            )
        except OocInfluenceError as error:
            finding.outcome, finding.message = "refused", str(error)
        except Exception as error:
            finding.outcome, finding.message = "crashed", f"{type(error).__name__}: {error}".splitlines()[0]
        if store is None:
            store, late = _stored(path), finding.outcome == "refused"
        if store is not None:
            _compare(finding, model, store, expected[: len(store)])
            if late and finding.outcome == "refused":
                finding.outcome = "refused late"
    finding.warned = [str(each.message) for each in said if issubclass(each.category, ooc.OocInfluenceWarning)]


def _stored(path: Path) -> Any:
    """Return what a run that stopped had stored; None where that is nothing."""
    try:
        store = ooc.GradientStore.open(path)
    except StoreNotFoundError:
        return None
    return store if len(store) else None


def _compare(finding: Finding, model: nn.Module, store: Any, expected: Gradients) -> None:
    """Compare every stored entry; set the finding's numbers, and its outcome where entries are wrong."""
    names = {id(p): name for name, p in model.named_parameters()}
    right = {name: np.zeros(p.numel(), bool) for name, p in model.named_parameters() if p.requires_grad}
    rows = store.rows().astype(np.float64)
    uses, start, frozen = find_uses(model, [kept.layer for kept in store.mask.modules]), 0, 0
    for number, kept in enumerate(store.mask.modules):
        use = next(use for use in uses if use.layer == number and use.shape.name == kept.layer.name)
        stored = rows[:, start : start + len(kept.rows)] / kept.weight
        start += len(kept.rows)
        places = []
        for parameter, at, where in use.kind.locate(kept.layer, use.module, kept.rows, kept.cols):
            name = names[id(use.module.get_parameter(parameter))]
            if name in right:
                places.append((name, at, where))
            else:
                frozen += len(at)
        error = _error(stored, places, expected)
        if error <= TOLERANCE:
            for name, _, where in places:
                right[name][where] = True
        if not error <= finding.worst:
            finding.worst, finding.worst_layer = error, f"{kept.layer.name} ({type(use.module).__name__})"
    _conclude(finding, store, right, expected, frozen)


def _error(stored: np.ndarray, places: list[Any], expected: Gradients) -> float:
    """Return a layer's largest error over all samples, relative to its largest entry."""
    worst, names = 0.0, {name for name, _, _ in places}
    for row, sample in zip(stored, expected, strict=True):
        sizes = [np.abs(sample[name]).max(initial=0) for name in names]
        largest = max((np.abs(value).max(initial=0) for value in sample.values()), default=0)
        scale = max([*sizes, *(_NOISE * sample.noise.get(name, 0.0) for name in names), _FLOOR * largest, 1e-30])
        for name, at, where in places:
            if len(at):
                error = float(np.abs(row[at] - sample[name][where]).max()) / scale
                worst = error if not error <= worst else worst  # NaN is the worst
    return worst


def _conclude(finding: Finding, store: Any, right: dict[str, np.ndarray], expected: Gradients, frozen: int) -> None:
    total = max(1, sum(len(flags) for flags in right.values()))
    finding.share = sum(int(flags.sum()) for flags in right.values()) / total
    for name, flags in right.items():
        if not flags.all():
            used = any(sample[name][~flags].any() for sample in expected)
            finding.missing[name] = {"share": round(float((~flags).sum() / total), 5), "used": used}
    verification = store.attrs.get("verification") or {}
    finding.claimed = verification.get("share") if verification.get("checked") else store.attrs.get("covered")
    finding.left_out = dict(verification.get("left_out", {}))
    if not finding.worst <= TOLERANCE:
        finding.outcome = "wrong"
        finding.message = f"{finding.worst_layer}: {finding.worst:.2g} of its largest entry"
    elif finding.outcome == "right" and frozen:
        finding.outcome, finding.message = "frozen", f"{frozen} of {store.mask.k} entries are frozen parameters'"
    elif finding.outcome == "right" and finding.claimed is not None and finding.claimed > finding.share + 1e-4:
        finding.outcome, finding.message = "overclaimed", f"claims {finding.claimed:.4f}, has {finding.share:.4f}"
