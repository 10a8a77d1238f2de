"""Extraction against torch.func in float64, its invariances, and the model left as it was."""

from __future__ import annotations

import copy
import warnings
from collections import namedtuple

import numpy as np
import oracle
import pytest
import torch
from models import LINEAR, Encoder, Mlp, Twice, batches, data, loss, make, sample_loss
from numpy.testing import assert_allclose, assert_array_equal
from scipy.stats import spearmanr
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from ooc_influence import (
    Batching,
    Dropout,
    Eigenbasis,
    GradientStore,
    OocInfluenceWarning,
    Storage,
    cross_entropy,
    extract_gradients,
    fit_fisher,
    influence_scores,
    token_cross_entropy,
)
from ooc_influence.errors import InputError, MismatchError, NonFiniteError, StoreExistsError, UnsupportedModelError
from ooc_influence.extract.data import Shard
from ooc_influence.extract.selection import select_layers

pytestmark = pytest.mark.filterwarnings("ignore:gradients cover")
SMALL = Storage(chunk_rows=16, group_chunks=2)


def entries(kind):
    model = make(kind)
    return sum(p.numel() for name in LINEAR[kind] for p in model.get_submodule(name).parameters())


def extract(path, kind=Mlp, n=50, size=8, k=None, model=None, **options):
    """Run an extraction of ``kind``; k = p and float32 unless told otherwise."""
    if "like" not in options:
        options.setdefault("compressor", Dropout(k=k or entries(kind)))
        if model is None:
            options.setdefault("modules", LINEAR[kind])
    options = {"dtype": "float32", "storage": SMALL} | options
    source = options.pop("batches", None)
    source = batches(*data(kind, n), size) if source is None else source
    return extract_gradients(model or make(kind), options.pop("loss", loss), source, path, **options)


def full_gradients(kind, n=50):
    layers = select_layers(make(kind), LINEAR[kind]).layers
    return oracle.per_sample_gradients(make(kind), sample_loss, list(zip(*data(kind, n), strict=True)), layers)


