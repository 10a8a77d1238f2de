"""Selections as files: documents byte for byte, in their order, controls of one size, counts; and the command."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from test_cli import run  # noqa: F401 - a fixture
from tiny_hf import MARKS, SMALL, make_model, texts, write

from ooc_influence import GradientStore, hf, select_rows
from ooc_influence.corpus import bm25, open_documents
from ooc_influence.errors import InputError, MismatchError
from ooc_influence.report import Corpus, selection_counts, write_selection

pytestmark = MARKS


def documents(n=30):
    return [
        {"text": f"{text} w3", "name": f"doc{number}", "source": "abc"[number % 7 % 3], "kind": "xy"[number % 2]}
        for number, text in enumerate(texts(n))
    ]


def targets():
    return [{"text": f"{text[:12]} w3", "task": "uv"[number % 2]} for number, text in enumerate(texts(5, seed=9))]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with documents written oddly, a train store of pieces of them, and a query store."""
    folder = tmp_path_factory.mktemp("made")
    model = hf.load(make_model(folder / "model"))
    lines = [json.dumps(record, indent=None, separators=(",", " :  ")) for record in documents()]
    lines[3] = "  " + lines[3] + "  \r"
    lines[7] += "\n\n   "  # empty lines after a record
    (folder / "d.jsonl").write_bytes(b"\xef\xbb\xbf" + "\n".join(lines).encode())  # no end of the last line
    write(folder / "q.jsonl", targets())
    options = {"compressor": SMALL, "dtype": "float32", "max_length": 8}
    train = hf.extract(model, folder / "d.jsonl", folder / "t.zarr", id="name", keep=["source"], **options)
    hf.extract(model, folder / "q.jsonl", folder / "q.zarr", like=train, keep=["task"])
    return folder


@pytest.fixture
def stores(made):
    return GradientStore.open(made / "q.zarr"), GradientStore.open(made / "t.zarr")


OPTIONS = {"curvature": False, "unit": "document"}


def lines_of(path):
    """The lines of the corpus's records, as they are in the file, or of another file."""
    return [line + b"\n" for line in path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n") if line.strip()]


def test_documents_are_copied_byte_for_byte_in_their_order(made, stores, tmp_path):
    query, train = stores
    assert train.n > 30, "documents should have several rows"
    chosen = select_rows(query, train, "40%", tasks="task", **OPTIONS)
    files = write_selection(chosen, query, train, tmp_path / "kept.jsonl")
    numbers = np.unique(train.column("document")[chosen.rows])
    assert (len(numbers), files.documents) == (12, 12)
    everything = lines_of(made / "d.jsonl")
    assert files.path.read_bytes() == b"".join(everything[number] for number in numbers)
    for name in ("random", "bm25"):
        control = files.controls[name]
        assert control.path == tmp_path / f"kept.{name}.jsonl"
        own = lines_of(control.path)
        assert len(own) == len(set(own)) == 12
        assert [everything.index(line) for line in own] == np.unique(train.column("document")[control.rows]).tolist()
    again = write_selection(chosen, query, train, tmp_path / "again.jsonl", seed=1)
    assert set(lines_of(again.controls["random"].path)) != set(lines_of(files.controls["random"].path))
    assert sorted(path.name for path in tmp_path.glob(".*")) == []


def test_the_search_is_bm25_by_task(stores, tmp_path):
    query, train = stores
    chosen = select_rows(query, train, 10, tasks="task", **OPTIONS)
    files = write_selection(chosen, query, train, tmp_path / "kept.txt")
    scores = bm25([record["text"] for record in targets()], [record["text"] for record in documents()])
    assert query.n == len(targets())
    best = np.maximum(scores[::2].mean(0), scores[1::2].mean(0))
    found = train.column("document")[files.controls["bm25"].rows]
    assert_array_equal(np.sort(best[found]), np.sort(best)[-10:])


def test_ids(stores, tmp_path):
    query, train = stores
    chosen = select_rows(query, train, 4, **OPTIONS)
    files = write_selection(chosen, query, train, tmp_path / "kept.txt", seed=None)
    assert files.controls == files.missing == {}
    assert files.path.read_text().split() == train.ids(np.flatnonzero(chosen.kept)).tolist()


@pytest.mark.parametrize("kind", [".csv", ".json", ".jsonl.gz", ".parquet", ".txt", "folder"])
def test_other_kinds_of_documents(stores, tmp_path, kind):
    pytest.importorskip("pyarrow")
    query, train = stores
    records = documents()
    path = tmp_path / f"d{kind}" if kind != "folder" else tmp_path / "folder"
    if kind == ".json":
        path.write_text(json.dumps(records, indent=2))
    elif kind == ".jsonl.gz":
        import gzip

        path.write_bytes(gzip.compress("".join(json.dumps(record) + "\n" for record in records).encode()))
    else:
        write(path, records)
    chosen = select_rows(query, train, 9, **OPTIONS)
    files = write_selection(chosen, query, train, tmp_path / "kept.jsonl", data=path)
    numbers = np.unique(train.column("document")[chosen.rows]).tolist()
    read = [json.loads(line) for line in lines_of(files.path)]
    expected = [{"text": records[number]["text"]} if kind == ".txt" else records[number] for number in numbers]
    assert read == expected
    if kind not in (".parquet", "folder"):
        with pytest.raises(InputError, match=r"documents in Parquet .*: name a .jsonl file"):
            write_selection(chosen, query, train, tmp_path / "kept.parquet", data=path)
        return
    parquet = write_selection(chosen, query, train, tmp_path / "kept.parquet", data=path)
    assert list(open_documents(parquet.path).read_all()) == expected
    assert len(open_documents(parquet.controls["bm25"].path)) == 9


def test_parquet_keeps_its_schema_over_many_batches(tmp_path, monkeypatch):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    from ooc_influence.corpus import corpus_file

    monkeypatch.setattr(corpus_file, "_GROUP_ROWS", 100)
    schema = pa.schema([("text", pa.large_string()), ("when", pa.timestamp("ms")), ("raw", pa.binary())], {"a": "b"})
    columns = [[f"t{row}" for row in range(700)], list(range(700)), [bytes([row % 256]) for row in range(700)]]
    table = pa.table([pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)], schema)
    for number, part in enumerate((table[:600], table[600:])):
        pq.write_table(part, tmp_path / f"d{number}.parquet")
    numbers = np.sort(np.random.default_rng(0).choice(700, 350, replace=False))
    found = open_documents(tmp_path / "d*.parquet")
    found.write_parquet(numbers, tmp_path / "out.parquet")
    copied = pq.read_table(tmp_path / "out.parquet")
    assert copied.equals(table.take(numbers))
    assert copied.schema.equals(schema, check_metadata=True)
    assert pq.ParquetFile(tmp_path / "out.parquet").num_row_groups == 2
    with pytest.raises(InputError, match=r"that JSON can hold; received bytes .* a .parquet file"):
        list(found.lines(numbers))


