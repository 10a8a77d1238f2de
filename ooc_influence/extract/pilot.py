"""The pilot: a look at some samples before the mask is drawn and the basis chosen.

For importance sampling, one pass sums squares of every layer's inputs and output gradients; for a Kronecker basis,
their second moments, and another the squares of the entries drawn. For a reduction, wide rows of more samples go into a
temporary store beside the one to be made, so that a killed run can resume them; their eigenbasis becomes part of the
real store, and the pilot's rows are removed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch

from ooc_influence.checkpoint import ClaimedOutput, ResumableOutput, partial_path
from ooc_influence.compress import Compressor, KroneckerBasis, PilotMoments, fit_eigenbasis
from ooc_influence.errors import InputError, MismatchError, NonFiniteError, StoreNotFoundError
from ooc_influence.extract.data import (
    Batches,
    Batching,
    BudgetBatches,
    Numbers,
    RowMetadata,
    batch_size,
    count_rows,
    cut_batches,
    even_numbers,
    load_samples,
    to_device,
)
from ooc_influence.extract.factors import (
    FactorSums,
    KroneckerFactors,
    check_samples,
    check_scratch,
    column_moments,
    factor_groups,
    measured,
    rotated_sides,
)
from ooc_influence.extract.gather import MaskGatherer
from ooc_influence.extract.layers import Use, find_uses
from ooc_influence.extract.losses import rows_of_batch, run_loss, sampled_labels
from ooc_influence.extract.metric import AdamMetric
from ooc_influence.extract.passes import ModelSetup, fill
from ooc_influence.extract.pilot_rows import KnownRows, RowKeeper
from ooc_influence.extract.pilot_sums import Arrays, PilotParts, PilotSums, Position
from ooc_influence.extract.sink import Sink, StorePlan
from ooc_influence.extract.taps import tapped
from ooc_influence.fingerprint import json_digest
from ooc_influence.memory import MemoryBudget, parse_bytes
from ooc_influence.progress import Progress
from ooc_influence.store import (
    GradientStore,
    LayerShape,
    Mask,
    PathLike,
    Storage,
    StorePath,
    exists,
    parse_path,
    remove_tree,
)

logger = logging.getLogger("ooc_influence")


@dataclass(frozen=True)
class Pilot:
    """A pilot on some of ``batches``, its own or the extraction's."""

    setup: ModelSetup
    batches: Batches | BudgetBatches
    memory: int | str | None = None  # budget for fitting the eigenbasis of the pilot's rows
    parts: PilotParts = field(default_factory=lambda: PilotParts(ResumableOutput()))  # what keeps unfinished passes
    verification: dict[str, Any] = field(default_factory=dict)  # result of the comparison with autograd, after a pass
    keeps_rows: bool = False  # whether rows of the pilot's samples may be rows of the store: its labels, data, model

    def __post_init__(self) -> None:
        if self.memory is not None:
            parse_bytes(self.memory)  # an invalid budget is refused before the model runs

    def run(
        self, plan: StorePlan, compressor: Compressor, layers: list[LayerShape], metric: AdamMetric | None,
        store: PathLike,
    ) -> StorePlan:  # fmt: skip
        """Return the plan of ``store`` with the mask and the reduction that the compressor makes from the pilot."""
        basis, total = compressor.reduce, self.count()
        if basis is not None and total is not None and total < basis.r:
            raise InputError(
                f"expected at least r = {basis.r} samples to make an eigenbasis from; received {total}: use a smaller "
                "r (--dims), or no reduction"
            )
        wide, path = compressor.wide, pilot_path(store)
        plan = replace(plan, attributes=plan.attributes | {"compressor": wide.to_dict()})
        earlier = self._earlier(path, wide, layers, metric)
        if earlier is None:
            with self._resumable(store, plan, layers) as pilot:
                plan = replace(plan, mask=pilot.draw(wide, layers)).weighted_by(metric, self.setup.model)
        else:
            facts = earlier.attrs.get("metric")
            plan = replace(plan, mask=earlier.mask, attributes=plan.attributes | {"metric": facts})
        plan.attributes["verification"] |= self.verification
        if basis is None:
            return plan
        wide_plan = replace(plan, storage=Storage(), dtype="float16")
        try:
            self._fill(wide_plan, path, basis.pilot_rows)
        except MismatchError:  # rows of other data, or another model
            remove_tree(path)
            self._fill(wide_plan, path, basis.pilot_rows)
        reduction = fit_eigenbasis(
            GradientStore.open(path), basis.r, weights=basis.weights, memory=self.memory, progress=self.setup.progress
        )
        return replace(plan, reduction=reduction, attributes=plan.attributes | {"compressor": compressor.to_dict()})

    @contextmanager
    def _resumable(self, store: PathLike, plan: StorePlan, layers: list[LayerShape]) -> Iterator[Pilot]:
        """Keep sums of unfinished passes beside ``store``, until :func:`remove_pilot`."""
        settings = _sums_settings(plan, layers)
        output = ClaimedOutput(_sums_path(store), settings, "what a pilot has summed", ", or choose another path")
        try:
            yield replace(self, parts=PilotParts(output))
        finally:
            output.close(finished=False)

    def known_rows(self, plan: StorePlan, store: PathLike) -> KnownRows:
        """Return the rows of ``store`` that its pilot has computed, in this run or one that was killed."""
        if not self.keeps_rows:
            return KnownRows()
        settings = _sums_settings(plan, [module.layer for module in plan.mask.modules])
        return KnownRows(ResumableOutput(partial_path(_sums_path(store)), settings), plan.mask)

    def _earlier(
        self, path: StorePath, wide: Compressor, layers: list[LayerShape], metric: AdamMetric | None
    ) -> GradientStore | None:
        """Return the wide store of a killed run with the same compressor, layers and metric."""
        try:
            store = GradientStore.open(path)
        except StoreNotFoundError:
            return None
        same = store.attrs.get("compressor") == wide.to_dict()
        same &= (store.attrs.get("metric") is None) == (metric is None)
        return store if same and [module.layer for module in store.mask.modules] == layers else None

    def _fill(self, plan: StorePlan, path: StorePath, rows: int) -> None:
        sink = Sink(path, plan, RowMetadata.of(None, None), Batching(), None, None, "skip")
        setup = replace(self.setup, check=self.setup.check and not self.verification)
        try:
            total = min(rows, self.count() or rows)
            fill(sink, setup, part_of(self.batches, rows), Batching(), total=total, label="pilot rows")
        finally:
            sink.close()

    def count(self) -> int | None:
        """Return how many samples there are, if that is known without reading them."""
        return len(self.batches) if isinstance(self.batches, BudgetBatches) else count_rows(self.batches)

    def draw(self, compressor: Compressor, layers: Sequence[LayerShape]) -> Mask:
        """Draw the mask from what a pilot learns; in a Kronecker basis, with the eigenvectors and Λ of what is kept."""
        samples, basis = compressor.pilot_samples, compressor.kronecker
        if basis is None:
            return compressor.draw(layers, self.moments(layers, samples) if samples else ())
        with self.labels(basis):
            factors = self.factors(layers, samples)
            mask = factors.apply(compressor.draw(layers, factors.moments), basis)
            if basis.moments != "measured":
                return mask
            pilot = self if basis.labels == "dataset" else replace(self, keeps_rows=False)
            return pilot.measure(mask, samples, basis.damping_scope)

    @contextmanager
    def labels(self, basis: KroneckerBasis) -> Iterator[None]:
        """Have the loss draw labels where the basis is one of sampled labels; refuse, at the end, one that did not."""
        with nullcontext() if basis.labels == "dataset" else sampled_labels(basis.seed) as draws:
            yield
        if draws is not None and not draws.used:
            raise InputError(
                "expected a loss that draws labels, for a basis with labels='sampled'; received one that has the data "
                "set's only: compute it by ooc_influence.cross_entropy, token_cross_entropy or a loss of "
                "ooc_influence.hf, or use labels='dataset'"
            )

    def moments(self, layers: Sequence[LayerShape], samples: int) -> list[PilotMoments]:
        """Return second moments of every layer's rows and columns over ``samples`` samples."""
        sums = MomentSums(layers)
        self._run(layers, samples, "pilot", sums)
        return sums.result()

    def factors(self, layers: Sequence[LayerShape], samples: int) -> KroneckerFactors:
        """Return the factors of every layer's Kronecker basis, in as many passes as the budget asks for."""
        factors, sides = KroneckerFactors(), rotated_sides(layers, find_uses(self.setup.model, layers))
        groups = factor_groups(layers, sides, MemoryBudget.of(self.memory))
        check_scratch(layers, sides)
        for number, group in enumerate(groups):
            sums = FactorSums(layers, sides, group)
            self._run(layers, samples, "factors" if len(groups) == 1 else f"factors {number + 1}/{len(groups)}", sums)
            sums.solve(factors)
        return factors

    def measure(self, mask: Mask, samples: int, scope: str, at_once: int | None = None) -> Mask:
        """Return a mask in a Kronecker basis with Λ of its entries, measured over ``samples`` samples.

        Batches of more than ``at_once`` samples are cut.
        """
        sums = SquareSums(mask, self.setup.device)
        rows = self.parts.rows_of(mask, lambda: sums.rows) if self.keeps_rows else None
        self._run([module.layer for module in mask.modules], samples, "second moments", sums, at_once, rows)
        return measured(mask, sums.squares, sums.samples, scope)

    def _run(
        self, layers: Sequence[LayerShape], samples: int, label: str, sums: PilotSums, at_once: int | None = None,
        rows: RowKeeper | None = None,
    ) -> None:  # fmt: skip
        """Run a pass over the pilot's samples, of at most ``at_once`` at a time; ``rows`` keeps their rows.

        Batches with NaN or Inf do not count: the extraction that follows names the samples, or skips them.
        """
        position, batches = self._resume(label, samples, sums, at_once)
        if rows is not None:
            rows.begin(position.batches)
        check = self.setup.check and not self.verification
        with (
            tapped(self.setup.model, layers, self.setup.device, probe=True, check=check) as taps,
            Progress(label, min(samples, self.count() or samples), self.setup.progress) as bar,
        ):
            bar.advance(position.seen)
            for numbers, batch in batches:
                with rows_of_batch(position.seen):
                    losses = taps.run(self.setup.per_sample_loss, to_device(batch, self.setup.device), sums.receiver)
                finite = sums.finish_batch(len(losses))
                if rows is not None:
                    rows.add(numbers, losses, finite=finite)
                position.add(losses, finite=finite)
                bar.advance(len(losses))
                self.parts.save_if_due(label, position, sums, rows)
            self.verification.update(taps.verification() or {})
        self.parts.save_if_due(label, position, sums, rows)
        if rows is not None:
            rows.write()
        if position.skipped:
            if not sums.samples:
                raise NonFiniteError(
                    "expected finite pilot gradients; received NaN or Inf in every batch: check data and loss", []
                )
            logger.warning("batches with NaN or Inf, of %d samples, do not count in the pilot", position.skipped)

    def _resume(
        self, label: str, samples: int, sums: PilotSums, at_once: int | None
    ) -> tuple[Position, Iterator[NumberedBatch]]:
        """Return how far a killed run was with a pass, its sums restored, and the batches that are left."""

        def batches() -> Iterator[NumberedBatch]:
            taken = take_evenly(self.batches, samples)
            if at_once is None:
                return taken
            return (NumberedBatch(None, cut) for _, each in taken for _, cut in cut_batches(each, at_once))

        fresh, rest, last = sums.state(), batches(), None
        position = self.parts.resume(label, sums)
        for _ in range(position.batches):
            last = next(rest, None)
        if not position.batches:
            return position, rest
        if last is not None:
            with torch.no_grad(), rows_of_batch(position.seen - len(position.losses or ())):
                moved = to_device(last.batch, self.setup.device)
                losses = run_loss(self.setup.per_sample_loss, self.setup.model, moved)
            if position.has(losses):
                logger.info("%s: %d samples were summed before", label, position.seen)
                return position, rest
        logger.warning("%s: what was summed before is of other data or another loss, and not used", label)
        sums.restore(*fresh)
        sums.samples = 0
        return Position(), batches()

    def verify(self, layers: Sequence[LayerShape]) -> None:
        """Compare the entries gathered of a first batch with autograd."""
        with tapped(self.setup.model, layers, self.setup.device, check=True) as taps:
            for _, batch in take_evenly(self.batches, 2):
                moved = to_device(batch, self.setup.device)
                taps.run(self.setup.per_sample_loss, moved, lambda b: lambda use, x, delta: None)
                break
            self.verification.update(taps.verification() or {})


