"""Every command and block of the README is run, or counted with a reason why not."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, re.M | re.S)
NOT_RUN = {  # first words of the shell lines that are not run here, and why
    "./tools/demo": "test_demo runs what it calls",
    "./tools/test": "this is what runs",
    "PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu": "needs the network",
}


def environment():
    return os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


def test_the_library_example_runs_as_printed(tmp_path):
    pytest.importorskip("sklearn")
    blocks = [text for kind, text in BLOCKS if kind == "python"]
    assert len(blocks) == 1
    (tmp_path / "example.py").write_text(blocks[0])
    done = subprocess.run([sys.executable, "-W", "error::UserWarning", "example.py"], cwd=tmp_path, capture_output=True,
                          text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert re.search(r"proponents \[[ \d]+\] opponents \[[ \d]+\]", done.stdout)


def test_the_commands_run_as_printed(tmp_path):
    pytest.importorskip("sklearn")
    lines = [line.split("  #")[0].strip() for kind, text in BLOCKS if kind == "bash" for line in text.splitlines()]
    run = [line for line in lines if line and line.split()[0] not in NOT_RUN]
    assert {line.split()[0] for line in lines} - {"ooc-influence"} == set(NOT_RUN)
    assert len(run) == 9
    for line in run:
        done = subprocess.run(line, shell=True, cwd=tmp_path, env=environment(), capture_output=True, text=True)
        assert done.returncode == 0, f"{line}: {done.stderr}"
        assert done.stdout


def test_links_lead_somewhere():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if "://" not in link]
    assert links
    assert all((ROOT / link).exists() for link in links)


def test_the_scripts_it_names_are_there():
    scripts = re.findall(r"`python (tools/\S+\.py)`", README)
    assert scripts
    assert all((ROOT / script).exists() for script in scripts)
