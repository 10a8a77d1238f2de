"""The Hugging Face front: files, tokens, models, and rows that are those of the model itself."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from numpy.testing import assert_allclose, assert_array_equal
from test_cli import run  # noqa: F401 - a fixture
from tiny_hf import (
    MARKS,
    SMALL,
    datasets,
    documents,
    make_model,
    make_tokenizer,
    samples,
    texts,
    transformers,
    write,
)  # fmt: skip

from ooc_influence import Dropout, Eigenbasis, GradientStore, Storage, hf, influence_scores
from ooc_influence.errors import InputError, MissingExtraError
from ooc_influence.hf import job_of
from ooc_influence.hf.pretokenised import IGNORED

pytestmark = MARKS


@pytest.mark.parametrize("name", ["d.jsonl", "d.csv", "d.parquet", "d.txt", "folder"])
def test_kinds_of_files(tmp_path, name):
    found = hf.open_documents(write(tmp_path / name, documents()))
    assert list(found["text"]) == texts()
    if name != "d.txt":
        assert found[3]["name"] == "doc3"


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "blank.jsonl").write_text("\n\n")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "empty.csv").write_text("")
    (tmp_path / "header.csv").write_text("text,name\n")
    for name in ("empty.jsonl", "blank.jsonl", "empty.txt", "empty.csv", "header.csv"):
        with pytest.raises(InputError, match=f"{name}; received none: it is empty$"):
            hf.open_documents(tmp_path / name)
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"text": \n')
    (tmp_path / "what.xyz").write_text("a")
    (tmp_path / "folder").mkdir()
    for name in ("bad.jsonl", "what.xyz", "folder", "missing.jsonl"):
        with pytest.raises(InputError, match=name):
            hf.open_documents(tmp_path / name)
    with pytest.raises(InputError, match=r"field 'txt'.*text, name"):
        samples(tmp_path, hf.Fields(text="txt"))
    pair = datasets.DatasetDict(
        {"a": datasets.Dataset.from_list(documents(2)), "b": datasets.Dataset.from_list(documents(3))}
    )
    pair.save_to_disk(tmp_path / "pair")
    assert len(hf.open_documents(tmp_path / "pair", "b")) == 3
    with pytest.raises(InputError, match="--split"):
        hf.open_documents(tmp_path / "pair")


@pytest.mark.parametrize("length", [2, 3, 7, 16])
def test_every_token_is_a_target_once(tmp_path, length):
    found = samples(tmp_path, hf.Fields(text="text", id="name", keep=("source",)), length=length)
    words = make_tokenizer()
    seen = {}
    for row in range(len(found)):
        sample = found[row]
        assert len(sample["input_ids"]) == found.lengths[row] <= length
        targets = [token for token in sample["labels"][1:] if token != IGNORED]
        assert len(targets) == found.n_tokens[row] > 0
        assert sample["labels"][0] == IGNORED
        seen.setdefault(int(found.document[row]), []).extend(targets)
    for number, text in enumerate(texts()):
        assert seen.get(number, []) == words(text)["input_ids"][1:]
    ids = found.ids()[:]
    assert len(set(ids)) == len(found)
    assert all(name.split("#")[0] == f"doc{number}" for name, number in zip(ids, found.document, strict=True))
    kept = found.columns()
    assert list(kept["source"][:]) == ["ab"[number % 2] for number in found.document]
    assert found.without_target == sum(len(text.split()) == 1 for text in texts())


@pytest.mark.parametrize(
    ("kind", "text", "more", "said"),
    [
        ("gpt2", "w1", 1, ["1 document without a target token is left out"]),
        ("gpt2", "w1", 2, ["2 documents without a target token are left out"]),
        ("bert", "w5 " * 40, 1, ["1 text is cut to 16 tokens"]),
        ("bert", "w5 " * 40, 2, ["2 texts are cut to 16 tokens"]),
        ("bert", "w5", 1, []),
    ],
)
def test_what_is_left_out_or_cut_is_said_where_there_is_some(tmp_path, caplog, kind, text, more, said):
    from ooc_influence.hf.extraction import prepare

    rows = [{"text": own, "y": 1} for own in ["w1 w2"] + [text] * more]
    fields = {"text": "text"} | ({"label": "y"} if kind == "bert" else {})
    prepare(make_model(tmp_path / "m", kind), write(tmp_path / "d.jsonl", rows), **fields)
    assert [record.getMessage() for record in caplog.records if record.name.startswith("ooc")] == said


def test_only_the_completion_is_a_target(tmp_path):
    rows = [{"q": "w1 w2 w3", "a": "w4 w5"}, {"q": "w1", "a": ""}, {"q": "", "a": "w7"}]
    found = samples(tmp_path, hf.Fields(prompt="q", completion="a"), rows)
    words = make_tokenizer()
    assert found[0]["input_ids"] == words("w1 w2 w3 w4 w5 <eos>")["input_ids"]
    assert found[0]["labels"] == [IGNORED] * 3 + words("w4 w5 <eos>")["input_ids"]
    assert found[1]["labels"] == [IGNORED, 1]
    assert found[2]["labels"] == [IGNORED, 1]


@pytest.mark.parametrize("form", ["messages", "pair"])
def test_chats(tmp_path, form):
    turns = [{"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w3"}]
    rows = [{"m": turns, "q": "w1 w2", "a": "w3"}]
    fields = hf.Fields(messages="m") if form == "messages" else hf.Fields(prompt="q", completion="a", chat=True)
    found = samples(tmp_path, fields, rows, template=True)
    words = make_tokenizer()
    assert found[0]["input_ids"] == words("user: w1 w2 <eos> bot: w3 <eos>")["input_ids"]
    assert found[0]["labels"] == [IGNORED] * 5 + words("w3 <eos>")["input_ids"]
    with pytest.raises(InputError, match="chat template"):
        samples(tmp_path, fields, rows)


@pytest.mark.parametrize(
    "bad", [{}, {"text": "a", "prompt": "b", "completion": "c"}, {"prompt": "a"}, {"label": "l", "messages": "m"}]
)
def test_fields_that_do_not_go_together(bad):
    with pytest.raises(InputError, match="one of text, prompt"):
        hf.Fields(**bad)


def whole(model):
    return Dropout(k=sum(p.numel() for p in model.parameters()))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_rows_of_a_language_model(tmp_path, reduction):
    """They are the gradients of each piece's loss, and the pieces' sums those of the document."""
    folder = make_model(tmp_path / "model")
    loaded = hf.load(folder)
    data = write(tmp_path / "d.jsonl", documents())
    store = hf.extract(loaded, data, tmp_path / "s.zarr", id="name", keep=["score"], compressor=whole(loaded.model),
                       dtype="float32", tokens=64, max_length=8, reduction=reduction)  # fmt: skip
    assert store.attrs["loss_kind"] == f"token_cross_entropy_{reduction}"
    found = samples(tmp_path, hf.Fields(text="text"), length=8)
    assert_array_equal(store.column("n_tokens"), found.n_tokens)
    assert_array_equal(store.column("score"), found.document / 2)
    for row in range(0, len(found), 5):
        sample = found[row]
        ids = torch.tensor(sample["input_ids"])
        loaded.model.zero_grad()
        value = F.cross_entropy(loaded.model(ids[None]).logits[0, :-1], ids[1:], reduction=reduction)
        value.backward()
        assert_allclose(store.loss[row], value.item(), rtol=1e-5)
        norm = np.sqrt(sum(float((p.grad**2).sum()) for p in loaded.model.parameters()))
        assert_allclose(store.grad_norm[row], norm, rtol=1e-4)


@pytest.mark.parametrize("turns", ["last", "all"])
def test_rows_of_chats(tmp_path, turns):
    """The loss is the mean over the replies' tokens, all of them or the last one's; origin says which."""
    folder = make_model(tmp_path / "model", template=True)
    loaded = hf.load(folder)
    chat = [{"role": role, "content": text} for role, text in
            (("user", "w1 w2"), ("assistant", "w3"), ("user", "w4"), ("assistant", "w5 w6"))]  # fmt: skip
    data = write(tmp_path / "d.jsonl", [{"m": chat}, {"m": chat[2:]}])
    store = hf.extract(loaded, data, tmp_path / "s.zarr", messages="m", turns=turns, compressor=whole(loaded.model),
                       dtype="float32")  # fmt: skip
    ids = torch.tensor(loaded.tokenizer("user: w1 w2 <eos> bot: w3 <eos> user: w4 <eos> bot: w5 w6 <eos>")["input_ids"])
    learned = [5, 6, 11, 12, 13] if turns == "all" else [11, 12, 13]
    loaded.model.zero_grad()
    value = F.cross_entropy(loaded.model(ids[None]).logits[0, [at - 1 for at in learned]], ids[learned])
    value.backward()
    assert_allclose(store.loss[0], value.item(), rtol=1e-5)
    norm = np.sqrt(sum(float((p.grad**2).sum()) for p in loaded.model.parameters()))
    assert_allclose(store.grad_norm[0], norm, rtol=1e-4)
    assert store.column("n_tokens").tolist() == [len(learned), 3]
    assert store.attrs["origin"]["fields"] == {"messages": "m"} | ({"turns": "all"} if turns == "all" else {})
    assert_array_equal(job_of(store, loaded).samples.n_tokens, store.column("n_tokens"))


@pytest.mark.filterwarnings("ignore:.* has an effective dimension")
def test_defaults_queries_and_scores(tmp_path):
    """From two paths: the Kronecker basis, of a small model all entries, not reduced; scored without a fit."""
    folder = make_model(tmp_path / "model")
    data = write(tmp_path / "d.jsonl", documents(40))
    train = hf.extract(folder, data, tmp_path / "t.zarr")
    assert train.attrs["compressor"]["basis"]["samples"] == 256
    assert "reduce" not in train.attrs["compressor"]
    assert train.k == train.attrs["p"]
    query = hf.extract(folder, write(tmp_path / "q.jsonl", documents(40)[:3]), tmp_path / "q.zarr", like=train)
    assert_allclose(query.rows(), train.rows(0, len(query)), atol=2e-3 * np.abs(query.rows()).max())
    scores = influence_scores(query, train).compute()
    assert (np.diag(scores[:, : len(query)]) > 0).all()
    again = hf.extract(folder, data, tmp_path / "t.zarr")
    assert again.rows_digest() == train.rows_digest()


def test_sequence_classification(tmp_path):
    folder = make_model(tmp_path / "model", "bert")
    rows = [{"text": text, "y": ["bad", "fine", "good"][number % 3]} for number, text in enumerate(texts())]
    data = write(tmp_path / "d.jsonl", rows)
    store = hf.extract(folder, data, tmp_path / "s.zarr", text="text", label="y", keep=["y"], compressor=SMALL)
    assert store.n == 12
    assert store.attrs["loss_kind"] == "cross_entropy"
    loaded = hf.load(folder)
    assert loaded.task == "classification"
    ids = make_tokenizer()(texts()[0])["input_ids"][:16]
    with torch.no_grad():
        expected = F.cross_entropy(loaded.model(torch.tensor([ids])).logits, torch.tensor([0]))
    assert_allclose(store.loss[0], expected, rtol=1e-5)
    with pytest.raises(InputError, match="labels"):
        hf.extract(folder, write(tmp_path / "e.jsonl", [{"text": "w1 w2", "y": "other"}]), tmp_path / "t.zarr",
                   text="text", label="y", compressor=SMALL)  # fmt: skip
    with pytest.raises(InputError, match="text and label"):
        hf.extract(folder, data, tmp_path / "u.zarr", compressor=SMALL)


def test_rows_with_random_signs_estimate_the_token_matrix(tmp_path):
    """Averaged over signs, Σ rows rowsᵀ is Σ_t (w_t/T) ∇ℓ_t ∇ℓ_tᵀ, whatever the batches."""
    folder = make_model(tmp_path / "model")
    loaded = hf.load(folder)
    data = write(tmp_path / "d.jsonl", [{"text": "w1 w2 w3 w4 w5"}, {"text": "w9 w8 w7"}])
    train = hf.extract(loaded, data, tmp_path / "t.zarr", compressor=Dropout(k=50), dtype="float32")
    mask = train.mask
    for weights in (None, "ggn"):
        total = np.zeros((50, 50))
        job = hf.prepare(loaded, data, output="curvature", weights=weights)
        for seed in range(300):
            rows = gradients(loaded.model, job, mask, seed)
            total += rows.T @ rows / 300
        expected = np.zeros((50, 50))
        for text in ("w1 w2 w3 w4 w5", "w9 w8 w7"):
            ids = torch.tensor(make_tokenizer()(text)["input_ids"])
            losses = F.cross_entropy(loaded.model(ids[None]).logits[0, :-1], ids[1:], reduction="none")
            for value in losses:
                row = masked(
                    torch.autograd.grad(value, list(loaded.model.parameters()), retain_graph=True), loaded.model, mask
                )
                w = 1 if weights is None else 1 / np.expm1(value.item())
                expected += w / len(losses) * np.outer(row, row)
        assert np.abs(total - expected).max() < 0.25 * np.abs(expected).max()
        assert_allclose(np.trace(total), np.trace(expected), rtol=0.15)
    store = hf.extract(loaded, data, tmp_path / "c.zarr", like=train, output="curvature", documents=1, dtype="float32")
    assert store.n == 1
    assert store.attrs["loss_kind"] == "signed_tokens_plain"
    with pytest.raises(InputError, match="like="):
        hf.extract(loaded, data, tmp_path / "x.zarr", output="curvature")


def gradients(model, job, mask, seed):
    from ooc_influence.extract.passes import RowGatherer
    from ooc_influence.extract.taps import tapped

    device = torch.device("cpu")
    gather = RowGatherer(mask, device)
    with tapped(model, [module.layer for module in mask.modules], device) as taps:
        batch = hf.Collator(0, seed)([job.samples[row] for row in range(len(job.samples))])
        return gather(taps, job.per_sample_loss, batch)[1].numpy().astype(float)


def masked(grads, model, mask):
    import oracle

    named = dict(zip([name for name, _ in model.named_parameters()], grads, strict=True))
    full = torch.cat([oracle.entry_matrix(module.layer, named).flatten() for module in mask.modules]).numpy()
    return oracle.keep(full[None].astype(float), mask)[0]


def test_an_adapter_folder(tmp_path):
    peft = pytest.importorskip("peft")
    folder = make_model(tmp_path / "model")
    base = transformers.AutoModelForCausalLM.from_pretrained(folder)
    adapted = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True))
    torch.nn.init.normal_(next(p for name, p in adapted.named_parameters() if "lora_B" in name))
    adapted.save_pretrained(tmp_path / "adapter")
    data = write(tmp_path / "d.jsonl", documents())
    stores = [
        hf.extract(str(tmp_path / "adapter"), data, tmp_path / "a.zarr", compressor=Dropout(k=40)),
        hf.extract(folder, data, tmp_path / "b.zarr", adapter=str(tmp_path / "adapter"), compressor=Dropout(k=40)),
    ]
    assert_array_equal(stores[0].rows(), stores[1].rows())
    assert all("lora_" in module.layer.name for module in stores[0].mask.modules)
    assert np.abs(stores[0].rows()).max() > 0


@pytest.mark.parametrize("adapter", [False, True])
def test_checkpoints_of_a_trainer(tmp_path, run, adapter):  # noqa: F811 - the fixture
    """Folders as a Trainer leaves them, of a model or of an adapter: the mean of each one's rows; queries likewise."""
    peft = pytest.importorskip("peft")
    folder = make_model(tmp_path / "model")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    if adapter:
        config = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, modules_to_save=["ln_f"])
        model = peft.get_peft_model(model, config)
    for step in (20, 100, 30):
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.3)
        model.save_pretrained(tmp_path / "run" / f"checkpoint-{step}")
        make_tokenizer().save_pretrained(tmp_path / "run" / f"checkpoint-{step}")
    data = write(tmp_path / "d.jsonl", documents())
    each = [
        hf.extract(tmp_path / "run" / f"checkpoint-{step}", data, tmp_path / f"{step}.zarr", compressor=Dropout(k=40))
        for step in (20, 30, 100)
    ]
    line = f"extract --model {tmp_path}/run/checkpoint-100 --data {data} --checkpoints {tmp_path}/run"
    code, out, err = run(f"{line} --k 40 --sampling uniform --dims 0 --basis parameters --store {tmp_path}/mean.zarr")
    assert code == 0, err
    assert "rows averaged over 3 checkpoints" in out
    mean = GradientStore.open(tmp_path / "mean.zarr")
    assert_allclose(mean.rows(), np.mean([one.rows() for one in each], 0), atol=2e-3 * np.abs(mean.rows()).max())
    for extra, same in (("", True), ("--checkpoints none", False)):
        code, out, err = run(
            f"extract --model {tmp_path}/run/checkpoint-100 --data {data} --store {tmp_path}/q{same}.zarr "
            f"--like {tmp_path}/mean.zarr {extra}"
        )
        assert code == 0, err
        found = GradientStore.open(tmp_path / f"q{same}.zarr").rows()
        assert_array_equal(found, mean.rows() if same else each[2].rows())


