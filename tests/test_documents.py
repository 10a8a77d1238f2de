"""Documents from files and objects: what the file says is what is read."""

from __future__ import annotations

import csv
import datetime
import gzip
import json
import logging
import math
import os
import subprocess
import sys

import numpy as np
import pytest
from tiny_hf import MARKS, SMALL, datasets, make_model, make_tokenizer, samples, write

from ooc_influence import GradientStore, hf
from ooc_influence.corpus import Documents, open_records
from ooc_influence.corpus.cache import cache_root
from ooc_influence.errors import InputError, MissingExtraError
from ooc_influence.memory import PeakMemory
from ooc_influence.report import Corpus, write_report

arrow = pytest.importorskip("pyarrow")
pandas = pytest.importorskip("pandas")
pytestmark = MARKS
ODD = ["NA", "null", "nan", "None", "", "007", "2.50", "3", "1e3", "True", "2020-01-01"]


def read(path, field="text"):
    return hf.open_documents(path)[field]


@pytest.mark.parametrize("separator", [",", "\t"])
def test_a_cell_is_text_whatever_it_looks_like(tmp_path, separator):
    path = tmp_path / ("d.csv" if separator == "," else "d.tsv")
    lines = [separator.join((str(number), value)) for number, value in enumerate(ODD)]
    path.write_bytes("\r\n".join([separator.join(("n", "text")), *lines]).encode("utf-8-sig"))
    assert read(path) == ODD
    assert [record["text"] for record in open_records(path)] == ODD


def test_reading_csv_leaves_the_limit_of_others_alone(tmp_path):
    (tmp_path / "d.csv").write_text("text\n" + "a" * 2**18 + "\nb\n")
    limit = csv.field_size_limit()
    records = open_records(tmp_path / "d.csv")
    assert len(next(records)["text"]) == 2**18
    assert csv.field_size_limit() == limit < 2**18
    assert read(tmp_path / "d.csv")[1] == "b"


def test_quotes_and_line_breaks_in_cells(tmp_path):
    path = tmp_path / "d.csv"
    path.write_text('text,id\n"one, ""two""\n\nthree",a\n\n\nfour,b\n')
    assert read(path) == ['one, "two"\n\nthree', "four"]
    assert hf.open_documents(path)[1] == {"text": "four", "id": "b"}
    for bad, match in (
        ('text\na\n"open\n', r"from line 3 of .*d\.csv on; received unexpected end of data"),
        ("text\na,b\n", "expected 1 columns"), ("a,a\n1,2\n", "'a' twice"),
        ("text\n\xff\n", "in UTF-8"),
    ):  # fmt: skip
        path.write_bytes(bad.encode("latin-1"))
        with pytest.raises(InputError, match=match):
            read(path)


def test_dates_and_numbers_of_json_stay_what_they_are(tmp_path):
    rows = [{"text": "2020-01-01", "id": "2020-01-02", "n": 3, "x": 2.5, "when": "2020-01-03T00:00:00"}]
    path = write(tmp_path / "d.jsonl", rows)
    assert hf.open_documents(path)[0] == rows[0]


def test_a_type_that_changes_late_in_a_field_that_is_not_used(tmp_path):
    rows = [{"text": f"w{n} w2", "other": 3} for n in range(3000)] + [{"text": "w1 w3", "other": {"a": ["b"]}}]
    path = write(tmp_path / "d.jsonl", rows)
    assert len(samples(tmp_path, hf.Fields(text="text"), rows)) == 3001
    assert read(path)[-1] == "w1 w3"


@pytest.mark.parametrize("name", ["part[1].jsonl", "what?.jsonl", "star*.jsonl", "~.jsonl"])
def test_a_path_is_no_pattern(tmp_path, name):
    write(tmp_path / name, [{"text": "this"}])
    for other in ("part1.jsonl", "whatx.jsonl", "starry.jsonl"):
        write(tmp_path / other, [{"text": "another"}])
    assert read(tmp_path / name) == ["this"]
    assert [record["text"] for record in open_records(tmp_path / name)] == ["this"]


