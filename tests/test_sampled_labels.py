"""Labels drawn from the model: their distribution, what they depend on, and the rows they make, against autograd."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from models import Mlp, batches, data, loss, make
from numpy.testing import assert_allclose, assert_array_equal
from scipy.stats import chi2
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ooc_influence import (
    Batching,
    BudgetBatches,
    Dropout,
    GradientStore,
    Recipe,
    Split,
    Storage,
    cross_entropy,
    extract_gradients,
    extract_shards,
    init_store,
    token_cross_entropy,
)
from ooc_influence.compress import Identity
from ooc_influence.errors import InputError, MismatchError, UnsupportedModelError
from ooc_influence.extract import binary_cross_entropy, losses, sampled_labels
from ooc_influence.hf.padding import pad_right

CLASSES, WIDTH = 6, 7
SAMPLED = {"labels": "sampled", "dtype": "float32", "compressor": Identity()}


class Words(nn.Module):
    """A language model of six words without a look at earlier ones, so that padding on either side changes nothing."""

    def __init__(self):
        super().__init__()
        self.embed, self.last = nn.Embedding(CLASSES, WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, ids):
        return self.last(torch.tanh(self.embed(ids)))


def words_loss(model, batch):
    ids, labels = batch
    return token_cross_entropy(model(ids)[:, :-1], labels[:, 1:])


def sequences(n=13, seed=0):
    """Rows of words of different lengths; the first targets of some do not count."""
    generator = np.random.default_rng(seed)
    rows = [generator.integers(0, CLASSES, length).tolist() for length in generator.integers(5, 11, n)]
    return [(ids, [-100] * (1 + index % 3) + ids[1 + index % 3 :]) for index, ids in enumerate(rows)]


def collate(rows, *, left=False):
    sides = [[row[0], row[1]] for row in rows]
    if left:
        sides = [[ids[::-1], labels[::-1]] for ids, labels in sides]
    ids, _ = pad_right([ids for ids, _ in sides], 0)
    labels, _ = pad_right([labels for _, labels in sides], -100)
    return (ids.flip(1), labels.flip(1)) if left else (ids, labels)


def cut(rows, size, **options):
    return [collate(rows[low : low + size], **options) for low in range(0, len(rows), size)]


def drawn_labels(seed, row, logits):
    """The labels of a row's targets, from logits (m, classes), by the definition, in float64."""
    uniform = losses._hash_to_unit(seed, np.full(len(logits), row), np.arange(len(logits)))
    sums = np.cumsum(torch.softmax(logits.double(), 1).detach().numpy(), axis=1)
    return torch.tensor([int((total <= number).sum()) for total, number in zip(sums, uniform, strict=True)])


def frequencies_agree(drawn, probabilities):
    """Assert Pearson's chi-square of draws (m,) below its 99.9 % quantile."""
    counts = np.bincount(drawn, minlength=len(probabilities))
    assert counts.sum() == len(drawn)
    assert (counts[probabilities == 0] == 0).all()
    possible = probabilities > 0
    expected = len(drawn) * probabilities[possible]
    statistic = (((counts[possible] - expected) ** 2) / expected).sum()
    assert statistic <= chi2.ppf(0.999, max(1, possible.sum() - 1))


# what is drawn


@pytest.mark.parametrize("seed", [0, 1, -3])
def test_labels_are_distributed_as_the_model_says(seed):
    probabilities = np.array([0.5, 0.0, 0.25, 0.2, 0.04, 0.01])
    logits = torch.log(torch.tensor(probabilities, dtype=torch.float32)).expand(20_000, -1) + 3.0
    labels = torch.full((20_000,), 5)
    with sampled_labels(seed) as draws, draws.rows(40):
        values = draws.labels(logits, np.arange(20_000), 20_000).numpy()
    frequencies_agree(values, probabilities)
    with sampled_labels(seed) as draws, draws.rows(40):
        assert_allclose(
            cross_entropy(logits, labels),
            F.cross_entropy(logits, torch.from_numpy(values), reduction="none"),
            rtol=1e-5,
        )


