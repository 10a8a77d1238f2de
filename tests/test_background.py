"""Started in the background of a script, where the shell lets processes ignore Ctrl-C."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
from conftest import hear_interrupts, random_rows, write_store

ASK = "import signal; print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)"
FIT = """
import os, signal, sys
from ooc_influence.linalg import rows
original = rows.read_blocks
def interrupted(*args, **options):
    for block in original(*args, **options):
        os.kill(os.getpid(), signal.SIGINT)
        yield block
rows.read_blocks = interrupted
from ooc_influence.cli.main import main
main(["fisher", sys.argv[1]])
"""


@pytest.fixture
def in_the_background():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("in_the_background")
def test_children_of_the_tests_can_be_interrupted():
    def hears():
        return subprocess.run([sys.executable, "-c", ASK], capture_output=True, text=True, check=True).stdout.strip()

    assert hears() == "False"
    hear_interrupts()
    assert hears() == "True"
    os.kill(os.getpid(), signal.SIGINT)  # ignored here, as it was


@pytest.mark.parametrize(("trap", "code"), [("", 130), ("trap '' INT; ", 0)])
def test_a_command_that_is_to_ignore_ctrl_c_does(tmp_path, trap, code):
    """As any Unix program: the Ctrl-C of the script's terminal is not for what it runs in the background."""
    store = write_store(tmp_path / "t.zarr", random_rows(300, 6))
    command = ["sh", "-c", f'{trap}exec "$@"', "sh", sys.executable, "-c", FIT, str(store.path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert ("interrupted" in done.stderr) == (code == 130)
