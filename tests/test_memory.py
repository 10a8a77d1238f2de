from __future__ import annotations

import json
import mmap
import os
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from ooc_influence.errors import InputError, MemoryBudgetError
from ooc_influence.memory import (
    WORKING,
    MemoryBudget,
    MemoryModel,
    PeakMemory,
    block_limit,
    format_bytes,
    parse_bytes,
    process_anonymous,
)

# distinct primes: a term that is missing or counted twice shows
MODEL = MemoryModel(
    "stage for k=5", fixed=1_000_003, per_worker=100_003, per_row=10_007, workers=2, max_rows=1024, advice="reduce k"
)
ALONE = replace(MODEL, workers=1)


def test_sizes():
    for text, expected in [
        ("4GiB", 2**32),
        ("1.5 kb", 1500),
        ("7", 7),
        (7, 7),
        ("2 MiB", 2**21),
        ("1t", 10**12),
        ("3Gi", 3 * 2**30),
    ]:
        assert parse_bytes(text) == expected


def test_bad_sizes():
    for text in ["", "four", "-1GiB", "0", "4 XB", "iB"]:
        with pytest.raises(InputError, match="memory size"):
            parse_bytes(text)


def test_format():
    assert [format_bytes(number) for number in (5, 2048, 9.4 * 2**30)] == ["5 B", "2 KiB", "9.4 GiB"]


def test_projection_counts_every_term():
    assert replace(MODEL, workers=3).peak(16, 11) == 11 + WORKING + 1_000_003 + 3 * (100_003 + 16 * 10_007)


def test_blocks_shrink_to_the_budget_and_no_further():
    budget = MODEL.peak(256)
    assert MemoryBudget(budget, 0).plan(MODEL) == 256
    assert MemoryBudget(budget - 1, 0).plan(MODEL) == 128
    assert MemoryBudget(10**12, 0).plan(MODEL) == 1024
    assert MemoryBudget(0, 0).block_rows(MODEL) == 16


def test_refusal_names_both_numbers_and_the_alternatives():
    budget = MemoryBudget(ALONE.peak(16), 0)
    with pytest.raises(MemoryBudgetError, match=r"needs .* with 2 workers, budget .*--workers 1.*--memory .*reduce k"):
        budget.plan(MODEL)
    assert budget.plan(ALONE) == 16


def test_default_budget_is_a_share_of_what_is_free():
    assert process_anonymous() < MemoryBudget.of(None).limit
    assert MemoryBudget.of("1GiB").limit == 2**30


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="of glibc")
def test_memory_that_was_freed_is_not_held():
    """The extraction commands keep it for the next batch; a budget sees what it may take, a loop keeps its pages."""
    script = """if True:
        import json
        from ooc_influence.cli.options import keep_freed_memory
        from ooc_influence.memory import MemoryBudget, MemoryModel, available, process_anonymous
        assert keep_freed_memory()
        start, found = process_anonymous(), {}
        def take():
            blocks = [b"x" * 2**24 for _ in range(16)]
        take()
        found["kept"] = process_anonymous() - start
        available(1)
        found["still kept"] = process_anonymous() - start
        found["held"] = MemoryBudget.of("4GiB").reserved - start
        take()
        MemoryBudget.of(start + 2**28).plan(MemoryModel("a stage", 2**27, 0, 0))  # fits, with WORKING
        take()
        available(2**60)
        found["short"] = process_anonymous() - start
        print(json.dumps(found))
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert min(found["kept"], found["still kept"]) > 200 * 2**20
    assert max(found["held"], found["short"]) < 20 * 2**20


def test_block_limit():
    assert block_limit(4096) == 4096
    assert block_limit(1) == 8192
    assert block_limit(10**7) == 64
    assert block_limit(10**7, least=1024) == 1024
    assert block_limit(1, least=1024) == 8192


def test_peak_memory_sees_an_allocation():
    with PeakMemory(interval=0.001) as watch:
        block = mmap.mmap(-1, 64 * 2**20, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # not what the allocator still holds
        block.write(b"x" * len(block))
        end = time.monotonic() + 60
        while watch.peak - watch.start < 50 * 2**20 and time.monotonic() < end:
            time.sleep(0.01)
        block.close()
    assert watch.peak - watch.start > 50 * 2**20