@pytest.mark.parametrize("kind", [Mlp, Encoder, Twice])
@pytest.mark.parametrize("k", [None, 60])
def test_rows_are_the_masked_gradients(tmp_path, kind, k):
    store = extract(tmp_path / "s.zarr", kind, k=k)
    expected = oracle.keep(full_gradients(kind), store.mask)
    assert store.shape == (50, k or entries(kind))
    assert_allclose(store.rows(), expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    assert_allclose(store.small("grad_norm"), np.linalg.norm(expected, axis=1), rtol=1e-5)
    losses = loss(make(kind).eval(), data(kind, 50)).detach().numpy()
    assert_allclose(store.small("loss"), losses, rtol=1e-5)


def test_a_model_that_is_one_linear_layer(tmp_path):
    torch.manual_seed(0)
    model = nn.Linear(12, 5)
    store = extract(tmp_path / "s.zarr", model=model, compressor=Dropout(k=65))
    expected = oracle.per_sample_gradients(
        model, sample_loss, list(zip(*data(Mlp, 50), strict=True)), select_layers(model, None).layers
    )
    assert_allclose(store.rows(), expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("size", [1, 3, 50])
def test_batch_size_changes_nothing(tmp_path, size):
    expected = extract(tmp_path / "a.zarr", Encoder, size=8).rows()
    assert_allclose(extract(tmp_path / "b.zarr", Encoder, size=size).rows(), expected, rtol=0,
                    atol=1e-5 * np.abs(expected).max())  # fmt: skip


@pytest.mark.parametrize("chunk_rows", [1, 5, 64])
def test_chunks_change_nothing(tmp_path, chunk_rows):
    expected = extract(tmp_path / "a.zarr").rows()
    assert_array_equal(extract(tmp_path / "b.zarr", storage=Storage(chunk_rows=chunk_rows)).rows(), expected)


def test_padding_changes_nothing(tmp_path):
    """Target tokens of a padded sequence give the gradients of the sequence alone."""

    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.up, self.head = nn.Embedding(9, 8), nn.Linear(8, 16), nn.Linear(16, 9)

        def forward(self, x):
            return self.head(torch.tanh(self.up(self.embed(x))))

    def token_loss(model, batch):
        return token_cross_entropy(model(batch["x"]), batch["y"])

    torch.manual_seed(0)
    model = Tokens()
    x = torch.randint(0, 9, (6, 10))
    y = torch.randint(0, 9, (6, 10))
    lengths = [10, 3, 7, 1, 5, 10]
    for row, length in enumerate(lengths):
        y[row, length:] = -100
    padded = [{"x": x, "y": y}]
    alone = [{"x": x[row : row + 1, :length], "y": y[row : row + 1, :length]} for row, length in enumerate(lengths)]
    stores = [
        extract(tmp_path / f"{number}.zarr", model=model, loss=token_loss, batches=source, compressor=Dropout(k=120))
        for number, source in enumerate((padded, alone))
    ]
    assert_allclose(stores[0].rows(), stores[1].rows(), atol=1e-6)


@pytest.mark.filterwarnings("ignore:.*effective dimension")
def test_end_to_end_scores_against_the_oracle(tmp_path):
    """k = p, float32: 1e-4 of the largest; float16 storage ranks the same."""
    g = full_gradients(Mlp)
    matrix = oracle.fisher(g)
    expected = oracle.scores(g[:20], g, oracle.damping(matrix, rows=len(g)), matrix)
    for dtype in ("float32", "float16"):
        train = extract(tmp_path / f"train-{dtype}.zarr", dtype=dtype)
        query = extract(tmp_path / f"query-{dtype}.zarr", n=20, like=train, dtype=dtype)
        fit_fisher(train)
        found = influence_scores(query, train).compute()
        if dtype == "float32":
            assert_allclose(found, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
        for row, other in zip(found, expected, strict=True):
            assert spearmanr(row, other).statistic > 0.9999


def snapshot(model):
    return {
        "parameters": {name: value.clone() for name, value in model.state_dict().items()},
        "flags": [parameter.requires_grad for parameter in model.parameters()],
        "modes": [module.training for module in model.modules()],
        "grads": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "hooks": [len(module._forward_hooks) for module in model.modules()],
        "fused": torch.backends.mha.get_fastpath_enabled(),
    }


@pytest.mark.parametrize("failure", [None, "loss", "backward", "interrupt"])
def test_the_model_is_left_as_it_was(tmp_path, failure):
    model = make(Encoder)
    model.train()
    model.encoder.eval()
    model.last.bias.requires_grad_(False)
    model.embed.weight.grad = torch.ones_like(model.embed.weight)
    before = copy.deepcopy(snapshot(model))

    def failing(model, batch):
        assert not model.training
        losses = loss(model, batch)
        if failure == "loss":
            raise RuntimeError("planned")
        if failure == "interrupt":
            raise KeyboardInterrupt
        if failure == "backward":
            losses.register_hook(lambda _: (_ for _ in ()).throw(RuntimeError("planned")))
        return losses

    if failure is None:
        extract(tmp_path / "s.zarr", Encoder, model=model, loss=failing)
    else:
        with pytest.raises(KeyboardInterrupt if failure == "interrupt" else RuntimeError):
            extract(tmp_path / "s.zarr", Encoder, model=model, loss=failing)
    after = snapshot(model)
    for name, value in before["parameters"].items():
        assert_array_equal(after["parameters"][name], value)
    assert [None if grad is None else grad.tolist() for grad in after["grads"]] == [
        None if grad is None else grad.tolist() for grad in before["grads"]
    ]
    for name in ("flags", "modes", "hooks", "fused"):
        assert after[name] == before[name]


def test_no_parameter_needs_a_gradient_and_none_is_computed(tmp_path):
    model = make(Mlp).requires_grad_(False)
    with torch.no_grad():
        store = extract(tmp_path / "s.zarr", model=model)
    assert_array_equal(store.rows(), extract(tmp_path / "t.zarr").rows())
    assert all(parameter.grad is None for parameter in model.parameters())


class Moved:
    """Not a tensor, tuple or dict, but it has ``.to``."""

    def __init__(self, x, y):
        self.x, self.y = x, y

    def to(self, device):
        return Moved(self.x.to(device), self.y.to(device))


Named = namedtuple("Named", ["x", "y"])


@pytest.mark.parametrize("form", ["dict", "named", "nested", "object", "loader"])
def test_forms_of_batches(tmp_path, form):
    expected = extract(tmp_path / "a.zarr").rows()
    make_batch, unpack = {
        "dict": (lambda x, y: {"x": x, "y": y}, lambda b: (b["x"], b["y"])),
        "named": (Named, lambda b: (b.x, b.y)),
        "nested": (lambda x, y: [{"x": (x,)}, y, "a string"], lambda b: (b[0]["x"][0], b[1])),
        "object": (Moved, lambda b: (b.x, b.y)),
        "loader": (None, lambda b: b),
    }[form]
    if form == "loader":
        source = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*data(Mlp, 50)), batch_size=8)
    else:
        source = [make_batch(x, y) for x, y in batches(*data(Mlp, 50), 8)]
    store = extract(tmp_path / "b.zarr", batches=source, loss=lambda model, batch: loss(model, unpack(batch)))
    assert_array_equal(store.rows(), expected)
    again = extract(tmp_path / "b.zarr", batches=source, loss=lambda model, batch: loss(model, unpack(batch)))
    assert again.n == 50


def test_ids_and_columns(tmp_path):
    _, y = data(Mlp, 50)
    options = {
        "ids": [f"doc-{number}" for number in range(50)],
        "columns": {"label": lambda batch: batch[1], "tokens": np.arange(50), "score": np.linspace(0, 1, 50),
                    "ok": y == 2, "source": ["a", "b"] * 25},
    }  # fmt: skip
    store = extract(tmp_path / "s.zarr", loss_kind="cross_entropy", **options)
    assert store.ids([3, 49]).tolist() == ["doc-3", "doc-49"]
    assert_array_equal(store.column("label"), y)
    assert_array_equal(store.column("tokens"), np.arange(50))
    assert_allclose(store.column("score"), np.linspace(0, 1, 50))
    assert_array_equal(store.column("ok"), y == 2)
    assert store.column("source").tolist() == ["a", "b"] * 25
    assert store.layout.columns == {
        "label": "int64",
        "tokens": "int64",
        "score": "float64",
        "ok": "bool",
        "source": "str",
    }
    assert store.attrs["loss_kind"] == "cross_entropy"
    with pytest.raises(InputError, match=r"50 values of example_id.*received 5"):
        extract(tmp_path / "t.zarr", ids=list("abcde"))


@pytest.mark.parametrize("stop", [1, 3, 6])
@pytest.mark.parametrize("form", ["list", "generator", "callable"])
def test_a_stopped_run_resumes_bit_for_bit(tmp_path, stop, form):
    """Stopped in the middle of a chunk: the straddling batch is computed again and its committed rows dropped."""
    source = batches(*data(Mlp, 50), 8)
    computed = []

    def counted(model, batch):
        computed.append(len(batch[0]))
        if len(computed) == stop + 1 and stopping:
            raise KeyboardInterrupt
        return loss(model, batch)

    def rest(start):
        for first, (x, y) in zip(range(0, 50, 8), source, strict=True):
            if first + len(x) > start:
                yield x[max(0, start - first) :], y[max(0, start - first) :]

    def make_source():
        return {"callable": rest, "generator": iter(source), "list": source}[form]

    stopping = True
    with pytest.raises(KeyboardInterrupt):
        extract(tmp_path / "s.zarr", batches=make_source(), loss=counted, check_gradients=False)
    partial = GradientStore.open(tmp_path / "s.zarr")
    assert partial.n == 8 * stop
    stopping, computed = False, []
    store = extract(tmp_path / "s.zarr", batches=make_source(), loss=counted, check_gradients=False)
    looked_at = 0 if form == "callable" else 8  # the first batch's losses show that the data is still the same
    assert sum(computed) == looked_at + 50 - 8 * stop
    whole = extract(tmp_path / "w.zarr")
    for name in ("gradients", "row_scale", "loss", "grad_norm", "commits"):
        files = sorted(path.name for path in (whole.path / name).glob("c.*"))
        assert files
        assert sorted(path.name for path in (store.path / name).glob("c.*")) == files
        for file in files:
            assert (store.path / name / file).read_bytes() == (whole.path / name / file).read_bytes()
    stamp = (store.path / "commits" / "c.0").stat().st_mtime_ns
    extract(tmp_path / "s.zarr", batches=make_source())
    assert (store.path / "commits" / "c.0").stat().st_mtime_ns == stamp


def test_a_straddling_batch(tmp_path):
    """A commit boundary inside a batch, as a kill leaves it: chunks of 16 rows, batches of 12."""
    x, y = data(Mlp, 50)
    whole = extract(tmp_path / "w.zarr", batches=batches(x, y, 12))
    extract(tmp_path / "s.zarr", batches=batches(x[:16], y[:16], 12))
    store = extract(tmp_path / "s.zarr", batches=batches(x, y, 12))
    assert_array_equal(store.rows(), whole.rows())
    extract(tmp_path / "t.zarr", batches=batches(x[:16], y[:16], 12))
    with pytest.raises(MismatchError, match=r"losses stored in .* the data or its order changed"):
        extract(tmp_path / "t.zarr", batches=batches(x.flip(0), y.flip(0), 12))


def test_more_data_is_appended(tmp_path):
    x, y = data(Mlp, 50)
    extract(tmp_path / "s.zarr", batches=batches(x[:30], y[:30], 8))
    for _ in range(2):  # the second time there is nothing to do
        store = extract(tmp_path / "s.zarr", batches=batches(x[30:], y[30:], 8), batching=Batching(first_row=30))
        assert store.n == 50
    assert_allclose(store.rows(), extract(tmp_path / "w.zarr").rows(), atol=1e-6)
    with pytest.raises(InputError, match="without a gap"):
        extract(tmp_path / "s.zarr", batching=Batching(first_row=51))


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_shards_fill_one_store(tmp_path, order):
    for position, index in enumerate(order):
        store = extract(tmp_path / "s.zarr", n=100, shard=(index, 3))
        assert store.n == 100 or position < 2
    assert store.n == store.committed == 100
    assert store.verify() == []
    assert_array_equal(store.rows(), extract(tmp_path / "w.zarr", n=100).rows())
    again = extract(tmp_path / "s.zarr", n=100, shard=(1, 3))
    assert again.n == 100


def test_shard_ranges_cover_all_rows():
    for rows, count, group_rows in ((100, 3, 8), (1, 1, 4), (1000, 7, 12), (48, 3, 16), (20, 3, 16)):
        ranges = [Shard(index, count).range(rows, group_rows) for index in range(count)]
        assert ranges[0][0] == 0
        assert ranges[-1][1] == rows
        assert [start for start, _ in ranges[1:]] == [stop for _, stop in ranges[:-1]]
        assert all(start % group_rows == 0 for start, _ in ranges)
    for wrong in ((3, 3), (-1, 2), (0, 0), (0,), "1/3", (0.0, 2)):
        with pytest.raises(InputError, match="shard"):
            Shard.parse(wrong)


def test_what_is_not_covered_is_named(tmp_path):
    with pytest.warns(
        OocInfluenceWarning, match=r"cover \d+\.\d% .*self_attn \(Multi\w+, 3[0-9.]+%\).*out_proj \(used"
    ):
        store = extract(tmp_path / "s.zarr", Encoder, modules=None)
    attention = sum(p.numel() for p in make(Encoder).encoder.self_attn.parameters())
    total = sum(p.numel() for p in make(Encoder).parameters())
    assert store.attrs["covered"] == pytest.approx(1 - attention / total)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        extract(tmp_path / "t.zarr")


def test_a_layer_that_gets_no_gradient_is_named(tmp_path):
    class Idle(Mlp):
        def forward(self, x):
            return self.last(torch.relu(self.first(x)))

    with pytest.warns(OocInfluenceWarning, match="no gradient reached these layers .* second"):
        extract(tmp_path / "s.zarr", model=make(Idle))


@pytest.mark.parametrize("modules", ["last", ["fir*", "last"], lambda name, module: name != "second"])
def test_selected_modules(tmp_path, modules):
    store = extract(tmp_path / "s.zarr", modules=modules, compressor=Dropout(k=50))
    names = [module.layer.name for module in store.mask.modules]
    assert names == (["last"] if modules == "last" else ["first", "last"])


def test_a_query_store_has_the_mask_of_its_train_store(tmp_path):
    train = extract(tmp_path / "t.zarr", k=60)
    query = extract(tmp_path / "q.zarr", like=train.path, n=10)
    assert query.mask_digest == train.mask_digest
    assert query.attrs["compressor"] == train.attrs["compressor"]
    assert_array_equal(query.rows(0, 8), train.rows(0, 8))
    with pytest.raises(MismatchError, match="the model of"):
        extract(tmp_path / "r.zarr", like=train, model=make(Mlp, seed=1))
    with pytest.raises(InputError, match="received both"):
        extract(tmp_path / "r.zarr", like=train, modules="last")


class Mixing(Mlp):
    def forward(self, x):
        return super().forward(x) + self.first(x).mean(0)[:5]


class SequenceFirst(Mlp):
    def forward(self, x):
        return self.last(torch.relu(self.first(x.view(len(x), -1, 12).transpose(0, 1)))).sum(0)


@pytest.mark.parametrize(
    ("what", "error", "match"),
    [
        ({"loss": lambda model, batch: loss(model, batch).mean()}, InputError, r"shape \(b,\); received shape \(\)"),
        ({"loss": lambda model, batch: 3.0}, InputError, "received float"),
        ({"loss": lambda model, batch: loss(model, batch).detach()}, InputError, "depend on a tapped layer"),
        ({"loss": lambda model, batch: loss(model, batch)[:3]}, UnsupportedModelError, "batch of 3 samples on axis 0"),
        ({"batches": []}, InputError, "the data set is empty"),
        ({"compressor": Dropout(k=10_000)}, InputError, "k <= p"),
        ({"dtype": "float8"}, InputError, "expected dtype one of"),
        ({"modules": "nothing"}, UnsupportedModelError, "at least one selected layer"),
        ({"model": nn.Flatten()}, UnsupportedModelError, "a model with parameters"),
        ({"model": make(Mixing)}, UnsupportedModelError, "depend on that sample alone"),
        ({"batching": Batching(first_row=5)}, InputError, "without a gap"),
        ({"ids": [object()] * 50}, InputError, "numbers, booleans or strings"),
    ],
)
def test_bad_input(tmp_path, what, error, match):
    with pytest.raises(error, match=match):
        extract(tmp_path / "s.zarr", **what)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("tokens", [2, 4, 8])
def test_the_batch_may_be_on_axis_1(tmp_path, tokens):
    """Also with as many tokens as samples, or a multiple, where shapes alone cannot tell."""
    torch.manual_seed(0)
    x, y = torch.randn(10, tokens * 12), torch.randint(0, 5, (10,))
    model, names = make(SequenceFirst), ["first", "last"]
    source = [(x[:8], y[:8]), (x[8:], y[8:])] if tokens == 8 else [(x[:2], y[:2]), (x[2:], y[2:])]
    store = extract(tmp_path / "s.zarr", model=model, modules=names, batches=source, compressor=Dropout(k=365))
    layers = select_layers(model, names).layers
    expected = oracle.per_sample_gradients(model, sample_loss, list(zip(x, y, strict=True)), layers)
    assert_allclose(store.rows(), expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_nonfinite_rows_are_named(tmp_path, where):
    def broken(model, batch):
        losses = loss(model, batch)
        if batch[0] is not last:
            return losses
        chosen = torch.arange(len(losses)) == 3
        if where == "loss":
            return losses * torch.where(chosen, torch.nan, 1.0)
        return losses + 10 * (torch.where(chosen, 1e38, 0.0) * (losses - losses.detach()))

    source = batches(*data(Mlp, 50), 8)
    last = source[4][0]
    with pytest.raises(NonFiniteError, match=r"rows 35 \(id-35\)") as caught:
        extract(tmp_path / "s.zarr", loss=broken, batches=source, ids=[f"id-{row}" for row in range(50)])
    assert caught.value.rows == [35]
    assert GradientStore.open(tmp_path / "s.zarr").n == 32


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"compressor": Dropout(k=40)}, "compressor"),
        ({"compressor": Dropout(k=50, seed=1)}, "compressor"),
        ({"modules": ["first", "last"]}, "selected layers"),
        ({"model": make(Mlp, seed=1)}, "the model of"),
        ({"dtype": "float16"}, "dtype"),
        ({"loss_kind": "other"}, "loss_kind"),
        ({"shard": (0, 1)}, "planned rows"),
        ({"ids": list(range(50))}, "per-row values"),
    ],
)
def test_another_run_does_not_touch_a_store(tmp_path, change, match):
    store = extract(tmp_path / "s.zarr", compressor=Dropout(k=50), n=20)
    before = store.rows()
    with pytest.raises((MismatchError, InputError), match=match):
        extract(tmp_path / "s.zarr", **({"compressor": Dropout(k=50)} | change))
    assert_array_equal(GradientStore.open(store.path).rows(), before)


