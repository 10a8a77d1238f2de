"""Which of what a training gives helps: rows of its own steps, its optimizer, its checkpoints, or a pass at the end.

Three truths, each of models trained on random halves of the rows: the fine-tuned Llama and the one trained from scratch
(finetuning.py: AdamW, the same seed and order for all models), and the MLP on MNIST (tools/bench/quality.py: SGD with
momentum and dropout, a seed for each model). The training of all rows is done once more, by the same code with the same
seed, and gathering.py sums the gradients of its backward passes over the subsets that the models were trained on;
snapshots are taken at the ends of stretches of epochs, of which the first is the first epoch. Whole gradients of linear
layers; every score is of minus the loss, and the table has the linear datamodeling score (LDS)::

    EK-FAC at a snapshot    g_qᵀ U (Λ + d · mean Λ of the layer)⁻¹ Uᵀ g_i, all of the snapshot
    sum over snapshots      the sum of these scores
    averaged                mean over snapshots of g_q and of g_i, in the last one's basis
    collected               the mean of a row's gradients g_i(t) at the steps it was trained on
    trajectory              g_q at the end with Σ_t lr_t g_i(t) (TracIn, Pruthi et al. 2020, arXiv 2002.08484), with
                            Adam's metric at each step, and with momentum and decay carried (gathering.py)
    trajectory x EK-FAC     Σ_t lr_t g_i(t) with (Λ + λ)⁻¹ between, of one basis or of each stretch's own
    SOURCE                  Bae et al. 2024, arXiv 2405.12186: of segments l = 1 .. L of Σ lr = η_l K_l in all,
                            score = g_qᵀ Σ_l (Π_{k>l} S_k, the last one first) r_l,   S_l = exp(-η_l K_l H_l),
                            r_l = (1 - exp(-η_l K_l H_l)) H_l⁻¹ ḡ_l, with ḡ_l the segment's mean of g_i, and H_l in the
                            eigenvectors of its mean Kronecker factors with the mean Λ there, times the tokens of a row
                            (the mean of T tokens' losses has gradients with a Tth of the covariance of its curvature).
                            AdamW multiplies gradients by 1/(√v̂ + ε), here by one over its mean in each layer, which
                            η_l contains; for momentum μ, η_l contains 1/(1 - μ). Instead of a damping, η is multiplied.

"passes" counts forward-backward passes over the rows beside those of the training, two for a basis (its factors, and Λ)
and one for rows; "stored rows" is the bytes of what is kept of a row. Methods of stores are the library's own calls,
:func:`ooc_influence.collect` in the same training, with a pilot at the first epoch's end; or without one, of all
entries, whose averages are turned into the basis of a pilot at the end (:func:`ooc_influence.rewrite_store`).

Run: python tools/experiments/collected.py --data DIR [--truths finetuned-output] [--folder collected-output] [--only
TEXT] [--quick]: the truths of finetuning.py are read from --truths, as far as they are finished there; that of MNIST is
trained. The sums of a training, (subsets, p) float32 each, stay in the folder for further methods: up to 6 GB.
"""

from __future__ import annotations

import itertools
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from common import Result, Runs, arguments, report
from dense import DAMPINGS
from finetuning import LAYERS, FineTuning, Watch, make_finetuning
from gathering import Along, Basis, Layers, Parts, each_row, factors, summed, with_squares
from tasks import quality
from torch import Tensor, nn

import ooc_influence as ooc
from ooc_influence.evaluate import lds, random_subsets
from ooc_influence.evaluate.retrain import seeded

SEGMENTS, MODELS = 3, 100
DEFAULT = 0.03  # the damping of a Kronecker curvature, of a layer's mean Λ
SCALES = (0.1, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)  # of SOURCE's learning rates
COLUMNS = (
    "truth", "method", "stored rows", "passes", "LDS", "at damping", "default LDS", "of EK-FAC's at the end",
    "of the sum's over snapshots", "models",
)  # fmt: skip
END, SUM = "EK-FAC at the end", "EK-FAC, sum over snapshots"


