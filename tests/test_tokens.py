"""Influence token by token: sums are the scores, single tokens are autograd's own gradients against the query."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from numpy.testing import assert_allclose, assert_array_equal
from torch import nn

from ooc_influence import (
    BudgetBatches,
    Dropout,
    Eigenbasis,
    Gaussian,
    GradientStore,
    KroneckerBasis,
    LoGra,
    Sjlt,
    extract_gradients,
    fit_curvature,
    token_influence,
    top_influential,
)
from ooc_influence.errors import InputError, MismatchError, UnsupportedModelError
from ooc_influence.extract import direction as direction_module
from ooc_influence.extract import directional_derivatives, parameter_direction, tapped

N, Q, TOKENS, WORDS = 48, 4, 9, 13
pytestmark = [pytest.mark.filterwarnings(f"ignore:{text}") for text in ("gradients cover", "LoGra leaves out")]


class Decoder(nn.Module):
    """Causal attention, normalisation, a bias, an unembedding that is the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(WORDS, 16), nn.LayerNorm(16)
        self.qkv, self.out, self.up = nn.Linear(16, 48), nn.Linear(16, 16), nn.Linear(16, 16)
        self.head = nn.Linear(16, WORDS, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        h = self.embed(tokens)
        q, k, v = (part[:, None] for part in self.qkv(self.norm(h)).chunk(3, 2))
        h = h + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True)[:, 0])
        return self.head(h + torch.tanh(self.up(h)))


def token_losses(model, batch):
    """Means over the targets of each sample; padding is token 0."""
    (tokens,) = batch
    targets = tokens[:, 1:]
    losses = F.cross_entropy(model(tokens)[:, :-1].mT, targets, reduction="none")
    losses = losses * (targets != 0)
    return F.pad(losses / (targets != 0).sum(1, keepdim=True), (1, 0))


def loss(model, batch):
    return token_losses(model, batch).sum(1)


def make(seed=0, kind=Decoder):
    torch.manual_seed(seed)
    return kind().eval()


def data(n, seed, size=5):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, WORDS, (n, TOKENS), generator=generator)
    lengths = torch.randint(3, TOKENS + 1, (n,), generator=generator)
    tokens[torch.arange(TOKENS) >= lengths[:, None]] = 0
    return [(part,) for part in tokens.split(size)]


def stores(folder, compressor, *, dtype="float32", **options):
    model, pair = make(), (data(Q, 1), data(N, 0))
    train = extract_gradients(model, loss, pair[1], folder / "t", compressor=compressor, dtype=dtype, **options)
    query = extract_gradients(model, loss, pair[0], folder / "q", like=train, dtype="float32")
    return model, pair, query, train


COMPRESSORS = {
    "uniform": Dropout(k=300),
    "importance": Dropout(k=300, sampling="importance", pilot=32),
    "kronecker": Dropout(k=300, basis=KroneckerBasis(samples=32)),
    "everything": Dropout(k=1600, basis=KroneckerBasis(samples=32)),
    "eigenbasis": Dropout(k=300, reduce=Eigenbasis(24)),
    "whitened": Dropout(k=300, basis=KroneckerBasis(samples=32), reduce=Eigenbasis(24)),
    "sjlt": Sjlt(k=60),
    "gaussian": Gaussian(k=60),
}


@pytest.mark.parametrize("kind", COMPRESSORS)
def test_a_rows_product_is_a_derivative(tmp_path, kind):
    """Of every compressor: the adjoint of extraction."""
    model, (_, batches), _, train = stores(tmp_path, COMPRESSORS[kind])
    vector = np.random.default_rng(0).standard_normal(train.k).astype(np.float32)
    direction = parameter_direction(model, train, vector)
    with tapped(model, [], torch.device("cpu")):
        found = torch.cat([directional_derivatives(model, loss, batch, direction).along for batch in batches])
    wanted = train.rows() @ vector
    assert_allclose(found, wanted, rtol=1e-4, atol=1e-5 * abs(wanted).max())


@pytest.mark.parametrize("normalize", ["none", "train", "cosine"])
@pytest.mark.parametrize("kind", ["uniform", "kronecker", "whitened"])
def test_shares_add_up_to_scores(tmp_path, kind, normalize):
    model, pair, query, train = stores(tmp_path, COMPRESSORS[kind])
    if kind == "uniform":
        fit_curvature(train)
    lists = top_influential(query, train, 6, normalize=normalize)
    for found in token_influence(query, train, model, token_losses, pair, lists):
        sides = lists.of_query(found.query)
        assert found.rows.tolist() == [row for side in sides.values() for row, *_ in side]
        assert_allclose(found.scores, [score for side in sides.values() for *_, score in side])
        sums = [values.sum() for values in found.tokens]
        assert_allclose(sums, found.scores, rtol=1e-4)
        assert_allclose(found.query_tokens.sum(), found.scores[found.scores > 0].sum(), rtol=1e-4)


def gradient(model, batch, sample, token):
    """Autograd's gradient of a token's loss, by parameter."""
    names, values = zip(*model.named_parameters(), strict=True)
    losses = token_losses(model, batch)
    return dict(zip(names, torch.autograd.grad(losses[sample, token], values, allow_unused=True), strict=True))


