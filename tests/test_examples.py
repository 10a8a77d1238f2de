"""The examples run at their quick sizes and find what they are about."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOM = Path(__file__).parent.parent / "tools" / "examples"
NEEDS = {"digits_mislabels": "jinja2", "language_model": "transformers", "lora": "peft", "cluster": "distributed"}
FOUND = {
    "digits_mislabels": r"(\d+) of 30 flipped labels",
    "language_model": r"document (\d+), cosine",
    "lora": r"is first for \d+, among the first five for (\d+)",
    "cluster": r"differ by (\S+) of the largest",
}


def test_every_example_is_listed():
    assert {path.stem for path in ROOM.glob("*.py")} == set(FOUND)


@pytest.mark.slow
@pytest.mark.parametrize("name", FOUND)
def test_it_finds_what_it_is_about(name, tmp_path):
    pytest.importorskip(NEEDS[name])
    pytest.importorskip("sklearn")
    command = [sys.executable, "-W", "error", str(ROOM / f"{name}.py"), "--quick", "--folder", "out"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = [float(number) for number in re.findall(FOUND[name], done.stdout)]
    if name == "digits_mislabels":
        assert found[0] >= 20
        assert (tmp_path / "out" / "report" / "index.html").exists()
    elif name == "language_model":
        assert len(found) == 3
    elif name == "lora":
        assert found[0] >= 6  # of eight: by chance, five of thirty for each
    else:
        assert found[0] < 1e-4


@pytest.mark.slow
def test_a_text_too_short_is_a_mistake(tmp_path):
    pytest.importorskip("transformers")
    (tmp_path / "short.txt").write_text("a single paragraph")
    command = [sys.executable, str(ROOM / "language_model.py"), "short.txt", "--folder", "out"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "several paragraphs" in done.stderr