def test_lists_ranked_again_from_documents(tmp_path, run):  # noqa: F811 - the fixture
    """Both stores recorded their documents and fields; other documents, and none where they were, are refused."""
    folder = make_model(tmp_path / "model")
    data, asked = write(tmp_path / "d.jsonl", documents(30)), write(tmp_path / "q.jsonl", documents(2))
    how = "--k 200 --dims 0 --id name"
    assert run(f"extract --model {folder} --data {data} --store t.zarr {how} --max-length 8")[0] == 0
    line = f"extract --model {folder} --data {asked} --store q.zarr --like t.zarr --prompt text --completion name"
    assert run(f"{line} --max-length 16")[0] == 0
    line = f"top q.zarr t.zarr --rerank 20 --model {folder} --top 3 --json"
    code, out, err = run(line)
    assert code == 0, err
    proponents = json.loads(out)["queries"][0]["proponents"]
    assert proponents[0].keys() == {"row", "id", "score", "stored_score"}
    assert proponents[0]["score"] >= proponents[1]["score"]
    moved = (tmp_path / "d.jsonl").rename(tmp_path / "moved.jsonl")
    assert run(line)[0] == 2
    code, again, err = run(f"{line} --data {moved}")
    assert code == 0, err
    found = json.loads(again)["queries"][0]["proponents"]
    ranks = [entry.pop("bm25_rank") for entry in found]  # documents were named, so their words count
    assert any(isinstance(rank, int) for rank in ranks)
    assert found == proponents
    other = write(tmp_path / "other.jsonl", documents(30)[::-1])
    code, _, err = run(f"{line} --data {other}")
    assert (code, "losses stored" in err) == (2, True), err


