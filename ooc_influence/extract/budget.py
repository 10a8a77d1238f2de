"""Batches by a budget of tokens or samples, with little padding, in an order that resumes.

Rows are taken in blocks of the caller's order. Inside a block samples are sorted by length, longest first, and cut into
batches that hold at most ``tokens`` tokens, padding included. A block's rows are stored together in the caller's order,
so what a row is, and what a resumed run does, depends on data and settings only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ooc_influence.errors import InputError

BLOCK_BYTES = 128 * 2**20  # of a block's float32 rows: the host memory that keeping the caller's order costs
LARGEST_BLOCK = 2**30  # but a block has 64 rows, to sort by length, as long as they take no more than this
_BLOCK_ROWS = 4096
Numbers = npt.NDArray[np.int64]


class _Part:
    """Some of a sequence's items."""

    def __init__(self, samples: Any, numbers: Numbers) -> None:
        self._samples, self._numbers = samples, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, place: int) -> Any:
        return self._samples[int(self._numbers[place])]


class BudgetBatches:
    """Samples that are batched by length.

    Parameters
    ----------
    samples : sequence
        Samples by number: ``len(samples)`` and ``samples[number]``.
    collate : callable list of samples -> batch
        Makes a batch of them, padded to the longest.
    lengths : sequence of int, optional
        Tokens of each sample; without it every sample counts one.
    tokens : int, optional
        Most tokens a batch may hold, padding included; a sample longer than that is a batch of its own.
    batch_size : int, optional
        Most samples a batch may hold.

    Attributes
    ----------
    halved : int
        How often the budget was halved because the device ran out of memory.

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
        """Return what is recorded: the budget as it is now."""
        return {"tokens": self.tokens, "batch_size": self.batch_size, "halved": self.halved}

    def load(self, numbers: Numbers) -> Any:
        """Return the batch of some samples."""
        return self._collate([self._samples[number] for number in numbers.tolist()])

    def part(self, numbers: Numbers) -> BudgetBatches:
        """Return some of the samples, with the same budget."""
        return BudgetBatches(
            _Part(self._samples, numbers), self._collate, lengths=self.lengths[numbers], tokens=self.tokens,
            batch_size=self.batch_size,
        )  # fmt: skip

    def blocks(self, k: int, start: int) -> Iterator[tuple[int, int]]:
        """Yield blocks ``(first, last)`` of the grid for rows of ``k`` numbers, from the one that holds ``start``."""
        least = max(1, min(64, LARGEST_BLOCK // (4 * k)))
        size = int(max(least, min(_BLOCK_ROWS, BLOCK_BYTES // (4 * k))))
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
        """Halve the budget after a batch that did not fit the device, and return that batch cut anew.

        Raises
        ------
        InputError
            For a batch of one sample.
        """
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
