"""What the shell completes: commands, options, and file names wherever a path may stand."""

from __future__ import annotations

import os
import subprocess
import sys

import click
from click.shell_completion import ShellComplete

from ooc_influence.cli.main import cli

# other text than paths: by what stands for a value in the help, or by name where nothing does
NO_PATHS = {
    "SIZE", "NAME", "ADDRESS", "FIELD", "COLUMN", "A:B", "I/N", "PATTERN", "HH:MM:SS", "TEXT",
    "SHARE|N", "COLUMN[:VALUE]=SHARE", "ID",
    "name", "device", "revision", "title", "host", "ids", "rows", "commands",
}  # fmt: skip
TEXT = (click.types.StringParamType, click.Path, click.File, click.types.UnprocessedParamType)


def completed(words, incomplete):
    found = ShellComplete(cli, {}, "ooc-influence", "_OOC_INFLUENCE_COMPLETE").get_completions(words, incomplete)
    return [(item.type, item.value) for item in found]


def paths():
    """Yield every place of the command line where a path may stand: what is typed before it."""
    for name, command in cli.commands.items():
        before = [name]
        for param in command.params:
            if isinstance(param, click.Option):
                words = [name, param.opts[0]]
            else:
                words, before = before, [*before, "x"]
            if isinstance(param.type, TEXT) and (param.metavar or param.name) not in NO_PATHS:
                yield words


def test_paths_are_completed_as_files():
    for words in paths():
        assert completed(words, "tr") == [("file", "tr")]


def test_there_are_many_and_others_are_not():
    found = {" ".join(words) for words in paths()}
    assert {"report", "report -o", "report --data", "top x", "compact x", "merge", "top --also"} <= found
    assert len(found) > 80
    assert completed(["top", "--memory"], "tr") == []
    assert [value for _, value in completed(["top"], "--sched")] == ["--scheduler", "--scheduler-file"]
    assert ("plain", "report") in completed([], "re")
    assert completed(["top", "a", "b", "--also", "c"], "tr") == [("file", "tr")]


def test_bash_completes_a_file_name(tmp_path):
    """As README's line sets it up: bash is told to complete file names itself."""
    script = "from ooc_influence.cli.main import cli; cli(prog_name='ooc-influence')"
    told = {"_OOC_INFLUENCE_COMPLETE": "bash_complete", "COMP_WORDS": "ooc-influence report tr2.z", "COMP_CWORD": "2"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=os.environ | told)
    assert done.stdout == "file,tr2.z\n", done.stderr
