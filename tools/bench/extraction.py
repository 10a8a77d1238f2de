"""Time of one extraction batch against one training forward+backward of the same model, interleaved in one run.

Models, all with random weights: a decoder-only transformer of about 27 M parameters (8 x 128 tokens), a small
convolutional network and a BERT-like encoder; on a GPU also the shapes of Pythia-1.4B and 6.9B in bfloat16 (2048
tokens). Measured together for each mask:

    train     forward + backward with weight gradients
    floor     forward + backward with activation gradients only (no parameter requires a gradient)
    ours      what extract_gradients does a batch: forward, backward, gather; rows as float32, or packed signs
    run       ours, and a batch's share of the pilot of a run of 10,000 rows: 256 samples, factors, drawing

Run: python tools/bench/extraction.py [--rounds 9] [--models decoder,cnn,encoder]. The last line is JSON with the
medians' ratios of ours to train and to floor, by model, sampling and k. With --headlines FILE (a text a line, up to the
first tab) also the share of padding in batches by a budget of tokens, in words or in the tokens of --tokenizer DIR.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

os.environ.pop("OPENBLAS_CORETYPE", None)  # some machines export a slower core type

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

import ooc_influence as ooc
from ooc_influence.extract.packing import SignPacker
from ooc_influence.extract.passes import ModelSetup, RowGatherer
from ooc_influence.extract.pilot import Pilot
from ooc_influence.extract.selection import select_layers
from ooc_influence.extract.taps import tapped
from ooc_influence.linalg import KeptNorms, storage_scale
from ooc_influence.store import Encoding

PILOT_SAMPLES, ROWS = 256, 10_000  # of a pilot; of the run that its cost is divided among


class Block(nn.Module):
    """A pre-norm transformer block, GPT-NeoX in shape."""

    def __init__(self, width: int, heads: int, *, causal: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.heads, self.causal = heads, causal

    def forward(self, h: Tensor) -> Tensor:
        b, t, width = h.shape
        q, k, v = self.qkv(self.norm1(h)).view(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        h = h + self.out(mixed.transpose(1, 2).reshape(b, t, width))
        return h + self.down(F.gelu(self.up(self.norm2(h))))


class Decoder(nn.Module):
    """Embedding, blocks, and an unembedding (a language model) or a classifier of the mean."""

    def __init__(self, vocabulary: int, width: int, layers: int, heads: int, tokens: int, classes: int = 0) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(vocabulary, width), nn.Embedding(tokens, width)
        self.blocks = nn.ModuleList(Block(width, heads, causal=not classes) for _ in range(layers))
        self.norm, self.classes = nn.LayerNorm(width), classes
        self.head = nn.Linear(width, classes or vocabulary, bias=bool(classes))

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.embed(tokens) + self.place(torch.arange(tokens.shape[1], device=tokens.device)[None])
        for block in self.blocks:
            h = block(h)
        h = self.norm(h)
        return self.head(h.mean(1) if self.classes else h)


class Convolutional(nn.Sequential):
    """Five convolutions with batch norm, and a classifier."""

    def __init__(self) -> None:
        layers: list[nn.Module] = []
        for inputs, outputs, stride in ((3, 32, 1), (32, 64, 2), (64, 128, 2), (128, 256, 2), (256, 256, 1)):
            layers += [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, 10))


def token_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    tokens, _ = batch
    logits = model(tokens)
    losses = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    return losses.view(len(tokens), -1).mean(1)


def class_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


class Case(NamedTuple):
    """A model, its loss, a batch."""

    model: nn.Module
    loss: Callable[[nn.Module, Any], Tensor]
    batch: tuple[Tensor, Tensor]


def language(vocabulary: int, width: int, layers: int, heads: int, b: int, t: int, dtype: Any, device: str) -> Case:
    with torch.device(device):
        model = Decoder(vocabulary, width, layers, heads, t).to(dtype)
        return Case(model, token_loss, (torch.randint(0, vocabulary, (b, t)), torch.zeros(b, dtype=torch.long)))


def make(name: str) -> Case:
    half = torch.bfloat16
    if name == "decoder":
        return language(8192, 512, 6, 8, 8, 128, torch.float32, "cpu")
    if name == "encoder":
        model = Decoder(8192, 384, 6, 6, 128, classes=4)
        return Case(model, class_loss, (torch.randint(0, 8192, (16, 64)), torch.arange(16) % 4))
    if name == "cnn":
        return Case(Convolutional(), class_loss, (torch.randn(32, 3, 32, 32), torch.arange(32) % 10))
    sizes = {"pythia-1.4b": (50304, 2048, 24, 16, 4), "pythia-6.9b": (50432, 4096, 32, 32, 1)}[name]
    return language(*sizes, 2048, half, "cuda")


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Let nothing but the first activation require a gradient."""
    first = next(m for m in model.modules() if isinstance(m, (nn.Embedding, nn.Conv2d)))
    model.requires_grad_(False)
    hook = first.register_forward_hook(lambda module, args, output: output.detach().requires_grad_())
    try:
        yield
    finally:
        hook.remove()
        model.requires_grad_(True)


def clock(function: Callable[[], object]) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    began = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def compressor(sampling: str, k: int) -> ooc.Dropout:
    """Return dropout by a sampling's name: ``kronecker`` is a grid in the Kronecker basis, ``sign`` its signs."""
    basis, _, shape = sampling.partition("-")
    if basis in ("kronecker", "sign"):
        return ooc.Dropout(k=k, sampling=shape or "grid", basis="kronecker")
    return ooc.Dropout(k=k, sampling=sampling)


