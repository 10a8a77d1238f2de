"""Models of PyTorch's own layers, with the batch on axis 0 or 1, packed, recurrent, or in bags."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from families.base import CLASSES, VOCABULARY, Case, families_of, labelled, plain_loss, text_batches, vectors

family = families_of(__name__)


class Texts(nn.Module):
    """Embedded tokens through something that is given and returns (b, t, features), and a classifier of the mean."""

    def __init__(self, inner: nn.Module, apply: Callable[[nn.Module, Tensor, Tensor], Tensor], width: int = 12) -> None:
        super().__init__()
        self.embed, self.inner, self.head = nn.Embedding(VOCABULARY, 12), inner, nn.Linear(width, CLASSES)
        self.apply_inner = apply

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        h = self.apply_inner(self.inner, self.embed(ids), mask)
        if h.dim() == 2:
            return self.head(h)
        return self.head((h * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))


def text_loss(model: nn.Module, batch: Any) -> Tensor:
    """Return the cross-entropy of each text's class."""
    return F.cross_entropy(model(batch["input_ids"], batch["attention_mask"]), batch["labels"], reduction="none")


def texts(inner: nn.Module, apply: Callable[[nn.Module, Tensor, Tensor], Tensor], width: int = 12) -> Case:
    """Return a case of a model of texts."""
    return Case(Texts(inner, apply, width), text_loss, labelled(text_batches()))


def encoder(*, batch_first: bool, norm_first: bool = False) -> Case:
    """Return torch's TransformerEncoder."""
    layer = nn.TransformerEncoderLayer(12, 2, 16, batch_first=batch_first, norm_first=norm_first)
    inner = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def apply(module: nn.Module, h: Tensor, mask: Tensor) -> Tensor:
        if batch_first:
            return module(h, src_key_padding_mask=mask == 0)
        return module(h.transpose(0, 1), src_key_padding_mask=mask == 0).transpose(0, 1)

    return texts(inner, apply)


family("transformer-encoder", partial(encoder, batch_first=True))
family("transformer-encoder-pre-norm", partial(encoder, batch_first=True, norm_first=True))
family("transformer-encoder-time-first", partial(encoder, batch_first=False))


@family("transformer-seq2seq")
def transformer() -> Case:
    """torch's Transformer, its causal mask as long as the sequence."""

    def apply(module: Any, h: Tensor, mask: Tensor) -> Tensor:
        causal = nn.Transformer.generate_square_subsequent_mask(h.shape[1], dtype=h.dtype)
        return module(h, h.flip(1), tgt_mask=causal)

    return texts(nn.Transformer(12, 2, 1, 1, 16, batch_first=True), apply)


def attention(*, batch_first: bool, separate: bool = False) -> Case:
    """Return torch's MultiheadAttention, with a causal mask (t, t)."""
    inner = nn.MultiheadAttention(12, 2, batch_first=batch_first, kdim=12, vdim=8 if separate else 12)

    def apply(module: nn.Module, h: Tensor, mask: Tensor) -> Tensor:
        value = h[..., :8] if separate else h
        causal = torch.ones(h.shape[1], h.shape[1], dtype=torch.bool).triu(1)
        if batch_first:
            return module(h, h, value, attn_mask=causal, need_weights=False)[0]
        h, value = h.transpose(0, 1), value.transpose(0, 1)
        return module(h, h, value, attn_mask=causal, need_weights=False)[0].transpose(0, 1)

    return texts(inner, apply)


family("attention", partial(attention, batch_first=True))
family("attention-time-first", partial(attention, batch_first=False))
family("attention-separate-projections", partial(attention, batch_first=True, separate=True))