def test_tokens_rows_and_seeds_are_drawn_independently():
    logits = torch.zeros(1, CLASSES)
    numbers = np.arange(4000)

    def draws_of(seed, rows, targets):
        uniform = losses._hash_to_unit(seed, rows, targets)
        return losses._invert(logits.expand(len(uniform), -1), torch.from_numpy(uniform)).numpy()

    zeros = np.zeros_like(numbers)
    one = draws_of(0, numbers, zeros)
    for seed, rows, targets in (
        (0, zeros, numbers),
        (1, numbers, zeros),
        (0, numbers, zeros + 1),
        (0, numbers + 1, zeros),
    ):
        other = draws_of(seed, rows, targets)
        frequencies_agree(CLASSES * one + other, np.full(CLASSES**2, 1 / CLASSES**2))


def test_binary_marks_are_distributed_as_the_model_says():
    logits = torch.tensor([-2.0, 0.0, 1.5, float("-inf")]).expand(5000, -1)
    with sampled_labels(0) as draws, draws.rows(0):
        marks = draws.marks(logits).numpy()
    for values, probability in zip(marks.T, torch.sigmoid(logits[0]).numpy(), strict=True):
        frequencies_agree(values.astype(int), np.array([1 - probability, probability]))


def test_outside_of_the_context_labels_are_those_given():
    logits, labels = torch.randn(4, 5), torch.tensor([0, 1, 2, 3])
    expected = F.cross_entropy(logits, labels, reduction="none")
    with sampled_labels(0) as draws, draws.rows(0):
        assert not torch.allclose(cross_entropy(logits, labels), expected)
    assert_allclose(cross_entropy(logits, labels), expected, rtol=1e-6)
    marks = (torch.arange(20).view(4, 5) % 2).float()
    expected = F.binary_cross_entropy_with_logits(logits, marks, reduction="none").mean(1)
    assert_array_equal(binary_cross_entropy(logits, marks), expected)


def test_positions_that_do_not_count_stay_so():
    model, rows = make(Words), sequences()
    ids, labels = collate(rows)
    with sampled_labels(3) as draws, draws.rows(10):
        values = words_loss(model, (ids, labels))
    expected = []
    for index in range(len(rows)):
        counted = torch.nonzero(labels[index, 1:] != -100).flatten()
        logits = model(ids[index])[:-1][counted]
        expected.append(F.cross_entropy(logits, drawn_labels(3, 10 + index, logits)).item())
    assert_allclose(values.detach(), expected, rtol=1e-6)
    nothing = torch.full_like(labels, -100)
    with sampled_labels(3) as draws, draws.rows(10):
        assert not words_loss(model, (ids, nothing)).any()


def test_tokens_in_pieces_are_drawn_as_in_one_call():
    logits = torch.randn(3, 8, CLASSES, generator=torch.Generator().manual_seed(0))
    labels = torch.zeros(3, 8, dtype=torch.int64)
    sample = torch.arange(3).repeat_interleave(8)
    with sampled_labels(0) as draws, draws.rows(0):
        whole = token_cross_entropy(logits, labels, reduction="sum")
    with sampled_labels(0) as draws, draws.rows(0):
        pieces = sum(token_cross_entropy(logits[:, low : low + 3], labels[:, low : low + 3], reduction="sum")
                     for low in (0, 3, 6))  # fmt: skip
    with sampled_labels(0) as draws, draws.rows(0):
        order = torch.randperm(3)[sample].argsort(stable=True)  # samples in another order
        flat = cross_entropy(logits.flatten(0, 1)[order], labels.flatten()[order], sample=sample[order])
    assert_allclose(pieces, whole, rtol=1e-6)
    assert_allclose(torch.zeros(3).index_add(0, sample[order], flat), whole, rtol=1e-6)


