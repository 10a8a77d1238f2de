"""What this user may not read or write is said in one line with the advice that fits, and exit code 2."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import random_rows, write_store

from ooc_influence import fit_fisher
from ooc_influence.cli.main import main
from ooc_influence.errors import StoreBusyError, StoreWriteError, refused
from ooc_influence.report.folder import PageFolder

POWERS = "-dac_override,-dac_read_search"  # what lets root read and write all the same; setpriv drops it
DROP = ["setpriv", "--bounding-set", POWERS, "--inh-caps", POWERS] if os.geteuid() == 0 else []
SCRIPT = """
import contextlib, io, json, os, sys
from ooc_influence.cli.main import main
lines, found = json.load(sys.stdin), {}
for line in [] if os.access("secret.csv", os.R_OK) else lines:
    with contextlib.redirect_stderr(io.StringIO()) as err, contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            main(line.split())
        except SystemExit as stopped:
            code = stopped.code
    found[line] = code, out.getvalue(), err.getvalue()
print(json.dumps(found))
"""
RECIPE = """
from models import Mlp, batches, data, loss, make

def recipe():
    return make(Mlp), loss, {"only": batches(*data(Mlp, 10), 5)}
"""
CASES = {
    "report train.zarr -o shut/pages": ("expected to write a report to ", "; received permission denied: change"),
    "report train.zarr -o pages --data secret.jsonl": ("expected to read secret.jsonl; received permission denied",),
    "report train.zarr -o pages --data secret.jsonl.gz": ("expected to read secret.jsonl.gz; received permission",),
    "drop train.zarr --from secret.csv": ("expected to read secret.csv; received permission denied: change",),
    "self-influence train.zarr --out shut/values.npy": ("expected to write shut/values.npy; ", "may not write"),
    "self-influence train.zarr --resume shut/parts": ("for partial results at ", "permission denied", "choose another"),
    "extract --recipe my_recipe.py:recipe --store shut/new.zarr --k 9": ("/shut, where this user may not write: ",),
    "score test.zarr train.zarr --out shut/scores.zarr": ("permission denied: change the permissions, then run the",),
    "compact train.zarr shut/new.zarr": ("permission denied: change the permissions, or choose another path",),
    "reduce train.zarr shut/new.zarr --dims 3": ("permission denied: change the permissions, or choose another path",),
    "fisher train.zarr --out shut/f.zarr": ("permission denied: change the permissions, or give another path",),
    "fisher train.zarr --method dual --out shut/f.zarr": (
        "permission denied: change the permissions, or give another",
    ),
    "demo --out shut/demo": ("expected a folder to write to at shut/demo; received permission denied",),
    "info folder.zarr": ("expected to read the store at ", "received permission denied (", ": change the"),
    "info root.zarr": ("expected to read ", "root.zarr/zarr.json; received permission denied: change"),
    "info gradients.zarr": ("expected to read ", "gradients.zarr/gradients/zarr.json; received permission denied"),
    "top test.zarr gradients.zarr": ("expected to read ", "/gradients/zarr.json; received permission denied: change"),
    "top test.zarr chunk.zarr": ("expected to read ", "chunk.zarr/gradients/c.1.0; received permission denied"),
    "top test.zarr curvature.zarr": ("expected to read ", "/curvature/default/zarr.json; received permission denied"),
}
SHUT = {
    "folder.zarr": "", "root.zarr": "zarr.json", "gradients.zarr": "gradients", "chunk.zarr": "gradients/c.1.0",
    "curvature.zarr": "curvature",
}  # fmt: skip


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """Exit code, stdout and stderr of every command above, in a folder where they may not do what they are to."""
    folder = tmp_path_factory.mktemp("permissions")
    train = write_store(folder / "train.zarr", random_rows(150, 20))
    write_store(folder / "test.zarr", random_rows(3, 20, 1))
    fit_fisher(train)
    (folder / "my_recipe.py").write_text(RECIPE)
    (folder / "shut").mkdir()
    shut = [folder / "shut"]
    for name, path in SHUT.items():
        shutil.copytree(train.path, folder / name)
        shut.append(folder / name / path)
    for name in ("secret.jsonl", "secret.jsonl.gz", "secret.csv"):
        (folder / name).write_text("{}\n")
        shut.append(folder / name)
    for path in shut:
        path.chmod(0o500 if path.name == "shut" else 0)
    root = Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(root), str(root.parent)])}
    done = subprocess.run(
        [*DROP, sys.executable, "-c", SCRIPT], input=json.dumps(list(CASES)), cwd=folder, env=environment,
        capture_output=True, text=True,
    )  # fmt: skip
    for path in shut:
        path.chmod(0o700)
    if DROP and done.stderr.startswith("setpriv"):
        pytest.skip(f"root keeps its powers here: {done.stderr}")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout) or pytest.skip("permissions do not hold for this user")


@pytest.mark.skipif(bool(DROP) and shutil.which("setpriv") is None, reason="root, and no setpriv")
@pytest.mark.parametrize("line", CASES)
def test_what_may_not_be_done_is_a_mistake_in_one_line(answers, line):
    code, out, err = answers[line]
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    for part in ("error: ", *CASES[line]):
        assert part in err
    assert not any(words in err for words in ("unexpected", "make room", "credentials", "Errno"))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "no space left on device: make room"),
        (OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)), "disk quota exceeded: make room"),
        (PermissionError(errno.EACCES, os.strerror(errno.EACCES), "/a/b"), "permission denied (/a/b): change the"),
        (PermissionError(errno.EACCES, os.strerror(errno.EACCES), "/s"), "permission denied: change the"),
        (PermissionError(errno.EACCES, os.strerror(errno.EACCES), "/a/.b.xyz"), "permission denied (/a): change the"),
        (PermissionError("AccessDenied"), "AccessDenied: change the permissions"),
        (OSError(errno.EROFS, os.strerror(errno.EROFS)), "read-only file system: make it writable"),
        (NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR)), "not a directory: check the path"),
        (OSError(errno.EIO, os.strerror(errno.EIO)), "input/output error: check the disk or the connection"),
        (OSError("Bucket Gone"), "Bucket Gone: check the disk or the connection"),
    ],
)
def test_the_advice_fits_the_reason(error, message):
    assert refused("to write to /s", error, ", or not").startswith(f"expected to write to /s; received {message}")
    assert refused("to write to /s", error, ", or not").endswith(", or not")


def test_the_reason_of_an_error_that_says_one_is_taken():
    known = StoreWriteError("expected to write; received nothing")
    known.__cause__ = OSError(errno.ENOSPC, "No space left on device")
    assert refused("to go on", known) == "expected to go on; received no space left on device: make room"
    assert "received expected nobody; received one" in refused(
        "to go on", StoreBusyError("expected nobody; received one")
    )


def test_a_page_that_finds_no_room(tmp_path):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def write(name):
        with pytest.MonkeyPatch.context() as patch, PageFolder(tmp_path / "pages") as folder:
            patch.setattr(Path, name, full)
            folder.write_data("rows", [])

    for name in ("write_text", "rename"):
        with pytest.raises(StoreWriteError, match=r"a report to .*; received no space left on device: make room$"):
            write(name)
        assert not list(tmp_path.glob("*"))


def test_a_place_where_nothing_can_be_made_is_a_mistake(tmp_path, capsys):
    write_store(tmp_path / "train.zarr", random_rows(150, 20))
    (tmp_path / "file").write_text("")
    for place, reason in (("file/pages", "file exists"), ("file/further/pages", "not a directory")):
        with pytest.raises(SystemExit) as stopped:
            main(["report", str(tmp_path / "train.zarr"), "--dot", "-o", str(tmp_path / place)])
        err = capsys.readouterr().err
        assert stopped.value.code == 2
        assert reason in err
        assert err.endswith(": check the path\n")


def test_a_permission_that_nothing_else_foresaw(tmp_path, monkeypatch, capsys):
    def shut(*_, **__):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), "/some/file")

    monkeypatch.setattr("ooc_influence.GradientStore.open", shut)
    with pytest.raises(SystemExit) as stopped:
        main(["info", "train.zarr"])
    assert stopped.value.code == 2
    assert "received permission denied (/some/file): change the permissions\n" in capsys.readouterr().err