def test_counts(stores, tmp_path):
    query, train = stores
    chosen = select_rows(query, train, 10, quotas={"source": "proportional"}, **OPTIONS)
    files = write_selection(chosen, query, train, tmp_path / "kept.jsonl")
    random = files.controls["random"].rows
    counts = selection_counts(chosen, train, others={"random": random})["source"]
    source, candidates = train.column("source"), chosen.candidates.rows
    assert sum(entry["candidates"] for entry in counts) == 30
    assert sum(entry["share"] for entry in counts) == pytest.approx(1)
    for entry in counts:
        own = candidates[source[candidates] == entry["value"]]
        assert entry["candidates"] == len(own)
        assert entry["kept"] == np.isin(chosen.rows, own).sum() == 10 * entry["share"]
        assert entry["random"] == np.isin(random, own).sum() == entry["kept"]  # under the same quotas
        assert entry["score"] == pytest.approx(chosen.row_scores[own].mean(), rel=1e-4)
    sizes = [entry["candidates"] for entry in counts]
    assert sizes == sorted(sizes, reverse=True)
    with pytest.raises(InputError, match="to group"):
        selection_counts(chosen, train, ["kind"])


def test_refusals_of_files(made, stores, tmp_path):
    query, train = stores
    chosen = select_rows(query, train, 10, **OPTIONS)
    for out, match in (("kept.xml", "as .jsonl, .ndjson, .parquet, .txt"), ("none/kept.txt", "make it first")):
        with pytest.raises(InputError, match=match):
            write_selection(chosen, query, train, tmp_path / out)
    write(tmp_path / "other.jsonl", [record | {"text": "w1"} for record in documents()])
    with pytest.raises(MismatchError, match="received another text"):
        write_selection(chosen, query, train, tmp_path / "kept.jsonl", data=tmp_path / "other.jsonl")
    write(tmp_path / "few.jsonl", documents()[:20])
    with pytest.raises(MismatchError, match="a record for each of 30 documents"):
        write_selection(chosen, query, train, tmp_path / "kept.jsonl", data=tmp_path / "few.jsonl")
    pieces = select_rows(query, train, train.n, curvature=False)
    with pytest.raises(InputError, match=r"one row of each document .*--unit document"):
        write_selection(pieces, query, train, tmp_path / "kept.jsonl")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["few.jsonl", "other.jsonl"]