@dataclass(frozen=True)
class Subject:
    """A truth: its model, its training of all rows, and its outcomes."""

    name: str
    rows: Any
    queries: Any
    model: Callable[[], nn.Module]
    train: Callable[[Watch], nn.Module]
    loss: Callable[[nn.Module, Any], Tensor]
    outcomes: Callable[[int], Any]
    ends: tuple[int, ...]  # the last epochs of the stretches, from 0
    layers: str | None  # the layers that rows are of, as the library names them
    tokens: int
    carries: bool  # whether carrying momentum and decay differs from plain sums
    settings: dict[str, Any]

    @property
    def n(self) -> int:
        return len(self.rows[1])

    def batches(self, part: str, size: int = 64) -> list[Any]:
        return FineTuning.split(self.rows if part == "rows" else self.queries, size)

    @property
    def epochs(self) -> int:
        return self.ends[-1] + 1


def of_language(task: FineTuning) -> Subject:
    """Return the truth of finetuning.py."""
    # the ends of all epochs, or of five stretches with one that ends at the half
    ends = tuple(range(task.epochs)) if task.epochs < 8 else (0, 6, 12, 18, task.epochs - 1)

    def train(watch: Watch) -> nn.Module:
        with seeded(0):
            return task.fine_tune(np.arange(task.train_rows), watch)[0]

    return Subject(
        task.name, task.train, task.test, task.model, train, task.loss,
        lambda models: task.truth(models, train=task.train_rows < 1000), ends, LAYERS,
        task.train[1].shape[1], True, task.settings,
    )  # fmt: skip


def of_images(data: Path, folder: Path, quick: bool) -> Subject:
    """Return the truth of tools/bench/quality.py."""
    truth = quality.Truth(data, replace(quality.QUICK, epochs=4, models=4) if quick else quality.Size())
    size = truth.size

    def train(watch: Watch) -> nn.Module:
        with seeded(quality.MODEL_SEED):
            return truth.train(np.arange(size.train), watch)

    return Subject(
        "MNIST", truth.rows(0, size.train), truth.test, lambda: quality.make_model(size).eval(), train, quality.loss,
        lambda models: truth.runs(folder, 1), (0, 1, 3) if quick else (0, 6, 12, 18, 24, 30, 36, 42, 49), None, 1,
        False, {"train": size.train, "test": size.test, "epochs": size.epochs},
    )  # fmt: skip


class Swept(NamedTuple):
    """A method's summed scores, (L, m, q), at dampings; the default's index; what it takes."""

    sums: np.ndarray
    dampings: Sequence[float]
    default: int
    row_bytes: int
    passes: int


