"""Plans: the memory, disk and time of every stage, from the calls' own memory models and this machine's speed."""

from __future__ import annotations

import contextlib
import os
import random
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from statistics import median
from typing import Any, Unpack

import numpy as np

from ooc_influence.compress import KroneckerBasis
from ooc_influence.curvature import USUAL_PASSES, BlockShape, fisher_memory, gram_memory, largest_rank, plan_low_rank
from ooc_influence.errors import InputError, MemoryBudgetError, counted
from ooc_influence.influence import (
    CheckpointMemory,
    ScoringMemory,
    TileMemory,
    top_tiles,
    written_tiles,
)
from ooc_influence.linalg import choose_engine, choose_solver, symmetric_eigen, tile_side
from ooc_influence.memory import BATCH_COPIES, MemoryBudget, MemoryModel, ProblemSize, format_bytes
from ooc_influence.options import PlanOptions, takes
from ooc_influence.parallel import blas_threads
from ooc_influence.store import (
    Encoding,
    Layout,
    Representation,
    Storage,
    map_file,
    parse_representation,
    verify_memory,
    writing_bytes,
)

_SIDE = 1024  # of the matrices multiplied
_EIGEN_SIDE = 448
_FILE = 128 * 2**20
_STEP = 8 * 2**20
_SECONDS = 0.3  # for each rate
_READ_SECONDS, _READ_MOST = 1.0, 2**30  # of stores' files


@dataclass(frozen=True)
class Rates:
    """What the machine does in a second, with all cores.

    Attributes
    ----------
    gemm, syrk, double : float
        FLOP of float32 products, of float32 sums XᵀX (m k² each, one triangle) and of float64 products.
    eigen : float
        FLOP of a float64 eigendecomposition, counted as 9 d³.
    read, write : float
        Bytes from and to the disk.
    convert : float
        Bytes of float32 rows made of mapped float16 ones.
    """

    gemm: float
    syrk: float
    double: float
    eigen: float
    read: float
    write: float
    convert: float

    @classmethod
    def measure(cls, folder: str | Path = ".", *, gflops: float | None = None, read: float | None = None) -> Rates:
        """Measure the rates that are not given, on the disk of ``folder``: a file is written there, read and removed.

        Where ``folder`` is a store, or holds stores, of 128 MiB and more, some of their chunks are read instead.

        Raises
        ------
        InputError
            For rates that are not positive.
        """
        for name, value in (("gflops", gflops), ("read rate", read)):
            if value is not None and not 0 < value < float("inf"):
                raise InputError(f"expected a {name} above 0; received {value}")
        with blas_threads(1):
            products = _products() if gflops is None else [gflops * 1e9 * part for part in (1, 1, 0.5, 0.15)]
        gemm, syrk, double, eigen = products
        measured_read, write, convert = _disk(Path(folder))
        return cls(gemm, syrk, double, eigen, measured_read if read is None else read, write, convert)

    def __str__(self) -> str:
        flops = ", ".join(
            f"{name} {value / 1e9:.3g} GFLOP/s"
            for name, value in (("sgemm", self.gemm), ("ssyrk", self.syrk), ("eigh", self.eigen))
        )
        return f"{flops}, read {format_bytes(self.read)}/s, convert {format_bytes(self.convert)}/s"


def _repeated(work: Callable[[], object]) -> float:
    """Return the median seconds of ``work``, repeated for a while after once to warm up."""
    work()
    seconds: list[float] = []
    end = time.perf_counter() + _SECONDS
    while not seconds or time.perf_counter() < end:
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return median(seconds)


def _products() -> list[float]:
    generator = np.random.default_rng(0)
    left = generator.standard_normal((_SIDE, _SIDE), np.float32)
    out, wide = np.empty_like(left), left.astype(np.float64)
    wide_out, small = np.empty_like(wide), wide[:_EIGEN_SIDE, :_EIGEN_SIDE]
    engine = choose_engine(_SIDE)
    square = small @ small.T
    timed: list[tuple[int, Callable[[], object]]] = [
        (2 * _SIDE**3, lambda: np.matmul(left, left.T, out=out)),
        (_SIDE**3, lambda: engine.add_square(out, left)),
        (2 * _SIDE**3, lambda: np.matmul(wide, wide, out=wide_out)),
        (9 * _EIGEN_SIDE**3, lambda: symmetric_eigen(square.copy())),
    ]
    return [work / _repeated(call) for work, call in timed]


