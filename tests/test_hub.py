"""Data sets by name, copies of them in folders, streams with a stated number of documents, folders of files."""

from __future__ import annotations

import gzip
import json
import logging

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from test_cli import run  # noqa: F401 - a fixture
from tiny_hf import MARKS, SMALL, datasets, documents, make_model, write

from ooc_influence import hf
from ooc_influence.corpus import is_hub_id, open_documents
from ooc_influence.errors import InputError
from ooc_influence.hf import extraction

pytestmark = MARKS
CARD = """---
configs:
- config_name: one
  data_files:
  - split: train
    path: one/train.jsonl
  - split: test
    path: one/test.jsonl
- config_name: two
  data_files: two/train.jsonl
---
"""


def texts(found):
    return [record["text"] for record in found.read_all()]


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A copy of a repository with two configurations."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "copy"
    for name in ("one/train", "one/test", "two/train"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write(folder / f"{name}.jsonl", [{"text": f"w1 {name} {number}"} for number in range(3)])
    (folder / "README.md").write_text(CARD)
    return folder


def test_a_copy_of_a_repository_in_a_folder(repository):
    assert texts(open_documents(repository, "test", config="one")) == [f"w1 one/test {n}" for n in range(3)]
    assert texts(open_documents(repository, config="two")) == [f"w1 two/train {n}" for n in range(3)]
    with pytest.raises(InputError, match=r"one of the splits train, test of .* \(--split\)"):
        open_documents(repository, config="one")
    with pytest.raises(InputError, match=r"\(--split, --config\); received .*copy: ValueError: ") as caught:
        open_documents(repository, config="three")
    assert "\n" not in str(caught.value)


def test_streams_of_a_stated_number(repository):
    found = open_documents(repository, "train", config="one", streaming=True, first=2)
    assert (len(found), texts(found)) == (2, ["w1 one/train 0", "w1 one/train 1"])
    assert len(open_documents(repository, "train", config="one", streaming=True, first=9)) == 3
    with pytest.raises(InputError, match=r"take \(--documents\) of .*copy, which can only be read in order"):
        open_documents(repository, "train", config="one", streaming=True)
    taken = []
    stream = datasets.IterableDataset.from_generator(lambda: ({"text": str(taken.append(n) or n)} for n in range(100)))
    found = open_documents(stream, first=5)
    assert (texts(found), len(taken)) == ([str(n) for n in range(5)], 5)
    file = found._folder.path
    assert file.is_dir()
    del found
    assert not file.exists()
    with pytest.raises(InputError, match="the IterableDataset given, which can only be read in order"):
        open_documents(stream)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("org/name", True), ("org/name.v2", True), ("name", False), ("a/b/c", False), ("/a/b", False), ("./a", False),
     ("org/data.jsonl", False), ("org/*.jsonl", False), ("~/data", False), ("here/name", False), (7, False)],
)  # fmt: skip
def test_what_is_a_name_of_the_hub(name, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    assert is_hub_id(name) == expected


def test_a_name_of_the_hub_is_loaded_by_the_library(tmp_path, monkeypatch):
    asked = []

    def load_dataset(*arguments, **options):
        asked.append((arguments, options))
        return datasets.Dataset.from_list([{"text": "w1"}, {"text": "w2"}])

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert texts(open_documents("org/name", "train", config="c")) == ["w1", "w2"]
    assert asked == [(("org/name", "c"), {"split": "train", "streaming": False})]

    def refuse(*arguments, **options):
        raise ConnectionError("no\nnetwork")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(InputError, match="received org/name: ConnectionError: no network"):
        open_documents("org/name")


@pytest.mark.parametrize("options", [{"config": "c"}, {"streaming": True}])
def test_options_of_the_hub_with_other_data(tmp_path, options):
    data = write(tmp_path / "d.jsonl", documents(2))
    name = next(iter(options))
    for other in (data, [{"text": "w1"}]):
        with pytest.raises(InputError, match=rf"with {name} \(--{name}\); received"):
            open_documents(other, **options)


def test_a_folder_of_files(tmp_path, caplog):
    caplog.set_level(logging.INFO, "ooc_influence")
    folder = tmp_path / "files"
    (folder / "below").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    write(folder / "b.jsonl", [{"text": "2"}])
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(json.dumps({"text": "1"}).encode()))
    write(folder / "below" / "c.jsonl", [{"text": "3"}])
    write(folder / ".hidden" / "d.jsonl", [{"text": "4"}])
    write(folder / "_log.jsonl", [{"text": "5"}])
    (folder / "README.md").write_text("about")
    assert texts(open_documents(folder)) == ["1", "2", "3"]
    assert "3 files in" in caplog.text
    write(folder / "e.parquet", [{"text": "6"}])
    with pytest.raises(InputError, match=r"one kind; received .* with files of \.jsonl, \.parquet: give a pattern"):
        open_documents(folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"received .*empty with none: give a pattern"):
        open_documents(tmp_path / "empty")


def test_rows_of_a_stream(tmp_path, repository, run, monkeypatch):  # noqa: F811
    """The store records what the stream was, and finds its rows again."""
    folder = make_model(tmp_path / "model")
    code, _, err = run(f"extract --model {folder} --data {repository} --config one --split train --streaming "
                       f"--documents 2 --store {tmp_path / 's.zarr'} --k 50 --basis parameters")  # fmt: skip
    assert code == 0, err
    loaded = hf.load(folder)
    plain = hf.extract(loaded, repository / "one" / "train.jsonl", tmp_path / "p.zarr", compressor=SMALL)
    from ooc_influence import GradientStore

    store = GradientStore.open(tmp_path / "s.zarr")
    assert_array_equal(store.column("text_digest"), plain.column("text_digest")[:2])
    origin = store.attrs["origin"]
    assert {name: origin[name] for name in ("config", "split", "streaming", "documents")} == {
        "config": "one", "split": "train", "streaming": True, "documents": 2,
    }  # fmt: skip
    job = hf.job_of(store, loaded)
    assert_array_equal(job.samples.text_digest, store.column("text_digest"))
    assert np.asarray(job.samples.n_tokens).tolist() == store.column("n_tokens").tolist()


def test_shards_are_given_the_name(tmp_path, monkeypatch):
    given = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(extraction, "run_shards", lambda path, init, write, *more: given.append(write.args[1]))
    for data in ("org/name", "part.jsonl"):
        hf.extract_shards("model", data, tmp_path / "s.zarr", shards=2)
    assert given == ["org/name", str(tmp_path / "part.jsonl")]