class Study:
    """What methods are made of: sums over subsets, snapshots and their bases, kept in a folder."""

    def __init__(self, subject: Subject, folder: Path) -> None:
        torch.set_num_threads(1)
        self.subject, self.folder = subject, folder
        self.ends = subject.ends
        self.last = len(self.ends) - 1
        self.half = min(range(len(self.ends)), key=lambda each: abs(self.ends[each] + 1 - subject.epochs / 2))
        self.credit = torch.from_numpy(self.subsets).float() - 0.5
        names = [name for name, each in subject.model().named_modules()
                 if type(each) is nn.Linear and ("layers" in name or subject.layers is None)]  # fmt: skip
        self.layers = Layers.of(subject.model(), names)
        folder.mkdir(parents=True, exist_ok=True)

    @cached_property
    def subsets(self) -> np.ndarray:
        return random_subsets(self.subject.n, MODELS)

    @property
    def segments(self) -> list[list[int]]:
        """Return the stretches of each segment of SOURCE."""
        return [list(part) for part in np.array_split(np.arange(len(self.ends)), min(SEGMENTS, len(self.ends)))]

    def kept(self, name: str, make: Callable[[], Any]) -> Any:
        path = self.folder / f"{name}.pt"
        if not path.exists():
            print(f"{self.subject.name}: {name}", file=sys.stderr, flush=True)
            torch.save(make(), path.with_suffix(".partial"))
            path.with_suffix(".partial").replace(path)
        return torch.load(path, weights_only=True)

    @cached_property
    def training(self) -> dict[str, Any]:
        """Return what is kept of the training, once its sums are written: weights, rates, Adam's roots."""

        def make() -> dict[str, Any]:
            along = Along(self.layers, self.credit, self.ends, self.folder, carries=self.subject.carries)
            self.subject.train(along)
            return {"weights": along.weights, "rates": along.rates, "roots": along.roots}

        return self.kept("training", make)

    def along(self, name: str) -> Tensor:
        """Return sums of the training, (m, p)."""
        assert self.training
        return torch.from_numpy(np.load(self.folder / f"{name}.npy"))

    def all_of(self, kind: str) -> Tensor:
        """Return sums of all stretches."""
        return sum((self.along(f"{kind} {number}") for number in range(len(self.ends))), self.layers.zeros(1))

    def model(self, snapshot: int) -> nn.Module:
        model = self.subject.model()
        model.load_state_dict(self.training["weights"][snapshot])
        return model.eval()

    def losses(self) -> str:
        """Return the mean losses of rows and of queries at each snapshot."""
        means = []
        for number, end in enumerate(self.ends):
            model = self.model(number)
            with torch.no_grad():
                each = [torch.cat([self.subject.loss(model, batch) for batch in self.subject.batches(part)]).mean()
                        for part in ("rows", "queries")]  # fmt: skip
            means.append(f"{each[0]:.3f}, {each[1]:.3f} after epoch {end + 1}")
        return f"{self.subject.name}: losses of rows, of queries: {'; '.join(means)}"

    def at(self, snapshot: int) -> Tensor:
        """Return sums of gradients at a snapshot, (m, p)."""
        path = self.folder / f"at {snapshot}.npy"
        if not path.exists():
            print(f"{self.subject.name}: rows at snapshot {snapshot}", file=sys.stderr, flush=True)
            model, batches = self.model(snapshot), self.subject.batches("rows")
            found = summed(model, self.subject.loss, batches, self.layers, self.credit)
            np.save(path.with_suffix(".partial.npy"), found.numpy())
            path.with_suffix(".partial.npy").replace(path)
        return torch.from_numpy(np.load(path))

    def queries(self, *snapshots: int) -> Parts:
        """Return the queries' gradients, means over snapshots."""
        found: Parts = []
        for number in snapshots:
            own = each_row(self.model(number), self.subject.loss, self.subject.batches("queries"), self.layers)
            found = [a + b for a, b in zip(found, own, strict=True)] if found else own
        return [part / len(snapshots) for part in found]

    def bases(self, snapshots: Sequence[int]) -> Basis:
        """Return the basis of the mean factors of snapshots, with their mean Λ; kept."""

        def make() -> dict[str, Parts]:
            own = [self._factors(number) for number in snapshots]
            basis = Basis.of([tuple(sum(parts) / len(own) for parts in zip(*layer, strict=True))  # type: ignore[misc]
                              for layer in zip(*own, strict=True)])  # fmt: skip
            total: Any = 0
            for number in snapshots:
                found = with_squares([basis], self.model(number), self.subject.loss, self.subject.batches("rows"),
                                     self.layers)  # fmt: skip
                total = found[0] if number == snapshots[0] else [a + b for a, b in zip(total, found[0], strict=True)]
            return {"left": basis.left, "right": basis.right, "squares": [part / len(own) for part in total]}

        return Basis(**self.kept(f"basis {'-'.join(map(str, snapshots))}", make))

    def _factors(self, snapshot: int) -> list[tuple[Tensor, Tensor]]:
        batches = self.subject.batches("rows")
        return self.kept(f"factors {snapshot}",
                         lambda: factors(self.model(snapshot), self.subject.loss, batches, self.layers))  # fmt: skip

    def with_squares_of(self, basis: int, snapshot: int) -> Basis:
        """Return the eigenvectors of one snapshot with the Λ that another has there; kept."""
        if basis == snapshot:
            return self.bases([basis])
        found, model = self.bases([basis]), self.model(snapshot)

        def make() -> Parts:
            return with_squares([found], model, self.subject.loss, self.subject.batches("rows"), self.layers)[0]

        return replace(found, squares=self.kept(f"squares {snapshot} in {basis}", make))

    def ekfac(self, basis: int, queries: Parts, sums: Tensor, squares: int | None = None) -> np.ndarray:
        own = self.with_squares_of(basis, basis if squares is None else squares)
        return own.scores(queries, self.layers.split(sums), DAMPINGS)

    def swept(self, sums: np.ndarray, rows: float, passes: int) -> Swept:
        """Return scores at each of DAMPINGS, or one."""
        dampings = DAMPINGS if len(sums) > 1 else (0.0,)
        default = DAMPINGS.index(DEFAULT) if len(sums) > 1 else 0
        return Swept(sums, dampings, default, round(4 * rows * self.layers.p), passes)

    def products(self, queries: Parts, sums: Tensor) -> np.ndarray:
        flat = torch.cat([part.flatten(1) for part in queries], 1)
        return (sums @ flat.T).double().numpy()[None]


