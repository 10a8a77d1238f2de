"""Weights that layers share, weights used without their layer, and positions that samples share."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from families.base import (
    CLASSES,
    VOCABULARY,
    Case,
    families_of,
    hf,
    labelled,
    plain_loss,
    text_batches,
    token_loss,
    vectors,
)

family = families_of(__name__)


class Pair(nn.Module):
    """Two layers, one after the other, that share parameters."""

    def __init__(self, first: nn.Module, second: nn.Module, names: tuple[str, ...], *, images: bool = False) -> None:
        super().__init__()
        self.first, self.second = first, second
        for name in names:
            setattr(second, name, getattr(first, name))
        self.head = nn.Linear(6, CLASSES)
        self.images = images

    def forward(self, x: Tensor) -> Tensor:
        h = self.second(torch.tanh(self.first(x)))
        return self.head(h.mean((2, 3)) if self.images else h.mean(1))


def pair(make: Callable[[], nn.Module], *names: str, images: bool = False) -> Case:
    """Return two layers that share the parameters named."""
    shape = (6, 8, 8) if images else (4, 6)
    return Case(Pair(make(), make(), names, images=images), plain_loss, vectors(*shape))


family("linear-shares-weight", partial(pair, lambda: nn.Linear(6, 6), "weight"))
family("linear-shares-both", partial(pair, lambda: nn.Linear(6, 6), "weight", "bias"))
family("linear-shares-bias", partial(pair, lambda: nn.Linear(6, 6), "bias"))
family("conv-shares-weight", partial(pair, lambda: nn.Conv2d(6, 6, 3, padding=1), "weight", images=True))
family("conv-shares-both", partial(pair, lambda: nn.Conv2d(6, 6, 3, padding=1), "weight", "bias", images=True))
family("layer-norm-shares-both", partial(pair, lambda: nn.LayerNorm(6), "weight", "bias"))
family("rms-norm-shares-weight", partial(pair, lambda: nn.RMSNorm(6), "weight"))
family("group-norm-shares-weight", partial(pair, lambda: nn.GroupNorm(2, 6), "weight", images=True))
family("conv1d-shares-weight", partial(pair, lambda: hf.pytorch_utils.Conv1D(6, 6), "weight"))


class Tied(nn.Module):
    """An embedding whose weight is the unembedding's, in one of several ways."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.embed, self.hidden, self.how = nn.Embedding(VOCABULARY, 8), nn.Linear(8, 8), how
        if how in ("layer", "layer first", "bias of another"):
            self.head = nn.Linear(8, VOCABULARY, bias=how != "layer first")
            self.head.weight = self.embed.weight
        if how == "bias of another":
            self.bias = nn.Parameter(torch.zeros(VOCABULARY))
            self.head.bias = self.bias
        if how == "transposed":
            self.head = nn.Linear(VOCABULARY, 8, bias=False)
            self.head.weight = nn.Parameter(torch.randn(8, VOCABULARY))
            self.embed.weight = nn.Parameter(torch.randn(VOCABULARY, 8))

    def forward(self, ids: Tensor) -> Tensor:
        h = torch.tanh(self.hidden(self.embed(ids)))
        if self.how == "function":
            return F.linear(h, self.embed.weight)
        if self.how == "matrix":
            return h @ self.embed.weight.T
        return self.head(h)


def tied_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Return the loss of each sequence's next tokens."""
    return token_loss(model(batch["input_ids"])[:, :-1], batch["labels"][:, 1:])


for _how in ("layer", "layer first", "bias of another", "function", "matrix"):
    family(f"tied-by-{_how.replace(' ', '-')}", partial(lambda how: Case(Tied(how), tied_loss, text_batches()), _how))


