"""Repeated texts are found among many, with none of them in memory."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ooc_influence import scratch as repeats
from ooc_influence.errors import InputError
from ooc_influence.extract.data import RowMetadata
from ooc_influence.memory import PeakMemory


def find(texts):
    with repeats.Repeats() as found:
        for low in range(0, len(texts), 7):
            found.add(texts[low : low + 7])
        return found.find(lambda numbers: [texts[number] for number in numbers.tolist()])


@pytest.mark.parametrize("n", [0, 1, 2, 16, 17, 100, 1000])
def test_two_equal_texts_are_found_wherever_they_are(n, monkeypatch):
    monkeypatch.setattr(repeats, "_BLOCK", 16)
    monkeypatch.setattr(repeats, "_COMPARED", 3)
    texts = [f"name {number}" for number in range(n)]
    assert find(texts) is None
    generator = np.random.default_rng(n)
    for _ in range(20 if n > 1 else 0):
        first, second = sorted(generator.choice(n, 2, replace=False).tolist())
        assert find([*texts[:second], texts[first], *texts[second + 1 :]]) == (first, second)
    if n > 1:
        assert find(["same"] * n) == (0, 1)


def test_texts_of_one_digest_are_compared(monkeypatch):
    monkeypatch.setattr(repeats, "_BLOCK", 16)
    monkeypatch.setattr(repeats, "_COMPARED", 3)
    monkeypatch.setattr(repeats, "hash", lambda text: int(text) % 5 - 2, raising=False)
    texts = [str(number) for number in range(100)]
    assert find(texts) is None
    assert find([*texts, "57"]) == (57, 100)


@pytest.mark.parametrize(
    ("ids", "received"),
    [
        ([1, "1"], "1 and '1', which are the same as text"),
        (["a", "b", "a"], "'a' twice"),
        (np.array([3, 4, 3]), "3 twice"),
        (torch.tensor([3, 4, 3]), "3 twice"),
        ([3, np.int64(3)], "3 twice"),
    ],
)
def test_ids_that_repeat(ids, received):
    with pytest.raises(InputError, match=f"expected ids that do not repeat; received {received}: give every sample"):
        RowMetadata.of(ids, None).check_ids()
    RowMetadata.of(ids[1:], None).check_ids()


class Numbers:
    """Ids made when they are asked for."""

    def __init__(self, n):
        self.n = n

    def __len__(self):
        return self.n

    def __getitem__(self, key):
        return [f"document-{number:012}" for number in range(*key.indices(self.n))]


def test_memory_does_not_grow_with_ids():
    RowMetadata.of(Numbers(2**18), None).check_ids()  # buffers and caches
    used = []
    for n in (2**19, 2**21):
        with PeakMemory(interval=0.001) as watch:
            RowMetadata.of(Numbers(n), None).check_ids()
        used.append(watch.peak - watch.start)
    assert used[1] < used[0] + 8 * 2**20 < 122 * 2**21


def test_a_long_list_has_the_type_of_all_its_values():
    from ooc_influence.extract.data import _AT_ONCE

    for values, kind in (([1], "int64"), ([1.5], "float64"), ([True], "bool"), (["a"], "str")):
        source = [1] * _AT_ONCE + values
        assert RowMetadata.of(None, {"c": source}).dtypes({}) == {"columns/c": kind if kind != "bool" else "int64"}
    with pytest.raises(InputError, match="received NoneType"):
        RowMetadata.of(None, {"c": [1] * _AT_ONCE + [None]}).dtypes({})
