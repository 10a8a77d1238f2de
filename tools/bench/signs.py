"""Rows of signs: appending them against writing plain files, scoring them against int8 rows, and their error.

Ratios are of the same work within one run, interleaved, medians of several rounds; above 1 is faster than the limit or
the rival. Appending: rows to a store of signs, packed as extraction hands them over, or numbers that are rotated and
packed on the way, against as many bytes written to one plain file and synced. Scoring: 32 queries against rows that are
in the page cache, signs of k entries against int8 rows of k and of k/8 entries, which take as many bytes. Errors of
<q, x̂>, for random queries q, over |q||x|/√k, root mean squares: of rows of normal numbers, of Student's t with two
degrees of freedom, and with one entry alone, as they are and rotated. Lists: the passes of the top 100 of 1 and 16
queries over random rows, cold against one sequential read of the same files, nothing of which is in the page cache
(before and after; posix_fadvise, void where pages stayed), and warm against touching every byte with all cores.

Run: python tools/bench/signs.py [--rows 1000] [--mib 128] [--list-mib 1024] [--repeats 5] [--k 65536 262144]
[--only rates,lists,errors]. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import time
from pathlib import Path
from statistics import median

os.environ.pop("OPENBLAS_CORETYPE", None)

import numpy as np
from engine import ours, share
from limits import Limits
from store import drop_cache

import ooc_influence as ooc
from ooc_influence.store import Encoding, LayerShape, Mask


def mask(k: int) -> Mask:
    return ooc.Dropout(k=k).draw([LayerShape("fc", "linear", (1, k), False)])


def append(path: Path, k: int, dtype: str, rows: np.ndarray, count: int) -> float:
    """Write ``count`` rows, some of them again and again; return the seconds until all is synced.

    Rows are (b, k) float32, or (b, columns) uint8 in their stored form.
    """
    held, ones = mask(k), np.ones(len(rows), np.float32)
    start = time.perf_counter()
    with ooc.GradientStore.create(path, held, dtype=dtype) as store:
        for first in range(0, count, len(rows)):
            part = rows[: min(len(rows), count - first)]
            small = {"loss": ones[: len(part)], "grad_norm": ones[: len(part)]}
            if rows.dtype == np.uint8:
                store.append_encoded(part, ones[: len(part)], **small)
            else:
                store.append(part, **small)
    return time.perf_counter() - start


def plain(path: Path, size: int) -> float:
    """Write and sync ``size`` bytes; return the seconds."""
    data = np.random.default_rng(0).bytes(2**20)
    start = time.perf_counter()
    with path.open("wb") as file:
        for first in range(0, size, len(data)):
            file.write(data[: min(len(data), size - first)])
        file.flush()
        os.fsync(file.fileno())
    return time.perf_counter() - start


def score(train: Path, queries: Path) -> float:
    start = time.perf_counter()
    ooc.influence_scores(str(queries), str(train), curvature=False).compute()
    return time.perf_counter() - start


def rates(folder: Path, k: int, count: int, mib: int, repeats: int) -> dict[str, float]:
    rows = np.random.default_rng(1).standard_normal((64, k), np.float32)
    row_bytes = Encoding.of("sign", k).row_bytes
    packed = np.random.default_rng(3).integers(0, 256, (4 * 2**20 // row_bytes, row_bytes), np.uint8)
    written = max(1, mib * 2**20 // row_bytes)
    appending: dict[str, list[float]] = {"packed": [], "numbers": []}
    scoring = []
    for name, dtype, width in (("signs", "sign", k), ("int8", "int8", k), ("narrow", "int8", k // 8)):
        append(folder / name, width, dtype, rows[:, :width], count)
        append(folder / f"{name}-q", width, "float32", rows[:32, :width], 32)
    for _ in range(repeats):
        limit = plain(folder / "plain", written * row_bytes)
        for kind, values in (("packed", packed), ("numbers", rows)):
            appending[kind].append(limit / append(folder / "again", k, "sign", values, written))
            shutil.rmtree(folder / "again")
        times = {name: score(folder / name, folder / f"{name}-q") for name in ("signs", "int8", "narrow")}
        scoring.append((times["int8"] / times["signs"], times["narrow"] / times["signs"]))
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    same_entries, same_bytes = (median(values) for values in zip(*scoring, strict=True))
    return {
        **{f"append_{kind}_over_plain_file": median(ratios) for kind, ratios in appending.items()},
        "score_over_int8_of_same_entries": same_entries,
        "score_over_int8_of_same_bytes": same_bytes,
        "row_bytes": row_bytes,
    }


def lists(folder: Path, k: int, mib: int, repeats: int) -> dict[str, float | None]:
    generator, row_bytes = np.random.default_rng(4), Encoding.of("sign", k).row_bytes
    count, train = mib * 2**20 // row_bytes, folder / "train"
    with ooc.GradientStore.create(train, mask(k), dtype="sign") as store:
        step = max(1, 2**26 // row_bytes)
        for first in range(0, count, step):
            packed = generator.integers(0, 256, (min(step, count - first), row_bytes), np.uint8)
            ones = np.ones(len(packed), np.float32)
            store.append_encoded(packed, ones, loss=ones, grad_norm=ones)
    found: dict[str, float | None] = {}
    for q in (1, 16):
        query = folder / f"query{q}"
        append(query, k, "float32", generator.standard_normal((q, k), np.float32), q)
        limits = Limits(train, folder, q)

        def find(query: Path = query, cold: bool = False) -> float:
            if cold and not drop_cache(train):
                return float("nan")
            return ours(lambda: ooc.top_influential(query, train, top=100, curvature=False, normalize="none"))

        read, touch = (lambda limits=limits: limits.plain_read(train)), (lambda limits=limits: limits.touched(train))
        found[f"lists_{q}_cold_over_read"] = share(read, lambda find=find: find(cold=True), repeats)
        find()
        found[f"lists_{q}_warm_over_touch"] = share(touch, find, repeats)
    for path in folder.iterdir():
        shutil.rmtree(path)
    return found


def errors(form: Encoding) -> dict[str, float]:
    k = form.k
    generator = np.random.default_rng(2)
    alone = np.zeros((200, k), np.float32)
    alone[np.arange(200), generator.integers(0, k, 200)] = 1
    kinds = {
        "normal": generator.standard_normal((200, k), np.float32),
        "t2": generator.standard_t(2, (200, k)).astype(np.float32),
        "one_entry": alone,
    }
    queries, found = generator.standard_normal((50, k), np.float32), {}
    for name, rows in kinds.items():
        raw, scale, read = np.empty((200, form.columns), np.uint8), np.empty(200, np.float32), np.empty_like(rows)
        form.encode_into(rows, raw, scale)
        form.decode_into(raw, scale, read)
        unit = np.linalg.norm(queries, axis=1)[:, None] * np.linalg.norm(rows, axis=1) / np.sqrt(k)
        found[name] = float(np.sqrt(np.mean(np.square(queries @ (read - rows).T / unit))))
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=1000, help="to be scored")
    parser.add_argument("--mib", type=int, default=128, help="to be appended")
    parser.add_argument("--list-mib", type=int, default=1024, help="rows that lists are found in")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--k", type=int, nargs="+", default=[65_536, 262_144], help="entries a row")
    parser.add_argument("--only", default="rates,lists,errors", help="some of these")
    parser.add_argument("--folder", help="where to write; default a temporary folder")
    options = parser.parse_args()
    result: dict[str, object] = {"bench": "signs", "rows": options.rows}
    parts = options.only.split(",")
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        for k in options.k:
            found: dict[str, float | None] = {}
            if "rates" in parts:
                found |= rates(Path(name), k, options.rows, options.mib, options.repeats)
            if "lists" in parts:
                found |= lists(Path(name), k, options.list_mib, options.repeats)
            for what, value in found.items():
                print(f"k = {k}: {what.replace('_', ' ')}: {'void' if value is None else f'{value:.3g}'}", flush=True)
                result[f"{what}_{k}"] = None if value is None else round(value, 3)
    for way, form in (("plain", Encoding("sign", options.k[0], 1)), ("rotated", Encoding.of("sign", options.k[0]))):
        for kind, error in errors(form).items() if "errors" in parts else ():
            print(f"error over |q||x|/sqrt(k), {kind}, {way}: {error:.3f}")
            result[f"error_{kind}_{way}"] = round(error, 3)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
