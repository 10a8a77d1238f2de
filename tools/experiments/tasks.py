"""Small models on small real data, the same in every experiment: digits, MNIST, AG News, Shakespeare.

A task has n train and q test rows, trains a model on some of the train rows, and measures minus its loss on the test
rows. Rows are pairs (inputs, targets); the targets can be others than the data's (labels sampled from the model), and
for token sequences a third part holds factors of the tokens' losses.

    digits       scikit-learn's, 1200 + 300; MLP 64-64-32-10
    MNIST        the test set's images, 5000 + 500; the MLP of tools/bench/quality.py
    AG News      headlines, 3000 + 200; words looked up by a hash, one transformer layer, mean over words
    Shakespeare  1500 + 150 passages of 64 characters; a causal transformer of two layers
"""

from __future__ import annotations

import hashlib
import sys
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "bench"))

import numpy as np
import quality
import torch
from torch import Tensor, nn

import ooc_influence as ooc

Rows = tuple[Tensor, ...]  # inputs, targets, perhaps factors
WORDS, LENGTH = 2048, 32  # of AG News: hashed words, words of a headline
PASSAGE = 64  # characters of Shakespeare


class Encoder(nn.Module):
    """A transformer over tokens: a classifier of their mean, or (``causal``) of each next token."""

    def __init__(self, tokens: int, length: int, classes: int, *, layers: int, width: int = 64, causal: bool) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(tokens, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)
        self.causal = causal
        for table in (self.tokens, self.places):
            nn.init.normal_(table.weight, std=0.05)

    def states(self, inputs: Tensor) -> Tensor:
        """Return what the last layer holds, (b, t, width)."""
        hidden = self.tokens(inputs) + self.places(torch.arange(inputs.shape[1]))
        for block in self.blocks:
            hidden = block(hidden, self.causal)
        return self.norm(hidden)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return logits, (b, classes) or, causal, (b, t, classes); token 0 is padding where it is not causal."""
        states = self.states(inputs)
        if self.causal:
            return self.head(states)
        there = (inputs > 0).float()[..., None]
        return self.head((states * there).sum(1) / there.sum(1).clamp(min=1))


class Block(nn.Module):
    """Attention and an MLP, each behind a norm."""

    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.after = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mix, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, hidden: Tensor, causal: bool) -> Tensor:
        b, t, width = hidden.shape
        parts = self.mix(self.before(hidden)).view(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        found = nn.functional.scaled_dot_product_attention(*parts, is_causal=causal)
        hidden = hidden + self.out(found.transpose(1, 2).reshape(b, t, width))
        return hidden + self.down(nn.functional.gelu(self.up(self.after(hidden))))


@dataclass(frozen=True)
class Task:
    """Data, a model, its training and its measurement; plain enough to be sent to processes."""

    name: str
    train_rows: int
    test_rows: int
    epochs: int
    data: Path | None = None
    lr: float = 2e-3
    batch: int = 32
    tokens: bool = False  # a loss of many tokens: the weights of one-label cross-entropy do not hold

    @cached_property
    def rows(self) -> Rows:
        """All train rows, then all test rows."""
        loaders: dict[str, Callable[[], Rows]] = {"digits": self._digits, "AG News": self._news,
                                                  "Shakespeare": self._passages}  # fmt: skip
        found = loaders[self.name]()
        order = torch.from_numpy(np.random.default_rng(0).permutation(len(found[1])))
        return tuple(part[order[: self.train_rows + self.test_rows]] for part in found)

    def _digits(self) -> Rows:
        from sklearn.datasets import load_digits

        data = load_digits()
        return torch.tensor(data.data / 16, dtype=torch.float32), torch.tensor(data.target)

    def _news(self) -> Rows:
        texts, labels = news(self.data)
        inputs = torch.tensor([hashed(text) for text in texts])
        return inputs, torch.tensor(labels)

    def _passages(self) -> Rows:
        codes, _ = characters(self.data)
        passages = codes[: len(codes) // (PASSAGE + 1) * (PASSAGE + 1)].view(-1, PASSAGE + 1)
        return passages[:, :-1], passages[:, 1:]

    @property
    def train(self) -> Rows:
        return tuple(part[: self.train_rows] for part in self.rows)

    @property
    def test(self) -> Rows:
        return tuple(part[self.train_rows :] for part in self.rows)

    @property
    def settings(self) -> dict[str, Any]:
        digest = hashlib.sha256(b"".join(part.numpy().tobytes() for part in self.rows)).hexdigest()
        own = ("name", "train_rows", "test_rows", "epochs", "lr", "batch")
        return {"rows": digest, **{name: getattr(self, name) for name in own}}

    def model(self) -> nn.Module:
        if self.name == "digits":
            return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
        if self.name == "AG News":
            return Encoder(WORDS, LENGTH, 4, layers=1, width=48, causal=False)
        return Encoder(int(self.rows[0].max()) + 1, PASSAGE, int(self.rows[0].max()) + 1, layers=2, causal=True)

    def fit(self, indices: np.ndarray) -> nn.Module:
        """Train a model on rows ``indices``, from the global generator's state."""
        parts = [part[torch.from_numpy(indices)] for part in self.train]
        model = self.model().train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=self.lr, weight_decay=1e-2)
        steps = self.epochs * -(-len(indices) // self.batch)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / (steps + 1))
        for _ in range(self.epochs):
            for chosen in torch.randperm(len(indices)).split(self.batch):
                optimizer.zero_grad()
                self.loss(model, [part[chosen] for part in parts]).mean().backward()
                optimizer.step()
                schedule.step()
        return model.eval()

    def logits(self, model: nn.Module, inputs: Tensor) -> Tensor:
        return model(inputs)

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Return a loss a sample; for token sequences the mean over tokens, or Σ factor · loss where there are any."""
        logits = self.logits(model, batch[0])
        if not self.tokens:
            return ooc.cross_entropy(logits, batch[1])
        each = ooc.cross_entropy(logits.flatten(0, 1), batch[1].flatten()).view(batch[1].shape)
        return each.mean(1) if len(batch) == 2 else (each * batch[2]).sum(1)

    def measure(self, model: nn.Module) -> np.ndarray:
        with torch.no_grad():
            return -self.loss(model, self.test).numpy()


class Mnist(Task):
    """The models of tools/bench/quality.py, on the same rows."""

    def truth(self, models: int = 100) -> quality.Truth:
        size = quality.Size(train=self.train_rows, test=self.test_rows, epochs=self.epochs, models=models)
        return quality.Truth(self.data, size)

    @cached_property
    def rows(self) -> Rows:
        return self.truth().rows(0, self.train_rows + self.test_rows)

    def fit(self, indices: np.ndarray) -> nn.Module:
        return self.truth().train(indices)


def make_task(name: str, data: Path | None, quick: bool = False) -> Task:
    sizes = {
        "MNIST": (5000, 500, 50),
        "digits": (1200, 300, 40),
        "AG News": (3000, 200, 8),
        "Shakespeare": (1500, 150, 20),
    }
    n, q, epochs = (120, 20, 4) if quick else sizes[name]
    return (Mnist if name == "MNIST" else Task)(name, n, q, epochs, data, tokens=name == "Shakespeare")


def news(data: Path, part: str = "dev") -> tuple[list[str], list[int]]:
    """Return headlines and topics, of the half ``dev`` or ``test``."""
    whole = (data / f"agnews/{part}.tsv").read_text("utf-8")
    lines = [line.rsplit("\t", 1) for line in whole.splitlines() if "\t" in line]
    names = sorted({label for text, label in lines if label in ("World", "Sports", "Business", "Sci/Tech")})
    kept = [(text, names.index(label)) for text, label in lines if label in names]
    return [text for text, _ in kept], [label for _, label in kept]


def hashed(text: str) -> list[int]:
    """Return the headline's words as numbers from 1 on, padded with zeros."""
    words = [1 + zlib.crc32(word.encode()) % (WORDS - 1) for word in text.lower().split()[:LENGTH]]
    return words + [0] * (LENGTH - len(words))


def characters(data: Path) -> tuple[Tensor, str]:
    """Return Shakespeare's text as numbers of characters, and the characters."""
    text = (data / "shakespeare/input.txt").read_text("utf-8")
    alphabet = "".join(sorted(set(text)))
    place = {character: number for number, character in enumerate(alphabet)}
    return torch.tensor([place[character] for character in text]), alphabet


def batches(rows: Rows, size: int = 100) -> list[Rows]:
    return list(zip(*(part.split(size) for part in rows), strict=True))


def sampled(task: Task, model: nn.Module, rows: Rows, seed: int = 0) -> Rows:
    """Return the rows with targets drawn from the model: their gradients make the true Fisher matrix."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        found = [torch.softmax(task.logits(model, part[0]), -1) for part in batches(rows)]
    chances = torch.cat(found)
    drawn = torch.multinomial(chances.flatten(0, -2), 1, generator=generator).view(rows[1].shape)
    return rows[0], drawn


def signed(task: Task, model: nn.Module, rows: Rows, *, ggn: bool, seed: int = 0) -> Rows:
    """Return token rows with factors ±√(w/T): outer products of their gradients estimate Σ_t (w_t/T) ∇ℓ_t ∇ℓ_tᵀ."""
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, rows[1].shape, generator=generator) * 2.0 - 1
    if ggn:
        with torch.no_grad():
            each = [ooc.cross_entropy(model(part[0]).flatten(0, 1), part[1].flatten()) for part in batches(rows)]
        losses = torch.cat(each).view(rows[1].shape)
        signs = signs * torch.expm1(losses.clamp(min=1e-6)).rsqrt()
    return rows[0], rows[1], signs / rows[1].shape[1] ** 0.5