def part_of(batches: Batches | BudgetBatches, samples: int) -> Batches | BudgetBatches:
    """Return the batches of :func:`take_evenly`, to be read as often as needed and never held all at once."""
    if isinstance(batches, BudgetBatches):
        return batches.part(even_numbers(len(batches), samples))
    return _Taken(batches, samples)


class _Taken:
    def __init__(self, batches: Batches, samples: int) -> None:
        self._batches, self._samples = batches, samples

    def __iter__(self) -> Iterator[Any]:
        return (batch for _, batch in take_evenly(self._batches, self._samples))


class NumberedBatch(NamedTuple):
    """A batch, and the numbers of its samples in the data: None where they are not known."""

    numbers: Numbers | None
    batch: Any


def take_evenly(batches: Batches | BudgetBatches, samples: int) -> Iterator[NumberedBatch]:
    """Yield batches that hold at least ``samples`` samples, evenly over the data or, of a stream, from its start."""
    if isinstance(batches, Iterator):
        raise InputError(
            "expected batches that can be read twice, once for the pilot; received an iterator: give a list, a "
            "DataLoader or a callable start_row -> iterable, or the pilot's own batches with pilot="
        )
    count = 0
    for each in _spread(batches, samples):
        if count >= samples:
            return
        count += batch_size(each.batch) or 1
        yield each