class Largest(TorchDispatchMode):
    """Notes the bytes of the largest tensor made meanwhile, views aside."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        inputs, outputs = ([t for t in tree_leaves(tree) if torch.is_tensor(t)] for tree in ((args, kwargs), out))
        before = {each.untyped_storage().data_ptr() for each in inputs}
        made = [each.nbytes for each in outputs if each.untyped_storage().data_ptr() not in before]
        self.size = max([self.size, *made])
        return out


def test_drawing_takes_memory_for_some_tokens_only():
    tokens, classes = 300, 20_000
    logits = torch.zeros(1, 1, dtype=torch.bfloat16).expand(tokens, classes)
    with sampled_labels(0) as draws, draws.rows(0), Largest() as largest:
        values = draws.labels(logits, np.arange(tokens), tokens)
    assert 0 < largest.size <= 8 * losses._AT_ONCE_CPU
    assert abs(values.double().mean() / classes - 0.5) < 0.06


def test_a_seed_that_was_forgotten_or_samples_that_are_unclear_are_refused():
    logits, labels = torch.randn(6, 5), torch.zeros(6, dtype=torch.int64)
    with sampled_labels(0), pytest.raises(InputError, match="rows"):
        cross_entropy(logits, labels)

    def flattened(model, batch):
        return cross_entropy(logits, labels).view(2, 3).mean(1)

    with sampled_labels(0) as draws, draws.rows(0), pytest.raises(InputError, match="each of the 2 losses"):
        draws.run(flattened, None, None)
    with sampled_labels(0) as draws, draws.rows(np.arange(2)), pytest.raises(InputError, match="token_cross_entropy"):
        cross_entropy(logits, labels)


def test_a_loss_inside_a_gradient_checkpoint_is_refused():
    from torch.utils.checkpoint import checkpoint

    model, (x, y) = make(Mlp), data(Mlp, 4)

    def checkpointed(model, batch):
        return checkpoint(lambda x: cross_entropy(model(x), y), x, use_reentrant=False)

    with sampled_labels(0) as draws, draws.rows(0):
        value = checkpointed(model, (x, y)).sum()
        with pytest.raises(UnsupportedModelError, match="gradient checkpoint"):
            value.backward()


# rows


def rows_of(store):
    return store.rows()


def expected_rows(model, rows, *, seed=0, first=0):
    """Autograd's gradients (n, p) and losses (n,) of the mean loss with labels drawn by the definition."""
    gradients, values = [], []
    for number, (ids, labels) in enumerate(rows):
        targets = torch.tensor(labels[1:])
        logits = model(torch.tensor(ids))[:-1][targets != -100]
        value = F.cross_entropy(logits, drawn_labels(seed, first + number, logits))
        embed, weight, bias = torch.autograd.grad(value, [model.embed.weight, model.last.weight, model.last.bias])
        gradients.append(torch.cat([embed.flatten(), torch.cat([weight, bias[:, None]], 1).flatten()]))
        values.append(value.item())
    return torch.stack(gradients), values


def test_rows_are_autograds_gradients_of_the_loss_with_the_labels_drawn(tmp_path):
    model, rows = make(Words), sequences()
    store = extract_gradients(model, words_loss, cut(rows, 4), tmp_path / "s", label_seed=5, **SAMPLED)
    assert [module.layer.name for module in store.mask.modules] == ["embed", "last"]
    expected, values = expected_rows(model, rows, seed=5)
    assert store.attrs["labels"] == {"kind": "sampled", "seed": 5, "draws": 1}
    assert store.attrs["verification"]["checked"]
    assert_allclose(store.loss, values, rtol=1e-5)
    assert_allclose(rows_of(store), expected, atol=1e-5)
    plain = extract_gradients(model, words_loss, cut(rows, 4), tmp_path / "p", dtype="float32", compressor=Identity())
    assert np.abs(rows_of(plain) - rows_of(store)).max() > 0.1
    assert plain.attrs["labels"] == {"kind": "dataset"}


def test_draws_do_not_depend_on_batches_order_or_padding(tmp_path):
    model, rows = make(Words), sequences(17)
    lengths = [len(ids) for ids, _ in rows]
    sources = {
        "ones": cut(rows, 1),
        "five": cut(rows, 5),
        "left": cut(rows, 5, left=True),
        "budget": BudgetBatches(rows, collate, lengths=lengths, tokens=20),
    }
    stores = [
        extract_gradients(model, words_loss, source, tmp_path / name, **SAMPLED) for name, source in sources.items()
    ]
    for store in stores[1:]:
        assert_allclose(rows_of(store), rows_of(stores[0]), atol=1e-6)
    other = extract_gradients(model, words_loss, cut(rows, 5), tmp_path / "seed", label_seed=1, **SAMPLED)
    assert np.abs(rows_of(other) - rows_of(stores[0])).max() > 0.1


