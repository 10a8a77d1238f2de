"""A report's data: the public calls' numbers, examples matched to rows, text kept as data; `drop` takes its export."""

from __future__ import annotations

import csv
import gzip
import json
import re
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from conftest import random_rows
from numpy.testing import assert_allclose, assert_array_equal
from pages import HOSTILE, hostile_pair, make_store
from test_cli import run, stores  # noqa: F401 - fixtures

import ooc_influence as ooc
from ooc_influence.corpus import open_records
from ooc_influence.errors import InputError, MismatchError, MissingExtraError, OocInfluenceWarning, StoreExistsError
from ooc_influence.memory import PeakMemory
from ooc_influence.report import Corpus, read_decisions, write_report
from ooc_influence.report import write as writing
from ooc_influence.report.folder import to_script

pytest.importorskip("jinja2")


def data_of(report, name):
    text = (Path(report) / "data" / f"{name}.js").read_text("ascii")
    found = re.fullmatch(r"ooc\.receive\(\"([a-z0-9-]+)\", (.*)\);\n", text, re.S)
    assert found[1] == name
    return json.loads(found[2])


@pytest.fixture
def pair(tmp_path):
    return hostile_pair(tmp_path)


def test_numbers_are_the_public_calls(pair, tmp_path):
    query, train = pair
    data = {"data": tmp_path / "train.jsonl", "query_data": tmp_path / "query.jsonl"}
    report = write_report(train, tmp_path / "r", query, **data, top=4, damping=0.5, suspects=9)
    top = ooc.top_influential(query, train, top=4, damping=0.5)
    own = ooc.self_influence(train, damping=0.5)
    sums = ooc.group_influence(query, train, "label", damping=0.5)
    file = data_of(report, "queries-0")
    assert len(file["queries"]) == 12
    for number, entry in enumerate(file["queries"]):
        for side in ("proponents", "opponents"):
            rows, scores = zip(*entry[side], strict=True)
            assert list(rows) == getattr(top, side).rows[number].tolist()
            assert_allclose(scores, getattr(top, side).scores[number], rtol=1e-5)
        assert entry["groups"]["label"][0][1] == pytest.approx(
            sums.sums[number][np.abs(sums.sums[number]).argmax()], rel=1e-5
        )
        assert entry["text"].endswith(HOSTILE[number])
    for row, example in file["examples"].items():
        assert example["self"] == pytest.approx(own[int(row)], rel=1e-5)
        assert example["loss"] == pytest.approx(train.loss[int(row)], rel=1e-5)
        assert (example["id"], example["label"]) == (train.ids()[int(row)], train.column("label")[int(row)])
        assert example["text"].startswith(example["id"])
    suspects = data_of(report, "suspects-0")
    expected = set(np.argsort(-own)[:9]) | set(np.argsort(-train.loss)[:9])
    assert {entry["row"] for entry in suspects} == expected
    index = data_of(report, "index")
    curvature = ooc.Curvature.open(train.path / "curvature" / "default")
    assert index["spectrum"]["dimension"] == pytest.approx(
        curvature.effective_dimension(curvature.damping_value(0.5)), rel=1e-5
    )
    level, value, dimension = index["spectrum"]["curve"][30]
    assert value == pytest.approx(curvature.damping_value(level), rel=1e-5)
    assert dimension == pytest.approx(curvature.effective_dimension(value), rel=1e-5)
    (histogram,) = [part for part in index["histograms"] if part["name"] == "self-influence"]
    assert sum(histogram["counts"]) + histogram["zeros"] == train.n
    heat = next(part for part in index["groups"] if part["by"] == "label")
    first = query.column("label") == heat["queries"][0]
    assert_allclose(heat["sums"][0], sums.sums[first].mean(0), rtol=1e-5)
    assert heat["counts"] == sums.counts.tolist()


