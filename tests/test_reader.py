"""Reading some rows, some columns, several threads: the same numbers as reading all."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from conftest import random_rows, whole_mask
from numpy.testing import assert_array_equal

from ooc_influence import GradientStore, Storage
from ooc_influence.store import read_blocks


@pytest.fixture(
    scope="module",
    params=[
        "float32",
        "float16",
        "bfloat16",
        "int8",
        "int8-linear",
        "int4",
        "sign",
        "float16 zstd",
        "float16 scaled",
        "int8-linear scaled",
        "sign scaled",
    ],
)
def store(tmp_path_factory, request):
    folder = tmp_path_factory.mktemp("reader")
    dtype, _, extra = request.param.partition(" ")
    storage = Storage(chunk_rows=16, group_chunks=2, codec="zstd" if extra == "zstd" else None)
    scale = 1 + np.arange(23) / 7 if extra == "scaled" else None
    options = {"dtype": dtype, "storage": storage, "column_scale": scale}
    with GradientStore.create(folder / "s.zarr", whole_mask(23), **options) as store:
        store.append(random_rows(100, 23), loss=np.arange(100))
        store.flush()
        store.drop([3, 40, 41])
    return GradientStore.open(folder / "s.zarr")


def test_some_rows_and_columns(store):
    ranges = [None, [(0, 23)], [(4, 11)], [(0, 5), (20, 23)]]
    numbers = [None, [0, 3, 15, 16, 17, 40, 77, 99], [50], list(range(5, 64))]
    for chosen, columns, threads in itertools.product(numbers, ranges, [1, 3]):
        rows = np.arange(100) if chosen is None else np.array(chosen)
        wanted = store.rows()[rows]
        if columns is not None:
            wanted = np.concatenate([wanted[:, first:last] for first, last in columns], axis=1)
        options = {"numbers": None if chosen is None else rows, "columns": columns, "loss": True, "threads": threads}
        start = 0
        for block in read_blocks(store, 0, len(rows), 7, **options):
            assert (block.start, block.stop) == (start, min(len(rows), start + 7))
            here = slice(block.start, block.stop)
            assert_array_equal(block.gradients, wanted[here])
            assert_array_equal(block.loss, rows[here])
            dropped = np.zeros(len(rows[here]), bool) if block.dropped is None else block.dropped
            assert_array_equal(dropped, np.isin(rows[here], [3, 40, 41]))
            start = block.stop
        assert start == len(rows)


def test_places_start_where_they_are_told(store):
    (block,) = read_blocks(store, 10, 13, 8, numbers=np.array([2, 30, 31]))
    assert (block.start, block.stop) == (10, 13)
    assert_array_equal(block.gradients, store.rows()[[2, 30, 31]])


def test_nothing_is_asked_for(store):
    assert list(read_blocks(store, 0, 0, 8, numbers=np.array([], np.int64))) == []
    assert list(read_blocks(store, 5, 5, 8)) == []
