"""The benchmarks run and end with one line of JSON; their numbers are not judged here."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from pages import find_browser

BENCH = Path(__file__).parent.parent / "tools" / "bench"
SMALL = {
    "engine": [
        "--rows",
        "1500",
        "--k",
        "64",
        "--queries",
        "32",
        "--repeats",
        "1",
        "--naive-rows",
        "1000",
        "--memory",
        "2GiB",
        "--only",
        "fisher,cold,scores,self_influence,naive,gpu",
    ],
    "collect": ["--k", "64", "--rounds", "1", "--width", "32"],
    "extraction": ["--rounds", "1", "--k", "512", "--models", "cnn", "--samplings", "importance"],
    "families": ["--only", "vgg", "--kept", "kept.jsonl"],
    "memory": ["--rows", "600", "--k", "64"],
    "pages": ["--queries", "12", "--few", "2", "--rows", "20", "--rounds", "1"],
    "quality": ["--quick", "--data", ".", "--folder", "out", "--workers", "1"],
    "representations": ["--mib", "1", "--k", "100", "--repeats", "1"],
    "rows_memory": ["--rows", "1000,3000"],
    "scale": ["--rows", "20000", "--dims", "64", "--sketch-dims", "16", "--queries", "1,4", "--damping", "1"],
    "selfcheck": ["--small", "--rounds", "1", "--models", "decoder", "--tokens", "8"],
    "signs": ["--rows", "100", "--mib", "1", "--repeats", "1", "--k", "1000"],
    "tokens": ["--layers", "1", "--length", "8", "--rounds", "1", "--vocabulary", "512"],
    "trace": ["--model", "model", "--chats", "8", "--questions", "2", "--dtype", "float32", "--folder", "."],
    "vocabulary": ["--layers", "1", "--dtypes", "float32", "--vocabulary", "512"],
    "store": ["--mib", "32", "--chunks", "100", "--repeats", "1"],
}
NEEDS_INDEX = {"first_contact"}  # it installs
NO_BENCHMARK = {"page", "compare"}  # tests/test_bench_page.py; it runs the others at two revisions
SLOW = {
    "collect",
    "engine",
    "pages",
    "quality",
    "representations",
    "rows_memory",
    "scale",
    "signs",
    "store",
    "tokens",
    "trace",
    "vocabulary",
}  # what they measure with has tests of its own


def write_images(folder: Path, n: int = 360) -> None:
    """Write images of random classes in MNIST's format, each class bright in a part of its own."""
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 10, n).astype(np.uint8)
    images = generator.integers(0, 120, (n, 28, 28)).astype(np.uint8)
    for image, label in zip(images, labels.tolist(), strict=True):
        image[2 * label : 2 * label + 4] += 100
    folder.mkdir()
    for name, head, values in (("images-idx3", 16, images), ("labels-idx1", 8, labels)):
        (folder / f"t10k-{name}-ubyte.gz").write_bytes(gzip.compress(bytes(head) + values.tobytes()))


def test_every_benchmark_is_listed():
    assert {path.stem for path in BENCH.glob("*.py") if "__main__" in path.read_text()} == (
        set(SMALL) | NEEDS_INDEX | NO_BENCHMARK
    )


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in SMALL]
)
def test_it_runs(name, tmp_path):
    if name == "pages":
        find_browser()  # or skip
    if name == "quality":
        write_images(tmp_path / "mnist")
    if name == "trace":
        pytest.importorskip("peft")
        pytest.importorskip("tiny_hf").make_model(tmp_path / "model", template=True)
    command = [sys.executable, str(BENCH / f"{name}.py"), *SMALL[name]]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["bench"] == name
    assert any("_over_" in key for key in result)