def budget(rows, tokens=20):
    return BudgetBatches(rows, collate, lengths=[len(ids) for ids, _ in rows], tokens=tokens)


@pytest.mark.parametrize(("source", "runs"), [(lambda rows: cut(rows, 4), 20), (budget, 30)])
def test_a_resumed_run_draws_the_same(tmp_path, monkeypatch, source, runs):
    monkeypatch.setattr("ooc_influence.extract.data._BLOCK_ROWS", 64)
    model, rows = make(Words), sequences(100)
    options = SAMPLED | {"storage": Storage(chunk_rows=8, group_chunks=2)}
    whole = extract_gradients(model, words_loss, source(rows), tmp_path / "whole", **options)
    calls = 0

    def failing(model, batch):
        nonlocal calls
        calls += 1
        if calls > runs:
            raise KeyboardInterrupt
        return words_loss(model, batch)

    with pytest.raises(KeyboardInterrupt):
        extract_gradients(model, failing, source(rows), tmp_path / "parts", **options)
    part = GradientStore.open(tmp_path / "parts")
    assert 0 < part.n < len(rows)
    resumed = extract_gradients(model, words_loss, source(rows), tmp_path / "parts", **options)
    assert_array_equal(rows_of(resumed), rows_of(whole))
    assert_array_equal(resumed.loss, whole.loss)
    more = extract_gradients(
        model, words_loss, source(rows), tmp_path / "parts", batching=Batching(first_row=100), **options
    )
    expected, _ = expected_rows(model, rows, first=100)
    assert_allclose(rows_of(more)[100:], expected, atol=1e-5)


def test_shards_draw_what_one_writer_draws(tmp_path):
    model, rows = make(Words), sequences(40)
    options = SAMPLED | {"storage": Storage(chunk_rows=4, group_chunks=2), "draws": 2}
    whole = extract_gradients(model, words_loss, budget(rows), tmp_path / "whole", **options)
    init_store(model, tmp_path / "parts", 80, **options)
    for index in (1, 2, 0):
        store = extract_gradients(model, words_loss, budget(rows), tmp_path / "parts", shard=(index, 3), **options)
    assert store.n == 80
    assert_allclose(rows_of(store), rows_of(whole), atol=1e-6)


def test_other_labels_or_another_seed_do_not_continue_a_store(tmp_path):
    model, (x, y) = make(Mlp), data(Mlp, 6)
    options = {"compressor": Dropout(50)}
    extract_gradients(model, loss, batches(x, y, 3), tmp_path / "s", labels="sampled", **options)
    for other in ({}, {"labels": "sampled", "label_seed": 1}, {"labels": "sampled", "draws": 2},
                  {"labels": "sampled", "sample": 3}):  # fmt: skip
        with pytest.raises(MismatchError, match=r"labels|sample"):
            extract_gradients(model, loss, batches(x, y, 3), tmp_path / "s", **options, **other)
    with pytest.raises(MismatchError, match="losses"):
        extract_gradients(model, loss, batches(x.flip(0) * 3, y, 3), tmp_path / "s", labels="sampled", **options)


def test_a_store_without_a_record_has_the_labels_of_its_data(tmp_path):
    model, (x, y) = make(Mlp), data(Mlp, 6)
    store = extract_gradients(model, loss, batches(x, y, 3), tmp_path / "s", compressor=Dropout(50))
    with GradientStore.open(store.path, mode="a") as opened:
        opened.record(labels=None)
    extract_gradients(model, loss, batches(x, y, 3), tmp_path / "s", compressor=Dropout(50))
    with pytest.raises(MismatchError, match="labels"):
        extract_gradients(model, loss, batches(x, y, 3), tmp_path / "s", compressor=Dropout(50), labels="sampled")