def test_pickled_weights_are_refused(tmp_path):
    folder = make_model(tmp_path / "model")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    (tmp_path / "model" / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "model" / "pytorch_model.bin")
    with pytest.raises(InputError, match="--allow-pickle"):
        hf.load(folder)
    assert hf.load(folder, allow_pickle=True).task == "causal-lm"


@pytest.mark.parametrize("options", [{"dtype": "other"}, {"task": "classification", "dtype": "float32"}])
def test_models_that_cannot_be_loaded(tmp_path, options):
    with pytest.raises(InputError):
        hf.load(tmp_path / "missing", **options)


def test_half_precision(tmp_path):
    folder = make_model(tmp_path / "model")
    data = write(tmp_path / "d.jsonl", documents())
    stores = [hf.extract(folder, data, tmp_path / f"{dtype}.zarr", model_dtype=dtype, compressor=SMALL)
              for dtype in ("float32", "bfloat16")]  # fmt: skip
    rows = [store.rows() for store in stores]
    assert 0 < np.abs(rows[0] - rows[1]).max() < 0.1 * np.abs(rows[0]).max()


def test_writers_share_a_store(tmp_path):
    folder = make_model(tmp_path / "model")
    data = write(tmp_path / "d.jsonl", documents(40))
    compressor = Dropout(k=200, sampling="importance", reduce=Eigenbasis(r=20))
    hf.extract(folder, data, tmp_path / "s.zarr", compressor=compressor, rows_only=True, keep=["source"])
    for part in (1, 0):
        hf.extract(folder, data, tmp_path / "s.zarr", compressor=compressor, shard=(part, 2), keep=["source"])
    store = GradientStore.open(tmp_path / "s.zarr")
    assert store.n == store.layout.planned_rows > 40
    alone = hf.extract(folder, data, tmp_path / "a.zarr", compressor=compressor, keep=["source"])
    assert_allclose(store.rows(), alone.rows(), atol=2e-3 * np.abs(alone.rows()).max())


