"""Time of one extraction batch against one training forward+backward of the same model, interleaved in one run.

A decoder-only transformer of about 25 M parameters in plain PyTorch, 8 x 128 tokens, k = 16384. Measured together:

    train     forward + backward with weight gradients
    floor     forward + backward with activation gradients only (no parameter requires a gradient)
    ours      what extract_gradients does a batch: forward, backward, gather; rows as float32 on the CPU
    write     the same and the row's append to a store on disk

Run: python tools/bench/extraction.py [--rounds 9]. The last line is JSON with the medians' ratios to ``train``.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable

os.environ.pop("OPENBLAS_CORETYPE", None)  # some machines export a slower core type

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

import ooc_influence as ooc
from ooc_influence.extract.layers import select_layers
from ooc_influence.extract.rows import RowGatherer
from ooc_influence.extract.taps import tapped

VOCABULARY, WIDTH, LAYERS, HEADS, TOKENS, BATCH = 8192, 512, 6, 8, 128, 8


class Block(nn.Module):
    """A pre-norm transformer block, GPT-NeoX in shape."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, h: Tensor) -> Tensor:
        b, t, _ = h.shape
        q, k, v = self.qkv(self.norm1(h)).view(b, t, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        h = h + self.out(mixed.transpose(1, 2).reshape(b, t, WIDTH))
        return h + self.down(F.gelu(self.up(self.norm2(h))))


class Decoder(nn.Module):
    """Embedding, blocks, unembedding: about 27 M parameters, 23 M of them in linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.place = nn.Parameter(torch.zeros(TOKENS, WIDTH))
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.embed(tokens) + self.place
        for block in self.blocks:
            h = block(h)
        return self.head(self.norm(h))


def per_sample_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    logits = model(tokens)
    losses = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    return losses.view(len(tokens), -1).mean(1)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--k", type=int, default=16384)
    options = parser.parse_args()
    torch.manual_seed(0)
    warnings.simplefilter("ignore", ooc.OocInfluenceWarning)
    model = Decoder().eval()
    tokens = torch.randint(0, VOCABULARY, (BATCH, TOKENS))
    layers, share = select_layers(model, None)
    mask = ooc.Dropout(k=options.k).draw(layers)
    gather = RowGatherer(mask, torch.device("cpu"))
    folder = tempfile.TemporaryDirectory()
    store = ooc.GradientStore.create(f"{folder.name}/store.zarr", mask)

    def train() -> None:
        model.zero_grad(set_to_none=True)
        per_sample_loss(model, tokens).mean().backward()

    def floor() -> None:
        h = (model.embed(tokens) + model.place).detach().requires_grad_()
        for block in model.blocks:
            h = block(h)
        logits = model.head(model.norm(h))
        F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()

    def frozen(function: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            model.requires_grad_(False)
            try:
                function()
            finally:
                model.requires_grad_(True)

        return run

    times: dict[str, list[float]] = {name: [] for name in ("train", "floor", "ours", "write")}

    def clock(name: str, function: Callable[[], object], keep: bool) -> None:
        began = time.perf_counter()
        function()
        if keep:
            times[name].append(time.perf_counter() - began)

    for number in range(options.rounds + 1):
        clock("train", train, number > 0)
        clock("floor", frozen(floor), number > 0)
        with tapped(model, layers, torch.device("cpu"), skip=mask.empty_modules) as taps:
            clock("ours", lambda: gather(taps, per_sample_loss, tokens), number > 0)

            def write() -> None:
                losses, rows = gather(taps, per_sample_loss, tokens)
                store.append(rows.numpy(), loss=losses.numpy())

            clock("write", write, number > 0)
    store.close()
    folder.cleanup()
    medians = {name: statistics.median(values) for name, values in times.items()}
    ratios = {f"{name}_over_train": round(medians[name] / medians["train"], 3) for name in ("floor", "ours", "write")}
    ratios["ours_over_floor"] = round(medians["ours"] / medians["floor"], 3)
    facts = {
        "bench": "extraction",
        "parameters": sum(p.numel() for p in model.parameters()),
        "covered": round(share, 3),
        "k": options.k,
        "tokens": [BATCH, TOKENS],
        "rounds": options.rounds,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    print(json.dumps(facts | ratios))


if __name__ == "__main__":
    main()