def at_snapshot(study: Study, number: int) -> Swept:
    return study.swept(study.ekfac(number, study.queries(number), study.at(number)), 1, 3)


def products_at_end(study: Study) -> Swept:
    return study.swept(study.products(study.queries(study.last), study.at(study.last)), 1, 1)


def adams_metric(study: Study) -> Swept:
    """Return scores at the end with 1/(√v̂ + ε + d · its mean in the layer)."""
    found: Any = [0.0] * len(DAMPINGS)
    parts = [study.queries(study.last), *map(study.layers.split, (study.at(study.last), study.training["roots"]))]
    for q, b, roots in zip(*parts, strict=True):
        for number, damping in enumerate(DAMPINGS):
            weighted = q / (roots + damping * roots.mean())
            found[number] = found[number] + (b.flatten(1) @ weighted.flatten(1).T).double().numpy()
    return study.swept(np.stack(found), 1, 1)


def summed_over_snapshots(study: Study) -> Swept:
    numbers = range(len(study.ends))
    found = sum(study.ekfac(number, study.queries(number), study.at(number)) for number in numbers)
    return study.swept(np.asarray(found), len(numbers), 3 * len(numbers))


def averaged_snapshots(study: Study) -> Swept:
    numbers = range(len(study.ends))
    rows = sum((study.at(number) for number in numbers), study.layers.zeros(1))
    return study.swept(study.ekfac(study.last, study.queries(*numbers), rows), 1, len(numbers) + 2)


def averages(study: Study, first: int, basis: int, mean_query: bool, squares: int | None = None) -> Swept:
    """Return rows collected from a stretch on, in the basis of a snapshot, with its Λ or that of another."""
    rows = sum((study.along(f"plain {number}") for number in range(first, len(study.ends))), study.layers.zeros(1))
    queries = study.queries(*range(first, len(study.ends))) if mean_query else study.queries(study.last)
    return study.swept(study.ekfac(basis, queries, rows, squares), 1, 2 if squares is None else 3)


def of_stretches(study: Study, kind: str, own_queries: bool) -> Swept:
    """Return rows collected in each stretch in the basis of its end, summed."""
    found: Any = 0
    for number in range(len(study.ends)):
        queries = study.queries(number if own_queries else study.last)
        found = found + study.ekfac(number, queries, study.along(f"{kind} {number}"))
    return study.swept(found, len(study.ends), 2 * len(study.ends))


def trajectory(study: Study, name: str) -> Swept:
    """Return first-order scores of sums of the training."""
    kind, when = name.split()
    whole = partial(study.all_of, "lr") if kind == "lr" else partial(study.along, f"{kind} all")
    first = partial(study.along, "lr 0" if kind == "lr" else f"{kind} first")
    sums = {"first": first, "all": whole, "later": lambda: whole() - first()}[when]()
    return study.swept(study.products(study.queries(study.last), sums), 1, 0)


def trajectory_of_own_queries(study: Study) -> Swept:
    """Return TracIn with the queries' gradients at each stretch's end."""
    numbers = range(len(study.ends))
    found = sum(study.products(study.queries(number), study.along(f"lr {number}")) for number in numbers)
    return study.swept(np.asarray(found), len(study.ends), 0)


