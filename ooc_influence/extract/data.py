"""What an extraction reads: batches, and the ids and columns that belong to their rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ooc_influence.errors import InputError, warn
from ooc_influence.scratch import Repeats
from ooc_influence.store import column_dtype

Batches = Iterable[Any] | Callable[[int], Iterable[Any]]
Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Batching:
    """How batches are read.

    Attributes
    ----------
    first_row : int
        Store row of the first sample of ``batches``: 0 if they are the whole data; n to add further data to a store of
        n rows, so that a killed run resumes inside the added part.
    check_independence : bool
        Check on the first batch that no sample's loss depends on another sample (one extra backward pass).
    """

    first_row: int = 0
    check_independence: bool = True

    def __post_init__(self) -> None:
        if self.first_row < 0:
            raise InputError(f"expected first_row >= 0; received {self.first_row}")


@dataclass(frozen=True)
class Shard:
    """Writer ``index`` of ``count`` that fill a store together, each a contiguous range of its chunk groups."""

    index: int
    count: int

    def __post_init__(self) -> None:
        if self.count < 1 or not 0 <= self.index < self.count:
            raise InputError(f"expected shard (i, N) with 0 <= i < N; received ({self.index}, {self.count})")

    @classmethod
    def parse(cls, shard: tuple[int, int] | None) -> Shard | None:
        """Return the shard ``(i, N)``, two whole numbers with 0 <= i < N; None for None."""
        if shard is None:
            return None
        numbers = tuple(shard) if isinstance(shard, (tuple, list)) else ()
        if len(numbers) != 2 or not all(type(number) is int for number in numbers):
            raise InputError(f"expected shard (i, N), two whole numbers; received {shard!r}")
        return cls(*numbers)

    def range(self, rows: int, group_rows: int) -> tuple[int, int]:
        """Return this writer's range of a store of ``rows``, ``start`` to ``stop``, cut at groups; may be empty."""
        groups = -(-rows // group_rows)
        edges = (groups * self.index // self.count, groups * (self.index + 1) // self.count)
        return edges[0] * group_rows, min(rows, edges[1] * group_rows)


def to_device(batch: Any, device: torch.device) -> Any:
    """Return ``batch`` with every tensor on ``device``: tensors, tuples, lists, dicts, objects with ``.to``."""
    if isinstance(batch, Mapping) and not hasattr(batch, "to"):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_make") and not hasattr(batch, "to"):
        return type(batch)._make(to_device(value, device) for value in batch)
    if type(batch) in (list, tuple):
        return type(batch)(to_device(value, device) for value in batch)
    if isinstance(batch, Tensor) and batch.is_inference():  # autograd cannot follow it
        with torch.inference_mode(False):
            return batch.to(device, copy=True)
    if not hasattr(batch, "to"):
        return batch
    moved = batch.to(device)
    return batch if moved is None else moved  # some classes move themselves and return nothing


def batch_size(batch: Any) -> int | None:
    """Return how many samples a batch holds, from its first tensor or array; None if it has none."""
    if isinstance(batch, (Tensor, np.ndarray)):
        return len(batch) if batch.ndim else None
    values: Iterable[Any] = ()
    if isinstance(batch, Mapping):
        values = batch.values()
    elif isinstance(batch, (list, tuple)):
        values = batch
    return next((size for size in map(batch_size, values) if size is not None), None)


def open_batches(batches: Batches, first_row: int, next_row: int) -> tuple[int, Iterable[Any]]:
    """Return the store row of the first sample, and the batches: a callable is asked for those from ``next_row``."""
    if callable(batches):
        return max(first_row, next_row), batches(max(0, next_row - first_row))
    _warn_if_shuffled(batches)
    return first_row, batches


def _warn_if_shuffled(batches: Any) -> None:
    data = torch.utils.data
    sampler = getattr(getattr(batches, "batch_sampler", None), "sampler", getattr(batches, "sampler", None))
    if isinstance(sampler, (data.RandomSampler, data.SubsetRandomSampler, data.WeightedRandomSampler)):
        warn(
            "batches come from a shuffling DataLoader: row numbers will not be data set indices and a killed run "
            "cannot resume; use shuffle=False"
        )


def count_rows(batches: Batches) -> int | None:
    """Return how many samples there are if that is known without reading them: of a DataLoader or a list."""
    if isinstance(batches, (list, tuple)):
        sizes = [batch_size(batch) for batch in batches]
        return None if None in sizes else sum(size or 0 for size in sizes)
    if getattr(batches, "drop_last", False) or not isinstance(
        getattr(batches, "sampler", None), (torch.utils.data.SequentialSampler, torch.utils.data.RandomSampler)
    ):
        return None
    try:
        return len(batches.dataset)  # type: ignore[union-attr]
    except (AttributeError, TypeError):
        return None


def even_numbers(count: int, wanted: int) -> Numbers:
    """Return at most ``wanted`` of the numbers below ``count``, spread evenly, ascending."""
    return np.unique(np.linspace(0, count - 1, min(count, wanted)).round().astype(np.int64))


def load_samples(batches: Any, numbers: Numbers) -> Iterator[Any] | None:
    """Return batches of some samples of a DataLoader, loaded by their numbers; None where that is impossible."""
    if not isinstance(batches, torch.utils.data.DataLoader) or not batches.batch_size:
        return None
    size, collate, dataset = batches.batch_size, batches.collate_fn, batches.dataset
    if not hasattr(dataset, "__getitem__"):
        return None
    parts = (numbers[low : low + size].tolist() for low in range(0, len(numbers), size))
    return (collate([dataset[number] for number in part]) for part in parts)


def samples_of(value: Any, chosen: Sequence[int], b: int) -> tuple[Any, bool]:
    """Return a batch with the chosen samples of every tensor, array or list of ``b`` entries, and whether any is."""
    if isinstance(value, (Tensor, np.ndarray)):
        cut = value.ndim > 0 and len(value) == b
        return (value[list(chosen)] if cut else value), cut
    if isinstance(value, Mapping):
        parts = {key: samples_of(each, chosen, b) for key, each in value.items()}
        kept: Any = {key: each for key, (each, _) in parts.items()}
        return (kept if type(value) is dict else type(value)(kept)), any(cut for _, cut in parts.values())  # type: ignore[call-arg]
    if isinstance(value, (tuple, list)):
        items = [samples_of(item, chosen, b) for item in value]
        if any(cut for _, cut in items):
            make = type(value)._make if hasattr(value, "_make") else type(value)
            return make([item for item, _ in items]), True
        if len(value) == b and not hasattr(value, "_make"):
            return type(value)(value[sample] for sample in chosen), True
    return value, False


def cut_batches(batch: Any, most: int) -> Iterator[tuple[slice, Any]]:
    """Yield a batch in parts of at most ``most`` samples, and where they are in it; whole if it cannot be cut."""
    size = batch_size(batch)
    if size is None or size <= most:
        yield slice(None), batch
        return
    for low in range(0, size, most):
        part, cut = samples_of(batch, range(low, min(low + most, size)), size)
        if not cut:
            yield slice(None), batch
            return
        yield slice(low, low + most), part


def numbered_batches(batches: Batches | BudgetBatches, numbers: Numbers) -> Iterator[tuple[Numbers, Any]]:
    """Yield batches that hold some samples of the data, ascending ``numbers``, and which of these are in each.

    They are loaded by number where the data allows it, else picked out of a pass over it.

    Raises
    ------
    InputError
        If the data ends before.
    """
    if isinstance(batches, BudgetBatches):
        if len(numbers) and numbers[-1] >= len(batches):
            raise _too_short(int(numbers[-1]), len(batches))
        places = {number: place for place, number in enumerate(numbers.tolist())}
        for part in batches.cut(numbers):
            yield np.array([places[number] for number in part.tolist()], np.int64), batches.load(part)
        return
    total = count_rows(batches)
    if total is not None and len(numbers) and numbers[-1] >= total:
        raise _too_short(int(numbers[-1]), total)
    loaded, first = load_samples(batches, numbers), 0
    for batch in loaded or ():
        size = batch_size(batch) or 1
        yield np.arange(first, first + size), batch
        first += size
    if loaded is not None:
        return
    row = 0
    for batch in batches(0) if callable(batches) else batches:
        size = batch_size(batch) or 1
        low, high = np.searchsorted(numbers, (row, row + size))
        if high > low:
            chosen, cut = samples_of(batch, (numbers[low:high] - row).tolist(), size)
            if not cut and size > 1:
                raise InputError(
                    "expected batches whose samples can be picked by number: tensors, arrays or lists with a value a "
                    "sample; received others: give a DataLoader over a data set, or BudgetBatches"
                )
            yield np.arange(low, high), chosen
        row += size
        if high == len(numbers):
            return
    raise _too_short(int(numbers[-1]), row)


def _too_short(number: int, total: int) -> InputError:
    return InputError(f"expected data with sample {number}; received {total} samples: give the data of the store")


BLOCK_BYTES = 128 * 2**20  # of a block's rows: the host memory that keeping the caller's order costs
LARGEST_BLOCK = 2**30  # bytes up to which a block has at least 64 rows, to be sorted by length
_BLOCK_ROWS = 4096


class _Subset:
    """Some of a sequence's items."""

    def __init__(self, samples: Any, numbers: Numbers) -> None:
        self._samples, self._numbers = samples, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: int) -> Any:
        return self._samples[int(self._numbers[index])]


class BudgetBatches:
    """Samples that are batched by length.

    Parameters
    ----------
    samples : sequence
        Samples by number: ``len(samples)`` and ``samples[number]``.
    collate : callable list of samples -> batch
        Makes a batch of some samples, padded to the longest.
    lengths : sequence of int, optional
        Tokens of each sample; by default every sample counts as one.
    tokens : int, optional
        The most tokens in a batch, padding included; a longer sample is a batch of its own.
    batch_size : int, optional
        The most samples in a batch.

    Attributes
    ----------
    halved : int
        Times that the budget was halved because the device ran out of memory.

    Raises
    ------
    InputError
        Without any budget, or for one below 1.
    """

    def __init__(
        self,
        samples: Sequence[Any] | Any,
        collate: Callable[[list[Any]], Any],
        *,
        lengths: Sequence[int] | npt.NDArray[Any] | None = None,
        tokens: int | None = None,
        batch_size: int | None = None,
    ) -> None:
        for name, value in (("tokens", tokens), ("batch_size", batch_size)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise InputError(f"expected {name} >= 1; received {value!r}")
        if tokens is None and batch_size is None:
            raise InputError("expected a budget: tokens= or batch_size=; received neither")
        self._samples, self._collate = samples, collate
        self.lengths: Numbers = np.ones(len(samples), np.int64) if lengths is None else np.asarray(lengths, np.int64)
        if self.lengths.shape != (len(samples),) or (len(samples) and self.lengths.min() < 0):
            raise InputError(f"expected a length for each of the {len(samples)} samples; received {len(self.lengths)}")
        self.tokens, self.batch_size = tokens, batch_size
        self.halved = 0

    def __len__(self) -> int:
        return len(self._samples)

    def settings(self) -> dict[str, Any]:
        """Return what is recorded: the current budget."""
        return {"tokens": self.tokens, "batch_size": self.batch_size, "halved": self.halved}

    def load(self, numbers: Numbers) -> Any:
        """Return the batch of some samples."""
        return self._collate([self._samples[number] for number in numbers.tolist()])

    def part(self, numbers: Numbers) -> BudgetBatches:
        """Return some of the samples, with the same budget."""
        return BudgetBatches(
            _Subset(self._samples, numbers), self._collate, lengths=self.lengths[numbers], tokens=self.tokens,
            batch_size=self.batch_size,
        )  # fmt: skip

    def blocks(self, row_bytes: int, start: int) -> Iterator[tuple[int, int]]:
        """Yield blocks ``(first, last)`` of rows of some bytes, from the one that contains ``start``."""
        least = max(1, min(64, LARGEST_BLOCK // row_bytes))
        size = int(max(least, min(_BLOCK_ROWS, BLOCK_BYTES // row_bytes)))
        for first in range(start // size * size, len(self), size):
            yield first, min(len(self), first + size)

    def cut(self, numbers: Numbers) -> list[Numbers]:
        """Return batches of samples ``numbers``, longest first, each within the budget."""
        order = numbers[np.argsort(-self.lengths[numbers], kind="stable")]
        batches, first = [], 0
        while first < len(order):
            longest = max(1, int(self.lengths[order[first]]))
            count = len(order) if self.tokens is None else max(1, self.tokens // longest)
            count = min(count, self.batch_size or count)
            batches.append(order[first : first + count])
            first += count
        return batches

    def padded(self, numbers: Numbers) -> tuple[int, int]:
        """Return the tokens of a batch without and with padding."""
        lengths = self.lengths[numbers]
        return int(lengths.sum()), int(lengths.max(initial=0)) * len(numbers)

    def halve(self, numbers: Numbers) -> list[Numbers]:
        """Halve the budget after a batch that did not fit the device, and return that batch cut again."""
        if len(numbers) == 1:
            raise InputError(
                f"expected sample {int(numbers[0])} of {int(self.lengths[numbers[0]])} tokens to fit the device; "
                "received out of memory: use shorter samples, a smaller model dtype, or another device"
            )
        cost = self.padded(numbers)[1]
        if self.tokens is not None:
            self.tokens = max(1, min(self.tokens, cost) // 2)
        if self.tokens is None or self.batch_size is not None:
            self.batch_size = max(1, len(numbers) // 2)
        self.halved += 1
        return self.cut(numbers)


_AT_ONCE = 2**14  # values processed together
RowSource = Sequence[Any] | np.ndarray[Any, Any] | Callable[[Any], Sequence[Any]]


@dataclass(frozen=True)
class RowMetadata:
    """Where the ids and columns of rows come from.

    ``sources`` has by array path (``"example_id"``, ``"columns/<name>"``) a value for each sample, indexed by sample
    number, or a function of the batch.
    """

    sources: Mapping[str, RowSource]

    @classmethod
    def of(cls, ids: RowSource | None, columns: Mapping[str, RowSource] | None) -> RowMetadata:
        """Return the metadata of an extraction's ``ids`` and ``columns``."""
        if columns is not None and not isinstance(columns, Mapping):
            raise InputError(f"expected columns as a mapping of name to values; received {type(columns).__name__}")
        named = {} if ids is None else {"example_id": ids}
        return cls(named | {f"columns/{name}": source for name, source in (columns or {}).items()})

    def check_length(self, samples: int | None) -> None:
        """Refuse sequences that do not have one value for each of the samples, if their number is known."""
        for name, source in self.sources.items():
            if samples is not None and hasattr(source, "__len__") and len(source) != samples:
                raise InputError(
                    f"expected {samples} values of {name}, one for each sample of batches; received {len(source)}"
                )

    def check_ids(self) -> None:
        """Refuse a sequence of ids that repeat, as text; the memory is that of a part of them."""
        source = self.sources.get("example_id")
        if source is None or callable(source) or not hasattr(source, "__len__"):
            return  # they are checked batch by batch
        if getattr(source, "distinct", False):
            return  # they were checked when they were made
        with Repeats() as repeats:
            for low in range(0, len(source), _AT_ONCE):
                values = as_list(source[low : low + _AT_ONCE])
                if not all(isinstance(value, (str, int, np.integer)) for value in values):
                    return  # not ids at all, which is refused where their type is checked
                repeats.add([str(value) for value in values])
            pair = repeats.find(lambda numbers: [str(_at(source, number)) for number in numbers.tolist()])
        if pair is not None:
            one, other = (_at(source, number) for number in pair)
            received = f"{one!r} twice" if one == other else f"{one!r} and {other!r}, which are the same as text"
            raise InputError(f"expected ids that do not repeat; received {received}: give every sample its own")

    def take(self, batch: Any, first: int, count: int) -> dict[str, list[Any]]:
        """Return the values of a batch's ``count`` rows, by array path; ``first`` is its first sample's number."""
        return {name: _take(source, name, batch, first, count) for name, source in self.sources.items()}

    def dtypes(self, of_batch: Mapping[str, list[Any]]) -> dict[str, str]:
        """Return the stored dtype of each array, from all its values if they are known, otherwise from the batch's."""
        dtypes = {}
        for name, source in self.sources.items():
            values = source.complete if isinstance(source, _ChosenValues) else source
            complete = isinstance(values, (list, tuple, np.ndarray, Tensor))
            try:
                dtypes[name] = _dtype(_plain(values) if complete else of_batch[name])
            except InputError as error:
                raise InputError(f"{error} (in {name})") from error
        if dtypes.get("example_id", "str") not in ("str", "int64"):
            raise InputError(f"expected ids that are whole numbers or strings; received {dtypes['example_id']}")
        return dtypes


def _dtype(values: Any) -> str:
    """Return the stored dtype of values: of a long list by parts, since an array of all may be much larger."""
    if isinstance(values, np.ndarray) or len(values) <= _AT_ONCE:
        return column_dtype(values)
    kinds = {column_dtype(values[low : low + _AT_ONCE]) for low in range(0, len(values), _AT_ONCE)}
    return next(kind for kind in ("str", "float64", "int64", "bool") if kind in kinds)


def _plain(values: Any) -> Any:
    return values.cpu().numpy() if isinstance(values, Tensor) else values


def as_list(values: Any) -> list[Any]:
    """Return values of samples, a tensor or a sequence, as a list."""
    plain = _plain(values)
    return plain.tolist() if isinstance(plain, np.ndarray) else list(plain)


def _at(source: Any, number: int) -> Any:
    return as_list(source[number : number + 1])[0]


def _take(source: RowSource, name: str, batch: Any, first: int, count: int) -> list[Any]:
    try:
        values = as_list(source(batch) if callable(source) else source[first : first + count])
    except (TypeError, KeyError, IndexError) as error:
        raise InputError(
            f"expected {name} as a sequence with one value a sample, or a function of the batch that returns one; "
            f"received {type(source).__name__} ({error})"
        ) from error
    if len(values) != count:
        raise InputError(f"expected {count} values of {name} for rows {first}-{first + count}; received {len(values)}")
    return values


@dataclass(frozen=True)
class RowChoice:
    """Which samples of the data become rows, and how often.

    With m samples chosen, row d · m + j is draw d of the j-th of them. Its id is the sample's; of later draws than the
    first with ``/draw1``, ``/draw2`` and so on behind it.

    Attributes
    ----------
    sample : int, optional
        How many samples, spread evenly; by default all.
    draws : int
        Rows of each.
    """

    sample: int | None = None
    draws: int = 1

    def __post_init__(self) -> None:
        for name, value in (("sample", self.sample), ("draws", self.draws)):
            if value is not None and (type(value) is not int or value < 1):
                raise InputError(f"expected {name} >= 1; received {value!r}")

    def count(self, samples: int | None) -> int | None:
        """Return the number of rows made of some samples; None where their number is not known."""
        return None if samples is None else self.draws * min(samples, self.sample or samples)

    def batches(self, batches: Batches | BudgetBatches, samples: int | None) -> Batches | BudgetBatches:
        """Return the batches of the chosen samples.

        Raises
        ------
        InputError
            If they cannot be had: of batches that can be read once only, whose number of samples is not known, or that
            cannot be cut.
        """
        if self == RowChoice():
            return batches
        if isinstance(batches, BudgetBatches):
            return batches.part(self._numbers(len(batches)))
        if isinstance(batches, Iterator):
            raise InputError(
                "expected batches that can be read again, for sample= or draws=; received an iterator: give a list, a "
                "DataLoader or BudgetBatches"
            )
        if self.sample is None:
            return _ChosenBatches(batches, None, self.draws)
        if samples is None:
            raise InputError(
                "expected data whose number of samples is known, for sample=; received a stream: give a list, a "
                "DataLoader or BudgetBatches"
            )
        return _ChosenBatches(batches, even_numbers(samples, self.sample), self.draws)

    def metadata(self, metadata: RowMetadata, samples: int | None) -> RowMetadata:
        """Return the ids and columns of the chosen samples.

        Raises
        ------
        InputError
            For several draws with a function that returns ids, which are then the same for all of them.
        """
        if self == RowChoice():
            return metadata
        if self.draws > 1 and callable(metadata.sources.get("example_id")):
            raise InputError(
                f"expected ids as a sequence with draws={self.draws}, since those of further draws differ; received a "
                "function of the batch"
            )
        chosen: dict[str, RowSource] = {}
        for name, source in metadata.sources.items():
            draws = self.draws if name == "example_id" else 1
            numbers = None if callable(source) else self._numbers(samples or len(source))
            chosen[name] = source if numbers is None else _ChosenValues(source, numbers, draws)
        return RowMetadata(chosen)

    def id_type(self, kind: str | None) -> str | None:
        """Return the type of the rows' ids, by that of the samples'."""
        return "str" if kind is not None and self.draws > 1 else kind

    def _numbers(self, samples: int) -> Numbers:
        chosen = np.arange(samples) if self.sample is None else even_numbers(samples, self.sample)
        return np.tile(chosen, self.draws)


def batches_of_rows(attributes: Mapping[str, Any], batches: Batches | BudgetBatches) -> Batches | BudgetBatches:
    """Return the batches of a store's rows, by its attributes: they may be of some samples of the data only."""
    total = len(batches) if isinstance(batches, BudgetBatches) else count_rows(batches)
    return RowChoice(attributes.get("sample")).batches(batches, total)


class _ChosenBatches:
    """Batches of some samples, all of them where ``numbers`` is None, to be read several times over."""

    def __init__(self, batches: Batches, numbers: Numbers | None, draws: int) -> None:
        self._batches, self._numbers, self._draws = batches, numbers, draws

    def __iter__(self) -> Iterator[Any]:
        for _ in range(self._draws):
            source: Iterable[Any] = self._batches(0) if callable(self._batches) else self._batches
            if self._numbers is None:
                yield from source
            else:
                yield from load_samples(source, self._numbers) or self._cut(source, self._numbers)

    @staticmethod
    def _cut(source: Iterable[Any], numbers: Numbers) -> Iterator[Any]:
        first = 0
        for batch in source:
            size = batch_size(batch)
            if size is None:
                raise InputError("expected batches of tensors, which tell their size, for sample=; received others")
            low, high = np.searchsorted(numbers, (first, first + size))
            chosen = (numbers[low:high] - first).tolist()
            first += size
            if len(chosen) == size:
                yield batch
            elif chosen:
                part, cut = samples_of(batch, chosen, size)
                if not cut:
                    raise InputError(
                        f"expected batches that can be cut, for sample=; received {type(batch).__name__}: give "
                        "tensors, or tuples or mappings of them, or BudgetBatches"
                    )
                yield part


class _ChosenValues(Sequence[Any]):
    """The values of some samples; of ``draws`` draws, with the number of a further draw behind each, as text."""

    def __init__(self, values: Any, numbers: Numbers, draws: int = 1) -> None:
        self.values, self._numbers, self._draws = values, numbers, draws

    @property
    def complete(self) -> Any:
        """What their type can be told from, where all of it is in memory."""
        return self[: len(self) // self._draws] if self._draws > 1 else self.values

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, key: Any) -> Any:
        if not isinstance(key, slice):
            return self[key : key + 1][0]
        numbers = self._numbers[key]
        runs = np.split(numbers, np.flatnonzero(np.diff(numbers) != 1) + 1) if len(numbers) else []
        values = [value for run in runs for value in as_list(self.values[int(run[0]) : int(run[-1]) + 1])]
        if self._draws == 1:
            return values
        draws = (np.arange(len(self))[key] // (len(self) // self._draws)).tolist()
        return [f"{value}/draw{draw}" if draw else str(value) for value, draw in zip(values, draws, strict=True)]