@pytest.mark.slow
def test_shards(tmp_path, monkeypatch):
    """One after the other where no cluster is; by paths, relative ones too; a finished store is left alone."""
    monkeypatch.chdir(tmp_path)
    make_model(tmp_path / "model")
    write(tmp_path / "d.jsonl", documents(40))
    settings = {
        "storage": Storage(chunk_rows=8, group_chunks=2),
        "compressor": Dropout(k=200),
        "dtype": "float32",
        "id": "name",
        "keep": ["source"],
        "max_length": 8,
    }
    store = hf.extract_shards("model", "d.jsonl", "s.zarr", shards=3, **settings)
    assert store.n == store.layout.planned_rows > 40
    alone = hf.extract("model", "d.jsonl", tmp_path / "a.zarr", **settings)
    assert store.columns_digest == alone.columns_digest
    assert_allclose(store.rows(), alone.rows(), atol=1e-5 * np.abs(alone.rows()).max())
    assert_array_equal(store.column("source"), alone.column("source"))
    assert list(store.ids(range(5))) == list(alone.ids(range(5)))
    written = [file.stat().st_mtime_ns for file in sorted((store.path / "gradients").iterdir())]
    again = hf.extract_shards("model", "d.jsonl", "s.zarr", shards=3, **settings)
    assert again.n == store.n
    assert [file.stat().st_mtime_ns for file in sorted((store.path / "gradients").iterdir())] == written
    queries = hf.extract_shards("model", "d.jsonl", "q.zarr", like="s.zarr", id="name", max_length=8)
    assert queries.columns_digest == store.columns_digest
    assert_allclose(queries.rows(), store.rows(), atol=1e-3 * np.abs(store.rows()).max())
    with pytest.raises(InputError, match="received objects: workers load them"):
        hf.extract_shards(hf.load("model"), "d.jsonl", "x.zarr")
    with pytest.raises(InputError, match="shards >= 1"):
        hf.extract_shards("model", "d.jsonl", "x.zarr", shards=0)
    with pytest.raises(InputError, match="expected a model at nowhere"):
        hf.extract_shards("nowhere", "d.jsonl", "x.zarr")


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(MissingExtraError, match=r"install the extra 'hf' \(in the clone: pip install '\.\[hf\]'\)$"):
        hf.open_documents("x.jsonl")


