"""The gradient store against the machine: reading, writing, verifying, opening, memory.

Each figure is a ratio within one run, ours and the limit interleaved, the median of several: above 1 we are faster. The
limits: memory maps of the same files with the same work done on them, one sequential read of the same files, plain
files of the same size written and synced, crc32c and a finite scan over the same bytes with the same threads. A cold
measurement drops the page cache first and is void (null) where mincore says that pages stayed.

Run: python tools/bench/store.py [--mib 1024] [--chunks 100000] [--repeats 5]. The last line is JSON.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import mmap
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

os.environ.pop("OPENBLAS_CORETYPE", None)

import crc32c
import numpy as np
import torch  # noqa: F401 - there in every extraction; rounds to float16 faster than NumPy
import zarr

import ooc_influence as ooc
from ooc_influence.parallel import cores
from ooc_influence.store import LayerShape, Mask, ModuleMask, read_blocks, writer

K = 4096
Timed = Callable[[], float]


def whole_mask(k: int) -> Mask:
    entries = np.arange(k, dtype=np.int32)
    layer = LayerShape("bench", "linear", (1, k), False)
    return Mask((ModuleMask(layer, np.zeros_like(entries), entries, np.ones(k, np.float32)),))


def make_rows(rows: int) -> np.ndarray:
    generator = np.random.Generator(np.random.PCG64(0))
    return generator.standard_normal((rows, K), np.float32)


def write(path: Path, mib: int, rows: np.ndarray, dtype: str = "float16") -> int:
    """Append until the store has about ``mib`` MiB; return its rows."""
    total = mib * 2**20 // (K * (2 if dtype == "float16" else 4))
    with ooc.GradientStore.create(path, whole_mask(K), dtype=dtype) as store:
        for start in range(0, total, len(rows)):
            part = rows[: total - start]
            store.append(part, loss=np.zeros(len(part)))
    return total


def chunk_files(path: Path) -> list[Path]:
    return sorted((path / "gradients").glob("c.*"), key=lambda file: int(file.name.split(".")[1]))


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def compare(ours: Timed, limit: Timed, repeats: int) -> float | None:
    """Return the median of limit / ours, interleaved; None where a measurement was void."""
    ratios = []
    for turn in range(repeats):
        pair = [limit(), ours()] if turn % 2 else [ours(), limit()][::-1]
        ratios.append(pair[0] / pair[1])
    return None if any(np.isnan(ratio) for ratio in ratios) else round(median(ratios), 3)


def map_file(file: Path) -> np.ndarray:
    with file.open("rb") as handle:
        return np.frombuffer(mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)


def touch(data: np.ndarray) -> None:
    """Use every byte, at memory speed."""
    np.bitwise_or.reduce(data.reshape(-1).view(np.uint64))


def drop_cache(path: Path) -> bool:
    """Drop a store's files from the page cache; return whether at most one in ten thousand of its pages stayed."""
    os.sync()
    libc = ctypes.CDLL(None, use_errno=True)
    stayed = whole = 0
    for file in [file for file in path.rglob("*") if file.is_file()]:
        handle = os.open(file, os.O_RDONLY)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        size = os.fstat(handle).st_size
        if size and file.parent.name == "gradients" and file.name != "zarr.json":
            mapped = mmap.mmap(handle, 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
            pages = (ctypes.c_ubyte * (-(-size // mmap.PAGESIZE)))()
            address = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
            libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(size), pages)
            stayed += int((np.frombuffer(pages, np.uint8) & 1).sum())
            whole += len(pages)
        os.close(handle)
    if stayed > whole / 10_000:
        print(f"void: {stayed} of {whole} pages stayed in the page cache")
        return False
    return True


def cold(path: Path, work: Callable[[ooc.GradientStore], None]) -> Timed:
    """Return a measurement on a store newly opened, none of its pages in memory."""

    def measure() -> float:
        clear = drop_cache(path)
        store = ooc.GradientStore.open(path)
        return timed(lambda: work(store)) if clear else float("nan")

    return measure


def read_converted(store: ooc.GradientStore) -> None:
    for block in read_blocks(store, 0, store.n, 4096):
        assert block.stop


def map_converted(store: ooc.GradientStore) -> None:
    """Do the same with plain maps and a tiled conversion into one buffer, with the scales: the limit."""
    scales, rows = store.small("row_scale"), store.layout.chunk_rows
    out = np.empty((4096, store.k), np.float32)
    tile = 2**19 // (4 * store.k)
    for number, file in enumerate(chunk_files(store.path)):
        data = map_file(file).view(np.float16).reshape(rows, store.k)
        count = min(rows, store.n - number * rows)
        base = number * rows % 4096
        for start in range(0, count, tile):
            stop = min(count, start + tile)
            part = out[base + start : base + stop]
            np.copyto(part, data[start:stop])
            np.multiply(part, scales[number * rows + start : number * rows + stop, None], out=part)


def read_raw(store: ooc.GradientStore) -> None:
    for _, raw in store.raw_chunks():
        touch(raw)


def map_raw(store: ooc.GradientStore) -> None:
    for file in chunk_files(store.path):
        touch(map_file(file))


def plain_zarr(store: ooc.GradientStore) -> None:
    array = zarr.open_group(str(store.path), mode="r")["gradients"]
    for start in range(0, array.shape[0], array.chunks[0]):
        touch(np.asarray(array[start : start + array.chunks[0]]))


def read_files(store: ooc.GradientStore) -> None:
    buffer = bytearray(16 * 2**20)
    for file in chunk_files(store.path):
        with file.open("rb", buffering=0) as handle:
            while count := handle.readinto(buffer):
                touch(np.frombuffer(buffer, np.uint8)[:count])


def scan_files(store: ooc.GradientStore) -> None:
    def scan(file: Path) -> None:
        data = map_file(file)
        crc32c.crc32c(data)
        assert np.isfinite(data.view(np.float16)).all()

    with ThreadPoolExecutor(cores()) as pool:
        list(pool.map(scan, chunk_files(store.path)))


def verify(store: ooc.GradientStore) -> None:
    assert store.verify() == []


def write_files(folder: Path, mib: int, rows: np.ndarray) -> float:
    data = rows.view(np.uint8).reshape(-1)[: 16 * 2**20]
    start = time.perf_counter()
    for number in range(mib // 16):
        with (folder / f"plain.{number}").open("wb", buffering=0) as file:
            file.write(data)
            os.fsync(file.fileno())
    seconds = time.perf_counter() - start
    for number in range(mib // 16):
        (folder / f"plain.{number}").unlink()
    return seconds


def write_store(folder: Path, mib: int, rows: np.ndarray, dtype: str) -> float:
    seconds = timed(lambda: write(folder / "written", mib, rows, dtype))
    subprocess.run(["rm", "-rf", str(folder / "written")], check=True)
    return seconds


def many_chunks(folder: Path, chunks: int) -> tuple[float, float]:
    """Return the seconds to open a store of many chunks, and of ``info`` on it, in fresh processes."""
    path = folder / "many"
    fsync, os.fsync = os.fsync, lambda handle: None  # it is made for opening only: quickly
    buffers, writer.BUFFERS = writer.BUFFERS, 64
    try:
        layer = ooc.Storage(chunk_rows=1, group_chunks=64)
        with ooc.GradientStore.create(path, whole_mask(2), dtype="float32", storage=layer) as store:
            for start in range(0, chunks, 4096):
                count = min(4096, chunks - start)
                store.append(np.ones((count, 2), np.float32), loss=np.zeros(count))
    finally:
        os.fsync, writer.BUFFERS = fsync, buffers
    script = (
        "import sys, time, ooc_influence as ooc; from ooc_influence.report import store_facts\n"
        "ooc.GradientStore.open(sys.argv[1]); start = time.perf_counter()\n"
        "store = ooc.GradientStore.open(sys.argv[2])\n"
        "opened = time.perf_counter(); store_facts(store); print(opened - start, time.perf_counter() - start)"
    )
    small = folder / "one"
    ooc.GradientStore.create(small, whole_mask(2)).close()
    found = []
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", script, str(small), str(path)], check=True, capture_output=True)
        found.append([float(value) for value in done.stdout.split()])
    return round(median(pair[0] for pair in found), 2), round(median(pair[1] for pair in found), 2)


def peak_chunks(path: Path) -> float:
    """Return the anonymous memory that reading a store takes above the start, in chunks of 16 MiB."""
    script = (
        "import sys, ooc_influence as ooc; from ooc_influence.memory import PeakMemory\n"
        "store = ooc.GradientStore.open(sys.argv[1]); next(store.raw_chunks())\n"
        "with PeakMemory(interval=0.001) as watch:\n"
        "    for start, raw in store.raw_chunks(): raw.sum(dtype='float32')\n"
        "print((watch.peak - watch.start) / 2**24)"
    )
    done = subprocess.run([sys.executable, "-c", script, str(path)], check=True, capture_output=True)
    return round(float(done.stdout), 2)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--mib", type=int, default=1024)
    parser.add_argument("--chunks", type=int, default=100_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", help="where to write; default a temporary folder")
    options = parser.parse_args()
    rows = make_rows(2048)
    result: dict[str, object] = {"bench": "store", "mib": options.mib, "repeats": options.repeats}
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        path, large = folder / "store", folder / "large"
        write(path, options.mib, rows)
        store = ooc.GradientStore.open(path)
        read_converted(store)

        def figure(label: str, target: str, ours: Timed, limit: Timed) -> None:
            value = compare(ours, limit, options.repeats)
            result[label] = value
            print(f"{label:32} {target:>9} {value}", flush=True)

        for label, target, ours, limit in (
            ("warm_float32_over_map", ">= 0.95", read_converted, map_converted),
            ("warm_raw_over_map", ">= 0.90", read_raw, map_raw),
            ("plain_zarr_over_map", "", plain_zarr, map_raw),
            ("verify_warm_over_scan", ">= 0.80", verify, scan_files),
        ):
            limit(store)
            figure(label, target, lambda f=ours: timed(lambda: f(store)), lambda f=limit: timed(lambda: f(store)))
        for label, ours in (("cold_raw_over_read", read_raw), ("verify_cold_over_read", verify)):
            figure(label, ">= 0.90", cold(path, ours), cold(path, read_files))
        size = options.mib
        for dtype in ("float16", "float32"):
            figure(
                f"append_{dtype}_over_files", ">= 0.80" if dtype == "float16" else "",
                lambda dtype=dtype: write_store(folder, size, rows, dtype), lambda: write_files(folder, size, rows),
            )  # fmt: skip
        write(large, 4 * options.mib, rows)
        result["peak_chunks_n"], result["peak_chunks_4n"] = peak_chunks(path), peak_chunks(large)
        result["open_seconds"], result["info_seconds"] = many_chunks(folder, options.chunks)
        for label in ("peak_chunks_n", "peak_chunks_4n", "open_seconds", "info_seconds"):
            print(f"{label:32} {'<= 4' if 'peak' in label else '< 2':>9} {result[label]}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
