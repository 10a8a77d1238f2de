"""Peak memory of the bookkeeping before the first row is computed: ids, and the rows of documents.

Each measurement is a fresh process that samples its own anonymous resident memory (RssAnon); pages of mapped files are
told apart (RssFile). Ids are strings, made when they are asked for. Documents are two-word texts with an id and a kept
number, made when they are asked for, of a tokenizer of single words: every document is tokenised, cut, digested and
written, ids compared, and then the index is read once in the order of rows. Flat means that ten times the rows take no
more than a few MiB more.

Run: python tools/bench/rows_memory.py [--rows 100000,1000000,10000000] [--stages ids,documents]. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import ooc_influence as ooc
from ooc_influence.memory import format_bytes

WORDS = 1000


class Ids:
    """Ids by number."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, key: slice) -> list[str]:
        return [f"document-{number:012}" for number in range(*key.indices(self.n))]


class Peaks:
    """The highest anonymous and mapped resident bytes while it is open, sampled."""

    def __enter__(self) -> Peaks:
        self.anonymous = self.mapped = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._sample()
        self.start = self.anonymous
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.002):
            self._sample()

    def _sample(self) -> None:
        lines = Path("/proc/self/status").read_text().splitlines()
        held = {line.split(":")[0]: int(line.split()[1]) << 10 for line in lines if line.startswith("Rss")}
        self.anonymous = max(self.anonymous, held["RssAnon"] + held["RssShmem"])
        self.mapped = max(self.mapped, held["RssFile"])

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()


def check_ids(n: int) -> None:
    from ooc_influence.extract.data import RowMetadata

    RowMetadata.of(Ids(n), None).check_ids()


def documents(n: int) -> Any:
    from ooc_influence.corpus import Documents

    class Synthetic(Documents):
        def __len__(self) -> int:
            return n

        def read(self, numbers: Any, fields: Any) -> list[dict[str, Any]]:
            return [
                {"text": f"w{number % WORDS} w{number // WORDS % WORDS}", "id": f"document-{number}", "score": number}
                for number in numbers
            ]

    return Synthetic("synthetic documents", ["text", "id", "score"])


def index_documents(n: int) -> None:
    import tokenizers
    import transformers

    from ooc_influence import hf

    vocabulary = {word: number for number, word in enumerate(["<unk>", *(f"w{number}" for number in range(WORDS))])}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")
    samples = hf.Samples(documents(n), tokenizer, hf.Fields(text="text", id="id", keep=("score",)), 16)
    batches = ooc.BudgetBatches(samples, list, lengths=samples.lengths, tokens=2048)
    columns = [*samples.columns().values(), samples.ids()]
    for first, last in batches.blocks(4 * 4096, 0):
        if first % (256 * (last - first)) == 0:  # a block in 256: reading documents again is not what is measured
            for column in columns:
                _ = column[first:last]
        else:
            _ = [column[first:last].sum() for column in columns[:5]]
    assert len(samples) == n


STAGES = {"ids": check_ids, "documents": index_documents}


def child(stage: str, n: int) -> None:
    STAGES[stage](1000)  # imports, buffers
    with Peaks() as peaks:
        began = time.perf_counter()
        STAGES[stage](n)
        seconds = time.perf_counter() - began
    grown = peaks.anonymous - peaks.start
    print(
        json.dumps({"seconds": round(seconds, 2), "peak": peaks.anonymous, "anonymous": grown, "mapped": peaks.mapped})
    )


def measure(stage: str, n: int, folder: str) -> dict[str, Any]:
    command = [sys.executable, __file__, "--child", stage, str(n)]
    environment = {**os.environ, "TMPDIR": folder, "TOKENIZERS_PARALLELISM": "false"}
    output = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
    found: dict[str, Any] = json.loads(output.splitlines()[-1])
    return found


def main() -> None:
    if "--child" in sys.argv:
        child(sys.argv[2], int(sys.argv[3]))
        return
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rows", default="100000,1000000,10000000")
    parser.add_argument("--stages", default="ids,documents")
    parser.add_argument("--folder", default=".", help="Where temporary files are written: a disk.")
    given = parser.parse_args()
    results: dict[str, Any] = {}
    rows = list(map(int, given.rows.split(",")))
    with tempfile.TemporaryDirectory(dir=given.folder, prefix=".rows-memory-") as folder:
        for stage in given.stages.split(","):
            for n in rows:
                found = results.setdefault(stage, {})[str(n)] = measure(stage, n, folder)
                print(
                    f"{stage}, {n:,} rows: {format_bytes(found['anonymous'])} anonymous above the start, "
                    f"{format_bytes(found['mapped'])} of mapped files resident, {found['seconds']:.1f} s",
                    flush=True,
                )
    peaks = {stage: [found[str(n)]["peak"] for n in (rows[0], rows[-1])] for stage, found in results.items()}
    ratios = {f"{stage}_most_rows_over_fewest_rows": round(most / fewest, 3) for stage, (fewest, most) in peaks.items()}
    print(json.dumps({"bench": "rows_memory", "rows": rows, **ratios, "measured": results}))


if __name__ == "__main__":
    main()