def own_loss(model, batch):
    x, y = batch
    return F.cross_entropy(model(x), y, reduction="none")


def test_a_loss_that_draws_nothing_is_told_of_and_recorded(tmp_path):
    model, (x, y) = make(Mlp), data(Mlp, 6)
    options = {"compressor": Dropout(50), "dtype": "float32"}
    plain = extract_gradients(model, own_loss, batches(x, y, 3), tmp_path / "plain", **options)
    with pytest.warns(match="draws no labels"):
        store = extract_gradients(model, own_loss, batches(x, y, 3), tmp_path / "s", labels="sampled", **options)
    assert_array_equal(rows_of(store), rows_of(plain))
    more = batches(*data(Mlp, 9), 3)
    with pytest.warns(match="draws no labels"):
        store = extract_gradients(model, own_loss, more, tmp_path / "s", labels="sampled", **options)
    assert store.n == 9
    assert store.attrs["labels"] == {"kind": "dataset", "requested": {"kind": "sampled", "seed": 0, "draws": 1}}
    with pytest.raises(MismatchError, match=r"labels|losses"):
        extract_gradients(model, loss, batches(*data(Mlp, 12), 3), tmp_path / "s", labels="sampled", **options)
    with pytest.raises(InputError, match="draws=2"):
        extract_gradients(model, own_loss, batches(x, y, 3), tmp_path / "d", labels="sampled", draws=2, **options)
    init_store(model, tmp_path / "planned", 6, labels="sampled", **options)
    with pytest.warns(match="draws no labels"):
        store = extract_gradients(
            model, own_loss, batches(x, y, 3), tmp_path / "planned", shard=(0, 1), labels="sampled", **options
        )
    assert store.attrs["labels"]["kind"] == "dataset"