def test_something_else_at_the_path(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_text("x")
    for name in ("file", "folder"):
        with pytest.raises(StoreExistsError, match="received something else"):
            extract(tmp_path / name)


def test_shuffled_batches_are_noticed(tmp_path):
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*data(Mlp, 50)), batch_size=8, shuffle=True)
    with pytest.warns(OocInfluenceWarning, match="shuffle=False"):
        extract(tmp_path / "s.zarr", batches=loader)


def test_losses_are_exact_near_zero():
    logits = torch.tensor([[60.0, 0.0, 0.0], [0.0, 1.0, -1.0]], dtype=torch.float32, requires_grad=True)
    labels = torch.tensor([0, 2])
    exact = np.log1p(np.array([2 * np.exp(-60.0), np.exp(1.0) + np.exp(2.0)]))
    found = cross_entropy(logits, labels)
    assert_allclose(found.detach(), exact, rtol=3e-6)
    found.sum().backward()
    double = logits.detach().double().requires_grad_()
    nn.functional.cross_entropy(double, labels, reduction="sum").backward()
    assert_allclose(logits.grad, double.grad, atol=1e-7)


def test_token_losses():
    torch.manual_seed(0)
    logits, labels = torch.randn(3, 4, 6), torch.randint(0, 6, (3, 4))
    labels[1, 2:] = labels[2] = -100
    each = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(3, 4)
    assert_allclose(token_cross_entropy(logits, labels, reduction="sum"), each.sum(1), rtol=1e-5)
    assert_allclose(token_cross_entropy(logits, labels), each.sum(1) / torch.tensor([4, 2, 1]), rtol=1e-5)
    with pytest.raises(InputError, match="reduction"):
        token_cross_entropy(logits, labels, reduction="none")
    with pytest.raises(InputError, match="logits"):
        cross_entropy(logits, labels)
    with pytest.raises(InputError, match="labels"):
        token_cross_entropy(logits, labels[:2])


