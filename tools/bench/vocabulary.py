"""Peak memory of extraction from a model of a large vocabulary, against a training step and a loss of plain operations.

The model has the shape of SmolLM2-135M (49,152 tokens, tied embeddings, random weights), with --layers of its 30; a
batch has 8 x 256 tokens. Each measurement is a process of its own; a peak is the anonymous memory beyond the model's.
"Plain" is the same extraction with the cross-entropy of PyTorch's operations, which holds copies of the logits.

Run: python tools/bench/vocabulary.py [--layers 30] [--dtypes float32,bfloat16]. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

VOCABULARY, SAMPLES, LENGTH = 49_152, 8, 256
WAYS = ("train", "plain", "ours")


def make_model(layers: int, dtype: str, vocabulary: int) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
    config = LlamaConfig(vocab_size=vocabulary, num_hidden_layers=layers, tie_word_embeddings=True, **sizes)
    return LlamaForCausalLM(config).to(getattr(torch, dtype)).eval()


def run_child(way: str, layers: str, dtype: str, vocabulary: str) -> None:
    """Run one of the ways and print its peak."""
    import torch

    import ooc_influence as ooc
    import ooc_influence.extract.chunked_loss as chunked_loss
    from ooc_influence.hf.losses import CausalLoss
    from ooc_influence.memory import PeakMemory, release_freed

    model = make_model(int(layers), dtype, int(vocabulary))
    tokens = torch.randint(int(vocabulary), (SAMPLES, LENGTH))
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens}
    if way == "plain":
        chunked_loss._transformed = lambda logits: True

    def train() -> None:
        model(input_ids=tokens, labels=tokens).loss.backward()

    def extract() -> None:
        with tempfile.TemporaryDirectory() as folder:
            kept = ooc.Dropout(k=4096)
            ooc.extract_gradients(model, CausalLoss(), [batch, batch], Path(folder) / "s", compressor=kept)

    calls: dict[str, Callable[[], None]] = {"train": train, "plain": extract, "ours": extract}
    release_freed()
    with PeakMemory(0.002) as watch:
        calls[way]()
    size = SAMPLES * LENGTH * int(vocabulary) * next(model.parameters()).element_size()
    print(json.dumps({"peak": watch.peak - watch.start, "logits": size}))


def main() -> None:
    if "--child" in sys.argv:
        run_child(*sys.argv[2:])
        return
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY)
    options = parser.parse_args()
    result: dict[str, Any] = {"bench": "vocabulary", "layers": options.layers, "vocabulary": options.vocabulary}
    for dtype in options.dtypes.split(","):
        peaks = {}
        for way in WAYS:
            command = [sys.executable, __file__, "--child", way, str(options.layers), dtype, str(options.vocabulary)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(done.stderr[-2000:])
            peaks[way] = json.loads(done.stdout.splitlines()[-1])
            print(f"{dtype} {way}: {peaks[way]['peak'] / 2**20:.0f} MiB", flush=True)
        result[f"{dtype}_peak_over_training_step"] = round(peaks["ours"]["peak"] / peaks["train"]["peak"], 3)
        result[f"{dtype}_peak_over_plain_loss"] = round(peaks["ours"]["peak"] / peaks["plain"]["peak"], 3)
        result[f"{dtype}_peak_over_logits"] = round(peaks["ours"]["peak"] / peaks["ours"]["logits"], 3)
        result[f"{dtype}_mib"] = {way: peaks[way]["peak"] >> 20 for way in WAYS}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
