"""How fast this machine is: a calibration of about two seconds."""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, Unpack

import numpy as np

from ooc_influence.curvature import (
    BlockShape,
    FitShapes,
    costs,
    fisher_memory,
    gram_memory,
    precondition_bytes,
    self_influence_bytes,
)
from ooc_influence.errors import InputError, MemoryBudgetError
from ooc_influence.influence import LEFT_ROWS, TileMemory, pass_need, self_memory, top_costs
from ooc_influence.linalg import choose_engine, spectrum_solvers, symmetric_eigen, tile_side
from ooc_influence.memory import MemoryModel, budget_bytes, format_bytes, held_now, plan_block_rows
from ooc_influence.options import PlanOptions, takes
from ooc_influence.parallel import blas_threads
from ooc_influence.store import (
    BUFFERS,
    Encoding,
    Layout,
    Storage,
    map_file,
    parse_representation,
    verify_memory,
)

_SIDE = 1024  # of the matrices multiplied
_EIGEN_SIDE = 448
_FILE = 128 * 2**20
_STEP = 8 * 2**20
_SECONDS = 0.3  # for each rate


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
        """Measure what is not given.

        Parameters
        ----------
        folder : path
            Where the stores will be: a file is written there, read and removed.
        gflops : float, optional
            10⁹ FLOP of float32 products in a second.
        read : float, optional
            Bytes read in a second.

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
        found, write, convert = _disk(Path(folder))
        return cls(gemm, syrk, double, eigen, found if read is None else read, write, convert)

    def __str__(self) -> str:
        flops = ", ".join(
            f"{name} {value / 1e9:.3g} GFLOP/s"
            for name, value in (("sgemm", self.gemm), ("ssyrk", self.syrk), ("eigh", self.eigen))
        )
        return f"{flops}, read {format_bytes(self.read)}/s, convert {format_bytes(self.convert)}/s"


def _repeated(work: Callable[[], object]) -> float:
    """Return the median seconds of ``work``, repeated for a while after once to warm up."""
    work()
    taken: list[float] = []
    end = time.perf_counter() + _SECONDS
    while not taken or time.perf_counter() < end:
        began = time.perf_counter()
        work()
        taken.append(time.perf_counter() - began)
    return median(taken)


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
    place = folder if os.access(folder, os.W_OK) else Path(tempfile.gettempdir())
    data = np.random.default_rng(0).standard_normal(_STEP // 4, np.float32).astype(np.float16)
    raw = np.concatenate([data, data]).view(np.uint8)
    with tempfile.NamedTemporaryFile(prefix=".ooc_influence-", dir=place, buffering=0) as file:
        began, size = time.perf_counter(), 0
        while size < _FILE and (size < 2 * _STEP or time.perf_counter() < began + _SECONDS):
            size += file.write(raw[:_STEP].data)
        os.fsync(file.fileno())
        write = size / (time.perf_counter() - began)
        if hasattr(os, "posix_fadvise"):
            with contextlib.suppress(OSError):
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        buffer = bytearray(_STEP)
        began = time.perf_counter()
        while file.readinto(buffer):
            pass
        read = size / (time.perf_counter() - began)
        half = map_file(file.name).view(np.float16).reshape(-1, 1024)
        rows, scale = np.empty(half.shape, np.float32), np.ones(len(half), np.float32)
        convert = rows.nbytes / _repeated(lambda: Encoding("float16", 1024).decode_into(half, scale, rows))
    return read, write, convert


@dataclass(frozen=True)
class Stage:
    """One stage of the work.

    Attributes
    ----------
    name : str
        What it is.
    disk : int
        Bytes it leaves on disk.
    peak : int or None
        Peak bytes of a process; None where the model decides.
    read : int
        Bytes it reads.
    flops : float or None
        Arithmetic; None where the model decides.
    seconds : float or None
        Estimate; None where the model decides.
    refusal : str or None
        Why it does not fit the budget, and what to change; None where it does.
    note : str
        What else to know.
    """

    name: str
    disk: int
    peak: int | None
    read: int
    flops: float | None
    seconds: float | None
    refusal: str | None = None
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON-ready values."""
        return asdict(self)