def _spread(batches: Batches | BudgetBatches, samples: int) -> Iterator[NumberedBatch]:
    if isinstance(batches, (list, tuple)) and batches:
        found = [batch_size(batch) for batch in batches]
        sizes = [size or 1 for size in found]
        count = max(1, -(-samples // max(sizes)))
        while count < len(batches) and sum(sizes[index] for index in even_numbers(len(batches), count)) < samples:
            count += 1  # the last batch, which is always among them, may be short
        ends = None if None in found else np.cumsum(sizes)
        for index in even_numbers(len(batches), count):
            yield NumberedBatch(
                None if ends is None else np.arange(ends[index] - sizes[index], ends[index]), batches[index]
            )
        return
    if isinstance(batches, BudgetBatches):
        numbers = even_numbers(len(batches), samples)
        yield from (NumberedBatch(part, batches.load(part)) for part in (batches.cut(numbers) if len(numbers) else []))
        return
    if isinstance(batches, torch.utils.data.DataLoader) and hasattr(batches.dataset, "__len__"):
        loaded = load_samples(batches, even_numbers(len(batches.dataset), samples))
        if loaded is not None:
            yield from (NumberedBatch(None, batch) for batch in loaded)
            return
    yield from (NumberedBatch(None, batch) for batch in (batches(0) if callable(batches) else batches))


class MomentSums:
    """Sums of squares of layers' inputs and output gradients, in the product form of the entries."""

    def __init__(self, layers: Sequence[LayerShape]) -> None:
        self.samples = 0
        self._layers = layers
        self._sums: dict[tuple[int, str], list[Any]] = {}
        self._batch: dict[tuple[int, str], list[Any]] = {}

    def receiver(self, b: int) -> Callable[[Use, Any, Any], None]:
        """Return the receiver of a batch of ``b`` samples, without what an earlier attempt at it added."""
        self._batch = {}
        return self._receive

    def _receive(self, use: Use, x: Any, delta: Any) -> None:
        rows, cols, tokens = use.kind.moments(use.shape, use.module, x, delta)
        _add(self._batch, (use.layer, use.shape.name), [rows.cpu().numpy(), cols.cpu().numpy(), tokens])

    def finish_batch(self, b: int) -> bool:
        """Add the sums of a batch of ``b`` samples; return False, without adding them, if they are not finite."""
        if not all(np.isfinite(rows).all() and np.isfinite(cols).all() for rows, cols, _ in self._batch.values()):
            return False
        self.samples += b
        for key, moments in self._batch.items():
            _add(self._sums, key, moments)
        return True

    @property
    def identity(self) -> Any:
        """See :class:`PilotSums`."""
        return "moments"

    def state(self) -> tuple[Any, Arrays]:
        """See :class:`PilotSums`."""
        arrays: dict[str, Any] = {}
        for number, (rows, cols, _) in enumerate(self._sums.values()):
            arrays |= {f"rows{number}": rows, f"cols{number}": cols}
        return [[*key, tokens] for key, (_, _, tokens) in self._sums.items()], arrays

    def restore(self, facts: Any, arrays: Arrays) -> None:
        """See :class:`PilotSums`."""
        self._sums = {
            (layer, name): [arrays[f"rows{number}"], arrays[f"cols{number}"], tokens]
            for number, (layer, name, tokens) in enumerate(facts)
        }

    def result(self) -> list[PilotMoments]:
        """Return the moments of every layer that received gradients; of a tied weight, those of each of its uses."""
        check_samples(self.samples)
        return [
            PilotMoments(number, rows / self.samples, column_moments(self._layers[number], cols, tokens))
            for (number, _), (rows, cols, tokens) in sorted(self._sums.items(), key=lambda item: item[0])
            if len(rows) == self._layers[number].shape[0]  # else a weight shared in another form: its other uses count
        ]


def _add(sums: dict[tuple[int, str], list[Any]], key: tuple[int, str], moments: list[Any]) -> None:
    sums[key] = [total + value for total, value in zip(sums.get(key, [0.0, 0.0, 0]), moments, strict=True)]


class SquareSums:
    """Sums of the squares of a mask's entries, (k,) float64; ``rows`` are those of the last batch, (b, k) float32."""

    def __init__(self, mask: Mask, device: torch.device) -> None:
        self.samples, self.squares = 0, np.zeros(mask.k)
        self.identity = mask.digest
        self._gatherer, self._device, self._k = MaskGatherer(mask, device), device, mask.k
        self.rows = torch.empty(0)

    def receiver(self, b: int) -> Callable[[Use, Any, Any], None]:
        """Return the receiver of a batch of ``b`` samples, without what an earlier attempt at it added."""
        self.rows = torch.zeros((b, self._k), device=self._device)
        return lambda use, x, delta: self._gatherer.add(self.rows, use, x, delta)

    def finish_batch(self, b: int) -> bool:
        """Add the sums of a batch of ``b`` samples; return False, without adding them, if they are not finite."""
        squares = self.rows.square().sum(0, dtype=torch.float64).cpu().numpy()
        if not np.isfinite(squares).all():
            return False
        self.samples += b
        self.squares += squares
        return True

    def state(self) -> tuple[Any, Arrays]:
        """See :class:`PilotSums`."""
        return None, {"squares": self.squares}

    def restore(self, facts: Any, arrays: Arrays) -> None:
        """See :class:`PilotSums`."""
        self.squares = arrays["squares"].copy()


def pilot_path(store: PathLike) -> StorePath:
    """Return where the pilot's wide rows are kept until ``store`` has their basis."""
    path = parse_path(store)
    return path.with_name(f"{path.name}.pilot")


def _sums_path(store: PathLike) -> StorePath:
    """Return beside what the sums of a pilot's passes are kept (:class:`ClaimedOutput`)."""
    path = parse_path(store)
    return path.with_name(f"{path.name}.pilot-sums")


def _sums_settings(plan: StorePlan, layers: Sequence[LayerShape]) -> dict[str, Any]:
    """Return what the sums of a pilot's passes depend on, and rows too: not the reduction of these."""
    facts = {name: plan.attributes[name] for name in ("model", "labels", "sample")}
    facts["compressor"] = plan.attributes["compressor"] | {"reduce": None}
    return {"digest": json_digest({**facts, "layers": [repr(layer) for layer in layers]})}


def remove_pilot(store: PathLike) -> None:
    """Remove the pilot's wide rows and sums, now that the store has what was made of them."""
    for path in (pilot_path(store), partial_path(_sums_path(store))):
        if exists(path):
            remove_tree(path)