class OneWay(Mlp):
    """Sample s reaches into sample s + 1, never back."""

    def forward(self, x):
        h = self.first(x)
        return self.last(torch.relu(torch.cat([h[:1], h[1:] + 0.5 * h[:-1]])))


@pytest.mark.filterwarnings("ignore:no gradient reached")
@pytest.mark.parametrize("check", [True, False])
def test_samples_that_mix_are_found(tmp_path, check):
    source = [(torch.randn(8, 12), torch.zeros(8, dtype=torch.long))]
    options = {"model": make(OneWay), "check_gradients": check}
    for batches_before in ([], [tuple(part[:1] for part in source[0])]):  # a first batch of one shows nothing
        with pytest.raises(UnsupportedModelError, match="depend on that sample alone"):
            extract(tmp_path / "s.zarr", batches=batches_before + source, **options)
    if not check:
        extract(tmp_path / "t.zarr", batches=source, batching=Batching(check_independence=False),
                modules=["first", "last"], compressor=Dropout(k=9), **options)  # fmt: skip


@pytest.mark.filterwarnings("ignore:no gradient reached")
def test_nan_in_the_first_batch_names_its_row(tmp_path):
    x, y = data(Mlp, 50)
    x = x.clone()
    x[2, 3] = float("nan")
    with pytest.raises(NonFiniteError, match="rows 2:"):
        extract(tmp_path / "s.zarr", batches=batches(x, y, 8))
    assert not (tmp_path / "s.zarr").exists()


