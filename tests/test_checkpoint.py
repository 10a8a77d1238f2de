"""Partial results: what is resumed, what is refused, and fits of one store at the same moment."""

from __future__ import annotations

import pickle
import shutil
import threading

import numpy as np
import pytest

from ooc_influence import Curvature, checkpoint, fit_fisher
from ooc_influence.errors import StoreExistsError, StoreWriteError
from ooc_influence.store import create_array, local


def keep(fit, name="sums"):
    """Save a result of a fit."""
    fit.put_group(name, 0, {}, lambda group: create_array(group, "x", (3,), (3,), np.float32))


def test_a_fit_that_ends_leaves_the_next_one_its_folder(tmp_path, monkeypatch):
    first = checkpoint.ClaimedOutput(tmp_path / "f", {"of": 1})
    keep(first)
    assert checkpoint.ClaimedOutput(tmp_path / "f", {"of": 1}).path is None  # while the first holds the claim
    next_one = []

    def remove_empty(folder):
        if not next_one:  # the first has given the folder back, and is about to remove it
            next_one.append(checkpoint.ClaimedOutput(tmp_path / "f", {"of": 2}))
            keep(next_one[0])
        plain(folder)

    plain = checkpoint.remove_empty
    monkeypatch.setattr(checkpoint, "remove_empty", remove_empty)
    first.close(finished=True)
    (second,) = next_one
    assert second.path is not None
    assert list(second.groups("sums")) == ["sums"]
    second.close(finished=False)
    again = checkpoint.ClaimedOutput(tmp_path / "f", {"of": 2})
    assert list(again.groups("sums")) == ["sums"]
    again.close(finished=True)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_goes_while_it_is_claimed_is_made_again(tmp_path, monkeypatch):
    left = [2]

    def make_claim(path, **how):
        if left[0]:
            left[0] -= 1
            shutil.rmtree(path)
        return plain(path, **how)

    plain = checkpoint.make_claim
    monkeypatch.setattr(checkpoint, "make_claim", make_claim)
    with checkpoint.ClaimedOutput(tmp_path / "f", {}) as kept:
        assert kept.path is not None
        keep(kept)
    assert list(tmp_path.iterdir()) == []
    left[0] = 1000
    with pytest.raises(StoreWriteError, match=r"expected to write the curvature to .*check the path"):
        checkpoint.ClaimedOutput(tmp_path / "f", {})


def test_results_of_other_settings_do_not_count(tmp_path):
    first = checkpoint.ClaimedOutput(tmp_path / "f", {"of": 1})
    keep(first)
    (first.path / ".settings.json.0.partial").write_text("of a crash")
    first.close(finished=False)
    other = checkpoint.ClaimedOutput(tmp_path / "f", {"of": 2})
    assert other.groups("sums") == {}
    other.close(finished=False)
    assert list(tmp_path.iterdir()) == []  # it kept nothing


def test_there_is_a_finished_curvature_at_any_moment(tmp_path, pair):
    for name in "ab":
        (tmp_path / name).mkdir()
    if not local._swap(tmp_path / "a", tmp_path / "b"):
        pytest.skip("this system, or the file system of the temporary folder, does not swap names")
    train = pair[1]
    place = fit_fisher(train).path
    done, missed = threading.Event(), []

    def look():
        while not done.is_set():
            if not (place / "zarr.json").exists():
                missed.append(1)

    watching = threading.Thread(target=look)
    watching.start()
    for _ in range(20):
        fit_fisher(train, refit=True)
    done.set()
    watching.join()
    assert missed == []
    assert [path.name for path in place.parent.iterdir() if path.is_dir()] == ["default"]


def test_a_curvature_is_replaced_without_swapping_names(pair, monkeypatch):
    train = pair[1]
    before = fit_fisher(train)
    monkeypatch.setattr(local, "_renameat2", lambda: None)
    after = fit_fisher(train, refit=True)
    assert after.attrs["fit"] != before.attrs["fit"]
    assert Curvature.open(after.path).attrs["fit"] == after.attrs["fit"]
    assert [path.name for path in after.path.parent.iterdir() if path.is_dir()] == ["default"]


def test_parts_are_those_of_one_call(tmp_path, caplog):
    """Settings are compared as JSON; a damaged part counts as missing; what is not a part stays."""
    output = checkpoint.ResumableOutput(tmp_path / "parts", {"digest": "a", "ranges": [(0, 3)]})
    output.check()
    assert not output.path.exists()
    output.begin()
    output.put("0-4-0-8", {"values": np.arange(3)})
    output.put("0-4-8-16", {"values": np.arange(4)})
    (output.path / "notes.txt").write_text("of its user")
    again = pickle.loads(pickle.dumps(checkpoint.ResumableOutput(output.path, {"digest": "a", "ranges": [[0, 3]]})))
    again.check()
    assert again.part_names() == ["0-4-0-8", "0-4-8-16"]
    assert again.get("0-4-0-8")["values"].tolist() == [0, 1, 2]
    assert again.get("0-4-16-24") is None
    (output.path / "0-4-8-16.npz").write_bytes(b"PK damaged")
    assert again.get("0-4-8-16") is None
    assert "0-4-8-16.npz cannot be read" in caplog.text
    for settings, received in (({"digest": "b", "ranges": []}, "another call"), ({"seed": 1}, "something else")):
        with pytest.raises(StoreExistsError, match=received):
            checkpoint.ResumableOutput(output.path, settings).check()
    with output.claimed():
        assert again.part_names() == ["0-4-0-8", "0-4-8-16"]
    assert [path.name for path in output.path.iterdir()] == ["notes.txt"]


def test_without_a_folder_nothing_is_kept():
    output = checkpoint.ResumableOutput()
    output.check()
    with output.claimed():
        output.put("0-4-0-8", {"values": np.arange(3)})
        output.put_group("rows-0", 3, {}, lambda group: None)
        assert (output.get("0-4-0-8"), output.groups(), output.part_names()) == (None, {}, [])
        assert not output.clock().due()
