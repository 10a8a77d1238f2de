"""Which product scores rows: the quickest of those that keep their bound on this machine, tried once for each shape."""

from __future__ import annotations

import logging
import sys
import threading
import time
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ooc_influence.errors import InputError
from ooc_influence.influence.products import BFloat16Product, Float32Product, Floats, Int8Product, Pool, Product
from ooc_influence.memory import release_freed
from ooc_influence.options import ProductName
from ooc_influence.store import Encoding

logger = logging.getLogger("ooc_influence")
_KINDS: dict[ProductName, type[Product]] = {
    "float32": Float32Product, "bfloat16": BFloat16Product, "int8": Int8Product
}  # fmt: skip
_WORTH_TRYING = 2**34  # numbers multiplied, a conversion counted as 64: below, a pass takes about as long as the trial
_WORTH_LOADING = 2**38  # the same, for PyTorch to be loaded: float32 takes seconds
# columns: scores of rows with little in common are ‖q‖ ‖g‖ / √k, and bfloat16's bound of .004 ‖q‖ ‖g‖ tells few apart
_WIDEST = 2**14
# rows at most, their numbers, and scores, which are those of a pass's tile: of fewer narrow rows, the calls themselves
# would be timed; of more, the trial would take more memory than the pass
_TRIAL_ROWS, _TRIAL_NUMBERS, _TRIAL_SCORES = 2**14, 2**23, 2**22
_COMPARED = 2**18  # scores whose bounds are looked at at a time
_TRIALS = 5  # rounds, each of all products: others may use the machine meanwhile
_GAIN = 1.2  # times as fast as float32's must another product be
_lock = threading.Lock()
_chosen: dict[tuple[str, int, int, int], ProductName] = {}


def product_names(as_stored: bool) -> list[ProductName]:
    """Return the products that rows can be multiplied by; the first is the reference."""
    return ["float32", "bfloat16", "int8"] if as_stored else ["float32", "bfloat16"]


def make_product(name: ProductName, *args: Any, **options: Any) -> Product:
    """Return a product; see :class:`Product`."""
    if name != "float32":
        import torch  # noqa: F401 - the product looks it up
    return _KINDS[name](*args, **options)


def check_product(asked: str, form: Encoding, as_stored: bool) -> None:
    """Check that rows of a form can be multiplied as asked.

    Raises
    ------
    InputError
        If they cannot.
    """
    names = ["auto", *product_names(as_stored)]
    if asked not in names:
        raise InputError(
            f"expected product one of {', '.join(names)} for rows of {form.name}; received {asked!r}: int8 is for rows "
            "of int8-linear and sign"
        )


def choose_product(form: Encoding, width: int, queries: int, rows: int, pool: Pool, *, as_stored: bool) -> ProductName:
    """Return the quickest product.

    Parameters
    ----------
    form : Encoding
        How rows are stored.
    width : int
        Numbers of a row, as it is multiplied.
    queries, rows : int
        How many there are.
    pool : Pool
        Threads to work with.
    as_stored : bool
        Whether rows are multiplied as they are stored.
    """
    work = rows * width * (queries + 64)
    if work < _WORTH_TRYING or not (work >= _WORTH_LOADING or hasattr(sys.modules.get("torch"), "mm")):
        return "float32"
    queries = 1 << (queries - 1).bit_length()
    key = (form.name, width, queries, pool.threads)
    with _lock:
        if key not in _chosen:
            names = [name for name in product_names(as_stored) if name != "bfloat16" or width <= _WIDEST]
            _chosen[key] = _quickest(names, form, width, queries, pool, as_stored)
            release_freed()  # otherwise what the trial held would be kept beside what the pass holds
        return _chosen[key]


class _Scored(NamedTuple):
    """A product, its scores (1, q, b), and its F of the rows (b, t)."""

    product: Product
    scores: Floats
    errors: npt.NDArray[np.float64]

    def part(self, rows: slice) -> tuple[Floats, npt.NDArray[np.float64]]:
        """Return the scores of some rows, and what they may be off by."""
        scores = self.scores[..., rows]
        return scores, self.product.bounds(self.errors[rows], scores)


class _Trial:
    """Random rows and queries."""

    def __init__(self, form: Encoding, width: int, queries: int, pool: Pool, as_stored: bool) -> None:
        generator = np.random.default_rng(0)
        rows = max(16, min(_TRIAL_ROWS, _TRIAL_NUMBERS // width, _TRIAL_SCORES // queries))
        self._raw, self._scale = np.empty((rows, form.columns), form.dtype), np.empty(rows, np.float32)
        form.encode_into(generator.standard_normal((rows, form.k), np.float32), self._raw, self._scale)
        left = generator.uniform(-1, 1, (queries, width)).astype(np.float32)
        self._args = (form, None, left, (slice(None),), pool)
        self._as_stored = as_stored
        self._out = np.empty((1, queries, rows), np.float32)

    def run(self, name: ProductName) -> _Scored:
        """Return a product's scores, which the next one overwrites."""
        product = make_product(name, *self._args, as_stored=self._as_stored)
        return _Scored(product, self._out, product.multiply(self._raw, self._scale, self._out).errors)

    def agree(self, one: _Scored, other: _Scored) -> bool:
        """Return whether scores of two products differ by no more than their bounds."""
        step = max(1, _COMPARED // self._out.shape[1])
        for start in range(0, len(self._raw), step):
            (scores, bounds), (others, more) = (each.part(slice(start, start + step)) for each in (one, other))
            if not (np.abs(scores - others) <= bounds + more).all():
                return False
        return True

    def time(self, product: Product) -> float:
        """Return the seconds that a product takes."""
        began = time.perf_counter()
        product.multiply(self._raw, self._scale, self._out)
        return time.perf_counter() - began


def _quickest(
    names: list[ProductName], form: Encoding, width: int, queries: int, pool: Pool, as_stored: bool
) -> ProductName:
    trial = _Trial(form, width, queries, pool, as_stored)
    reference = trial.run(names[0])
    reference = reference._replace(scores=reference.scores.copy())
    products = {names[0]: reference.product}
    for name in names[1:]:
        try:
            found = trial.run(name)
        except (ImportError, AttributeError, RuntimeError) as error:
            logger.info("no %s products here: %s", name, str(error).splitlines()[0])
            continue
        if trial.agree(reference, found):
            products[name] = found.product
        else:
            logger.info("no %s products here: they are less accurate than they should be", name)
    rounds = [{name: trial.time(product) for name, product in products.items()} for _ in range(_TRIALS)]
    seconds = {name: min(each[name] for each in rounds) for name in products}
    best, first = min(products, key=lambda name: seconds[name]), seconds[names[0]]
    if _GAIN * seconds[best] > first:
        best = names[0]
    speed = ", ".join(f"{name} {first / taken:.1f}" for name, taken in seconds.items())
    logger.info("scores of %d queries with %s rows by %s products (speed: %s)", queries, form.name, best, speed)
    return best