def test_lists_end_where_scores_change_sign(tmp_path):
    train = make_store(tmp_path / "t.zarr", random_rows(30, 6))
    query = make_store(tmp_path / "q.zarr", random_rows(9, 6, 1), like=train)
    report = write_report(train, tmp_path / "r", query, top=30, normalize="cosine")
    scores = ooc.influence_scores(query, train, normalize="cosine").compute()
    for number, entry in enumerate(data_of(report, "queries-0")["queries"]):
        for side, sign in (("proponents", 1), ("opponents", -1)):
            order = np.argsort(-sign * scores[number], kind="stable")
            assert [row for row, _ in entry[side]] == [row for row in order if sign * scores[number, row] > 0]
        assert 0 < len(entry["opponents"]) < 30
    assert ooc.top_influential(query, train, top=30).proponents.rows.shape == (9, 30)


def test_a_line_has_a_chats_last_question(tmp_path):
    """What the chats of a report share, their system's message, is no line; it is searched like long texts."""
    train = make_store(tmp_path / "t.zarr", random_rows(30, 6))
    query = make_store(tmp_path / "q.zarr", random_rows(3, 6, 1), like=train)
    system = [{"role": "system", "content": "Answer briefly."}]
    asked = [[{"role": "user", "content": f"Which\n one,  {row}?"}] for row in range(2)]
    long = [{"role": "user", "content": "why " * 90}]
    chats = [system + own + [{"role": "assistant", "content": "This."}] for own in (*asked, long)]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps({"messages": own}) + "\n" for own in chats))
    report = write_report(train, tmp_path / "r", query, query_data=tmp_path / "q.jsonl", top=2)
    lines = [line[1] for line in data_of(report, "list-0")]
    assert lines == ["Which one, 0?", "Which one, 1?", ("why " * 90)[:160]]
    whole = [f"system: Answer briefly. user: Which one, {row}? assistant: This." for row in range(2)]
    assert data_of(report, "texts-0")[:2] == [[row, text] for row, text in enumerate(whole)]
    first = data_of(report, "queries-0")["queries"][0]
    assert first["text"][first["answer"] :] == "assistant: This."


@pytest.mark.parametrize("damping", [1e-7, 0.5, 3000.0])
def test_the_curve_of_dimensions_reaches_to_the_damping(tmp_path, damping):
    train = make_store(tmp_path / "t.zarr", random_rows(30, 6))
    spectrum = data_of(write_report(train, tmp_path / "r", damping=damping, suspects=5), "index")["spectrum"]
    (first, low, _), (last, high, _) = spectrum["curve"][0], spectrum["curve"][-1]
    assert low <= spectrum["lambda"] * (1 + 1e-5)
    assert high >= spectrum["lambda"] * (1 - 1e-5)
    assert first <= 1e-4
    assert last >= 100
    assert len(spectrum["curve"]) == 1 + round(10 * np.log10(last / first))


def test_no_text_leaves_its_string(pair, tmp_path):
    query, train = pair
    report = write_report(train, tmp_path / "r", query, data=tmp_path / "train.jsonl", title=HOSTILE[1])
    for path in (report / "data").iterdir():
        raw = path.read_bytes()
        assert b"<" not in raw
        assert max(raw) < 128
    index = (report / "index.html").read_text()
    assert "window.hacked" in index
    assert not re.search(r"<script>|onerror=\"", index)
    assert (
        to_script({"a": [float("nan"), np.inf, "</script>", 1 / 3]}) == '{"a":[null,null,"\\u003c/script>",0.333333]}'
    )


def test_files_are_of_few_queries_and_memory_of_one(tmp_path, monkeypatch):
    train = make_store(tmp_path / "t.zarr", random_rows(200, 4), labels=["a", "b"] * 100, sources=["s"] * 200)
    query = make_store(tmp_path / "q.zarr", random_rows(45, 4, 1), like=train)
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"text": f"text {row}"}) + "\n" for row in range(200)))
    held = []
    describe = writing.Examples.describe
    monkeypatch.setattr(writing.Examples, "describe", lambda self, rows: held.append(len(rows)) or describe(self, rows))
    report = write_report(train, tmp_path / "r", query, data=tmp_path / "t.jsonl", top=3, suspects=5)
    assert sorted(path.stem for path in (report / "data").iterdir()) == [
        "index", "list-0", "queries-0", "queries-1", "queries-2", "suspects-0",
    ]  # fmt: skip
    assert max(held) <= writing.QUERIES_A_FILE * 2 * 3
    assert len(data_of(report, "queries-2")["queries"]) == 5
    assert len(data_of(report, "list-0")) == 45
    assert data_of(report, "queries-1")["queries"][3]["number"] == 23
    assert data_of(report, "index")["groups"][0]["left_out"] == 0