@dataclass(frozen=True)
class Shapes:
    """What is planned for.

    Attributes
    ----------
    rows, k, queries : int
        Train rows, kept entries, query rows.
    dims : int
        Stored numbers a row: k, or fewer after a reduction.
    dtype : str
        Representation on disk.
    dampings, top, workers : int
        λs, rows of a top list, row stripes at once.
    memory : int, str or None
        The budget.
    held : int
        Bytes a process holds before a stage starts.
    rank : int or None
        Eigenvectors kept of the curvature; None for all.
    """

    rows: int
    k: int
    queries: int
    dims: int
    dtype: str
    dampings: int
    top: int
    workers: int
    memory: int | str | None
    held: int
    rank: int | None = None

    @property
    def fit_shapes(self) -> FitShapes:
        """Return what the ways to a curvature are priced by."""
        return FitShapes(self.dims, self.rows, modules=((0, self.k),) if self.dims == self.k else ())

    def layout(self, columns: int) -> Layout:
        """Return the layout of a store with so many columns."""
        dtype = parse_representation(self.dtype)
        return Layout(columns, dtype, *Storage().sizes(columns, dtype), block=Encoding.of(dtype, columns).block)

    def store_bytes(self, rows: int, columns: int) -> int:
        """Return the bytes of a store: whole chunk files, and what belongs to each row."""
        layout = self.layout(columns)
        chunks = -(-rows // layout.chunk_rows)
        groups = -(-rows // layout.group_rows)
        small = groups * (layout.group_rows * sum(4 for _ in layout.row_arrays) + 8 * layout.group_chunks)
        return chunks * layout.chunk_bytes + small

    def fit(self, need: MemoryModel) -> tuple[int, int | None, str | None]:
        """Return the peak bytes of a stage, the rows of its blocks, and its refusal where it does not fit."""
        try:
            rows = plan_block_rows(need, self.memory, self.workers, self.held)
        except MemoryBudgetError as error:
            return need.peak(need.min_rows, self.workers, self.held), None, str(error)
        return need.peak(rows, self.workers, self.held), rows, None


def extraction(shapes: Shapes, rates: Rates) -> Stage:
    """Return the train store's extraction; time and most memory are the model's."""
    layout = shapes.layout(shapes.dims)
    disk = shapes.store_bytes(shapes.rows, shapes.dims)
    if shapes.dims < shapes.k:
        disk += 4 * shapes.k * shapes.dims
    buffers = BUFFERS * shapes.layout(shapes.dims).chunk_rows * 4 * shapes.dims
    rows = shapes.rows
    note = (
        f"{-(-rows // layout.chunk_rows)} chunks of {layout.chunk_rows} rows; writing takes {disk / rates.write:.0f} s"
    )
    return Stage("extract train", disk, None, 0, None, None, note=f"{note}; the model and {buffers / 2**20:.0f} MiB")


def query_extraction(shapes: Shapes) -> Stage:
    """Return the query store's extraction."""
    disk = shapes.store_bytes(shapes.queries, shapes.dims)
    copied = 4 * shapes.k * shapes.dims if shapes.dims < shapes.k else 0
    return Stage("extract queries", disk + (copied if copied < 256 * 2**20 else 0), None, 0, None, None)


def basis(shapes: Shapes, rates: Rates) -> Stage:
    """Return the reduction: the pilot's wide rows and the top of their spectrum, by the cheapest way that fits."""
    pilot = min(shapes.rows, 4 * shapes.dims)
    ways = spectrum_solvers(shapes.k, pilot, shapes.dims)
    found = [(way, *shapes.fit(way.need)) for way in ways]
    way, peak, _, refusal = next((fit for fit in found if fit[3] is None), min(found, key=lambda fit: fit[1]))
    read = way.passes * shapes.store_bytes(pilot, shapes.k)
    seconds = max(read / rates.read, way.flops / rates.gemm) + way.factoring / rates.eigen
    disk = shapes.store_bytes(pilot, shapes.k)
    note = f"{pilot} pilot rows of {shapes.k} entries, removed afterwards; by {way.name}"
    return Stage("eigenbasis", disk, peak, read, way.flops + way.factoring, seconds, refusal, note)


def fisher(shapes: Shapes, rates: Rates) -> Stage:
    """Return the Fisher matrix and its factorisation."""
    n, d = shapes.rows, shapes.dims
    peak, _, refusal = shapes.fit(
        replace(fisher_memory(d, shapes.workers), alternatives=shapes.fit_shapes.fisher_alternatives)
    )
    sums, factoring = float(n) * d * d, 9.0 * d**3
    read = shapes.store_bytes(n, d)
    seconds = _pass(shapes, rates, read, sums / rates.syrk) + factoring / rates.eigen
    return Stage("fisher", 16 * d * d + 8 * d, peak, read, sums + factoring, seconds, refusal)


def top_fisher(shapes: Shapes, rates: Rates) -> Stage | None:
    """Return the largest top of the Fisher matrix's spectrum that fits, by the quickest way; None where none does."""
    n, d, budget = shapes.rows, shapes.dims, budget_bytes(shapes.memory)
    row_bytes = shapes.layout(d).encoding.row_bytes
    sizes = costs.Shapes(d, n, n, row_bytes, shapes.workers, 0, 0)
    rank = costs.largest_rank(sizes, budget, shapes.held)
    if not rank:
        return None
    way = costs.low_rank_plans(sizes, rank, fisher_memory(d, shapes.workers), budget, shapes.held)[0]
    seconds = _pass(shapes, rates, int(way.read), way.flops / rates.gemm)
    disk = 8 * d * (rank + (0 if way.name == "rows" else d // 2))
    note = f"instead of fisher, --rank {rank}; by {way.name}, in about {costs.USUAL_PASSES} passes"
    peak = way.need.peak(way.block_rows, shapes.workers, shapes.held)
    return Stage(f"fisher, rank {rank}", disk, peak, int(way.read), way.flops, seconds, None, note)


def gram(shapes: Shapes, rates: Rates) -> Stage:
    """Return the Gram matrix of the rows: what the other side of Woodbury's identity costs."""
    n, d = shapes.rows, shapes.dims
    need = replace(gram_memory(n, d, shapes.workers), alternatives=shapes.fit_shapes.gram_alternatives)
    peak, rows, refusal = shapes.fit(need)
    side = tile_side(n)
    strips, blocks = -(-n // side), -(-side // (rows or need.min_rows))
    products, factoring = float(n) * n * d * (1 + 1 / strips) + 2.0 * n * n * d, 9.0 * n**3  # K, then eigenvectors
    read = shapes.store_bytes(n, d) * ((strips + 1) * (1 + blocks) // 2 + 1)
    seconds = _pass(shapes, rates, read, products / rates.double) + factoring / rates.eigen
    return Stage("Gram side", 8 * n * (n + d), peak, read, products + factoring, seconds, refusal, "instead of fisher")


def scores(shapes: Shapes, rates: Rates) -> Stage:
    """Return the whole matrix of scores, on disk."""
    out = 4 * shapes.queries * shapes.rows * shapes.dampings
    return _scored("scores", shapes, rates, lambda queries: TileMemory(tile=12), out)


def top(shapes: Shapes, rates: Rates) -> Stage:
    """Return top lists."""
    count = min(shapes.top, shapes.rows)
    costs = top_costs(count, shapes.dampings * shapes.queries, shapes.rows)
    return _scored(f"top {count}", shapes, rates, lambda queries: costs, 0)


def _scored(name: str, shapes: Shapes, rates: Rates, costs: Callable[[int], TileMemory], out: int) -> Stage:
    """Return a pass over the train rows, with as many queries at a time as fit."""
    n, d, values = shapes.rows, shapes.dims, shapes.dampings
    limit = max(1, LEFT_ROWS // values)
    queries = shapes.queries if shapes.queries <= limit else 1 << limit.bit_length() - 1
    while True:
        own = costs(queries)
        preparing = precondition_bytes(_eigen_block(shapes), queries, values) + 8 * queries * d * (2 + values)
        need = pass_need(
            f"{name} for k={d}",
            [d],
            values * queries,
            own._replace(fixed=own.fixed + preparing, row=own.row + 16 * values),
        )
        peak, _, refusal = shapes.fit(need)
        if refusal is None or queries == 1:
            break
        queries = 1 << (queries - 1).bit_length() - 1
    passes = -(-shapes.queries // queries)
    read = shapes.store_bytes(n, d)
    preparing_flops = 2.0 * shapes.queries * d * (shapes.rank or d) * (1 + values)
    products = 2.0 * shapes.queries * values * n * d
    seconds = passes * _pass(shapes, rates, read, products / passes / rates.gemm) + preparing_flops / rates.double
    seconds = max(seconds, out / rates.write)
    note = f"{passes} passes over the rows, {queries} queries at a time" if passes > 1 else ""
    return Stage(name, out, peak, passes * read, products + preparing_flops, seconds, refusal, note)


def _eigen_block(shapes: Shapes) -> list[BlockShape]:
    """Return the block of the curvature that fits."""
    return [BlockShape(shapes.dims, shapes.rank or shapes.dims)]


def self_influence(shapes: Shapes, rates: Rates) -> Stage:
    """Return the rows' self-influence."""
    n, d = shapes.rows, shapes.dims
    rank, values = shapes.rank, shapes.dampings
    norms = self_influence_bytes(_eigen_block(shapes), values)
    peak, _, refusal = shapes.fit(self_memory([d], n, values, norms=norms))
    products, read = 2.0 * n * d * (rank or d), shapes.store_bytes(n, d)
    seconds = _pass(shapes, rates, read, products / rates.gemm)
    return Stage("self-influence", 4 * n * shapes.dampings, peak, read, products, seconds, refusal)


def verify(shapes: Shapes, rates: Rates) -> Stage:
    """Return the check of every committed chunk."""
    layout, read = shapes.layout(shapes.dims), shapes.store_bytes(shapes.rows, shapes.dims)
    peak, _, refusal = shapes.fit(verify_memory(layout, shapes.rows, 0))
    return Stage("verify", 0, peak, read, 0.0, read / rates.read, refusal)


def _pass(shapes: Shapes, rates: Rates, read: int, computing: float) -> float:
    """Return the seconds of reading all rows beside converting and computing."""
    return max(read / rates.read, 4.0 * shapes.rows * shapes.dims / rates.convert + computing)


def all_stages(shapes: Shapes, rates: Rates) -> list[Stage]:
    """Return every stage that a corpus goes through."""
    found = [extraction(shapes, rates), query_extraction(shapes)]
    if shapes.dims < shapes.k:
        found.insert(0, basis(shapes, rates))
    found.append(fisher(shapes, rates))
    part = top_fisher(shapes, rates) if found[-1].refusal else None
    if part is not None:
        found.append(part)
        shapes = replace(shapes, rank=int(part.name.rpartition(" ")[2]))
    if shapes.rows < shapes.dims:
        found.append(gram(shapes, rates))
    return found + [stage(shapes, rates) for stage in (scores, top, self_influence, verify)]


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
        Stage by stage. Memory is what the stages themselves project; times are estimates for this machine.

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
    budget = budget_bytes(options["memory"])
    rates = Rates.measure(str(options["folder"]), gflops=options["gflops"], read=options["read_rate"])
    dims = k if reduce is None else reduce
    representation = parse_representation(options["dtype"])
    shapes = Shapes(
        rows, k, options["queries"], dims, representation, options["dampings"], options["top"], options["workers"],
        budget, held_now(),
    )  # fmt: skip
    return Plan(all_stages(shapes, rates), budget, rates)