def test_a_loss_of_another_model(tmp_path):
    other = make(Mlp, seed=3)
    with pytest.raises(InputError, match="reaches none of them"):
        extract(tmp_path / "s.zarr", loss=lambda model, batch: loss(other, batch))


def test_a_loss_that_differentiates_the_model(tmp_path):
    def penalty(model, batch):
        x = batch[0].requires_grad_()
        (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        return slope.square().sum(1)

    with pytest.raises(UnsupportedModelError, match="second derivatives"):
        extract(tmp_path / "s.zarr", loss=penalty)


@pytest.mark.parametrize("change", ["pruned", "weight_norm", "parametrized"])
def test_layers_with_computed_weights_are_left_out(tmp_path, change):
    model = make(Mlp)
    if change == "pruned":
        prune.random_unstructured(model.second, "weight", 0.5)
    elif change == "weight_norm":
        parametrizations.weight_norm(model.second)
    else:
        parametrize.register_parametrization(model.second, "weight", nn.Tanh())
    with pytest.warns(OocInfluenceWarning, match=r"second \(its weight is computed from other parameters, "):
        store = extract(tmp_path / "s.zarr", model=model, compressor=Dropout(k=50))
    assert [module.layer.name for module in store.mask.modules] == ["first", "last"]


def test_gradient_checkpointing(tmp_path):
    class Checkpointed(Mlp):
        reentrant = False

        def forward(self, x):
            part = lambda h: torch.relu(self.second(h))  # noqa: E731
            h = torch.relu(self.first(x))
            return self.last(h + torch.utils.checkpoint.checkpoint(part, h, use_reentrant=self.reentrant))

    store = extract(tmp_path / "s.zarr", model=make(Checkpointed))
    expected = extract(tmp_path / "t.zarr").rows()
    assert_allclose(store.rows(), expected, atol=1e-5 * np.abs(expected).max())
    Checkpointed.reentrant = True
    with pytest.raises(UnsupportedModelError, match="use_reentrant=False"):
        extract(tmp_path / "u.zarr", model=make(Checkpointed))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_models_of_other_dtypes(tmp_path, dtype):
    x, y = data(Mlp, 50)
    store = extract(tmp_path / "s.zarr", model=make(Mlp).to(dtype), batches=batches(x.to(dtype), y, 8))
    expected = extract(tmp_path / "t.zarr").rows()
    tolerance = 1e-5 if dtype == torch.float64 else 0.05
    assert_allclose(store.rows(), expected, atol=tolerance * np.abs(expected).max())


def test_autocast(tmp_path):
    def cast(model, batch):
        with torch.autocast("cpu", torch.bfloat16):
            return loss(model, batch)

    expected = extract(tmp_path / "t.zarr").rows()
    assert_allclose(extract(tmp_path / "s.zarr", loss=cast).rows(), expected, atol=0.05 * np.abs(expected).max())


def test_inference_mode(tmp_path):
    model = make(Mlp)
    with torch.inference_mode():
        x, y = (part.clone() for part in data(Mlp, 50))
        store = extract(tmp_path / "s.zarr", model=model, batches=batches(x, y, 8))
        inside = make(Mlp).train()
    assert_array_equal(store.rows(), extract(tmp_path / "t.zarr").rows())
    with (
        pytest.warns(OocInfluenceWarning, match="training mode"),
        pytest.raises(UnsupportedModelError, match="inference_mode"),
    ):
        extract(tmp_path / "u.zarr", model=inside)
    assert inside.training


def test_other_data_of_the_same_length_is_noticed(tmp_path):
    extract(tmp_path / "s.zarr")
    x, y = data(Mlp, 50, seed=7)
    with pytest.raises(MismatchError, match=r"losses stored in .* the data or its order changed"):
        extract(tmp_path / "s.zarr", batches=batches(x, y, 8))


def test_a_query_store_is_not_its_train_store(tmp_path):
    train = extract(tmp_path / "s.zarr")
    with pytest.raises(InputError, match="apart from its train store"):
        extract(tmp_path / "s.zarr", like=train)


def test_batches_whose_first_tensor_does_not_count_samples(tmp_path):
    """Their sizes are not believed: a finished run looks at every batch again, and stores nothing twice."""
    source = [{"epoch": torch.tensor([1]), "x": x, "y": y} for x, y in batches(*data(Mlp, 50), 8)]
    options = {"batches": source, "loss": lambda model, batch: loss(model, (batch["x"], batch["y"]))}
    expected = extract(tmp_path / "t.zarr").rows()
    for _ in range(2):
        assert_array_equal(extract(tmp_path / "s.zarr", **options).rows(), expected)


def test_shards_keep_the_grid_of_the_store(tmp_path):
    extract(tmp_path / "s.zarr", n=100, shard=(1, 2), storage=Storage(8, 2))
    with pytest.raises(MismatchError, match="chunk_rows"):
        extract(tmp_path / "s.zarr", n=100, shard=(0, 2), storage=Storage(20, 2))
    store = extract(tmp_path / "s.zarr", n=100, shard=(0, 2), storage=None)
    assert store.n == store.committed == 100
    with pytest.raises(InputError, match="expected 100 samples"):
        extract(tmp_path / "s.zarr", n=120, shard=(0, 2), storage=None)


def test_columns_take_their_type_from_all_values(tmp_path):
    store = extract(tmp_path / "s.zarr", columns={"mixed": [1] * 30 + [2.5] * 20})
    assert store.layout.columns == {"mixed": "float64"}
    assert store.column("mixed")[[0, 49]].tolist() == [1.0, 2.5]


@pytest.mark.parametrize(
    "what",
    [
        {"columns": {"c": np.zeros((50, 2))}},
        {"columns": {"c": ["a"] * 9 + [None] * 41}},
        {"columns": {"c": lambda batch: 3}},
        {"columns": ["c"]},
        {"columns": {"": list(range(50))}},
        {"ids": (str(row) for row in range(50))},
        {"ids": {"a": 1}},
        {"ids": [0.5] * 50},
        {"loss_kind": object()},
    ],
)
def test_bad_metadata_leaves_nothing(tmp_path, what):
    with pytest.raises(InputError):
        extract(tmp_path / "s.zarr", **what)
    assert not (tmp_path / "s.zarr").exists()


def test_a_place_that_cannot_be_written_is_refused_before_the_model_runs(tmp_path):
    (tmp_path / "file").write_text("x")

    def never(model, batch):
        raise AssertionError

    with pytest.raises(InputError, match="a folder to write to"):
        extract(tmp_path / "file" / "deep" / "s.zarr", loss=never)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_rows_equal_cpu_rows(tmp_path):
    expected = extract(tmp_path / "cpu.zarr", Encoder).rows()
    model = make(Encoder)
    found = extract(tmp_path / "gpu.zarr", Encoder, model=model, device="cuda").rows()
    assert next(model.parameters()).device.type == "cpu"
    assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())