class Positions(nn.Module):
    """Positions looked up once for all samples, in one of several ways."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.embed, self.place, self.how = nn.Embedding(VOCABULARY, 8), nn.Embedding(16, 8), how
        self.mix, self.head = nn.Linear(8, 8), nn.Linear(8, CLASSES)

    def forward(self, ids: Tensor) -> Tensor:
        b, t = ids.shape
        where = torch.arange(t)
        h, how = self.embed(ids), self.how
        if how == "row":
            h = h + self.place(where[None])
        elif how == "vector":
            h = h + self.place(where)
        elif how == "none":
            h = h + self.place(where)[None]
        elif how == "expand":
            h = h + self.place(where)[None].expand(b, -1, -1)
        elif how == "repeat":
            h = h + self.place(where)[None].repeat(b, 1, 1)
        elif how == "stack":
            h = h + torch.stack([self.place(where)] * b)
        elif how == "slice":
            h = h + self.place.weight[:t]
        elif how == "prompt":
            h = torch.cat([self.place(torch.arange(3))[None].expand(b, -1, -1), h], 1)
        elif how == "buckets":
            h = h + self.place((where[:, None] - where).abs()).mean(1)
        return self.head(torch.tanh(self.mix(h)).mean(1))


def class_of_text(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Return the loss of each text's class."""
    return F.cross_entropy(model(batch["input_ids"]), batch["labels"], reduction="none")


for _how in ("row", "vector", "none", "expand", "repeat", "stack", "slice", "prompt", "buckets"):
    family(
        f"positions-{_how}",
        partial(lambda how: Case(Positions(how), class_of_text, labelled(text_batches())), _how),
    )


class Table(nn.Module):
    """A layer of no known kind that is given a table as long as the sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(8))

    def forward(self, h: Tensor, table: Tensor) -> Tensor:
        return h * self.scale + torch.sin(table) * self.scale.square()


class WithTable(nn.Module):
    """It is given (t, 1), and at t = b that is as long as the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.table, self.head = nn.Embedding(VOCABULARY, 8), Table(), nn.Linear(8, CLASSES)

    def forward(self, ids: Tensor) -> Tensor:
        where = torch.arange(ids.shape[1], dtype=self.head.weight.dtype)[:, None]
        return self.head(torch.tanh(self.table(self.embed(ids), where)).mean(1))


@family("table-argument")
def table_argument() -> Case:
    """An argument that is no batch but as long as one."""
    return Case(WithTable(), class_of_text, labelled(text_batches()))


def decayed(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Return a loss with weight decay in it."""
    return plain_loss(model, batch) + 0.1 * sum(p.square().sum() for p in model.parameters())


@family("weight-decay-in-the-loss")
def weight_decay() -> Case:
    """The loss uses weights outside their layers."""
    return Case(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, CLASSES)), decayed, vectors(6))


class ScaledById(nn.Embedding):
    """An embedding scaled by its id."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * (1 + 0.1 * (ids > 1).to(self.weight.dtype))[..., None]


class Hashed(nn.Embedding):
    """An embedding of hashed ids."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids * 7 % self.num_embeddings)


def embedded(table: Callable[[], nn.Embedding]) -> Case:
    """Return a classifier of texts with an embedding of its own kind."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = table(), nn.Linear(8, CLASSES)

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(torch.tanh(self.embed(ids)).mean(1))

    return Case(Model(), class_of_text, labelled(text_batches()))


family("embedding-scaled-by-id", partial(embedded, lambda: ScaledById(VOCABULARY, 8)))
family("embedding-hashed", partial(embedded, lambda: Hashed(11, 8)))


class Chosen(nn.Module):
    """A layer that sees the chosen tokens of all samples, as many as divide by the batch now and then."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.inner, self.head = nn.Embedding(VOCABULARY, 8), nn.Linear(8, 8), nn.Linear(8, CLASSES)

    def forward(self, ids: Tensor, chosen: Tensor) -> Tensor:
        h = self.embed(ids)
        h = h.masked_scatter(chosen[..., None].expand_as(h), torch.tanh(self.inner(h[chosen])))
        return self.head(h.mean(1))


def chosen_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Return the loss of each text's class."""
    return F.cross_entropy(model(batch["input_ids"], batch["chosen"]), batch["labels"], reduction="none")


@family("chosen-tokens")
def chosen_tokens() -> Case:
    """At first 2 + 2 tokens are chosen of two samples, later 3 + 1."""
    batches = []
    for counts in ((2, 2), (2, 2), (3, 1)):
        batch = labelled([{"input_ids": torch.arange(12).reshape(2, 6) + sum(counts) + counts[0]}])[0]
        batch["chosen"] = torch.arange(6) < torch.tensor(counts)[:, None]
        batches.append(batch)
    return Case(Chosen(), chosen_loss, batches)