def trajectory_with_curvature(study: Study, name: str) -> Swept:
    """Return sums of the training with the curvature of the end between."""
    sums = study.all_of("lr") if name == "lr all" else study.along(name)
    return study.swept(study.ekfac(study.last, study.queries(study.last), sums), 1, 2)


def source(study: Study, kind: str) -> Swept:
    """Return SOURCE's scores, of rows at the snapshots (``at``) or collected in the segments (``plain``)."""
    found = []
    bases = [study.bases(segment) for segment in study.segments]
    sums = []
    for segment in study.segments:
        own = [study.at(each) if kind == "at" else study.along(f"plain {each}") for each in segment]
        count = len(own) if kind == "at" else sum(study.ends[s] - (study.ends[s - 1] if s else -1) for s in segment)
        sums.append(study.layers.split(sum(own, study.layers.zeros(1)) / count))
    turned = [basis.turn(each) for basis, each in zip(bases, sums, strict=True)]
    del sums
    rates = study.training["rates"]
    for scale in SCALES:
        vectors, total = study.queries(study.last), 0.0
        for segment, basis, rows in reversed(list(zip(study.segments, bases, turned, strict=True))):
            own = basis.turn(vectors)
            for number, (row, squares) in enumerate(zip(rows, basis.squares, strict=True)):
                curvature = squares.double() * study.subject.tokens
                eta = scale * sum(rates[stretch][number] for stretch in segment)
                left = -torch.expm1(-eta * curvature) / curvature.clamp(min=1e-30)
                left = torch.where(curvature > 1e-30, left, torch.full_like(left, eta)).float()
                total = total + (row.flatten(1) @ (own[number] * left).flatten(1).T).double().numpy()
                own[number] = own[number] * torch.exp(-eta * curvature).float()
            vectors = basis.turn_back(own)
        found.append(total)
    passes = 2 * len(study.ends) + (len(study.ends) if kind == "at" else 0)
    size = round(4 * len(study.segments) * study.layers.p)
    return Swept(np.stack(found), SCALES, SCALES.index(1.0), size, passes)


def collected_store(study: Study, mask: ooc.Dropout) -> ooc.GradientStore:
    """Return the averages that :func:`ooc_influence.collect` makes: of all epochs, in a basis from the second on."""
    subject, begin = study.subject, 0 if mask.basis is None else 1
    path = study.folder / f"collected-{'entries' if mask.basis is None else mask.k}"
    if path.exists():
        return ooc.GradientStore.open(path)
    print(f"{subject.name}: ooc.collect, {mask.k} numbers", file=sys.stderr, flush=True)
    with ExitStack() as stack:
        collectors: list[Any] = []
        last = 0

        @contextmanager
        def watch(model: nn.Module, optimizer: Any, rows: Tensor, epoch: int) -> Iterator[None]:
            nonlocal last
            if epoch < begin:
                yield
                return
            if not collectors:
                collectors.append(stack.enter_context(ooc.collect(
                    model, path, subject.loss, compressor=mask, modules=subject.layers, average=True,
                    pilot=subject.batches("rows"),
                )))  # fmt: skip
            elif epoch > last:
                collectors[0].fold()
            last = epoch
            with collectors[0].step(rows):
                yield

        subject.train(watch)
    return ooc.GradientStore.open(path)


