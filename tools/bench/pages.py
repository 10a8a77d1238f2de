"""Time to the first answer, with its tokens lit up, of a report of 5,000 queries, over that of a report of 50.

Both reports are written by ``write_report(model=)`` from stores of a tiny random language model (its numbers mean
nothing, its texts are as long as questions and answers are) and opened from disk in a headless Chromium, in turn, the
cache off. Measured is the time from the navigation until the first query, the tokens of its answer and those of its
first proponent have been painted; also over one second, the target. Needs chromium and chromedriver.

Run: python tools/bench/pages.py [--queries 5000] [--few 50] [--rows 500] [--rounds 9] [--folder DIR]. The last line is
JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import warnings
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent / "tests"))

from pages import start_browser  # of the tests
from tiny_hf import words_tokenizer

import ooc_influence as ooc
from ooc_influence import hf
from ooc_influence.report import write_report

WORDS, CONTEXT = 2000, 96
SEEN = """
const painted = () => document.querySelector('.query .t')?.getClientRects().length
  && document.querySelector('.proponents .card .t')?.getClientRects().length;
const look = () => painted()
  ? requestAnimationFrame(() => { window.answered = performance.now(); })
  : requestAnimationFrame(look);
requestAnimationFrame(look);
"""  # the frame after the one with marks: that one has been painted


def make_model(folder: Path) -> None:
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    words = ["<pad>", "<eos>", "<unk>", *(f"word{number}" for number in range(WORDS))]
    numbers = {word: number for number, word in enumerate(words)}
    tokenizer = words_tokenizer(numbers, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    torch.manual_seed(0)
    sizes = {"vocab_size": len(words), "n_positions": CONTEXT, "n_embd": 16, "n_layer": 1, "n_head": 2}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=1, pad_token_id=0))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def text(generator: np.random.Generator, length: int) -> str:
    return " ".join(f"word{number}" for number in generator.integers(WORDS, size=length))


def write_documents(folder: Path, rows: int, queries: dict[str, int]) -> None:
    """Write documents to train on, and files of questions with their answers."""
    generator = np.random.default_rng(0)
    files = {"train": [{"text": text(generator, 60)} for _ in range(rows)]}
    for name, count in queries.items():
        files[name] = [{"prompt": text(generator, 12), "completion": f" {text(generator, 24)}"} for _ in range(count)]
    for name, records in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")


def write_reports(folder: Path, rows: int, queries: dict[str, int]) -> None:
    """Write a report for each file of queries, all tokens computed."""
    make_model(folder / "model")
    write_documents(folder, rows, queries)
    loaded = hf.load(folder / "model")
    train = hf.extract(loaded, folder / "train.jsonl", folder / "train.zarr", compressor=ooc.Dropout(k=256))
    ooc.fit_fisher(train)
    for name in queries:
        query = hf.extract(loaded, folder / f"{name}.jsonl", folder / f"{name}.zarr", like=train,
                           prompt="prompt", completion="completion")  # fmt: skip
        write_report(train, folder / name, query, model=loaded, progress=True, title=f"{query.n} queries")


def first_answer(driver: Any, report: Path) -> float:
    """Return the seconds from the navigation until the first answer has been painted."""
    driver.get("about:blank")
    driver.get((report / "index.html").as_uri())
    end = time.monotonic() + 60
    while time.monotonic() < end:
        milliseconds = driver.execute_script("return window.answered ?? null")
        if milliseconds is not None:
            return float(milliseconds) / 1000
        time.sleep(0.05)
    sys.exit(f"expected an answer with tokens in {report} within a minute; received none")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--queries", type=int, default=5000)
    parser.add_argument("--few", type=int, default=50)
    parser.add_argument("--rows", type=int, default=500, help="train rows")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--folder", type=Path, help="keep stores and reports here, and use reports that are there")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        queries = {"many": options.queries, "few": options.few}
        if not all((folder / name / "index.html").exists() for name in queries):
            write_reports(folder, options.rows, queries)
        driver = start_browser(temporary)
        driver.execute_cdp_cmd("Network.setCacheDisabled", {"cacheDisabled": True})
        driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": SEEN})
        times: dict[str, list[float]] = {name: [] for name in queries}
        for number in range(options.rounds + 1):
            for name, found in times.items():
                seconds = first_answer(driver, folder / name)
                found.extend([seconds] if number else [])  # the first round warms the browser up
        driver.quit()
        bytes_of = {name: sum(path.stat().st_size for path in (folder / name).rglob("*.*")) for name in queries}
    middle = {name: median(found) for name, found in times.items()}
    facts = {
        "bench": "pages",
        **queries,
        "rows": options.rows,
        "first_answer_of_many_over_few": round(middle["many"] / middle["few"], 2),
        "first_answer_of_many_over_one_second": round(middle["many"], 3),
        "slowest_of_many_over_one_second": round(max(times["many"]), 3),
        "mib": {name: round(size / 2**20, 1) for name, size in bytes_of.items()},
        "rounds": {name: [round(value, 3) for value in found] for name, found in times.items()},
    }
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