def test_a_store_made_and_filled_by_another_meanwhile_gets_no_row_twice(tmp_path):
    """The other extraction runs inside this one's first loss."""
    state = {"first": True}

    def racing(model, batch):
        if state["first"]:
            state["first"] = False
            extract(tmp_path / "s.zarr")
        return loss(model, batch)

    store = extract(tmp_path / "s.zarr", loss=racing)
    assert store.n == 50
    assert_array_equal(store.rows(), extract(tmp_path / "t.zarr").rows())


def test_finished_batches_of_unknown_size_are_not_computed_again(tmp_path):
    source = [Moved(x, y) for x, y in batches(*data(Mlp, 50), 8)]
    modes = []

    def watched(model, batch):
        modes.append(torch.is_grad_enabled())
        return loss(model, (batch.x, batch.y))

    extract(tmp_path / "s.zarr", batches=source, loss=watched, check_gradients=False)
    assert modes == [True] * 7
    modes.clear()
    extract(tmp_path / "s.zarr", batches=source, loss=watched, check_gradients=False)
    assert modes == [False] * 7


def test_first_row_and_sharding_exclude_each_other(tmp_path):
    with pytest.raises(InputError, match="first_row 0 for a store with planned rows"):
        extract(tmp_path / "s.zarr", n=100, shard=(0, 2), batching=Batching(first_row=10))