def by_collect(study: Study, k: int | None, dtype: str, turned: bool = False, mean_query: bool = True) -> Swept:
    """Return the scores of averages that :func:`ooc_influence.collect` makes, in the curvature of their basis.

    The basis is that of the first epoch's end, or of the training's (``turned``): then all entries are collected.
    """
    subject = study.subject
    entries = sum(weight.numel() for name, weight in subject.model().named_parameters()
                  if "layers" in name or subject.layers is None)  # fmt: skip
    mask = ooc.Dropout(k=k or (entries if turned else study.layers.p), basis="kronecker")
    train = collected_store(study, ooc.Dropout(k=entries) if turned else mask)
    snapshots = range(0 if turned else 1, len(study.ends)) if mean_query else [study.last]
    scores: Any = 0.0
    with tempfile.TemporaryDirectory(dir=study.folder) as place:

        def queries_at(number: int, **how: Any) -> ooc.GradientStore:
            return ooc.extract_gradients(
                study.model(number), subject.loss, subject.batches("queries"), f"{place}/query{number}",
                dtype="float32", check_model=False, **how,
            )  # fmt: skip

        rows = train
        if turned:
            end = queries_at(study.last, compressor=mask, modules=subject.layers, pilot=subject.batches("rows"))
            rows = ooc.rewrite_store(train, f"{place}/rows", dtype=dtype, like=end)
        elif dtype != train.layout.encoding.name:
            rows = ooc.rewrite_store(train, f"{place}/rows", dtype=dtype)
        for number in snapshots:
            query = queries_at(number, like=rows)
            found = ooc.influence_scores(query, rows, curvature="kronecker", damping=[*DAMPINGS]).compute()
            scores = scores + found / len(snapshots)
        order = rows.ids().astype(np.int64)
        sums = np.einsum("lqn,mn->lmq", scores, study.credit.numpy()[:, order], optimize=True)
        return Swept(sums, DAMPINGS, DAMPINGS.index(DEFAULT), rows.layout.encoding.row_bytes, 2)


def by_trajectory(study: Study, k: int, **between: Any) -> Swept:
    """Return the scores of what rows did to the final weights, as :func:`ooc_influence.fit_trajectory` has it."""
    subject = study.subject
    with tempfile.TemporaryDirectory(dir=study.folder) as place, ExitStack() as stack:
        path, current = f"{place}/rows", ExitStack()
        collectors: list[Any] = []

        @contextmanager
        def watch(model: nn.Module, optimizer: Any, rows: Tensor, _: int) -> Iterator[None]:
            if not collectors:
                optimizer.register_step_pre_hook(lambda *_: current.close())  # before the collector's own
                collectors.append(stack.enter_context(ooc.collect(
                    model, path, compressor=ooc.Dropout(k=k), modules=subject.layers, optimizer=optimizer
                )))  # fmt: skip
            current.enter_context(collectors[0].step(rows))
            yield

        model = subject.train(watch).eval()
        stack.close()
        ooc.fit_trajectory(path, **between)
        query = ooc.extract_gradients(
            model, subject.loss, subject.batches("queries"), f"{place}/query", like=path, dtype="float32"
        )
        found = ooc.group_influence(query, path, by="example", curvature="trajectory")
        order = np.asarray(found.names).astype(np.int64)
        sums = np.einsum("qn,mn->mq", found.sums, study.credit.numpy()[:, order])
        row_bytes = ooc.GradientStore.open(path).layout.encoding.row_bytes
        return Swept(sums[None], (0.0,), 0, row_bytes * subject.epochs, 0)


