"""Small models that between them hold what extraction has to get right."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from ooc_influence import cross_entropy


class Mlp(nn.Module):
    """Vectors; an in-place activation right behind a linear layer; dropout."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(12, 20), nn.Linear(20, 20, bias=False), nn.Linear(20, 5)
        self.act, self.drop = nn.ReLU(inplace=True), nn.Dropout(0.5)

    def forward(self, x):
        h = self.act(self.first(x))
        h = h + self.drop(self.act(self.second(h)))
        return self.last(h)


class Encoder(nn.Module):
    """Token sequences through torch's own encoder layer (which in evaluation mode would skip its linear layers)."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 16)
        self.encoder = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.last = nn.Linear(16, 5)

    def forward(self, x):
        return self.last(self.encoder(self.embed(x)).mean(1))


class Twice(nn.Module):
    """A layer called twice, four-dimensional inputs, an input given by keyword."""

    def __init__(self):
        super().__init__()
        self.shared, self.last = nn.Linear(6, 6), nn.Linear(6, 5)

    def forward(self, x):
        h = x.view(len(x), 2, 1, 6)
        h = torch.tanh(self.shared(torch.tanh(self.shared(input=h))))
        return self.last(h.transpose(1, 2)).sum((1, 2))


def loss(model, batch):
    x, y = batch
    return cross_entropy(model(x), y)


def sample_loss(model, sample):
    """The same for one sample, with torch's own cross-entropy: what the oracle differentiates."""
    x, y = sample
    x = x.double() if x.is_floating_point() else x
    return F.cross_entropy(model(x[None]), y[None])


def data(kind, n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(0, 5, (200,), generator=generator)  # always all of it: data(kind, 10) starts data(kind, 50)
    tokens, vectors = torch.randint(0, 11, (200, 7), generator=generator), torch.randn(200, 12, generator=generator)
    return (tokens if kind is Encoder else vectors)[:n], y[:n]


def make(kind, seed=0):
    torch.manual_seed(seed)
    return kind().eval()


def batches(x, y, size):
    return list(zip(x.split(size), y.split(size), strict=True))


LINEAR = {
    Mlp: ["first", "second", "last"],
    Encoder: ["encoder.linear1", "encoder.linear2", "last"],
    Twice: ["shared", "last"],
}