def test_a_pattern_is_all_files_that_match_sorted_and_listed(tmp_path, caplog, monkeypatch):
    caplog.set_level(logging.INFO, "ooc_influence")
    for part in (2, 10, 1):
        write(tmp_path / f"p{part:02}.jsonl", [{"text": f"{part}.{n}"} for n in range(part)])
    (tmp_path / "p03.csv").write_text("text\n3.0\n")
    expected = [f"{part}.{n}" for part in (1, 2, 10) for n in range(part)]
    found = hf.open_documents(tmp_path / "*.jsonl")
    assert found["text"] == expected
    assert [record["text"] for record in found.read([12, 0, 2, 3], ["text"])] == ["10.9", "1.0", "2.1", "10.0"]
    assert "3 files match" in caplog.text
    assert caplog.text.index("p01") < caplog.text.index("p02") < caplog.text.index("p10")
    assert read(tmp_path / "p0*")[-1] == "3.0"
    assert [record["text"] for record in open_records(tmp_path / "*.jsonl")] == expected
    with pytest.raises(InputError, match="which none matches"):
        read(tmp_path / "*.parquet")
    with pytest.raises(InputError, match=r"folder.*give a pattern, such as"):
        read(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read("~/p01.jsonl") == ["1.0"]


@pytest.mark.parametrize(
    "name", ["d.ndjson", "d.jsonl.gz", "d.jsonl.zst", "d.csv.gz", "d.json", "d.json.gz", "d.txt.zst"]
)
def test_packed_files_and_further_endings(tmp_path, name):
    rows = [{"text": f"text {n} \N{GREEK SMALL LETTER ALPHA}"} for n in range(50)]
    path = tmp_path / name
    if ".json" in name.split(".gz")[0][-5:]:
        data = json.dumps(rows, indent=1, ensure_ascii=False)
    elif "csv" in name or "txt" in name:
        data = "".join(f"{row['text']}\n" for row in ([{"text": "text"}] if "csv" in name else []) + rows)
    else:
        data = "".join(json.dumps(row) + "\n" for row in rows)
    data = data.encode()
    if name.endswith(".gz"):
        data = gzip.compress(data[:100]) + gzip.compress(data[100:])  # as files joined by cat
    elif name.endswith(".zst"):
        data = arrow.Codec("zstd").compress(data, asbytes=True)
    path.write_bytes(data)
    expected = [row["text"] for row in rows]
    assert read(path) == expected
    assert [record["text"] for record in open_records(path)] == expected
    if path.suffix in (".gz", ".zst"):
        path.write_bytes(data[: len(data) // 2])
        with pytest.raises(InputError, match=rf"{name} as (gzip|zstd); received .*: compress it again"):
            read(path)


def test_the_package_that_zst_needs_is_named(tmp_path, monkeypatch):
    (tmp_path / "d.jsonl.zst").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingExtraError, match=r"'pyarrow' for files compressed by zstd.*'parquet'"):
        read(tmp_path / "d.jsonl.zst")


def test_a_json_list_longer_than_what_is_read_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr("ooc_influence.corpus.corpus_file._READ", 7)
    rows = [{"text": "]},{[" * n, "deep": [{"a": [1, {}]}], "n": n} for n in range(20)]
    (tmp_path / "d.json").write_text(json.dumps(rows))
    assert [hf.open_documents(tmp_path / "d.json")[n] for n in range(20)] == rows
    for bad in ('[{"text": "a"}, {"text"', '[{"text": "a"} 3]', "[3]"):
        (tmp_path / "d.json").write_text(bad)
        with pytest.raises(InputError, match=r"d\.json"):
            read(tmp_path / "d.json")


@pytest.mark.parametrize("kind", ["dataset", "splits", "one split", "list", "frame", "table"])
def test_objects(tmp_path, kind):
    rows = [{"text": f"w{n} w{n + 1}", "name": f"doc{n}", "score": n / 2} for n in range(5)]
    data, split = rows, None
    if kind in ("dataset", "splits", "one split"):
        data = datasets.Dataset.from_list(rows).with_format("numpy")
    if kind in ("splits", "one split"):
        data = datasets.DatasetDict({"train": data})
    if kind == "splits":
        data["test"], split = datasets.Dataset.from_list(rows[:2]), "train"
        with pytest.raises(InputError, match=r"one of the splits train, test of the DatasetDict given"):
            hf.open_documents(data)
    if kind == "frame":
        data = pandas.DataFrame(rows)
    if kind == "table":
        data = arrow.Table.from_pylist(rows)
    found = hf.open_documents(data, split)
    assert [found[n] for n in range(len(found))] == rows
    store = hf.extract(make_model(tmp_path / "m"), data, tmp_path / "s.zarr", id="name", keep=["score"], split=split,
                       compressor=SMALL)  # fmt: skip
    assert store.ids(range(5)).tolist() == [row["name"] for row in rows]
    assert store.column("score").tolist() == [row["score"] for row in rows]


def test_objects_that_are_no_documents():
    stream = datasets.Dataset.from_list([{"text": "a"}]).to_iterable_dataset()
    for data, match in ((stream, "only be read in order"), (3, "received int"), ([1, 2], "received list"),
                        ([], "received none: it is empty"), (iter([]), "received list_iterator")):  # fmt: skip
        with pytest.raises(InputError, match=match):
            hf.open_documents(data)


def test_what_a_frame_calls_missing_is_missing(tmp_path):
    frame = pandas.DataFrame({"text": ["w1 w2", None], "when": pandas.to_datetime(["2020-01-01", None])})
    assert hf.open_documents(frame)[1] == {"text": None, "when": None}
    with pytest.raises(InputError, match=r"document 1 of the DataFrame given; received null in field 'text'"):
        hf.Samples(hf.open_documents(frame), make_tokenizer(), hf.Fields(text="text"), 16)


PAIR = {"prompt": "q", "completion": "a"}


@pytest.mark.parametrize(
    ("fields", "bad", "match"),
    [
        ({"text": "q"}, {"q": None}, "document 1 .* received null in field 'q': .*--on-missing skip"),
        ({"text": "q"}, {"a": "w1"}, "document 1 .* received no field 'q'"),
        (PAIR, {"q": "w1", "a": None}, "document 1 .* received null in field 'a'"),
        (PAIR, {"q": "w1"}, "document 1 .* received no field 'a'"),
        ({"messages": "q"}, {"q": None}, "document 1 .* received null in field 'q'"),
    ],
)
def test_a_missing_text_is_refused_or_left_out(tmp_path, fields, bad, match):
    chat = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]
    good = {"q": chat if "messages" in fields else "w1 w2", "a": "w3"}
    rows = [good, bad, good]
    with pytest.raises(InputError, match=match):
        samples(tmp_path, hf.Fields(**fields), rows, template=True)
    found = samples(tmp_path, hf.Fields(**fields), rows, template=True, on_missing="skip")
    assert found.document.tolist() == [0, 2]
    assert found.missing == 1
    with pytest.raises(InputError, match="on_missing 'raise' or 'skip'"):
        samples(tmp_path, hf.Fields(**fields), rows, on_missing="no")


def test_a_short_line_of_csv_lacks_its_text(tmp_path):
    (tmp_path / "d.csv").write_text("id,text\na,w1 w2\nb\nc,\n")
    documents = hf.open_documents(tmp_path / "d.csv")
    with pytest.raises(InputError, match=r"document 1 of .*d\.csv; received no field 'text'"):
        hf.Samples(documents, make_tokenizer(), hf.Fields(text="text"), 16)
    found = hf.Samples(documents, make_tokenizer(), hf.Fields(text="text"), 16, on_missing="skip")
    assert (found.missing, found.without_target, len(found)) == (1, 1, 1)  # an empty cell is an empty text


@pytest.mark.parametrize("value", [3, 2.5, ["a"], {"a": "b"}, True, "\ud800"])
def test_a_text_that_is_none_is_refused(tmp_path, value):
    rows = [{"text": "w1 w2", "a": "w1"}, {"text": value, "a": "w1"}]
    for fields in ({"text": "text"}, {"prompt": "text", "completion": "a"}):
        with pytest.raises(InputError, match=r"text in field 'text' of document 1; received"):
            samples(tmp_path, hf.Fields(**fields), rows)


def test_what_is_tokenised_is_what_the_file_says(tmp_path):
    (tmp_path / "d.csv").write_text("q,a\n" + "".join(f"NA,{value}\n" for value in ODD))
    words = make_tokenizer()
    words.add_tokens(["NA", *ODD[:4], *ODD[5:]])
    found = hf.Samples(hf.open_documents(tmp_path / "d.csv"), words, hf.Fields(prompt="q", completion="a"), 16)
    for row, number in enumerate(found.document.tolist()):
        assert found[row]["input_ids"] == words(f"NA {ODD[number]} <eos>")["input_ids"]


KEPT = {
    "int": ([1, 2, 3], "int64", [1, 2, 3]),
    "float": ([1, 2.5, 3], "float64", [1, 2.5, 3]),
    "bool": ([True, False, True], "bool", [True, False, True]),
    "gap": ([1, None, 3], "float64", [1, math.nan, 3]),
    "words": (["a", None, "c"], "str", ["a", "", "c"]),
    "mixed": (["a", 2, 2.5], "str", ["a", "2", "2.5"]),
    "flags": ([True, None, False], "str", ["True", "", "False"]),
    "long": ([2**60 + 1, 2, 3], "int64", [2**60 + 1, 2, 3]),
    "long_gap": ([2**60 + 1, None, 2.5], "str", [str(2**60 + 1), "", "2.5"]),
    "huge": ([2**70, 2, 3], "str", [str(2**70), "2", "3"]),
    "list": ([[1, "ä"], [], [None]], "str", ['[1, "ä"]', "[]", "[null]"]),
    "object": ([{"a": 1}, {}, None], "str", ['{"a": 1}', "{}", ""]),
    "none": ([None, None, None], "str", ["", "", ""]),
}


def test_kept_fields_of_every_kind(tmp_path):
    rows = [{"text": f"w{n} w2"} | {name: values[n] for name, (values, *_) in KEPT.items()} for n in range(3)]
    del rows[1]["gap"], rows[1]["flags"]  # missing is as null
    data = write(tmp_path / "d.jsonl", rows)
    store = hf.extract(make_model(tmp_path / "m"), data, tmp_path / "s.zarr", keep=list(KEPT), compressor=SMALL)
    for name, (_, kind, expected) in KEPT.items():
        assert store.layout.columns[name] == kind, name
        np.testing.assert_array_equal(store.column(name).tolist(), expected, name)
    for fields in ({"text": "nothing"}, {"text": "text", "keep": ("nothing",)}, {"text": "text", "id": "nothing"}):
        for how in ("raise", "skip"):
            with pytest.raises(InputError, match="expected a field 'nothing'; received documents with text, int, "):
                samples(tmp_path, hf.Fields(**fields), rows, on_missing=how)


def test_kept_dates_of_parquet_and_fields_that_come_late(tmp_path):
    day = datetime.date(2020, 1, 2)
    arrow.parquet.write_table(arrow.table({"text": ["w1 w2"], "day": [day], "at": [datetime.datetime(2020, 1, 2, 3)]}),
                              tmp_path / "d.parquet")  # fmt: skip
    store = hf.extract(make_model(tmp_path / "m"), tmp_path / "d.parquet", tmp_path / "s.zarr", id="day",
                       keep=["day", "at"], compressor=SMALL)  # fmt: skip
    assert store.column("day").tolist() == store.ids(range(1)).tolist() == ["2020-01-02"]
    assert store.column("at").tolist() == ["2020-01-02T03:00:00"]
    rows = [{"text": "w1 w2"}] * 2000 + [{"text": "w1 w2", "late": 3}]
    found = samples(tmp_path, hf.Fields(text="text", keep=("late",)), rows)
    kept = found.columns()["late"]
    assert math.isnan(kept[0])
    assert kept[2000] == 3.0


def test_kept_cells_of_csv_are_numbers_where_all_are_written_so(tmp_path):
    columns = {
        "int": ["1", "-2"], "float": ["0.5", "3"], "zeros": ["007", "1"], "fixed": ["2.50", "1.25"],
        "nan": ["nan", "1.5"], "gap": ["1", ""], "exp": ["1e-05", "0.1"],
    }  # fmt: skip
    lines = [",".join([f"w{n} w2", *(values[n] for values in columns.values())]) for n in range(2)]
    (tmp_path / "d.csv").write_text("\n".join([",".join(["text", *columns]), *lines]))
    store = hf.extract(make_model(tmp_path / "m"), tmp_path / "d.csv", tmp_path / "s.zarr", keep=list(columns),
                       id="zeros", compressor=SMALL)  # fmt: skip
    kinds = {name: store.layout.columns[name] for name in columns}
    assert kinds == {"int": "int64", "float": "float64", "zeros": "str", "fixed": "str", "nan": "str", "gap": "str",
                     "exp": "float64"}  # fmt: skip
    for name, values in columns.items():
        expected = values if kinds[name] == "str" else [float(value) for value in values]
        assert store.column(name).tolist() == expected
    assert store.ids(range(2)).tolist() == ["007", "1"]


def test_classes_of_csv_are_numbers_or_names(tmp_path):
    model = make_model(tmp_path / "m", "bert")
    losses = []
    for name, values in (("numbers", "021"), ("names", ("bad", "good", "fine"))):
        (tmp_path / f"{name}.csv").write_text("text,y\n" + "".join(f"w{n} w2,{y}\n" for n, y in enumerate(values)))
        store = hf.extract(model, tmp_path / f"{name}.csv", tmp_path / f"{name}.zarr", text="text", label="y",
                           keep=["y"], compressor=SMALL)  # fmt: skip
        losses.append(store.loss)
        assert store.layout.columns["y"] == ("int64" if name == "numbers" else "str")
    np.testing.assert_array_equal(*losses)


@pytest.mark.parametrize(
    ("ids", "match"),
    [([1, "1"], "'1' in documents 0 and 1"), (["a", "b", "a"], "'a' in documents 0 and 2"), ([None, "a"], "none"),
     ([["a"], "b"], "list"), (["a#1", "a"], "'a#1' in documents 0 and 1")],
)  # fmt: skip
def test_ids_that_do_not_name_rows(tmp_path, ids, match):
    text = "w1 w2 w3 w4 w5 w6 w7"
    rows = [{"text": "w1 w2" if name == "a#1" else text, "id": name} for name in ids]
    with pytest.raises(InputError, match=match):
        samples(tmp_path, hf.Fields(text="text", id="id"), rows, length=5 if "a#1" in ids else 16)


def test_a_document_that_was_changed_meanwhile_is_noticed(tmp_path):
    rows = [{"text": f"w{n} w2"} for n in range(9)]
    found = samples(tmp_path, hf.Fields(text="text"), rows)
    assert found[5]["input_ids"]
    rows[4]["text"] = "w9 w2"
    write(tmp_path / "data.jsonl", rows)
    assert found[6]["input_ids"]
    with pytest.raises(InputError, match=r"expected document 4 of .* to be as it was"):
        found[4]
    write(tmp_path / "data.jsonl", rows[:2])
    with pytest.raises(InputError, match="a shorter file"):
        found[7]


CHILD = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from tiny_hf import hf, make_tokenizer
from ooc_influence.hf.tokens import Tokeniser
made = [0]
call = Tokeniser.__call__
def counted(self, documents):
    made[0] += len(documents)
    return call(self, documents)
Tokeniser.__call__ = counted
found = hf.Samples(hf.open_documents(sys.argv[1]), make_tokenizer(), hf.Fields(text="text", id="id"), int(sys.argv[2]))
print(made[0], len(found), found.text_digest.sum())
"""


def test_processes_at_the_same_time_count_tokens_once(tmp_path, monkeypatch):
    rows = [{"text": f"w{n % 40} w2 w3", "id": n} for n in range(5000)]
    data = write(tmp_path / "d.jsonl", rows)
    monkeypatch.setenv("OOC_INFLUENCE_CACHE", str(tmp_path / "kept"))
    command = [sys.executable, "-c", CHILD, str(data), "16", os.path.dirname(__file__)]  # noqa: PTH120
    children = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    together = [tuple(map(int, child.communicate()[0].split())) for child in children]
    assert sorted(made for made, *_ in together) == [0, 5000]
    assert {tuple(more) for _, *more in together} == {(5000, together[0][2])}
    monkeypatch.setattr("ooc_influence.hf.samples.RowMaker.make", lambda self, folder, progress: 1 / 0)
    fields = hf.Fields(text="text", id="id")
    found = hf.Samples(hf.open_documents(data), make_tokenizer(), fields, 16)
    assert (len(found), found.text_digest.sum()) == together[0][1:]
    for other in ((hf.Fields(text="text"), 16), (fields, 15)):  # another index
        with pytest.raises(ZeroDivisionError):
            hf.Samples(hf.open_documents(data), make_tokenizer(), *other)
    assert not [path for path in (tmp_path / "kept").iterdir() if "creating" in path.name]


def test_a_changed_file_is_counted_again(tmp_path, monkeypatch):
    monkeypatch.setattr("ooc_influence.hf.samples._WORTH_KEEPING", 1)
    for n in (3, 4):
        found = samples(tmp_path, hf.Fields(text="text"), [{"text": f"w{n} w2"}] * n)
        assert len(found) == n
        assert found[0]["input_ids"][0] == n + 5
    words = make_tokenizer()
    documents = hf.open_documents(tmp_path / "data.jsonl")
    words.add_tokens(["w4 w2"])
    assert hf.Samples(documents, words, hf.Fields(prompt="text", completion="text"), 16).n_tokens[0] == 2


def test_where_things_are_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("OOC_INFLUENCE_CACHE", str(tmp_path))
    assert cache_root() == tmp_path
    monkeypatch.delenv("OOC_INFLUENCE_CACHE")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    assert cache_root() == tmp_path / "hf" / "ooc_influence"


def test_nothing_is_left_of_what_is_kept_for_one_process(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    found = samples(tmp_path, hf.Fields(text="text"), [{"text": "w1 w2"}])
    assert len(list((tmp_path / "temporary").iterdir())) == 1
    del found
    assert not list((tmp_path / "temporary").iterdir())
    with pytest.raises(InputError):
        samples(tmp_path, hf.Fields(text="text"), [{"text": "w1 w2"}, {"text": None}])
    assert not list((tmp_path / "temporary").iterdir())


class Made(Documents):
    """Documents made when they are asked for."""

    def __init__(self, n):
        super().__init__("documents", ["text", "id"])
        self.n = n

    def __len__(self):
        return self.n

    def read(self, numbers, fields):
        return [{"text": f"w{number % 40} w2", "id": f"document {number}"} for number in numbers]


def test_memory_does_not_grow_with_documents():
    def peak(n):
        with PeakMemory(interval=0.001) as watch:
            found = hf.Samples(Made(n), make_tokenizer(), hf.Fields(text="text", id="id"), 16)
            assert found.lengths.sum() == 2 * n
        return watch.peak - watch.start

    peak(3000)  # buffers and caches
    assert peak(40000) < peak(3000) + 5 * 2**20 < 330 * 40000


def test_a_large_file_is_read_by_where_documents_begin(tmp_path, monkeypatch):
    monkeypatch.setattr("ooc_influence.corpus.corpus_file._SMALL", 0)
    rows = [{"text": f"text {n}\n", "n": n} for n in range(3000)]
    for name in ("d.jsonl", "d.csv", "d.parquet"):
        documents = hf.open_documents(write(tmp_path / name, rows))
        order = np.random.default_rng(0).permutation(3000).tolist()
        assert [record["text"] for record in documents.read(order, ["text"])] == [rows[n]["text"] for n in order]
        assert documents.read([2999, 0], ["text", "none"]) == [{"text": rows[n]["text"]} for n in (2999, 0)]


def test_the_report_reads_what_extraction_read(tmp_path):
    (tmp_path / "d.csv").write_text("text,id\n" + "".join(f"w1 {value},{n}.50\n" for n, value in enumerate(ODD)))
    store = hf.extract(make_model(tmp_path / "m"), tmp_path / "d.csv", tmp_path / "s.zarr", id="id", compressor=SMALL,
                       keep=["id"])  # fmt: skip
    write_report(store, tmp_path / "r", data=Corpus(tmp_path / "*.csv", id="id"), curvature=False)
    pages = "".join(path.read_text() for path in (tmp_path / "r" / "data").glob("suspects-*.js"))
    shown = {entry["id"]: entry["text"] for entry in json.loads(pages[pages.index("[") : pages.rindex("]") + 1])}
    assert shown == {f"{n}.50": f"w1 {value}" for n, value in enumerate(ODD) if value}


def test_the_command_line_leaves_out_what_is_missing_and_takes_patterns(tmp_path, capsys, monkeypatch):
    from ooc_influence.cli.main import main

    monkeypatch.chdir(tmp_path)
    make_model(tmp_path / "model")
    for part in range(2):
        write(tmp_path / f"p{part}.jsonl", [{"text": f"w{part} w2"}, {"text": None}])
    line = "extract --model model --data p*.jsonl --store s.zarr --k 50 --dims 0"
    for more, code, said in (("", 2, "document 1 of p*.jsonl; received null"), (" --on-missing skip", 0, "")):
        with pytest.raises(SystemExit) as stop:
            main((line + more).split())
        assert stop.value.code == code
        assert said in capsys.readouterr().err
    assert GradientStore.open(tmp_path / "s.zarr").n == 2
    assert hf.extract_shards("model", "p?.jsonl", "t.zarr", shards=2, on_missing="skip", compressor=SMALL).n == 2
