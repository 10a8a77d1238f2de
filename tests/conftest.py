from __future__ import annotations

import functools
import gc
import os
import signal

# before NumPy and PyTorch read it: matrices here are so small that threads which wait for each other double the time
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a model that there is not would be asked for again and again

import numpy as np
import pytest

from ooc_influence import GradientStore, Storage
from ooc_influence.memory import process_anonymous
from ooc_influence.store import LayerShape, Mask, ModuleMask


def whole_mask(k: int) -> Mask:
    """A mask that keeps all k entries of one layer."""
    entries = np.arange(k, dtype=np.int32)
    layer = LayerShape("fc", "linear", (1, k), False)
    return Mask((ModuleMask(layer, np.zeros_like(entries), entries, np.ones(k, np.float32)),))


@functools.lru_cache(maxsize=8)
def _basis(k: int) -> np.ndarray:
    """A random basis; made once for each k, since that takes longer than most tests that use it."""
    return np.linalg.qr(np.random.default_rng(99).normal(size=(k, k)))[0]


def random_rows(n: int, k: int, seed: int = 0) -> np.ndarray:
    """Rows with a decaying spectrum in a random basis, float32."""
    generator = np.random.default_rng(seed)
    return ((generator.normal(size=(n, k)) / np.sqrt(1 + np.arange(k))) @ _basis(k)).astype(np.float32)


def write_store(path, rows, *, dtype="float32", chunk_rows=64, group_chunks=3, **options) -> GradientStore:
    storage = Storage(chunk_rows=chunk_rows, group_chunks=group_chunks)
    with GradientStore.create(path, whole_mask(rows.shape[1]), dtype=dtype, storage=storage, **options) as store:
        store.append(rows, loss=np.arange(len(rows)))
    return GradientStore.open(path)


def roomy() -> int:
    """A budget that does not depend on what the tests before left in this process."""
    return process_anonymous() + 2**31


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """What is kept of documents is kept among the tests' own files."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OOC_INFLUENCE_CACHE", str(tmp_path_factory.mktemp("kept")))
        yield


def interrupt_third_append(monkeypatch):
    """Let the third append from now on be interrupted, and those after it be as ever."""
    append, calls = GradientStore.append, []

    def interrupted(self, *args, **values):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        append(self, *args, **values)

    monkeypatch.setattr(GradientStore, "append", interrupted)


def pytest_configure(config):
    hear_interrupts()
    gc.disable()  # importing all tests makes a million objects, none of them garbage


def pytest_collection_finish(session):
    gc.enable()


def hear_interrupts():
    """Let children be interrupted even where this process is to ignore Ctrl-C, as one in a script's background is.

    Children inherit that a signal is ignored, but not a handler: in them it becomes the default. This process ignores
    the signal as before.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, lambda number, frame: None)


@pytest.fixture
def interruptible():
    """SIGINT raises KeyboardInterrupt here, however the tests were started."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session", autouse=True)
def no_waiting_for_the_disk():
    """Nothing here can see what a sync does (test_replay.py records them instead); waiting for a disk takes minutes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def brief_measurements():
    """Plans measure this machine for some seconds, which nothing here can see."""
    from ooc_influence import planning

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "_SECONDS", 0.01)
        yield


@pytest.fixture
def pair(tmp_path):
    """A query store (7, 40) and a train store (500, 40), float32."""
    train = write_store(tmp_path / "train.zarr", random_rows(500, 40))
    query = write_store(tmp_path / "query.zarr", random_rows(7, 40, seed=1))
    return query, train


@pytest.fixture(scope="session")
def page(tmp_path_factory):
    """The browser that all tests of pages share; they are skipped, with the reason, where there is none."""
    from pages import Page, start_browser

    downloads = tmp_path_factory.mktemp("downloads")
    driver = start_browser(downloads)
    yield Page(driver, downloads)
    driver.quit()