def test_ids_have_to_be_the_data_s(tmp_path):
    extract(tmp_path / "s.zarr", ids=list(range(50)))
    with pytest.raises(MismatchError, match=r"ids stored in .* the data or its order changed"):
        extract(tmp_path / "s.zarr", ids=list(range(1, 51)))
    with pytest.raises(InputError, match="expected 50 values of example_id"):
        extract(tmp_path / "t.zarr", ids=list(range(60)))
    with pytest.raises(InputError, match="expected 50 values of columns/c"):
        extract(tmp_path / "t.zarr", columns={"c": np.zeros(49)})


@pytest.mark.parametrize("layer", [nn.Dropout(0.5), nn.BatchNorm1d(8)])
def test_a_model_in_training_mode_is_used_in_evaluation_mode_and_that_is_said_once(tmp_path, layer):
    x, y = torch.randn(20, 6), torch.arange(20) % 3
    model = nn.Sequential(nn.Linear(6, 8), layer, nn.Linear(8, 3))
    both = [(x[:10], y[:10]), (x[10:], y[10:])]

    def sample_loss(model, batch):
        return cross_entropy(model(batch[0]), batch[1])

    quiet = extract_gradients(model.eval(), sample_loss, both, tmp_path / "a.zarr", compressor=Dropout(k=40))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        store = extract_gradients(
            model.train(), sample_loss, both, tmp_path / "b.zarr",
            compressor=Dropout(k=40, sampling="importance", reduce=Eigenbasis(r=20)),
        )  # fmt: skip
    assert [str(w.message) for w in said if "training mode" in str(w.message)] == [
        "the model is in training mode with layers that behave otherwise there (1): gradients are those of evaluation "
        "mode"
    ]
    assert model.training
    assert_allclose(store.loss, quiet.loss)