def recurrent(kind: type[nn.RNNBase], how: str, *, batch_first: bool = True, **options: Any) -> Case:
    """Return a recurrent network, read at every step or at its last state, from a packed sequence or not."""
    inner = kind(12, 8, batch_first=batch_first, **options)

    def apply(module: nn.Module, h: Tensor, mask: Tensor) -> Tensor:
        if how == "packed":
            packed = pack_padded_sequence(h, mask.sum(1), batch_first=True, enforce_sorted=False)
            return pad_packed_sequence(module(packed)[0], batch_first=True, total_length=h.shape[1])[0]
        if how == "initial":
            state = torch.tanh(h.mean(1))[None, :, :8].contiguous()
            return module(h, (state, state) if kind is nn.LSTM else state)[0]
        output, state = module(h if batch_first else h.transpose(0, 1))
        if how == "last":
            return (state[0] if kind is nn.LSTM else state)[-1]
        return output if batch_first else output.transpose(0, 1)

    return texts(inner, apply, 16 if options.get("bidirectional") else 8)


family("lstm", partial(recurrent, nn.LSTM, "steps"))
family("lstm-last-state", partial(recurrent, nn.LSTM, "last"))
family("lstm-initial-state", partial(recurrent, nn.LSTM, "initial"))
family("lstm-packed", partial(recurrent, nn.LSTM, "packed"))
family("lstm-time-first", partial(recurrent, nn.LSTM, "steps", batch_first=False))
family("lstm-two-ways", partial(recurrent, nn.LSTM, "steps", bidirectional=True, num_layers=2))
family("gru-last-state", partial(recurrent, nn.GRU, "last"))
family("rnn", partial(recurrent, nn.RNN, "steps"))


@family("lstm-cell")
def lstm_cell() -> Case:
    """A cell that is called step by step."""

    def apply(module: nn.Module, h: Tensor, mask: Tensor) -> Tensor:
        state = (h.new_zeros(len(h), 8), h.new_zeros(len(h), 8))
        for step in range(h.shape[1]):
            state = module(h[:, step], state)
        return state[0]

    return texts(nn.LSTMCell(12, 8), apply, 8)


class Bags(nn.Module):
    """The mean of a bag's embeddings."""

    def __init__(self, mode: str = "mean", *, offsets: bool) -> None:
        super().__init__()
        self.bag, self.head, self.offsets = nn.EmbeddingBag(VOCABULARY, 8, mode=mode), nn.Linear(8, CLASSES), offsets

    def forward(self, ids: Tensor, starts: Tensor) -> Tensor:
        return self.head(self.bag(ids, starts) if self.offsets else self.bag(ids))


def bag_loss(model: nn.Module, batch: Any) -> Tensor:
    """Return the cross-entropy of each bag's class."""
    return F.cross_entropy(model(batch["ids"], batch["starts"]), batch["labels"], reduction="none")


def one_bag(batch: Any, sample: int) -> Any:
    """Return the batch of one bag."""
    stops = [*batch["starts"].tolist()[1:], len(batch["ids"])]
    ids = batch["ids"][int(batch["starts"][sample]) : stops[sample]]
    return {"labels": batch["labels"][sample : sample + 1], "starts": torch.zeros(1, dtype=torch.long), "ids": ids}


def bags(mode: str, *, offsets: bool) -> Case:
    """Return an EmbeddingBag, of equally long rows or of a flat list with offsets."""
    model, batches = Bags(mode, offsets=offsets), []
    for b, t in ((3, 7), (5, 5), (1, 6)):
        generator = torch.Generator().manual_seed(b)
        ids, labels = torch.randint(VOCABULARY, (b, t), generator=generator), torch.arange(b) % CLASSES
        starts = torch.arange(b) * t
        starts[1:] -= torch.arange(b - 1) % 2  # of unequal lengths
        batches.append({"labels": labels, "starts": starts, "ids": ids.flatten() if offsets else ids})
    return Case(model, bag_loss, batches, cut=one_bag) if offsets else Case(model, bag_loss, batches)


family("embedding-bag", partial(bags, "mean", offsets=False))
family("embedding-bag-sum", partial(bags, "sum", offsets=False))
family("embedding-bag-max", partial(bags, "max", offsets=False))
family("embedding-bag-offsets", partial(bags, "mean", offsets=True))


