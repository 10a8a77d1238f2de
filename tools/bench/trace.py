"""Time of a whole `trace` run, against one training epoch of the same LoRA on the same chats.

460 short chats, 30 questions (those of tools/experiments/facts.py), a chat model with a LoRA of rank 16 in bfloat16. An
epoch is trained before and after the run, each in a process of its own; its time is that of the steps alone, the run's
that of the whole command, pages and token shares included.

Run: python tools/bench/trace.py --model FOLDER [--chats 460] [--questions 30] [--dtype bfloat16] [--folder OUT]. The
last line is JSON. tools/smollm2.py makes the folder of a real model.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "experiments"))
RANK, BATCH = 16, 8


def busy(who: int) -> float:
    used = resource.getrusage(who)
    return used.ru_utime + used.ru_stime


def write_chats(folder: Path, chats: int, questions: int) -> None:
    from facts import corpus

    made = corpus(questions, max(0, chats - 2 * questions))
    for name, rows in (("train", made.train[:chats]), ("query", made.query)):
        lines = [json.dumps({"messages": each}, ensure_ascii=False) for each in rows]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", "utf-8")


def train_epoch(model: str, folder: Path, dtype: str) -> None:
    """Train a LoRA for an epoch, save it if there is none, and print the seconds, by the clock and of the processor."""
    import peft
    import torch

    from ooc_influence import hf

    torch.manual_seed(0)
    loaded = hf.load(model, dtype=dtype)
    config = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    job = hf.prepare(
        loaded._replace(model=peft.get_peft_model(loaded.model, config)),
        str(folder / "train.jsonl"),
        messages="messages",
    )
    optimizer = torch.optim.AdamW([each for each in job.model.parameters() if each.requires_grad], lr=1e-3)
    job.model.train()
    began, used = time.perf_counter(), busy(resource.RUSAGE_SELF)
    for chosen in torch.randperm(len(job.batches)).split(BATCH):
        optimizer.zero_grad()
        job.per_sample_loss(job.model, job.batches.load(chosen.numpy())).mean().backward()
        optimizer.step()
    print(json.dumps([time.perf_counter() - began, busy(resource.RUSAGE_SELF) - used]))
    if not (folder / "adapter").exists():
        job.model.save_pretrained(str(folder / "adapter"))


def run_epoch(model: str, folder: Path, dtype: str) -> tuple[float, float]:
    command = [sys.executable, __file__, "--epoch", "--model", model, "--folder", str(folder), "--dtype", dtype]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    clock, used = json.loads(done.stdout.splitlines()[-1])
    return float(clock), float(used)


def run_trace(folder: Path, dtype: str) -> tuple[float, float, float]:
    """Return the seconds of the command, by the clock and of the processor, and those to its first line."""
    shutil.rmtree(folder / "answer", ignore_errors=True)
    command = [
        sys.executable, "-m", "ooc_influence", "trace", "--model", str(folder / "adapter"), "--data",
        str(folder / "train.jsonl"), "--queries", str(folder / "query.jsonl"), "-o", str(folder / "answer"),
        "--messages", "messages", "--model-dtype", dtype, "--yes",
    ]  # fmt: skip
    began, used = time.perf_counter(), busy(resource.RUSAGE_CHILDREN)
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        process.stderr.readline()
        first = time.perf_counter() - began
        said = process.stderr.read()
    if process.returncode:
        raise SystemExit(said)
    return time.perf_counter() - began, busy(resource.RUSAGE_CHILDREN) - used, first


def measured(model: str, folder: Path, options: Any) -> dict[str, Any]:
    write_chats(folder, options.chats, options.questions)
    before = run_epoch(model, folder, options.dtype)
    clock, used, first = run_trace(folder, options.dtype)
    after = run_epoch(model, folder, options.dtype)
    return {
        "bench": "trace", "chats": options.chats, "questions": options.questions,
        "trace_over_epoch": clock / mean([before[0], after[0]]),
        "trace_cpu_over_epoch": used / mean([before[1], after[1]]), "first_line_seconds": first,
        "epochs_after_over_before": after[0] / before[0],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--chats", type=int, default=460)
    parser.add_argument("--questions", type=int, default=30)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--epoch", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.epoch:
        train_epoch(options.model, options.folder, options.dtype)
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        print(json.dumps(measured(options.model, folder, options)))


if __name__ == "__main__":
    main()