class Rounding(nn.Module):
    """Two classes; the number that decides is next to the boundary between them, on a side that the batch decides."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, x):
        out = self.layer(x[:, :4])
        move = x[:, 4] - (out[:, 0] - out[:, 1]).detach() + (1e-4 if len(x) > 2 else -1e-4)
        return out + torch.stack([move, 0 * move], 1)


def test_samples_that_the_self_check_runs_again_have_the_labels_they_had_in_their_batch(tmp_path):
    edge = torch.from_numpy(losses._hash_to_unit(0, np.arange(8), np.zeros(8, np.int64)))
    x = torch.cat([torch.randn(8, 4), (edge / (1 - edge)).log()[:, None].float()], 1)
    sizes = []

    def loss(model, x):
        sizes.append(len(x))
        return cross_entropy(model(x), torch.ones(len(x), dtype=torch.int64))

    model = make(Rounding)
    store = extract_gradients(model, loss, [x], tmp_path / "s", **SAMPLED)
    assert store.attrs["verification"]["share"] == 1
    assert sizes == [8, 2]  # the second run, of two samples by themselves, was accepted
    assert_allclose(store.loss, -edge.log(), rtol=1e-3)  # class 0
    with sampled_labels(0) as draws, draws.rows(0):
        cross_entropy(model(x), torch.ones(8, dtype=torch.int64))
        with draws.repeating([7, 2]):
            again = loss(model, x[[7, 2]])
        with draws.rows(np.array([7, 2])):
            repeated = loss(model, x[[7, 2]])
    assert_allclose(again.detach(), store.loss[[7, 2]], rtol=1e-3)
    assert_allclose(repeated.detach(), -(1 - edge[[7, 2]]).log(), rtol=1e-3)  # class 1


# several draws, some samples


def test_each_sample_has_its_draws_ids_and_columns(tmp_path):
    model, rows = make(Words), sequences(9)
    lengths = np.array([len(ids) for ids, _ in rows])
    chosen = [0, 3, 5, 8]
    expected, _ = expected_rows(model, [rows[number] for number in chosen] * 3)
    ids = [f"doc{number}" for number in range(9)]
    for name, source in {
        "list": cut(rows, 4),
        "loader": torch.utils.data.DataLoader(rows, batch_size=4, collate_fn=collate),
        "budget": BudgetBatches(rows, collate, lengths=lengths, tokens=24),
    }.items():
        store = extract_gradients(
            model, words_loss, source, tmp_path / name, ids=ids, columns={"length": lengths}, draws=3, sample=4,
            **SAMPLED,
        )  # fmt: skip
        assert store.n == 12
        names = [f"doc{number}{draw}" for draw in ("", "/draw1", "/draw2") for number in chosen]
        assert_array_equal(store.ids(), names)
        assert_array_equal(store.column("length"), np.tile(lengths[chosen], 3))
        assert_allclose(rows_of(store), expected, atol=1e-5)
        assert store.attrs["labels"]["draws"] == 3
        assert store.attrs["sample"] == 4
    each = rows_of(store).reshape(3, 4, -1)
    assert np.abs(each[0] - each[1]).max() > 0.1  # the draws differ


def test_streams_are_drawn_several_times_but_not_sampled(tmp_path):
    model, rows = make(Words), sequences(9)
    expected, _ = expected_rows(model, rows * 2)

    def stream(start):
        assert start == 0
        return iter(cut(rows, 4))

    options = SAMPLED | {"check_gradients": False}
    store = extract_gradients(
        model, words_loss, stream, tmp_path / "s", ids=list(range(9)), columns={"first": lambda batch: batch[0][:, 0]},
        draws=2, **options,
    )  # fmt: skip
    assert_allclose(rows_of(store), expected, atol=1e-5)
    assert_array_equal(store.ids(), [f"{number}{draw}" for draw in ("", "/draw1") for number in range(9)])
    assert_array_equal(store.column("first"), [ids[0] for ids, _ in rows] * 2)
    with pytest.raises(InputError, match="number of samples"):
        extract_gradients(model, words_loss, stream, tmp_path / "t", sample=3, **options)
    with pytest.raises(InputError, match="read again"):
        extract_gradients(model, words_loss, iter(cut(rows, 4)), tmp_path / "t", draws=2, **options)
    with pytest.raises(InputError, match="ids as a sequence"):
        extract_gradients(model, words_loss, cut(rows, 4), tmp_path / "t", draws=2, ids=lambda batch: [], **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": "model"}, "labels"),
        ({"draws": 2}, "draws=1"),
        ({"labels": "sampled", "draws": 0}, "draws >= 1"),
        ({"sample": 0}, "sample >= 1"),
        ({"labels": "sampled", "label_seed": 0.5}, "label_seed"),
    ],
)
def test_invalid_options_are_refused(tmp_path, options, message):
    model, (x, y) = make(Mlp), data(Mlp, 4)
    with pytest.raises(InputError, match=message):
        extract_gradients(model, loss, batches(x, y, 2), tmp_path / "s", **options)


def recipe():
    model, rows = make(Words), sequences(30)
    return Recipe(model, words_loss, {"train": Split(cut(rows, 4), ids=[f"d{number}" for number in range(30)])})


def test_shards_of_a_recipe_have_sampled_labels(tmp_path):
    options = SAMPLED | {"draws": 2, "sample": 20, "storage": Storage(chunk_rows=4, group_chunks=1)}
    name = f"{__file__}:recipe"
    store = extract_shards(name, tmp_path / "s", shards=3, **options)
    data = recipe()
    split = data.split("train")
    whole = extract_gradients(data.model, words_loss, split.batches, tmp_path / "w", ids=split.ids, **options)
    assert store.n == whole.n == 40
    assert_array_equal(store.ids(), whole.ids())
    assert_allclose(rows_of(store), rows_of(whole), atol=1e-6)


# Hugging Face models and the command line


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:gradients cover")
def test_losses_of_hugging_face_models_draw_labels(tmp_path):
    import tiny_hf

    hf = tiny_hf.hf
    path = tiny_hf.write(tmp_path / "data.jsonl", tiny_hf.documents())
    folder = tiny_hf.make_model(tmp_path / "model")
    options = {"dtype": "float32", "compressor": Identity(), "modules": "lm_head", "labels": "sampled", "label_seed": 2}
    store = hf.extract(folder, path, tmp_path / "s", sample=9, draws=2, **options)
    job = hf.prepare(folder, path)
    chosen = np.unique(np.linspace(0, len(job.samples) - 1, 9).round().astype(int))
    assert store.n == 18
    for row in range(18):
        batch = job.batches.load(chosen[[row % 9]])
        targets = batch["labels"][0, 1:] != -100
        logits = job.model(batch["input_ids"]).logits[0, :-1][targets]
        value = F.cross_entropy(logits, drawn_labels(2, row, logits))
        (gradient,) = torch.autograd.grad(value, [job.model.lm_head.weight])
        assert_allclose(store.rows(row, row + 1)[0], gradient.flatten(), atol=1e-5)
        assert_allclose(store.loss[row], value.item(), rtol=1e-5)
    batched = hf.extract(folder, path, tmp_path / "one", sample=9, draws=2, batch_size=1, **options)
    assert_allclose(batched.rows(), store.rows(), atol=1e-5)
    sharded = hf.extract_shards(folder, path, tmp_path / "shards", shards=2, sample=9, draws=2, **options)
    assert_allclose(sharded.rows(), store.rows(), atol=1e-5)
    assert_array_equal(sharded.ids(), store.ids())
    with pytest.raises(InputError, match="random signs"):
        hf.extract(folder, path, tmp_path / "c", like=store, labels="sampled", output="curvature")


@pytest.mark.parametrize("kind", ["cross_entropy", "binary_cross_entropy"])
def test_classifiers_draw_labels(kind):
    from ooc_influence.hf.losses import ClassificationLoss

    class Output:
        logits = torch.randn(200, 3, generator=torch.Generator().manual_seed(0))

    class Model:
        config = None

        def __call__(self, **inputs):
            return Output

    labels = torch.zeros(200, dtype=torch.int64) if kind == "cross_entropy" else torch.zeros(200, 3)
    batch = {"input_ids": None, "attention_mask": None, "labels": labels}
    with sampled_labels(0) as draws, draws.rows(0):
        values = ClassificationLoss(kind)(Model(), batch)
        assert draws.used
    if kind == "cross_entropy":
        drawn = [int(drawn_labels(0, row, Output.logits[row][None])) for row in range(200)]
        expected = F.cross_entropy(Output.logits, torch.tensor(drawn), reduction="none")
    else:
        uniform = losses._hash_to_unit(0, np.repeat(np.arange(200), 3), np.tile(np.arange(3), 200)).reshape(200, 3)
        marks = (torch.from_numpy(uniform) < torch.sigmoid(Output.logits.double())).float()
        expected = F.binary_cross_entropy_with_logits(Output.logits, marks, reduction="none").mean(1)
    assert_allclose(values, expected, rtol=1e-5)


def test_the_command_line_samples_labels(tmp_path):
    from click.testing import CliRunner

    from ooc_influence.cli.main import cli

    def run(*arguments):
        result = CliRunner().invoke(cli, [*arguments, "--recipe", f"{__file__}:recipe"])
        assert result.exit_code == 0, result.output
        return result.output

    run("extract", "--store", str(tmp_path / "train"), "--k", "60")
    flags = ("--labels", "sampled", "--label-seed", "3", "--draws", "4", "--sample", "10")
    text = run("extract", "--store", str(tmp_path / "rows"), "--like", str(tmp_path / "train"), *flags)
    assert "labels sampled from the model, 4 draws of each sample, seed 3" in text
    store = GradientStore.open(tmp_path / "rows")
    assert store.n == 40
    assert store.mask_digest == GradientStore.open(tmp_path / "train").mask_digest
    assert store.attrs["labels"] == {"kind": "sampled", "seed": 3, "draws": 4}
    run("init", "--store", str(tmp_path / "parts"), "--like", str(tmp_path / "train"), *flags)
    for shard in ("0/2", "1/2"):
        run("extract", "--store", str(tmp_path / "parts"), "--like", str(tmp_path / "train"), "--shard", shard, *flags)
    assert_allclose(GradientStore.open(tmp_path / "parts").rows(), store.rows(), atol=2e-3)
