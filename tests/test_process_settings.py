"""What we set for the whole process is as it was when threads that overlap are done, and as each wants it meanwhile."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import numpy as np
import pytest
import torch
from conftest import random_rows
from models import Mlp, make
from threadpoolctl import threadpool_info

from ooc_influence import parallel
from ooc_influence.extract.selection import select_layers
from ooc_influence.extract.taps import tapped
from ooc_influence.linalg.backend import TorchEngine
from ooc_influence.progress import Progress


def threads_of_blas():
    return {part["filepath"]: part["num_threads"] for part in threadpool_info() if part["user_api"] == "blas"}


@pytest.mark.parametrize("own", ["high", "highest"])
def test_products_in_threads_leave_the_callers_precision(monkeypatch, own):
    """And none is rounded as another one may be."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(own)
    plain, wrong, here = torch.addmm, [], threading.local()

    def addmm(*args, **options):
        time.sleep(0.0005)
        if torch.get_float32_matmul_precision() != here.wanted:
            wrong.append(here.wanted)
        return plain(*args, **options)

    monkeypatch.setattr(torch, "addmm", addmm)
    rows = random_rows(16, 8)

    def multiply(number):
        here.wanted = ("medium", "highest")[number % 2]
        engine, total = TorchEngine(here.wanted), np.zeros((8, 8), np.float32)
        for _ in range(20):
            engine.add_product(total, rows, rows)

    try:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(multiply, range(8)))
        assert torch.get_float32_matmul_precision() == own
        assert wrong == []
    finally:
        torch.set_float32_matmul_precision(before)


def test_overlapping_runs_leave_the_threads_of_the_blas(monkeypatch):
    before = threads_of_blas()
    assert before
    monkeypatch.setattr(parallel, "cores", lambda: 2)
    gate, threads = threading.Barrier(2, timeout=30), {}

    def task(stripe, key, name):
        gate.wait()  # both have begun
        threads[name] = parallel.task_threads()
        if name == "second":
            gate.wait()
            time.sleep(0.2)  # the first is over
            threads["later"] = parallel.task_threads()
        else:
            gate.wait()

    def run(name):
        with Progress(name, None, False) as bar:
            parallel.run_stripes(task, [parallel.Stripe(0, 1)], bar, name, slots=1, own_threads=name == "first")

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(run, ["first", "second"]))
    assert threads == {"first": 2, "second": 1, "later": 1}
    assert threads_of_blas() == before
    assert parallel.task_threads() == 1


@pytest.mark.skipif(parallel.cores() < 2, reason="a BLAS has one thread here")
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="needs two cores")
def test_a_blas_that_is_loaded_later_has_the_limit_too():
    """And its own threads again at the end: SciPy is loaded by the first task that needs it."""
    script = """
import sys, threadpoolctl, numpy
from ooc_influence.process import limit_blas, scipy_linalg

def threads():
    return {part["filepath"]: part["num_threads"] for part in threadpoolctl.threadpool_info()}

before = threads()
with limit_blas(1):
    assert "scipy" not in sys.modules
    linalg = scipy_linalg()
    assert set(threads().values()) == {1}, threads()
    with limit_blas(2):
        assert set(threads().values()) == {2}, threads()
    assert set(threads().values()) == {1}, threads()
after = threads()
assert set(after.values()) == set(before.values()) != {1}, (before, after)
assert linalg is sys.modules["scipy.linalg"] is scipy_linalg()
"""
    several = os.environ | {"OMP_NUM_THREADS": "2", "OPENBLAS_NUM_THREADS": "2"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=several)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("slots", [1, 2])
def test_tasks_know_their_threads(monkeypatch, slots):
    monkeypatch.setattr(parallel, "cores", lambda: 4)
    with Progress("x", None, False) as bar:
        found = parallel.run_stripes(
            lambda stripe, key: parallel.task_threads(), [parallel.Stripe(n, n + 1) for n in range(4)], bar,
            slots=slots, own_threads=True,
        )  # fmt: skip
    assert found == [4 // slots] * 4


def test_overlapping_taps_leave_the_fused_path():
    """The first to end must not turn it on again under the other, nor the other leave it off."""
    before = torch.backends.mha.get_fastpath_enabled()
    assert before
    with ExitStack() as other:
        one = ExitStack()
        for stack in (one, other):
            model = make(Mlp)
            stack.enter_context(tapped(model, select_layers(model, None).layers, torch.device("cpu")))
        assert not torch.backends.mha.get_fastpath_enabled()
        one.close()
        assert not torch.backends.mha.get_fastpath_enabled()
    assert torch.backends.mha.get_fastpath_enabled() == before


def test_libraries_that_come_later_are_limited_too():
    """They are looked for again when more are loaded, and only then."""
    code = """
import threadpoolctl
from ooc_influence import process

class Counted(threadpoolctl.ThreadpoolController):
    made = 0

    def __init__(self):
        super().__init__()
        Counted.made += 1

def limited():
    with process.limit_blas(1):
        return [part["num_threads"] for part in plain().info() if part["user_api"] == "blas"]

plain, threadpoolctl.ThreadpoolController = threadpoolctl.ThreadpoolController, Counted
before = limited()
import numpy
after = {threads for _ in range(3) for threads in limited()}
print(before, after, Counted.made if process._loads() else 2)
"""
    environment = os.environ | {"OMP_NUM_THREADS": "2", "OPENBLAS_NUM_THREADS": "2"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout == "[] {1} 2\n"