def _disk(folder: Path) -> tuple[float, float, float]:
    """Return the bytes read, written and converted in a second, by a file in ``folder``, or beside other files."""
    directory = folder if os.access(folder, os.W_OK) else Path(tempfile.gettempdir())
    data = np.random.default_rng(0).standard_normal(_STEP // 4, np.float32).astype(np.float16)
    raw = np.concatenate([data, data]).view(np.uint8)
    with tempfile.NamedTemporaryFile(prefix=".ooc_influence-", dir=directory, buffering=0) as file:
        began, size = time.perf_counter(), 0
        while size < _FILE and (size < 2 * _STEP or time.perf_counter() < began + _SECONDS):
            size += file.write(raw[:_STEP].data)
        os.fsync(file.fileno())
        write = size / (time.perf_counter() - began)
        read = _read_rate(_chunk_files(folder) or [Path(file.name)])
        half = map_file(file.name).view(np.float16).reshape(-1, 1024)
        rows, scale = np.empty(half.shape, np.float32), np.ones(len(half), np.float32)
        convert = rows.nbytes / _repeated(lambda: Encoding("float16", 1024).decode_into(half, scale, rows))
    return read, write, convert


def _chunk_files(folder: Path) -> list[Path]:
    """Return the chunks of the store that a folder is, or of those in it; none where they are few bytes.

    A file that was just written may be read faster than a disk can: another cache may have it, such as a host's.
    """
    files = [*folder.glob("gradients/c.*"), *folder.glob("*/gradients/c.*")]
    return files if sum(file.stat().st_size for file in files) >= _FILE else []


def _read_rate(files: Sequence[Path]) -> float:
    """Return the bytes read in a second, of some files by chance, none of which is in the page cache."""
    buffer, size, seconds = bytearray(_STEP), 0, 0.0
    for path in random.Random().sample(files, len(files)):
        with path.open("rb", buffering=0) as file:
            if hasattr(os, "posix_fadvise"):
                with contextlib.suppress(OSError):
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            began = time.perf_counter()
            while count := file.readinto(buffer):
                size += count
            seconds += time.perf_counter() - began
        if seconds > _READ_SECONDS or size > _READ_MOST:
            break
    return size / seconds


@dataclass(frozen=True)
class Stage:
    """One stage of the work.

    Attributes
    ----------
    name : str
        Its name.
    disk : int
        Bytes it leaves on disk.
    peak : int or None
        Peak bytes of a process; None where the user's model decides.
    read : int
        Bytes it reads.
    flops : float or None
        Arithmetic; None where the user's model decides.
    seconds : float or None
        Estimate; None where the user's model decides.
    refusal : str or None
        Why it does not fit the budget, and what to change, in the words of the call itself; None where it fits.
    note : str
        What else to know.
    memory : MemoryModel or None
        What ``peak`` and ``refusal`` follow from: the model by which the call sizes its blocks or refuses.
    """

    name: str
    disk: int
    peak: int | None
    read: int
    flops: float | None
    seconds: float | None
    refusal: str | None = None
    note: str = ""
    memory: MemoryModel | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON-ready values, without the memory model."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "memory"}


@dataclass(frozen=True)
class _Planner:
    """A corpus, the machine and the budget that its stages are planned for."""

    size: ProblemSize  # of the train store
    entries: int  # kept of a gradient: more than size.k where rows are reduced
    dtype: Representation  # of the stored rows
    top: int  # rows of a top list
    budget: MemoryBudget
    rates: Rates
    rank: int | None = None  # eigenvectors kept of the curvature; None for all
    model: Any = None  # whose Kronecker basis the entries are of

    def stages(self) -> list[Stage]:
        """Return every stage that the corpus goes through, in the order they run."""
        first = [self.kronecker_basis()] if self.model is not None else []
        first += [self.eigenbasis()] if self.size.k < self.entries else []
        fits, planner = self.curvature_fits()
        scoring = [planner.scores(), planner.top_lists(), planner.self_influence(), self.verify()]
        return [*first, self.extraction(), self.query_extraction(), *fits, *scoring]

    def curvature_fits(self) -> tuple[list[Stage], _Planner]:
        """Return the fits that are possible, and the planner of what follows the one that is taken."""
        if self.dtype == "sign":  # none is fitted on signs: the basis has a curvature, as diagonal as one of rank 1
            return [], replace(self, rank=1)
        fisher, planner = self.fisher(), self
        found = [fisher]
        rank = largest_rank(self.size, self.budget) if fisher.refusal else 0
        if rank:
            planner = replace(self, rank=rank)
            found.append(planner.low_rank(rank))
        if self.size.rows < self.size.k:
            found.append(self.gram())
        return found, planner

    def layout(self, columns: int, dtype: Representation | None = None) -> Layout:
        """Return the layout of a store with some number of columns; ``dtype`` if it is not that of the train rows."""
        dtype = dtype or self.dtype
        block = Encoding.of(dtype, columns).block
        return Layout(columns, dtype, *Storage().sizes(columns, dtype), block=block)

    def store_bytes(self, rows: int, columns: int, dtype: Representation | None = None) -> int:
        """Return the bytes of a store: whole chunk files, and the small values of each row."""
        layout = self.layout(columns, dtype)
        chunks, groups = -(-rows // layout.chunk_rows), -(-rows // layout.group_rows)
        small = groups * (layout.group_rows * sum(4 for _ in layout.row_arrays) + 8 * layout.group_chunks)
        return chunks * layout.chunk_bytes + small

    def train_bytes(self) -> int:
        """Return the bytes of the train store."""
        return self.store_bytes(self.size.rows, self.size.k)

    def stage(
        self, name: str, memory: MemoryModel, *, disk: int, read: int, flops: float, seconds: float, note: str = ""
    ) -> Stage:
        """Return a stage, with its peak or refusal by the budget."""
        try:
            peak, refusal = memory.peak(self.budget.plan(memory), self.budget.reserved), None
        except MemoryBudgetError as error:
            peak, refusal = self.budget.price(memory), str(error)
        return Stage(name, disk, peak, read, flops, seconds, refusal, note, memory)

    def pass_seconds(self, read: float, computing: float) -> float:
        """Return the seconds of reading all rows beside converting and computing."""
        return max(read / self.rates.read, 4.0 * self.size.rows * self.size.k / self.rates.convert + computing)

    def extraction(self) -> Stage:
        """Return the train store's extraction; time and most memory depend on the user's model."""
        rows, k, layout = self.size.rows, self.size.k, self.layout(self.size.k)
        disk = self.train_bytes() + (4 * self.entries * k if k < self.entries else 0)
        note = (
            f"{-(-rows // layout.chunk_rows)} chunks of {layout.chunk_rows} rows; writing takes "
            f"{disk / self.rates.write:.0f} s; beside the model, {format_bytes(writing_bytes(layout))} of chunks being "
            f"written and {format_bytes(BATCH_COPIES * 4 * self.entries)} for each sample of a batch"
        )
        return Stage("extract train", disk, None, 0, None, None, note=note)

    def query_extraction(self) -> Stage:
        """Return the query store's extraction."""
        basis = 4 * self.entries * self.size.k if self.size.k < self.entries else 0
        copied = basis if basis < 256 * 2**20 else 0
        dtype: Representation = "float16" if self.dtype == "sign" else self.dtype  # queries of signs keep their numbers
        disk = self.store_bytes(self.size.queries, self.size.k, dtype) + copied
        return Stage("extract queries", disk, None, 0, None, None)

    def kronecker_basis(self) -> Stage:
        """Return the pilot that makes the Kronecker basis; its time depends on the user's model."""
        from ooc_influence.extract import BasisPlan  # imports torch

        basis = BasisPlan.of(self.model, self.entries, self.budget)
        passes = "" if basis.passes is None else f"{counted(basis.passes, 'pass', 'passes')} to sum factors; "
        samples = min(KroneckerBasis().samples, self.size.rows)
        note = (
            f"{passes}{format_bytes(basis.scratch)} of temporary files; rotation takes {basis.rotation:.1%} of the "
            f"multiplications of a forward pass; {counted(samples, 'row')} of the pilot kept until the store has them "
            f"({format_bytes(4 * samples * self.entries)}), not computed twice"
        )
        stage = self.stage("Kronecker basis", basis.memory, disk=basis.kept, read=0, flops=0.0, seconds=0.0, note=note)
        return replace(stage, flops=None, seconds=None)

    def eigenbasis(self) -> Stage:
        """Return the reduction: the pilot's wide rows and their largest eigenvalues."""
        pilot = min(self.size.rows, 4 * self.size.k)
        solver = choose_solver(replace(self.size, k=self.entries, rows=pilot), self.size.k, self.budget)
        disk = self.store_bytes(pilot, self.entries)
        read, rates = solver.passes * disk, self.rates
        seconds = max(read / rates.read, solver.flops / rates.gemm) + solver.factoring / rates.eigen
        note = f"{pilot} pilot rows of {self.entries} entries, removed afterwards; by {solver.name}"
        flops = solver.flops + solver.factoring
        return self.stage("eigenbasis", solver.model, disk=disk, read=read, flops=flops, seconds=seconds, note=note)

    def fisher(self) -> Stage:
        """Return the Fisher matrix and its factorisation."""
        d, read = self.size.k, self.train_bytes()
        sums, factoring = float(self.size.rows) * d * d, 9.0 * d**3
        seconds = self.pass_seconds(read, sums / self.rates.syrk) + factoring / self.rates.eigen
        disk = 16 * d * d + 8 * d
        return self.stage(
            "fisher", fisher_memory(self.size), disk=disk, read=read, flops=sums + factoring, seconds=seconds
        )

    def low_rank(self, rank: int) -> Stage:
        """Return the largest eigenvalues of the Fisher matrix, by the quickest plan that fits."""
        plan = plan_low_rank(self.size, rank, self.budget)
        return self.stage(
            f"fisher, rank {rank}",
            plan.model,
            disk=8 * self.size.k * (rank + (0 if plan.name == "rows" else self.size.k // 2)),
            read=int(plan.read),
            flops=plan.flops,
            seconds=self.pass_seconds(int(plan.read), plan.flops / self.rates.gemm),
            note=f"instead of fisher, --rank {rank}; by {plan.name}, in about {USUAL_PASSES} passes",
        )

    def gram(self) -> Stage:
        """Return the Gram matrix of the rows and its factorisation."""
        n, d, memory = self.size.rows, self.size.k, gram_memory(self.size)
        side = tile_side(n)
        strips, blocks = -(-n // side), -(-side // self.budget.block_rows(memory))
        products, factoring = float(n) * n * d * (1 + 1 / strips) + 2.0 * n * n * d, 9.0 * n**3  # K, then eigenvectors
        read = self.train_bytes() * ((strips + 1) * (1 + blocks) // 2 + 1)
        return self.stage(
            "Gram side",
            memory,
            disk=8 * n * (n + d),
            read=read,
            flops=products + factoring,
            seconds=self.pass_seconds(read, products / self.rates.double) + factoring / self.rates.eigen,
            note="instead of fisher",
        )

    def scores(self) -> Stage:
        """Return the whole matrix of scores, on disk."""
        written = 4 * self.size.queries * self.size.rows * self.size.dampings
        return self._scored("scores", "scores", written_tiles(), written)

    def top_lists(self) -> Stage:
        """Return top lists."""
        count = min(self.top, self.size.rows)
        bounded = not self.scoring.on_device and (self.scoring.diagonal or not self.scoring.normalized)
        tile = top_tiles(count, self.size.dampings * self.size.queries, self.size.rows, bounded=bounded)
        return self._scored(f"top {count}", "top", tile, 0)

    def _scored(self, name: str, stage: str, tile: TileMemory, written: int) -> Stage:
        """Return passes over the train rows, with as many queries at a time as fit."""
        n, d, total, dampings = self.size.rows, self.size.k, self.size.queries, self.size.dampings
        queries, memory = self.scoring.plan_queries(self.budget, stage, tile)
        passes, read = -(-total // queries), self.train_bytes()
        preparing = 2.0 * total * d * (self.rank or d) * (1 + dampings)
        products = 2.0 * total * dampings * n * d
        seconds = passes * self.pass_seconds(read, products / passes / self.rates.gemm) + preparing / self.rates.double
        return self.stage(
            name,
            memory,
            disk=written,
            read=passes * read,
            flops=products + preparing,
            seconds=max(seconds, written / self.rates.write),
            note=f"{passes} passes over the rows, {queries} queries at a time" if passes > 1 else "",
        )

    def self_influence(self) -> Stage:
        """Return the rows' self-influence."""
        n, d, read = self.size.rows, self.size.k, self.train_bytes()
        products, disk = 2.0 * n * d * (self.rank or d), 4 * n * self.size.dampings
        seconds, memory = self.pass_seconds(read, products / self.rates.gemm), self.scoring.self_influence()
        return self.stage("self-influence", memory, disk=disk, read=read, flops=products, seconds=seconds)

    @property
    def scoring(self) -> ScoringMemory:
        """The memory models of scoring by the curvature that is planned."""
        blocks = (BlockShape(self.size.k, self.rank or self.size.k),)
        return ScoringMemory((CheckpointMemory(self.size, blocks, lambda: self.size),))

    def verify(self) -> Stage:
        """Return the check of every committed chunk."""
        memory, read = verify_memory(self.layout(self.size.k), self.size), self.train_bytes()
        return self.stage("verify", memory, disk=0, read=read, flops=0.0, seconds=read / self.rates.read)


@dataclass(frozen=True)
class Plan:
    """What every stage will take.

    Attributes
    ----------
    stages : list of Stage
        In the order they run.
    budget : int
        Bytes that a process may take.
    rates : Rates
        What times rest on.
    """

    stages: list[Stage]
    budget: int
    rates: Rates

    @property
    def fits(self) -> bool:
        """Whether every stage fits the budget."""
        return all(stage.refusal is None for stage in self.stages)

    def __getitem__(self, name: str) -> Stage:
        for stage in self.stages:
            if stage.name == name:
                return stage
        raise KeyError(name)

    def to_dict(self) -> Mapping[str, Any]:
        """Return the plan as JSON-ready values."""
        return {
            "budget": self.budget,
            "fits": self.fits,
            "stages": [stage.to_dict() for stage in self.stages],
            "rates": asdict(self.rates),
        }


@takes(PlanOptions)
def plan(rows: int, k: int, **options: Unpack[PlanOptions]) -> Plan:
    """Say what every stage will take, before anything runs.

    Parameters
    ----------
    rows, k : int
        Train rows, and gradient entries kept of each.
    **options : PlanOptions
        See :mod:`ooc_influence.options`.

    Returns
    -------
    Plan
        Stage by stage. Memory is what the calls themselves project; times are estimates for this machine.

    Raises
    ------
    InputError
        For sizes below one, a reduction beyond k, or rates that are not positive.
    """
    counts = {name: options[name] for name in ("queries", "top", "dampings", "workers")}
    for name, value in {"rows": rows, "k": k, **counts}.items():
        if type(value) is not int or value < 1:
            raise InputError(f"expected {name} >= 1; received {value!r}")
    reduce = options["reduce"]
    if reduce is not None and not 1 <= reduce <= min(k, rows):
        raise InputError(f"expected reduce between 1 and {min(k, rows)}, k or the rows; received {reduce}")
    budget, dtype = MemoryBudget.of(options["memory"]), parse_representation(options["dtype"])
    rates = Rates.measure(str(options["folder"]), gflops=options["gflops"], read=options["read_rate"])
    dims = k if reduce is None else reduce
    size = ProblemSize(
        dims, rows, options["workers"], queries=options["queries"], dampings=options["dampings"],
        modules=((0, k),) if dims == k else (), row_bytes=Encoding.of(dtype, dims).row_bytes,
    )  # fmt: skip
    planner = _Planner(size, k, dtype, options["top"], budget, rates, model=options["model"])
    return Plan(planner.stages(), budget.limit, rates)