def test_single_tokens_are_their_own_gradients(tmp_path):
    """With every entry kept, plain products: each token's gradient times the other side's whole gradient."""
    model, pair, query, train = stores(tmp_path, Dropout(k=1600))
    assert train.k == sum(p.numel() for p in model.parameters())
    (found,) = token_influence(query, train, model, token_losses, pair, top=2, queries=[1], curvature=False,
                               normalize="none")  # fmt: skip
    values = torch.autograd.grad(loss(model, (pair[0][0][0][1:2],))[0], model.parameters())
    whole = dict(zip(dict(model.named_parameters()), values, strict=True))
    for row, tokens in zip(found.rows, found.tokens, strict=True):
        batch, sample = pair[1][row // 5], row % 5
        for token in range(TOKENS):
            own = gradient(model, batch, sample, token)
            wanted = sum(float((own[name] * whole[name]).sum()) for name in own if own[name] is not None)
            assert_allclose(tokens[token], wanted, rtol=1e-3, atol=1e-6 * abs(found.scores).max())


@pytest.mark.parametrize("dtype", ["float16", "int8", "sign"])
def test_representations_change_the_unit_alone(tmp_path, dtype):
    """Shares follow the exact gradients; their sum is near the stored score."""
    model, pair, query, train = stores(tmp_path, COMPRESSORS["everything"], dtype=dtype)
    found = token_influence(query, train, model, token_losses, pair, top=3)
    sums = np.concatenate([[values.sum() for values in each.tokens] for each in found])
    scores = np.concatenate([each.scores for each in found])
    rtol = {"float16": 1e-2, "int8": 0.1, "sign": 1.0}[dtype]
    assert_allclose(sums, scores, rtol=rtol)
    assert np.corrcoef(sums, scores)[0, 1] > 0.9


def test_lists_by_exact_scores_count_by_their_stored_ones(tmp_path):
    from ooc_influence import rerank

    model, pair, query, train = stores(tmp_path, COMPRESSORS["kronecker"])
    exact = rerank(query, train, model, loss, pair, 12, 3)
    found = token_influence(query, train, model, token_losses, pair, exact, queries=[2, 0])
    assert [each.query for each in found] == [2, 0]
    stored = exact.proponents.stored_scores(2)
    assert_allclose(found[0].scores[:3], [stored[row] for row in found[0].rows[:3].tolist()], rtol=1e-5)


def test_rows_of_checkpoints_and_budgets(tmp_path):
    """Means over checkpoints; samples that are batched by length."""
    model, pair = make(), (data(Q, 1), data(N, 0))
    earlier = make()
    with torch.no_grad():
        for parameter in earlier.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    torch.save(earlier.state_dict(), tmp_path / "earlier.pt")
    samples = [row for (part,) in pair[1] for row in part]

    def collate(rows):
        return (torch.stack(rows),)

    budget = BudgetBatches(samples, collate, lengths=[int((row != 0).sum()) for row in samples], tokens=40)
    how = {"compressor": COMPRESSORS["kronecker"], "dtype": "float32", "checkpoints": str(tmp_path / "earlier.pt")}
    train = extract_gradients(model, loss, budget, tmp_path / "t", **how)
    query = extract_gradients(model, loss, pair[0], tmp_path / "q", like=train, dtype="float32")
    for found in token_influence(query, train, model, token_losses, (pair[0], budget), top=4):
        assert_allclose([values.sum() for values in found.tokens], found.scores, rtol=1e-3)


class Halved(torch.autograd.Function):
    """Without a forward-mode derivative."""

    @staticmethod
    def forward(ctx, x):
        return x / 2

    @staticmethod
    def backward(ctx, gradient):
        return gradient / 2


class Custom(Decoder):
    def forward(self, tokens):
        return Halved.apply(super().forward(tokens))


def test_without_forward_mode_it_differentiates_twice(tmp_path, monkeypatch):
    model, batches = make(kind=Custom), data(N, 0)
    train = extract_gradients(model, loss, batches, tmp_path / "t", compressor=Dropout(k=200), dtype="float32")
    direction = parameter_direction(model, train, np.ones(200, np.float32))
    with tapped(model, [], torch.device("cpu")):
        found = directional_derivatives(model, loss, batches[0], direction)
        assert not any(parameter.requires_grad for parameter in model.parameters())
    assert_allclose(found.along, train.rows(0, 5).sum(1), rtol=1e-3, atol=1e-6)
    assert_allclose(found.losses, train.loss[:5], rtol=1e-5)

    def fails(*_, **__):
        raise RuntimeError("no derivative")

    monkeypatch.setattr(direction_module.torch.autograd, "grad", fails)
    with pytest.raises(UnsupportedModelError, match="attn_implementation"):
        directional_derivatives(model, loss, batches[0], direction)


def test_refusals(tmp_path):
    model, pair, query, train = stores(tmp_path, COMPRESSORS["kronecker"])
    with pytest.raises(InputError, match=r"to return \(b, t\)"):
        token_influence(query, train, model, loss, pair)
    with pytest.raises(MismatchError, match="token losses that add up to its loss"):
        token_influence(query, train, model, token_losses, (pair[0], data(N, 5)))
    with pytest.raises(MismatchError, match="give the model"):
        token_influence(query, train, make(1), token_losses, pair)
    with pytest.raises(InputError, match="single queries"):
        token_influence(query, train, model, token_losses, pair, average_queries=True)
    with pytest.raises(InputError, match="one damping"):
        token_influence(query, train, model, token_losses, pair, damping=[0.1, 1.0])
    with pytest.raises(InputError, match="queries below 4"):
        token_influence(query, train, model, token_losses, pair, queries=[4])
    (tmp_path / "logra").mkdir()
    projected = stores(tmp_path / "logra", LoGra(4, 4))[2:]
    with pytest.raises(InputError, match="LoGra's projections"):
        token_influence(*projected, model, token_losses, pair, curvature=False)


def test_a_dropped_query_has_no_lists(tmp_path):
    model, pair, query, train = stores(tmp_path, COMPRESSORS["kronecker"])
    GradientStore.open(query.path, mode="a").drop([1])
    found = token_influence(query.path, train, model, token_losses, pair, queries=[1])
    assert_array_equal(found[0].rows, [])
    assert found[0].tokens == []