def texts_file(path, rows, *, ids=None):
    records = [{"text": f"text {row}"} | ({"name": ids[row]} if ids else {}) for row in rows]
    if path.suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(records), path)
    elif path.suffix in (".csv", ".tsv"):
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, records[0], delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(record | {"text": record["text"] + "\nsecond line"} for record in records)
    else:
        text = "".join(json.dumps(record) + "\n\n" for record in records)
        path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.csv", "a.tsv", "a.parquet"])
def test_texts_by_row_and_by_id_from_every_kind_of_file(tmp_path, name):
    numbered = make_store(tmp_path / "n.zarr", random_rows(30, 4))
    texts_file(tmp_path / name, range(30))
    report = write_report(numbered, tmp_path / "r1", data=tmp_path / name, suspects=30)
    for entry in data_of(report, "suspects-0"):
        assert entry["text"].splitlines()[0] == f"text {entry['row']}"
    ids = [f"doc{row}" for row in range(30)]
    named = make_store(
        tmp_path / "d.zarr", random_rows(30, 4), ids=[f"{own}#1" if own == "doc3" else own for own in ids]
    )
    order = np.random.default_rng(0).permutation(30).tolist()
    texts_file(tmp_path / f"by-id-{name}", order, ids=ids)
    report = write_report(named, tmp_path / "r2", data=Corpus(tmp_path / f"by-id-{name}", id="name"), suspects=30)
    for entry in data_of(report, "suspects-0"):
        assert entry["text"].splitlines()[0] == f"text {entry['row']}"


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.csv.gz"])
def test_a_file_that_is_not_gzip_or_ends_early(tmp_path, name):
    whole = gzip.compress(b'{"text": "a"}\n' * 9)
    for data in (b'{"text": "a"}\n', whole[: len(whole) // 2], whole[:10] + b"\xff" * 20):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(InputError, match=rf"{name} as gzip; received .*: compress it again"):
            list(open_records(tmp_path / name))


def test_records_that_do_not_belong_are_refused(tmp_path):
    train = make_store(tmp_path / "t.zarr", random_rows(20, 4))
    named = make_store(tmp_path / "d.zarr", random_rows(20, 4), ids=[f"doc{row}" for row in range(20)])
    texts_file(tmp_path / "short.jsonl", range(19))
    texts_file(tmp_path / "named.jsonl", range(20), ids=[f"other{row}" for row in range(20)])
    texts_file(tmp_path / "twice.jsonl", range(20), ids=["doc1"] * 20)
    texts_file(tmp_path / "some.jsonl", range(15), ids=[f"doc{row}" for row in range(20)])
    (tmp_path / "bad.jsonl").write_text('{"text": 1}\n{"text"\n')
    (tmp_path / "list.jsonl").write_text("[1]\n")
    cases = [
        (train, "short.jsonl", {}, MismatchError, "a record for each of 20 rows"),
        (named, "named.jsonl", {"id": "name"}, MismatchError, "received none of the 20 looked for, such as 'doc0'"),
        (named, "twice.jsonl", {"id": "name"}, InputError, "received 'doc1' twice"),
        (named, "named.jsonl", {"id": "no"}, InputError, "expected a field 'no' in record 0"),
        (named, "named.jsonl", {"text": "no"}, InputError, "expected a field 'no' .--text"),
        (named, "named.jsonl", {"label": "no"}, InputError, "expected a field 'no'"),
        (train, "bad.jsonl", {}, InputError, "line 2 of"),
        (train, "list.jsonl", {}, InputError, "expected an object in line 1"),
        (train, "missing.jsonl", {}, InputError, "where there is none"),
    ]
    for store, name, fields, error, message in cases:
        with pytest.raises(error, match=message):
            write_report(store, tmp_path / "r", data=Corpus(tmp_path / name, **fields))
        assert not (tmp_path / "r").exists()
    assert not [path for path in tmp_path.iterdir() if path.suffix == ".partial"]
    with pytest.warns(OocInfluenceWarning, match="5 of 20 examples have no record"):
        write_report(named, tmp_path / "r", data=Corpus(tmp_path / "some.jsonl", id="name"))
    (tmp_path / "x.xyz").write_text("a")
    with pytest.raises(InputError, match=r"expected documents as \.jsonl"):
        write_report(train, tmp_path / "r2", data=tmp_path / "x.xyz")


def test_images_from_arrays_and_files(tmp_path):
    images = pytest.importorskip("PIL.Image")
    train = make_store(tmp_path / "t.zarr", random_rows(6, 4))
    generator = np.random.default_rng(0)
    for array in (
        generator.integers(0, 256, (6, 5, 7), dtype=np.uint8),
        generator.random((6, 5, 7, 3)),
        generator.random((6, 3, 5, 7)),
    ):
        np.save(tmp_path / "i.npy", array)
        report = write_report(train, tmp_path / "r", data=Corpus(images=tmp_path / "i.npy"))
        (entry,) = [entry for entry in data_of(report, "suspects-0") if entry["row"] == 4]
        with images.open(report / entry["image"]) as found:
            assert found.size == (7, 5)
            pixels = np.asarray(found)
        own = array[4] if array.dtype == np.uint8 else (array[4] * 255).astype(np.uint8)
        assert_array_equal(pixels, np.moveaxis(own, 0, 2) if own.shape == (3, 5, 7) else own)
    with pytest.raises(InputError, match=r"expected images \(6, h, w\)"):
        write_report(train, tmp_path / "r2", data=Corpus(images=np.zeros((5, 3, 3))))
    (tmp_path / "data").mkdir()
    images.fromarray(np.zeros((900, 20), np.uint8)).save(tmp_path / "data" / "long.jpg")
    images.fromarray(np.zeros((9, 20), np.uint8)).save(tmp_path / "outside.png")
    places = ["long.jpg", "../outside.png", "none.png", "i.jsonl", str(tmp_path / "outside.png"), None]
    (tmp_path / "data" / "i.jsonl").write_text(
        "".join(json.dumps({"text": "", "image": place}) + "\n" for place in places)
    )
    with pytest.warns(OocInfluenceWarning, match="4 images"):
        report = write_report(train, tmp_path / "r3", data=Corpus(tmp_path / "data" / "i.jsonl", image="image"))
    found = {entry["row"]: entry["image"] for entry in data_of(report, "suspects-0") if "image" in entry}
    assert found == {0: "images/train/0.png"}
    unseen = [entry.get("unseen") for entry in data_of(report, "suspects-0")]
    outside, no_image = (
        f"image not shown: {why}" for why in ("not below the folder of the data", "no image that can be read")
    )
    assert unseen == [None, outside, "image not shown: no such file", no_image, outside, None]
    with images.open(report / "images/train/0.png") as picture:
        assert max(picture.size) == 512


def test_reading_csv_leaves_the_process_limit_to_others(tmp_path):
    """Between two records of one reader, of two in any order, and for one that is never read to its end."""
    limit, long = csv.field_size_limit(), "word " * 50_000
    for name in "ab":
        (tmp_path / f"{name}.csv").write_text(f"id,text\n1,{long}\n2,{long}\n")
    first, second = (open_records(tmp_path / f"{name}.csv") for name in "ab")
    for reader in (first, second, first):
        assert len(next(iter(reader))["text"]) == len(long) > limit
        assert csv.field_size_limit() == limit
    with pytest.raises(csv.Error, match="field larger than field limit"):
        list(csv.reader([long]))
    assert len(list(second)) == 1
    assert csv.field_size_limit() == limit


def png(width, height):
    """A PNG file that says it is so large, in a few bytes."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_one_bad_image_is_no_reason_to_stop(tmp_path):
    """Bombs of two sizes, a cut file, one that ends in the middle of a chunk, one that starts a program."""
    images = pytest.importorskip("PIL.Image")
    train = make_store(tmp_path / "t.zarr", random_rows(7, 4))
    (tmp_path / "bomb.png").write_bytes(png(60_000, 60_000))
    (tmp_path / "large.png").write_bytes(png(9_000, 9_000))
    images.fromarray(np.zeros((300, 300, 3), np.uint8)).save(tmp_path / "whole.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:700])
    (tmp_path / "short.png").write_bytes(png(5, 5)[:30])
    (tmp_path / "program.eps").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(x) print\n"
    )
    images.new("L", (9000, 9000)).save(tmp_path / "photo.jpg")
    places = ["bomb.png", "large.png", "cut.jpg", "short.png", "program.eps", "photo.jpg", "whole.jpg"]
    (tmp_path / "i.jsonl").write_text("".join(json.dumps({"text": "", "image": place}) + "\n" for place in places))
    with pytest.warns(OocInfluenceWarning, match="not shown: 5 images"):
        report = write_report(train, tmp_path / "r", data=Corpus(tmp_path / "i.jsonl", image="image"))
    shown = [entry.get("image") or entry["unseen"] for entry in data_of(report, "suspects-0")]
    assert shown[:2] == ["image not shown: more than 67 million pixels"] * 2
    assert all(said.startswith("image not shown: ") for said in shown[2:5])
    assert shown[4] == "image not shown: no image that can be read"
    assert shown[5:] == ["images/train/5.png", "images/train/6.png"]


def test_arrays_with_numbers_that_are_not_finite_are_shown(tmp_path):
    images = pytest.importorskip("PIL.Image")
    train = make_store(tmp_path / "t.zarr", random_rows(3, 4))
    pixels = np.full((3, 2, 2), 0.5, np.float32)
    pixels[0], pixels[1, 0] = np.nan, [np.inf, -np.inf]
    report = write_report(train, tmp_path / "r", data=Corpus(images=pixels))
    found = [np.asarray(images.open(report / f"images/train/{row}.png")).tolist() for row in range(3)]
    assert found == [[[0, 0], [0, 0]], [[255, 0], [127, 127]], [[127, 127], [127, 127]]]


def test_only_an_earlier_report_is_replaced(pair, tmp_path):
    train = pair[1]
    report = write_report(train, tmp_path / "r", pair[0])
    files = {path.relative_to(report) for path in report.rglob("*") if path.is_file()}
    assert {str(path) for path in files} == set(json.loads((report / "report.json").read_text())["files"])
    write_report(train, tmp_path / "r", title="again")
    assert "again" in (report / "index.html").read_text()
    found = {path.relative_to(report) for path in report.rglob("*") if path.is_file()}
    assert found < files  # none of queries
    written = (report / "index.html").read_bytes()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "index.html").write_bytes(written)  # looks like one
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    with pytest.raises(StoreExistsError, match="expected nothing or an earlier report"):
        write_report(train, tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "years of work"
    assert not list(tmp_path.glob(".*"))
    with pytest.raises(InputError, match="one store and one damping"):
        write_report(train, tmp_path / "r", damping=[1, 2])


def test_what_else_is_in_a_reports_folder_stays(pair, tmp_path):
    train, outside = pair[1], tmp_path / "outside"
    outside.write_text("kept")
    report = write_report(train, tmp_path / "r")
    kept = {"labels.csv": "a", "data/notes.txt": "b", "mine/deep/x": "c"}
    for name, text in kept.items():
        (report / name).parent.mkdir(parents=True, exist_ok=True)
        (report / name).write_text(text)
    (report / "empty").mkdir()
    (report / "link").symlink_to(tmp_path)
    listed = json.loads((report / "report.json").read_text())
    listed["files"] += ["../outside", str(outside), "link/outside", "mine"]
    (report / "report.json").write_text(json.dumps(listed))
    (tmp_path / "way").symlink_to(report)
    write_report(train, tmp_path / "way", title="again")
    assert {name: (report / name).read_text() for name in kept} == kept
    assert (report / "empty").is_dir()
    assert (report / "link").is_symlink()
    assert outside.read_text() == "kept"
    assert "again" in (report / "index.html").read_text()
    assert not list(tmp_path.glob(".*"))
    (report / "report.json").write_text(json.dumps(listed | {"files": ["report.json"]}))  # the page is somebody else's
    with pytest.raises(StoreExistsError, match=r"received assets in .*: move it away"):
        write_report(train, report)
    assert "again" in (report / "index.html").read_text()
    assert {name: (report / name).read_text() for name in kept} == kept


def test_dropped_rows_and_queries(pair, tmp_path):
    query, train = pair
    for store, rows in ((train, [3, 4]), (query, [2])):
        with ooc.GradientStore.open(store.path, "a") as opened:
            opened.drop(rows)
    ooc.fit_fisher(train.path)
    report = write_report(train.path, tmp_path / "r", query.path, suspects=60, top=5)
    assert {entry["row"] for entry in data_of(report, "suspects-0")} == set(range(60)) - {3, 4}
    entry = data_of(report, "queries-0")["queries"][2]
    assert (entry["proponents"], entry["dropped"], entry["outside"]) == ([], True, None)
    assert data_of(report, "list-0")[2][5] is None


def test_many_groups_are_added_up(tmp_path):
    train = make_store(tmp_path / "t.zarr", random_rows(120, 16), labels=[f"g{row // 2:02d}" for row in range(120)],
                       sources=["s"] * 120)  # fmt: skip
    query = make_store(tmp_path / "q.zarr", random_rows(250, 16, 1), like=train)
    report = write_report(train, tmp_path / "r", query)
    heat = data_of(report, "index")["groups"][0]
    assert (len(heat["groups"]), heat["groups"][-1], heat["left_out"], len(heat["sums"])) == (40, "(others)", 50, 200)
    sums = ooc.group_influence(query, train, "label")
    assert sum(heat["counts"]) == 120
    assert_allclose(np.sum(heat["sums"], 1), sums.sums[:200].sum(1), atol=1e-4 * np.abs(sums.sums).max())
    assert len(data_of(report, "queries-0")["queries"][0]["groups"]["label"]) == 12


def test_without_a_curvature(pair, tmp_path):
    query, train = pair
    report = write_report(train, tmp_path / "r", query, curvature=False, normalize="cosine")
    assert data_of(report, "index")["spectrum"] is None
    found = ooc.top_influential(query, train, curvature=False, normalize="cosine")
    assert data_of(report, "queries-0")["queries"][0]["proponents"][0][0] == found.proponents.rows[0, 0]


def test_memory_does_not_grow_with_the_corpus(tmp_path):
    train = make_store(tmp_path / "t.zarr", random_rows(4000, 4))
    with (tmp_path / "long.jsonl").open("w") as file:
        for row in range(4000):
            file.write(json.dumps({"text": f"{row} " + "x" * 30_000}) + "\n")
    with PeakMemory() as used:
        report = write_report(train, tmp_path / "r", data=tmp_path / "long.jsonl", suspects=20, memory=2**32)
    assert used.peak - used.start < 60 * 2**20 < (tmp_path / "long.jsonl").stat().st_size
    entry = data_of(report, "suspects-0")[0]
    assert len(entry["text"]) == writing_limit()
    assert entry["cut"] == len(f"{entry['row']} ") + 30_000 - writing_limit()


def writing_limit():
    from ooc_influence.report.examples import TEXT_LIMIT

    return TEXT_LIMIT


def test_missing_jinja_is_named(pair, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "jinja2", None)
    with pytest.raises(
        MissingExtraError, match=r"install the extra 'report' \(in the clone: pip install '\.\[report\]'\)$"
    ):
        write_report(pair[1], tmp_path / "r")


def test_decisions_are_checked(pair, tmp_path):
    train = pair[1]
    names = train.ids().tolist()

    def decisions(**values):
        line = {"row": 8, "id": names[8], "action": "drop", "label": None, "new_label": "", "note": ""} | values
        (tmp_path / "d.jsonl").write_text(json.dumps(line) + "\n")
        return read_decisions(tmp_path / "d.jsonl", train)

    assert decisions()[0][:3] == (8, names[8], "drop")
    for values, error in (
        ({"id": "x"}, MismatchError), ({"row": 60}, MismatchError), ({"action": "burn"}, InputError),
        ({"row": "a"}, InputError),
    ):  # fmt: skip
        with pytest.raises(error, match="expected"):
            decisions(**values)
    with pytest.raises(InputError, match=r"label-errors\.csv"):
        read_decisions(tmp_path / "d.txt", train)


def test_the_command_writes_and_drop_reads(run, stores, tmp_path):  # noqa: F811
    (tmp_path / "corpus.jsonl").write_text(
        "".join(json.dumps({"id": f"doc-{row}", "text": f"text {row}", "from": "web"}) + "\n" for row in range(50))
    )
    (tmp_path / "queries.csv").write_text("text\n" + "".join(f"query {row}\n" for row in range(10)))
    line = "report train.zarr --queries test.zarr --data corpus.jsonl --query-data queries.csv --source from -o out"
    code, out, err = run(line)
    assert (code, out, err) == (0, "open out/index.html\n", "")
    entry = data_of("out", "queries-0")["queries"][4]
    assert entry["text"] == "query 4"
    assert data_of("out", "queries-0")["examples"][str(entry["proponents"][0][0])]["source"] == "web"
    lines = [
        {"row": 3, "id": "doc-3", "action": "drop"},
        {"row": 5, "id": "doc-5", "action": "relabel", "new_label": "1"},
    ]
    (tmp_path / "e.jsonl").write_text("".join(json.dumps(own) + "\n" for own in lines))
    facts = json.loads(run("drop train.zarr --from e.jsonl --json")[1])
    assert (facts["newly_dropped"], facts["dropped"], facts["to_relabel"]) == (1, 1, [5])
    end = (
        "1 of 50 rows in all; fit the curvature again\n1 row to relabel was left as it is (--relabelled drops it too)\n"
    )
    assert run("drop train.zarr --from e.jsonl")[:2] == (0, f"train.zarr: 0 rows newly dropped, {end}")
    code, out, err = run("drop train.zarr --from e.jsonl --relabelled")
    assert (code, out) == (0, "train.zarr: 1 row newly dropped, 2 of 50 rows in all; fit the curvature again\n")
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "empty.csv").write_text("row,id,action,label,new_label,note\n")
    np.save("images.npy", np.zeros((50, 3, 3)))
    for line, message in (
        ("drop train.zarr --relabelled", "expected rows to drop"),
        ("drop train.zarr 3 --relabelled", "expected --from FILE"),
        ("drop train.zarr --from empty.csv", "expected rows in empty.csv; received none"),
        ("drop train.zarr --from empty.jsonl", "expected rows in empty.jsonl; received none"),
        ("report test.zarr -o r2", "expected a fitted curvature"),
        (
            "report train.zarr -o r2 --query-data queries.csv",
            "expected queries (--queries) with --query-data; received none",
        ),
        (
            "report train.zarr -o r2 --query-images images.npy",
            "expected queries (--queries) with --query-images; received none",
        ),
        ("report train.zarr -o r2 --by label", "expected queries (--queries) with --by; received none"),
        ("report train.zarr -o r2 --text t", "expected --data"),
        ("report train.zarr -o r2 --dot --curvature default", "received both"),
    ):
        code, out, err = run(line)
        assert (code, out, len(err.splitlines())) == (2, "", 1)
        assert message in err
    assert not (tmp_path / "r2").exists()