def methods(study: Study, quick: bool) -> dict[str, Callable[[], Swept]]:
    """Return the methods by name."""
    last, half, adam = study.last, study.half, study.subject.carries  # what momentum alone carries is plain sums
    found: dict[str, Callable[..., Swept]] = {END: partial(at_snapshot, number=last)}
    for number in range(last):
        at = " (half)" if number == half else ""
        found[f"EK-FAC after epoch {study.ends[number] + 1}{at}"] = partial(at_snapshot, number=number)
    found[SUM] = summed_over_snapshots
    found["EK-FAC, rows and queries averaged over snapshots"] = averaged_snapshots
    found["dot product at the end"] = products_at_end
    if adam:
        found["Adam's metric at the end"] = adams_metric
    for (first, rows), (basis, where), mean_query in itertools.product(
        ((1, "epochs 2 on"), (0, "all epochs")), ((0, "epoch 1"), (last, "the end")), (True, False)
    ):
        name = f"collected, {rows}, basis of {where}, queries {'averaged' if mean_query else 'at the end'}"
        found[name] = partial(averages, first=first, basis=basis, mean_query=mean_query)
    after = f"epochs {study.ends[half] + 2} on"
    for name, first, basis, squares in (
        (f"{after}, basis of the half", half + 1, half, None), ("all epochs, basis of the half", 0, half, None),
        (f"{after}, basis of epoch 1", half + 1, 0, None),
        ("epochs 2 on, basis of epoch 1 with Λ of the end", 1, 0, last),
        ("all epochs, basis of epoch 1 with Λ of the end", 0, 0, last),
        (f"{after}, basis of the half with Λ of the end", half + 1, half, last),
    ):  # fmt: skip
        found[f"collected, {name}, queries averaged"] = partial(
            averages, first=first, basis=basis, mean_query=True, squares=squares
        )
    for own in (True, False):
        queries = "at its end" if own else "at the end of training"
        found[f"collected, each stretch in its own basis, queries {queries}"] = partial(
            of_stretches, kind="plain", own_queries=own
        )
        found[f"trajectory x EK-FAC, each stretch in its own basis, queries {queries}"] = partial(
            of_stretches, kind="lr", own_queries=own
        )
    for when, epochs in (("first", "first epoch"), ("later", "epochs 2 on"), ("all", "all epochs")):
        found[f"trajectory, lr, {epochs}"] = partial(trajectory, name=f"lr {when}")
        if adam:
            found[f"trajectory, Adam's metric, {epochs}"] = partial(trajectory, name=f"adam {when}")
            name = f"trajectory, Adam with momentum and decay carried, {epochs}"
            found[name] = partial(trajectory, name=f"carried {when}")
    found["trajectory, lr, queries at each stretch's end"] = trajectory_of_own_queries
    found["trajectory x EK-FAC, lr, basis of the end"] = partial(trajectory_with_curvature, name="lr all")
    if adam:
        carried = partial(trajectory_with_curvature, name="carried all")
        found["trajectory x EK-FAC, carried, basis of the end"] = carried
    found[f"SOURCE, {len(study.segments)} segments, rows at snapshots"] = partial(source, kind="at")
    found[f"SOURCE, {len(study.segments)} segments, rows collected"] = partial(source, kind="plain")
    for k, dtype in itertools.product((64, 32) if quick else (65536, 16384, 4096), ("float16", "sign")):
        found[f"ooc.collect, {k} numbers, {dtype}, queries averaged"] = partial(by_collect, k=k, dtype=dtype)
    found["ooc.collect, all numbers, float16, queries averaged"] = partial(by_collect, k=None, dtype="float16")
    for k, dtype in itertools.product((None, 64) if quick else (None, 65536, 16384), ("float16", "sign")):
        name = f"ooc.collect, all entries, {k or 'all'} turned into the basis of the end, {dtype}"
        found[f"{name}, queries averaged"] = partial(by_collect, k=k, dtype=dtype, turned=True)
        if k is None and dtype == "float16":
            found[f"{name}, queries at the end"] = partial(by_collect, k=k, dtype=dtype, turned=True, mean_query=False)
    if adam:  # of MNIST's fifty epochs, rows would take 33 GB
        k = 64 if quick else 65536
        name = f"ooc.collect, {k} numbers, float16, fit_trajectory"
        found[name] = partial(by_trajectory, k=k)
        for segments in (1, SEGMENTS):
            found[f"{name}, between diagonal, segments {segments}"] = partial(
                by_trajectory, k=k, between="diagonal", segments=segments
            )
    return {name: partial(call, study) for name, call in found.items()}


def run(call: Callable[[], Swept], path: Path) -> Result:
    """Write a method's sums."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ooc.OocInfluenceWarning)
        found = call()
    path.parent.mkdir(exist_ok=True)
    np.savez(path, sums=found.sums.astype(np.float32))
    print(f"{path.stem}: done", file=sys.stderr, flush=True)
    return {"file": str(path), "dampings": [*found.dampings], "default": found.default,
            "stored rows": found.row_bytes, "passes": found.passes}  # fmt: skip


def correlations(sums: np.ndarray, outcomes: np.ndarray, finished: np.ndarray) -> list[float]:
    """Return the LDS at each damping."""
    eye = np.eye(len(finished), dtype=bool)
    return [lds(one[finished].T, eye, outcomes[finished]).mean for one in sums.astype(np.float64)]


def lines(subject: Subject, results: Sequence[Result], models: int) -> list[Result]:
    """Return the lines of a truth's table."""
    truth = subject.outcomes(models)
    finished = np.setdiff1d(np.arange(models), truth.missing)
    if len(finished) < 2:
        return []
    swept = {}
    for one in results:
        with np.load(one["file"]) as held:
            swept[one["run"].split(" / ")[1]] = one, correlations(held["sums"], truth.outcomes, finished)
    found = []
    for name, (one, values) in swept.items():
        best = int(np.argmax(values))
        cells = {
            "truth": subject.name, "method": name, "stored rows": one["stored rows"], "passes": one["passes"],
            "LDS": values[best], "at damping": f"{one['dampings'][best]:g}" if len(values) > 1 else "",
            "default LDS": values[one["default"]], "models": len(finished),
            "sweep": dict(zip(map(str, one["dampings"]), values, strict=True)),
        }  # fmt: skip
        for column, reference in ((COLUMNS[7], END), (COLUMNS[8], SUM)):
            if reference in swept:
                cells[column] = values[best] / max(swept[reference][1])
        found.append(cells)
    return sorted(found, key=lambda line: -line["LDS"])