def test_the_command_line(tmp_path, run):  # noqa: F811 - the fixture
    """--model and --data; two writers; a query store; mistakes in one line."""
    make_model(tmp_path / "model")
    write(tmp_path / "d.jsonl", documents(40))
    write(tmp_path / "q.jsonl", documents(2))

    both = "--model model --data d.jsonl --id name --keep source --max-length 8"
    code, out, err = run(f"init {both} --store s.zarr --k 200 --dims 30")
    assert code == 0, err
    assert "rows planned" in out
    assert "leave out" in out
    for part in ("0/2", "1/2"):
        code, _, err = run(f"extract {both} --store s.zarr --k 200 --dims 30 --shard {part}")
        assert code == 0, err
    code, out, err = run("extract --model model --data q.jsonl --store q.zarr --like s.zarr --json")
    assert code == 0, err
    assert json.loads(out)["reduction"]["columns"] == 30
    code, out, _ = run(
        "extract --model model --data q.jsonl --store c.zarr --like s.zarr --output curvature --documents 1"
    )
    assert code == 0
    for line, match in (
        ("extract --model model --store x.zarr", "--model and --data together"),
        ("extract --store x.zarr", "either --recipe"),
        (f"extract {both} --store x.zarr --text nothing", "field 'nothing'"),
        ("extract --model nowhere --data d.jsonl --store x.zarr", "expected a model at nowhere"),
        (f"extract {both} --store x.zarr --like s.zarr --dims 3", "--like fixes the mask"),
        (f"extract {both} --store x.zarr --dims 0 --pilot 3", "belong to a reduction"),
        ("extract --recipe a.py:b --store x.zarr --text t", "--text with --model"),
    ):
        code, _, err = run(line)
        assert (code, match in err) == (2, True), err