def gatherer(mask: Any, device: torch.device, *, signs: bool) -> Callable[..., Any]:
    """Return what computes a batch's rows and, of signs, packs them."""
    gather = RowGatherer(mask, device)
    if not signs:
        return gather
    scale, kept = storage_scale("sign", mask, None, {}), KeptNorms.of("sign", mask, {}, reduced=False)
    pack = SignPacker(Encoding.of("sign", mask.k), scale, kept, device)

    def packed(taps: Any, loss: Any, batch: Any) -> Any:
        losses, rows, norms = gather(taps, loss, batch)
        return losses, *pack(rows), norms

    return packed


def measure(name: str, sizes: list[int], samplings: list[str], rounds: int) -> dict[str, Any]:
    """Return ratios for one model, by sampling and k."""
    model, loss, batch = make(name)
    model.eval()
    device = batch[0].device
    layers, share, _ = select_layers(model, None)
    b = len(batch[0])
    pilot = Pilot(ModelSetup(model, loss, device, check=False), [batch] * -(-PILOT_SAMPLES // b))
    p = sum(layer.entries for layer in layers)
    masks, drawing = {}, {}
    for sampling in samplings:
        for k in [k for k in sizes if k < p]:
            began = time.perf_counter()
            masks[f"{sampling}_{k}"] = pilot.draw(compressor(sampling, k), layers)
            drawing[f"{sampling}_{k}"] = time.perf_counter() - began
    gathers = {key: gatherer(mask, device, signs=key.startswith("sign")) for key, mask in masks.items()}
    times: dict[str, list[float]] = {key: [] for key in ("train", "floor", *masks)}

    def train() -> None:
        model.zero_grad(set_to_none=True)
        loss(model, batch).sum().backward()

    for number in range(rounds + 1):
        took = {"train": clock(train)}
        model.zero_grad(set_to_none=True)
        with frozen(model):
            took["floor"] = clock(lambda: loss(model, batch).sum().backward())
        for key, gather in gathers.items():
            with tapped(model, layers, device, skip=masks[key].empty_modules) as taps:
                gather(taps, loss, batch)  # the first batch is looked at once more: it tells the number of samples
                took[key] = clock(lambda gather=gather, taps=taps: gather(taps, loss, batch))
        if number:
            for key, seconds in took.items():
                times[key].append(seconds)
    medians = {key: statistics.median(values) for key, values in times.items()}
    found: dict[str, Any] = {
        "parameters": sum(x.numel() for x in model.parameters()), "covered": round(share, 3),
        "floor_over_train": round(medians["floor"] / medians["train"], 3),
    }  # fmt: skip
    for key in masks:
        found |= {f"{key}_over_{base}": round(medians[key] / medians[base], 3) for base in ("train", "floor")}
        run = medians[key] + drawing[key] * b / ROWS
        found[f"{key}_run_over_epoch"] = round(run / medians["train"], 3)
    if device.type == "cuda":
        found["peak_over_model"] = peak_over_model(model, loss, batch, next(iter(gathers.values())), layers)
    return found


def peak_over_model(model: nn.Module, loss: Any, batch: Any, gather: Callable[..., Any], layers: Any) -> float:
    """Return the peak device memory of a batch over the model's own."""
    torch.cuda.reset_peak_memory_stats()
    with tapped(model, layers, batch[0].device) as taps:
        gather(taps, loss, batch)
    own = sum(x.numel() * x.element_size() for x in model.parameters())
    return round(torch.cuda.max_memory_allocated() / own, 3)


def padding(file: str, tokenizer: str | None) -> dict[str, float]:
    """Return the share of a batch that is padding, by budget of tokens."""
    with open(file, encoding="utf-8") as lines:  # noqa: PTH123
        texts = [line.split("\t")[0] for line in lines]
    lengths = [len(text.split()) for text in texts]
    if tokenizer is not None:
        from transformers import AutoTokenizer

        lengths = [len(ids) for ids in AutoTokenizer.from_pretrained(tokenizer)(texts)["input_ids"]]
    found = {}
    for tokens in (2048, 8192):
        batches = ooc.BudgetBatches(texts, list, lengths=lengths, tokens=tokens)
        parts = [part for low, high in batches.blocks(4 * 4096, 0) for part in batches.cut(np.arange(low, high))]
        used, padded = np.sum([batches.padded(part) for part in parts], axis=0)
        found[f"padding_over_tokens_{tokens}"] = round(float(1 - used / padded), 4)
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--k", default="16384,65536")
    parser.add_argument("--samplings", default="uniform,importance,grid,kronecker")
    gpu = ",pythia-1.4b,pythia-6.9b" if torch.cuda.is_available() else ""
    parser.add_argument("--models", default=f"decoder,cnn,encoder{gpu}")
    parser.add_argument("--headlines", metavar="FILE")
    parser.add_argument("--tokenizer", metavar="DIR")
    options = parser.parse_args()
    torch.manual_seed(0)
    warnings.simplefilter("ignore", ooc.OocInfluenceWarning)
    sizes = [int(k) for k in options.k.split(",")]
    results: dict[str, Any] = {}
    for name in filter(None, options.models.split(",")):
        found = measure(name, sizes, options.samplings.split(","), options.rounds)
        print(name, json.dumps(found, indent=1))
        results |= {f"{name}_{key}": value for key, value in found.items()}
    if options.headlines:
        results |= padding(options.headlines, options.tokenizer)
    facts = {"bench": "extraction", "rounds": options.rounds, "threads": torch.get_num_threads()}
    facts |= {"torch": torch.__version__, "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None}
    print(json.dumps(facts | results))


if __name__ == "__main__":
    main()
