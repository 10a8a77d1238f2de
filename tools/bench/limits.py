"""Upper limits of the machine on a store: seconds for all of its rows, to compare the engine with.

Products are of random blocks as large as the engine's, by the best BLAS at hand.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from store import chunk_files, drop_cache, map_converted, map_file, timed, touch
from threadpoolctl import threadpool_limits

import ooc_influence as ooc
from ooc_influence.linalg.backend import choose_engine
from ooc_influence.parallel import cores

_BLOCK_ROWS = 4096


class Limits:
    """The limits of a train store (n, k) and a number of queries; ``folder`` is where files may be written."""

    def __init__(self, train: Path, folder: Path, queries: int) -> None:
        self.train, self.folder = train, folder
        self.n, self.k = ooc.GradientStore.open(train).shape
        generator = np.random.default_rng(0)
        self.block = generator.standard_normal((min(_BLOCK_ROWS, self.n), self.k), np.float32)
        self.left = generator.standard_normal((queries, self.k), np.float32)

    def ssyrk(self) -> float:
        engine, total = choose_engine(self.k), np.zeros((self.k, self.k), np.float32)
        engine.add_square(total, self.block)
        return min(timed(lambda: engine.add_square(total, self.block)) for _ in range(3)) * self.n / len(self.block)

    def sgemm(self, rows: int | None = None) -> float:
        """Seconds of products with ``rows`` rows, by the quicker of the BLAS's threads and threads of our own.

        Of as many rows as there are queries where none are said.
        """
        left = self.left if rows is None else np.eye(rows, self.k, dtype=np.float32)
        out = np.empty((len(left), len(self.block)), np.float32)
        parts = [slice(start, start + -(-len(out) // cores())) for start in range(0, len(out), -(-len(out) // cores()))]

        def part(rows: slice) -> None:
            np.matmul(left[rows], self.block.T, out=out[rows])

        def best(call: Callable[[], object]) -> float:
            call()
            return min(timed(call) for _ in range(3))

        seconds = best(lambda: np.matmul(left, self.block.T, out=out))
        with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(cores()) as pool:
            seconds = min(seconds, best(lambda: list(pool.map(part, parts))))
        return seconds * self.n / len(self.block)

    def sgemm_written(self) -> float:
        """Seconds of the same products, plainly written to files by a thread beside, 32 MiB at a time, and synced."""
        size = max(1, 2**25 // (4 * len(self.left)))
        outs = [np.empty((len(self.left), size), np.float32) for _ in range(2)]
        folder = self.folder / "plain-writes"
        folder.mkdir()

        def part(rows: slice, block: Any, out: Any) -> None:
            np.matmul(self.left[rows], block.T, out=out[rows])

        def write(number: int, out: Any) -> None:
            with (folder / str(number)).open("wb", buffering=0) as file:
                file.write(out)
                os.fsync(file.fileno())

        step = -(-len(self.left) // cores())
        parts = [slice(start, start + step) for start in range(0, len(self.left), step)]
        with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(cores()) as pool, ThreadPoolExecutor(1) as disk:

            def all_of_it() -> None:
                written = None
                for number, start in enumerate(range(0, self.n, size)):
                    at = start % max(1, len(self.block) - size + 1)
                    block, out = self.block[at : at + size], outs[number % 2]
                    list(pool.map(lambda rows: part(rows, block, out[:, : len(block)]), parts))  # noqa: B023
                    if written is not None:
                        written.result()
                    written = disk.submit(write, number, out)
                written.result()

            seconds = timed(all_of_it)
        subprocess.run(["rm", "-rf", str(folder)], check=True)
        return seconds

    def plain_read(self, path: Path) -> float:
        if not drop_cache(path):
            return float("nan")
        store, buffer = ooc.GradientStore.open(path), bytearray(16 * 2**20)

        def read() -> None:
            for file in chunk_files(store.path):
                with file.open("rb", buffering=0) as handle:
                    while handle.readinto(buffer):
                        pass

        return timed(read)

    def touched(self, path: Path) -> float:
        """Seconds to read every byte of the mapped chunks of a store, which are in memory, with all cores."""
        store = ooc.GradientStore.open(path)
        whole = [map_file(file) for file in chunk_files(store.path)]
        chunks = [data[: len(data) // 8 * 8] for data in whole]

        def all_of_them() -> None:
            list(pool.map(touch, chunks))

        with ThreadPoolExecutor(cores()) as pool:
            all_of_them()
            return timed(all_of_them)

    def converted(self) -> float:
        """Seconds of a plain map of the train store, converted as reading does it."""
        store = ooc.GradientStore.open(self.train)
        return timed(lambda: map_converted(store))