def subjects(options: Any) -> list[Subject]:
    """Return the truths that are asked for."""
    found = []
    for kind in ("fine-tuned", "from-scratch"):
        if kind in options.truth:
            task = make_finetuning(options.data, options.truths, options.quick, kind)
            found.append(of_language(replace(task, epochs=3) if options.quick else task))
    if "MNIST" in options.truth:
        found.append(of_images(options.data.resolve(), options.folder / "mnist", options.quick))
    return found


def plot(found: Sequence[Result], axes: Any) -> None:
    """Draw LDS over passes."""
    for number, truth in enumerate(dict.fromkeys(line["truth"] for line in found)):
        own = [line for line in found if line["truth"] == truth]
        starts = dict.fromkeys(line["method"].split(",")[0].split(" after")[0] for line in own)
        for place, start in enumerate(starts):
            chosen = [line for line in own if line["method"].startswith(start)]
            axes.plot([line["passes"] for line in chosen], [line["LDS"] for line in chosen], "osd^vPX*<>"[place % 10],
                      color=f"C{number}", markersize=4, label=f"{truth}: {start}")  # fmt: skip
    axes.set(xlabel="passes over the rows, beside the training", ylabel="LDS, best damping")
    axes.legend(fontsize=4, loc="center left", bbox_to_anchor=(1.01, 0.5))


def main() -> None:
    parser = arguments(__doc__, "collected-output")
    parser.add_argument("--data", type=Path, required=True, help="a folder with agnews/, shakespeare/ and mnist/")
    parser.add_argument("--truths", type=Path, default=Path("finetuned-output"), help="the folder of finetuning.py")
    parser.add_argument("--truth", default="fine-tuned,MNIST,from-scratch", help="some of these")
    parser.add_argument("--only", default="", help="methods whose names contain this")
    parser.add_argument("--table", action="store_true", help="compute nothing more: the table of what is there")
    parser.add_argument("--clear", action="store_true", help="delete the sums of each training afterwards")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    found: list[Result] = []
    missing: list[str] = []
    for subject in subjects(options):
        study, runs = Study(subject, options.folder / subject.name), Runs(options.folder / "runs")
        for name, call in methods(study, options.quick).items():
            if options.only in name:
                path = (
                    options.folder / f"sums-{subject.name}" / f"{''.join(c if c.isalnum() else '-' for c in name)}.npz"
                )
                settings = {**subject.settings, "ends": subject.ends, "models": MODELS}
                runs.add(f"{subject.name} / {name}", settings, partial(run, call, path))
        missing += runs.missing()
        if options.status:
            continue
        print(f"{len(runs.missing())} runs to do", file=sys.stderr)
        results = runs.finished() if options.table else runs.finish()
        if not options.table:
            print(study.losses(), file=sys.stderr)
        found += lines(subject, results, 4 if options.quick else MODELS)
        if options.clear:
            shutil.rmtree(study.folder)
    if options.status:
        print("\n".join(missing) or "nothing is missing")
        return
    if options.table and missing:
        print(f"missing: {', '.join(missing)}", file=sys.stderr)
    report("collected", options.folder, found, COLUMNS, partial(plot, found))


if __name__ == "__main__":
    main()