def stack(*layers: nn.Module, shape: tuple[int, ...] = (3, 8, 8)) -> Case:
    """Return layers one after the other, the last of which yields scores."""
    return Case(nn.Sequential(*layers), plain_loss, vectors(*shape))


@family("vgg")
def vgg() -> Case:
    """Convolutions with biases, in-place activations, pooling, large linear layers."""
    conv = [nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(6, 6, 3, padding=1), nn.ReLU(inplace=True)]
    head = [nn.Flatten(), nn.Linear(96, 12), nn.ReLU(inplace=True), nn.Dropout(), nn.Linear(12, CLASSES)]
    return stack(*conv, nn.MaxPool2d(2), *head)


class Dense(nn.Module):
    """DenseNet's block: batch norm and activation before convolutions, whose outputs are concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(4 * n) for n in (1, 2, 3))
        self.convs = nn.ModuleList(nn.Conv2d(4 * n, 4, 3, padding=1, bias=False) for n in (1, 2))
        self.head = nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        features = [self.stem(x)]
        for norm, conv in zip(self.norms, self.convs, strict=False):
            features.append(conv(F.relu(norm(torch.cat(features, 1)), inplace=True)))
        return self.head(F.relu(self.norms[-1](torch.cat(features, 1))).mean((2, 3)))


@family("densenet")
def densenet() -> Case:
    """Concatenated features."""
    return Case(Dense(), plain_loss, vectors(3, 8, 8))


def normed(norm: Callable[[], nn.Module], *, last: bool = False) -> Case:
    """Return a network with a normalisation over channels, on axis 1 or (``last``) in flattened vectors."""
    if last:
        return stack(nn.Flatten(), nn.Linear(192, 8), norm(), nn.GELU(), nn.Linear(8, CLASSES))
    return stack(nn.Conv2d(3, 8, 3), norm(), nn.GELU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, CLASSES))


family("group-norm", partial(normed, lambda: nn.GroupNorm(4, 8)))
family("instance-norm", partial(normed, lambda: nn.InstanceNorm2d(8, affine=True)))
family("instance-norm-tracking", partial(normed, lambda: nn.InstanceNorm2d(8, affine=True, track_running_stats=True)))
family("batch-norm", partial(normed, lambda: nn.BatchNorm2d(8)))
family("batch-norm-without-statistics", partial(normed, lambda: nn.BatchNorm2d(8, track_running_stats=False)))
family("rms-norm", partial(normed, lambda: nn.RMSNorm(8), last=True))
family("layer-norm-without-bias", partial(normed, lambda: nn.LayerNorm(8, bias=False), last=True))
family("prelu", partial(normed, lambda: nn.PReLU(8)))
family("weight-norm", partial(normed, lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 1))))
family("spectral-norm", partial(normed, lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8)), last=True))


@family("conv-transpose")
def conv_transpose() -> Case:
    """An autoencoder's way up."""
    up = nn.ConvTranspose2d(4, 4, 3, stride=2, padding=1)
    return stack(nn.Conv2d(3, 4, 3), nn.ReLU(), up, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, CLASSES))


@family("conv-3d")
def conv_3d() -> Case:
    """Volumes, in dilated groups, with reflected borders."""
    first = nn.Conv3d(2, 4, 3, padding=1, padding_mode="replicate", groups=2)
    rest = [nn.GELU(), nn.Conv3d(4, 4, 2, dilation=2, stride=2), nn.Flatten(), nn.Linear(32, CLASSES)]
    return stack(first, *rest, shape=(2, 6, 6, 6))


@family("bilinear")
def bilinear() -> Case:
    """Two inputs at once."""

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.both = nn.Linear(6, 4), nn.Bilinear(4, 6, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            return self.both(self.first(x), x)

    return Case(Pair(), plain_loss, vectors(6))
