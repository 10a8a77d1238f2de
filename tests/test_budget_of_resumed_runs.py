"""Work that a run with one budget left behind is used by the next one with another."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from conftest import random_rows, roomy, write_store
from numpy.testing import assert_allclose
from test_fisher import count_rows
from test_top import force

from ooc_influence import checkpoint, fit_fisher, group_influence, self_influence, top_influential
from ooc_influence.curvature import costs, fit, primal
from ooc_influence.errors import MemoryBudgetError
from ooc_influence.influence import tiles
from ooc_influence.memory import MemoryBudget

N, K = 1024, 120


@pytest.fixture
def train(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "INTERVAL", 0.0)
    monkeypatch.setattr(checkpoint, "_SHARE", 0)
    monkeypatch.setattr("ooc_influence.linalg.accumulate.FOLD_ROWS", 64)
    return write_store(tmp_path / "train.zarr", random_rows(N, K))


def stop_after(monkeypatch, blocks):
    """Interrupt a fit after some blocks of rows."""
    from ooc_influence.linalg import rows

    plain, left = rows.read_blocks, [blocks]

    def read(*args, **options):
        for block in plain(*args, **options):
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
            yield block

    monkeypatch.setattr(rows, "read_blocks", read)


def block_rows(monkeypatch, rows):
    monkeypatch.setattr("ooc_influence.memory.BLOCK_BYTES", 4 * K * rows)


def test_sums_of_other_blocks_are_gone_on_from(train, monkeypatch):
    block_rows(monkeypatch, 64)
    with monkeypatch.context() as patch:
        stop_after(patch, 6)
        with pytest.raises(KeyboardInterrupt):
            fit_fisher(train)
    block_rows(monkeypatch, 128)
    read = count_rows(monkeypatch)
    found = fit_fisher(train)
    assert sum(read) == N - 6 * 64
    exact = train.rows().astype(np.float64)
    assert found.rows == N
    assert_allclose(found.fisher(), exact.T @ exact / N, rtol=0, atol=1e-6)


@pytest.mark.parametrize("then", ["sums", "whole", "tiles"])
def test_sums_of_another_way_are_gone_on_from(train, monkeypatch, then):
    """A run with less memory starts its tiles from sums that one with more kept, and reads only the other rows."""
    block_rows(monkeypatch, 64)
    with monkeypatch.context() as patch:
        force(patch, "sums")
        stop_after(patch, 6)
        with pytest.raises(KeyboardInterrupt):
            fit_fisher(train, rank=K)
    assert list(train.path.glob("curvature/.default.partial/rows-*"))
    force(monkeypatch, then)
    read = []
    plain = fit.plan_low_rank
    monkeypatch.setattr(fit, "plan_low_rank", lambda *a, **o: read.append(plain(*a, **o)) or read[-1])
    counted = count_rows(monkeypatch)
    found = fit_fisher(train, rank=K)
    assert read[0].name == then
    regions = 1 if then != "tiles" else 3
    assert sum(counted) == regions * (N - 6 * 64)
    exact = train.rows().astype(np.float64)
    assert found.rows == N
    assert_allclose(found.fisher(), exact.T @ exact / N, rtol=0, atol=1e-6)


@pytest.mark.parametrize("side", [64, 32])
def test_tiles_of_another_side_are_gone_on_from(train, monkeypatch, side):
    """Of 120 columns in tiles of 64: (0, 0), (1, 0), (1, 1); two are summed by the run that is stopped."""
    force(monkeypatch, "tiles")
    plain, calls, left = primal._sum_tile, [], [2]

    def stopping(*arguments):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        calls.append(1)
        return plain(*arguments)

    monkeypatch.setattr(primal, "_sum_tile", stopping)
    with pytest.raises(KeyboardInterrupt):
        fit_fisher(train, rank=K)
    square = not list(train.path.glob("curvature/.default.partial/done-64-120-0-64-0"))
    calls.clear()
    left[0] = 100
    monkeypatch.setattr(costs, "_LARGEST_TILE", side)
    fits = MemoryBudget.fits
    if side != 64:  # what is there does not fit this budget
        monkeypatch.setattr(
            MemoryBudget, "fits", lambda budget, model: model.per_row != 2 * 4 * 64 and fits(budget, model)
        )
    found = fit_fisher(train, rank=K)
    assert len(calls) == (1 if side == 64 else 4 if square else 3)  # a tile of 64 is 4 of 32, 3 on the diagonal
    exact = train.rows().astype(np.float64)
    assert found.rows == N
    assert_allclose(found.fisher(), exact.T @ exact / N, rtol=0, atol=1e-6)


def test_the_way_that_can_use_what_is_there_is_taken(train, monkeypatch):
    """The quickest one that fits would start again."""
    with monkeypatch.context() as patch:
        force(patch, "tiles")
        plain, left = primal._sum_tile, [1]

        def stopping(*arguments):
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
            return plain(*arguments)

        patch.setattr(primal, "_sum_tile", stopping)
        with pytest.raises(KeyboardInterrupt):
            fit_fisher(train, rank=5)
        patch.setattr(primal, "_sum_tile", plain)
        patch.setattr(costs, "low_rank_plans", all_ways)
        found = fit_fisher(train, rank=5)
    assert found.attrs["way"] == "tiles"
    assert fit_fisher(train, rank=5, refit=True).attrs["way"] != "tiles"


all_ways = costs.low_rank_plans


CALLS = {
    "top": lambda query, train, **more: top_influential(query, train, top=5, **more).proponents.rows,
    "self": lambda query, train, **more: self_influence(train, damping=[0.1, 1.0], **more),
    "group": lambda query, train, **more: group_influence(query, train, np.arange(train.n) % 3, **more).sums,
}


@pytest.mark.parametrize("name", CALLS)
def test_parts_of_other_blocks_and_workers_are_used(tmp_path, pair, monkeypatch, name):
    query, train = pair
    fit_fisher(train)
    call, row = partial(CALLS[name], query, train), train.layout.encoding.row_bytes
    expected = call()
    folder, plain, written = tmp_path / "parts", checkpoint.write_bytes, []

    def stopping(path, data):
        if len(written) == 4:
            raise KeyboardInterrupt
        written.append(path)
        plain(path, data)

    monkeypatch.setattr("ooc_influence.memory.BLOCK_BYTES", 64 * 4 * train.k)
    monkeypatch.setattr(tiles, "_PART_BYTES", 64 * row)
    monkeypatch.setattr(checkpoint, "write_bytes", stopping)
    with pytest.raises(KeyboardInterrupt):
        call(resume=folder)
    monkeypatch.setattr(checkpoint, "write_bytes", plain)
    kept = list(folder.glob("*.npz"))
    assert len(kept) == 3
    rows = [int(stop) - int(start) for *_, start, stop in (path.stem.split("-") for path in kept)]
    monkeypatch.setattr("ooc_influence.memory.BLOCK_BYTES", 128 * 4 * train.k)
    (folder / "notes.txt").write_text("of its user")
    computed, run = [], tiles.run_stripes
    monkeypatch.setattr(
        tiles,
        "run_stripes",
        lambda function, stripes, *a, **o: computed.extend(stripes) or run(function, stripes, *a, **o),
    )
    assert_allclose(call(resume=folder, workers=2), expected, rtol=1e-4)
    assert sum(stripe.stop - stripe.start for stripe in computed) == train.n - sum(rows)
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]


def test_parts_keep_their_queries(tmp_path, pair, monkeypatch):
    """A larger budget takes more queries at a time, but for what is there; one that does not hold them is refused."""
    query, train = pair
    fit_fisher(train)
    monkeypatch.setattr("ooc_influence.influence.costs.QUERY_ROWS", 4)
    monkeypatch.setattr("ooc_influence.memory.BLOCK_BYTES", 64 * 4 * train.k)
    monkeypatch.setattr(tiles, "_PART_BYTES", 64 * train.layout.encoding.row_bytes)
    plain, written, folder = checkpoint.write_bytes, [], tmp_path / "parts"

    def stopping(path, data):
        if len(written) == 4:
            raise KeyboardInterrupt
        written.append(path)
        plain(path, data)

    monkeypatch.setattr(checkpoint, "write_bytes", stopping)
    with pytest.raises(KeyboardInterrupt):
        top_influential(query, train, top=5, resume=folder)
    monkeypatch.setattr(checkpoint, "write_bytes", plain)
    kept = list(folder.glob("0-4-*.npz"))
    assert len(kept) == 3
    monkeypatch.setattr("ooc_influence.influence.costs.QUERY_ROWS", 2048)
    with pytest.raises(MemoryBudgetError):
        top_influential(query, train, top=5, resume=folder, memory="1MiB")
    assert list(folder.glob("0-4-*.npz")) == kept
    read, plain_read = [], tiles.ScoreParts.get
    monkeypatch.setattr(tiles.ScoreParts, "get", lambda own, name: read.append(name) or plain_read(own, name))
    found = top_influential(query, train, top=5, resume=folder, memory=roomy())
    assert sorted(read) == sorted(path.stem for path in kept)
    assert_allclose(found.proponents.scores, top_influential(query, train, top=5).proponents.scores, rtol=1e-6)