def test_the_command(made, tmp_path, run):  # noqa: F811 - the fixture
    base = f"select {made}/t.zarr --queries {made}/q.zarr --dot"
    code, out, err = run(f"{base} --keep 40% --out kept.jsonl --tasks task --redundancy 0.5 --json")
    assert (code, err) == (0, "")
    facts = json.loads(out)
    assert (facts["kept"], facts["candidates"], facts["documents"]) == (12, 30, 12)
    assert facts["settings"]["unit"] == "document"
    assert list(facts["by"]) == ["source"]
    chosen = select_rows(made / "q.zarr", made / "t.zarr", "40%", tasks="task", redundancy=0.5, **OPTIONS)
    train = GradientStore.open(made / "t.zarr")
    numbers = np.unique(train.column("document")[chosen.rows])
    assert lines_of(Path("kept.jsonl")) == [lines_of(made / "d.jsonl")[number] for number in numbers]
    assert {path.name for path in Path().glob("kept*")} == {"kept.jsonl", "kept.random.jsonl", "kept.bm25.jsonl"}

    code, out, err = run(f"{base} --keep 6 --out few.txt --quota source:a=2% --quota source:b=50% --no-controls")
    assert (code, err) == (0, "")
    assert out.startswith("few.txt: 6 of 30 documents, ")
    assert "no curvature" in out.splitlines()[-1] or "dot" in out.splitlines()[-1]
    kept = Path("few.txt").read_text().split()
    assert set(train.column("source")[train.find(kept)].tolist()) <= {"b", "c"}
    assert not list(Path().glob("few.*.txt"))

    code, out, _ = run(f"{base} --keep 90% --out most.jsonl --drop --quota source=proportional --by document")
    assert code == 0
    assert len(lines_of(Path("most.jsonl"))) == 27
    assert out.splitlines()[3 + 1].startswith("document")

    for line, match in (
        ("--keep 200% --out k.jsonl", "received '200%'"),
        ("--keep 5 --out k.xml", ".txt: ids); received k.xml"),
        ("--keep 5 --out k.jsonl --quota source", "--quota COLUMN=SHARE or COLUMN:VALUE=SHARE; received 'source'"),
        ("--keep 5 --out k.jsonl --quota source=1% --quota source:a=1%", "or one for each"),
        ("--keep 5 --out k.jsonl --quota source=1% --quota document=1%", "quotas by one column"),
        ("--keep 5 --out k.jsonl --id name", "--data with --id"),
        ("--keep 5 --out k.jsonl --redundancy 2", "0 <= redundancy <= 1"),
    ):
        code, _, err = run(f"{base} {line}")
        assert (code, err.count("\n")) == (2, 1), err
        assert match in err


def test_documents_by_id_and_targets_without_documents(made, stores, tmp_path):
    query, train = stores
    records = documents()[::-1]
    path = write(tmp_path / "back.jsonl", records)
    chosen = select_rows(query, train, 8, **OPTIONS)
    named = Corpus(path, id="name")
    files = write_selection(chosen, query, train, tmp_path / "kept.jsonl", data=named)
    numbers = np.unique(29 - train.column("document")[chosen.rows]).tolist()
    assert [json.loads(line) for line in lines_of(files.path)] == [records[number] for number in numbers]
    alone = write_selection(chosen, query, train, tmp_path / "kept.jsonl", data=named, query_data=Corpus())
    assert list(alone.controls) == ["random"]
    assert "q.zarr to search for (--query-data)" in alone.missing["bm25"]


def test_recorded_documents_that_are_gone(made, stores, tmp_path, monkeypatch):
    """Ids are written without them, and what needs them is refused; patterns of files are found."""
    query, train = stores
    chosen = select_rows(query, train, 8, **OPTIONS)
    origin = dict(train.attrs["origin"])
    monkeypatch.setitem(train.attrs, "origin", origin | {"data": str(made / "gone.jsonl")})
    files = write_selection(chosen, query, train, tmp_path / "kept.txt")
    assert (files.documents, list(files.controls)) == (0, ["random"])
    assert "t.zarr to search (--data)" in files.missing["bm25"]
    with pytest.raises(InputError, match=r"records .*gone.jsonl, where there are none: name them \(--data\)"):
        write_selection(chosen, query, train, tmp_path / "kept.jsonl")
    monkeypatch.setitem(train.attrs, "origin", origin | {"data": str(made / "d*.jsonl")})
    assert write_selection(chosen, query, train, tmp_path / "kept.jsonl", seed=None).documents == 8
    monkeypatch.setitem(train.attrs, "origin", {})
    with pytest.raises(InputError, match="the store records none"):
        write_selection(chosen, query, train, tmp_path / "kept.jsonl")
