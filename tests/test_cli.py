"""The commands, end to end on a small model; one line, no traceback and exit code 2 for a user's mistake."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import click
import numpy as np
import pytest
import zarr

import ooc_influence
from ooc_influence import GradientStore, influence_scores
from ooc_influence.cli.main import main

RECIPE = """
import torch
from models import Mlp, batches, data, loss, make
from ooc_influence import Recipe, Split

def recipe():
    x, y = data(Mlp, 60)
    train = Split(batches(x[:50], y[:50], 8), ids=[f"doc-{row}" for row in range(50)], columns={"label": y[:50]})
    return Recipe(make(Mlp), loss, {"train": train, "test": batches(x[50:], y[50:], 8)}, loss_kind="cross_entropy")

def as_tuple():
    return make(Mlp), loss, {"only": batches(*data(Mlp, 10), 5)}

def failing():
    return 1 / 0

def nothing():
    return None

number = 3

def printing():
    print("training epoch 1")
    return as_tuple()

def leaving():
    raise SystemExit(0)

def two_lines():
    raise RuntimeError("line one\\nline two")

def no_splits():
    return make(Mlp), loss, []

def failing_in(place, row=0):
    def per_sample_loss(model, batch):
        return loss(model, batch["labels"] if place == "loss" else batch)

    def rows(start):
        yield from batches(*data(Mlp, 10), 5)
        if place == "data":
            raise OSError("disk gone")

    class Failing(Mlp):
        def forward(self, x):
            return torch.cat([super().forward(x), x]) if place == "model" else super().forward(x)

    model = Failing().eval()
    model.load_state_dict(make(Mlp).state_dict())
    return model, per_sample_loss, {"only": rows}

def failing_loss():
    return failing_in("loss")

def failing_model():
    return failing_in("model")

def failing_data():
    return failing_in("data")

def no_model():
    return None, loss, {"a": []}
"""


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Run a command in ``tmp_path``; return (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    (tmp_path / "my_recipe.py").write_text(RECIPE)

    def call(line):
        with pytest.raises(SystemExit) as stopped:
            main(line.split())
        out, err = capsys.readouterr()
        return stopped.value.code or 0, out, err

    return call


@pytest.fixture
def stores(run):
    for line in (
        "extract --recipe my_recipe.py:recipe --split train --store train.zarr --k 200",
        "extract --recipe my_recipe.py:recipe --split test --store test.zarr --like train.zarr",
        "fisher train.zarr",
    ):
        code, _, err = run(line)
        assert (code, err) == (0, "")


def test_the_whole_way(run, stores):
    code, out, err = run("score test.zarr train.zarr --out scores.zarr --json")
    assert (code, err) == (0, "")
    assert json.loads(out)["queries"] == 10
    expected = influence_scores("test.zarr", "train.zarr").compute()
    assert (zarr.open_array("scores.zarr")[...] == expected).all()

    code, out, _ = run("top test.zarr train.zarr --top 3 --json")
    first = json.loads(out)["queries"][0]
    row = int(np.argmax(expected[0]))
    assert first["proponents"][0] == {"row": row, "id": f"doc-{row}", "score": float(expected[0, row])}
    assert [len(first[side]) for side in ("proponents", "opponents")] == [3, 3]

    code, out, _ = run("self-influence train.zarr --top 4 --out values.npy --json")
    rows = json.loads(out)["rows"]
    values = np.load("values.npy")
    assert values.shape == (50,)
    assert [entry["row"] for entry in rows] == np.argsort(-values)[:4].tolist()

    code, out, _ = run("info train.zarr --json")
    facts = json.loads(out)
    assert (facts["rows"], facts["k"], facts["columns"]) == (50, 200, {"label": "int64"})
    assert facts["curvature"] == {"default": "up to date"}
    assert facts["loss_kind"] == "cross_entropy"

    for line, words in (
        ("info train.zarr", ["rows", "50", "curvature.default", "up to date"]),
        ("top test.zarr train.zarr --top 1", ["query 9", "proponent", "opponent", "doc-"]),
        ("self-influence train.zarr", ["doc-", "self-influence", "relative damping 0.1, not normalised"]),
        ("fisher train.zarr --refit", ["<Curvature", "rows=50"]),
        ("score test.zarr train.zarr --out again.zarr --damping 1 --damping-mode absolute", ["10 queries x 50 rows"]),
    ):
        code, out, err = run(line)
        assert (code, err) == (0, "")
        assert all(word in out for word in words), out


def test_running_extract_again_does_nothing(run, stores):
    code, out, _ = run("extract --recipe my_recipe.py:recipe --split train --store train.zarr --k 200 --json")
    assert code == 0
    assert json.loads(out)["rows"] == 50


def test_what_a_recipe_prints_is_not_our_output(run):
    code, out, err = run("extract --recipe my_recipe.py:printing --store s.zarr --k 50 --json")
    assert code == 0
    assert json.loads(out)["k"] == 50
    assert "training epoch 1" in err


def test_a_broken_store_is_one_line(run, stores):
    Path("train.zarr/zarr.json").write_text("{")
    code, _, err = run("info train.zarr")
    assert code == 2
    assert "cannot be read" in err


def test_the_only_split_and_a_module_recipe(run):
    code, _, err = run("extract --recipe my_recipe:as_tuple --store s.zarr --k 50 --dtype bfloat16 --modules last")
    assert (code, err) == (0, "")
    assert GradientStore.open("s.zarr").shape == (10, 50)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("fisher nowhere.zarr", "no such path"),
        ("info nowhere.zarr", "no such path"),
        ("top train.zarr nowhere.zarr", "no such path"),
        ("fisher train.zarr --memory lots", "memory size such as"),
        ("fisher train.zarr --memory 1MiB --refit", "budget 1 MiB"),
        ("fisher train.zarr --workers 0", "workers >= 1"),
        ("fisher train.zarr --name ../other", "curvature name"),
        ("self-influence test.zarr", "run fit_curvature"),
        ("self-influence train.zarr --curvature other", "/train.zarr --name other'"),
        ("self-influence train.zarr --curvature gram", "/train.zarr --method dual'"),
        ("self-influence train.zarr --curvature some/place", "/some/place'"),
        ("modules test.zarr train.zarr", "(--top or --out)"),
        ("self-influence train.zarr --damping -1", "damping >= 0"),
        ("self-influence train.zarr --damping 0", "of numerical rank"),
        ("top test.zarr train.zarr --top 0", "top >= 1"),
        ("score test.zarr train.zarr --out train.zarr", "expected nothing at"),
        ("extract --recipe my_recipe.py:recipe --store a.zarr", "--split, one of train, test"),
        ("extract --recipe my_recipe.py:recipe --store a.zarr --split x", "to be one of train, test"),
        ("extract --recipe my_recipe.py --store a.zarr", "path.py:function"),
        ("extract --recipe none.py:recipe --store a.zarr", "no such file"),
        ("extract --recipe none:recipe --store a.zarr", "ModuleNotFoundError"),
        ("extract --recipe my_recipe.py:failing --store a.zarr", "ZeroDivisionError: division by zero (at"),
        ("extract --recipe my_recipe.py:nothing --store a.zarr", "received NoneType"),
        ("extract --recipe my_recipe.py:number --store a.zarr", "received none: check the name"),
        ("extract --recipe my_recipe.py:as_tuple --store a.zarr --k 999999", "k <= p"),
        ("extract --recipe my_recipe.py:as_tuple --store train.zarr --k 50", "expected the compressor"),
        ("extract --recipe my_recipe.py:as_tuple --store a.zarr --like train.zarr --k 9", "--like fixes the mask"),
        ("extract --recipe my_recipe.py:as_tuple --store my_recipe.py --k 9", "received something else"),
        ("extract --recipe my_recipe.py:as_tuple --store gopher://bucket/a.zarr", "fsspec URL"),
        ("extract --recipe my_recipe.py:as_tuple --store a.zarr --device nonsense", "expected a device such as"),
        ("extract --recipe my_recipe.py:leaving --store a.zarr", "received SystemExit"),
        ("extract --recipe my_recipe.py:two_lines --store a.zarr", "line one line two"),
        ("extract --recipe my_recipe.py:no_splits --store a.zarr", "splits"),
        ("extract --recipe my_recipe.py:no_model --store a.zarr", "a torch.nn.Module"),
        ("extract --recipe my_recipe.py:as_tuple --store a.zarr --seed -1", "seed >= 0"),
        ("extract --recipe my_recipe.py:as_tuple --store my_recipe.py/x --k 9", "a folder to write to"),
        ("self-influence train.zarr --out none/x.npy", "a folder to write"),
        ("score test.zarr train.zarr --out my_recipe.py/x", "expected to write scores"),
        ("demo --out my_recipe.py", "a folder to write to"),
        ("fisher train.zarr --out test.zarr", "a curvature or nothing"),
        ("demo --rows 5", "expected --rows >= 1437"),
    ],
)
def test_a_mistake_is_one_line(run, stores, line, message):
    code, out, err = run(line)
    assert code == 2
    assert out == ""
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1


def test_other_settings_than_a_stores_are_named(run):
    extract = "extract --recipe my_recipe.py:as_tuple --store a.zarr"
    assert run(f"{extract} --k 60 --dims 4 --pilot 8")[0] == 0
    for options, expected, received in (
        ("--k 50", "k 60, reduce with r 4, pilot 8", "k 50, no reduce"),
        ("--k 60 --dims 3 --pilot 8", "reduce with r 4", "reduce with r 3"),
        ("--k 60 --dims 4", "reduce with pilot 8", "reduce with no pilot"),
        ("--compressor gaussian --k 60", "name dropout, sampling uniform, reduce with", "name gaussian, no sampling"),
        ("--k 60 --dims 4 --pilot 8 --dtype int8", "float16", "int8"),
        ("--k 60 --dims 4 --pilot 8 --codec zstd", "none", "zstd"),
    ):
        code, out, err = run(f"{extract} {options}")
        assert (code, out) == (2, "")
        assert f" of the store at a.zarr, {expected}" in err
        assert f"; received {received}" in err
        assert "seed" not in err
        assert "{" not in err


@pytest.mark.parametrize(
    ("recipe", "reason", "code"),
    [
        ("failing_loss", "TypeError", 'return loss(model, batch["labels"]'),
        ("failing_model", "RuntimeError: Sizes of tensors", "return torch.cat("),
        ("failing_data", "OSError: disk gone", 'raise OSError("disk gone")'),
    ],
)
@pytest.mark.parametrize(
    ("command", "before"),
    [
        ("extract --k 50", None),
        ("extract --k 50 --shards 1", "init --k 50 --rows 10"),
        ("init --k 50 --rows 10 --sampling importance", None),
        ("check --rows 32", "extract --k 50"),
    ],
)
def test_a_failing_line_of_a_recipe_is_named(run, command, before, recipe, reason, code):
    number = next(number for number, line in enumerate(RECIPE.splitlines(), 1) if code in line)
    if before is not None:
        assert run(f"{before} --recipe my_recipe.py:as_tuple --store a.zarr")[0] == 0
    status, out, err = run(f"{command} --recipe my_recipe.py:{recipe} --store a.zarr")
    assert (status, out) == (2, "")
    assert f"error: expected the recipe my_recipe.py:{recipe} to run; received {reason}" in err
    assert f"my_recipe.py:{number}): fix the recipe\n" in err
    assert err.count("\n") == 1


def test_an_error_of_this_package_is_not_blamed_on_a_recipe(run, monkeypatch):
    monkeypatch.setattr("ooc_influence.extract.taps._Tap", None)
    code, _, err = run("extract --recipe my_recipe.py:as_tuple --store a.zarr --k 50")
    assert code == 1
    assert "unexpected AttributeError" in err


@pytest.mark.parametrize("line", ["top test.zarr", "score a b", "extract", "unknown", "fisher a --workers x"])
def test_wrong_usage(run, line):
    code, _, err = run(line)
    assert code == 2
    assert "Usage:" in err


def test_an_unexpected_error_is_one_line_too(run, stores, monkeypatch):
    monkeypatch.setattr("ooc_influence.linalg.rows.read_blocks", None)
    code, _, err = run("fisher train.zarr --refit")
    assert code == 1
    assert err.startswith("error: unexpected TypeError")
    with pytest.raises(TypeError):
        main(["--traceback", "fisher", "train.zarr", "--refit"])


def test_interruption(run, stores, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("ooc_influence.linalg.rows.read_blocks", stop)
    code, _, err = run("fisher train.zarr --refit")
    assert code == 130
    assert "run the same command again" in err


def test_help_loads_nothing_heavy():
    script = """
    import sys
    from ooc_influence.cli.main import main
    try:
        main(["extract", "--help"])
    except SystemExit as stopped:
        assert not stopped.code
    print([name for name in ("torch", "numpy", "zarr", "dask") if name in sys.modules])
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True)
    assert "--recipe" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"


HEAVY = ("torch", "scipy", "dask", "distributed", "pandas", "xarray", "pyarrow", "jinja2", "matplotlib", "transformers")


@pytest.mark.parametrize(
    ("line", "needed"),
    [
        ("top test.zarr train.zarr", []),
        ("top test.zarr train.zarr --dot", []),
        ("self-influence train.zarr", []),
        ("info train.zarr", []),
        ("fisher train.zarr --refit", ["scipy"]),  # eigenvectors
    ],
)
def test_commands_load_what_they_need(run, stores, line, needed):
    """A query of a small store takes less time than libraries that it does not need take to load."""
    script = f"""
    import sys
    from ooc_influence.cli.main import main
    try:
        main({line.split()!r})
    except SystemExit as stopped:
        assert not stopped.code
    print([name for name in {HEAVY!r} if name in sys.modules])
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == str(needed)


def test_no_warning_on_import_and_one_version():
    code = "import ooc_influence, ooc_influence.cli.main, torch, ooc_influence.extract, ooc_influence.evaluate"
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)
    citation = (Path(__file__).parent.parent / "CITATION.cff").read_text()
    assert f"version: {ooc_influence.__version__}\n" in citation


@pytest.mark.parametrize("module", ["ooc_influence", "ooc_influence.cli.main"])
def test_python_runs_it_as_a_module(module):
    done = subprocess.run([sys.executable, "-m", module, "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"ooc-influence, version {ooc_influence.__version__}\n"
    done = subprocess.run([sys.executable, "-m", module, "info", "nowhere.zarr"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: expected a gradient store at ")


def test_the_command_advised_makes_what_was_missing(run, stores):
    for name in ("other", "gram", "some/place"):
        _, _, err = run(f"self-influence train.zarr --curvature {name}")
        command = re.search("or 'ooc-influence (.*)'", err)[1]
        assert run(command)[0] == 0
        assert run(f"self-influence train.zarr --curvature {name}")[0] == 0
    assert run("drop train.zarr 3")[0] == 0
    _, _, err = run("self-influence train.zarr --curvature other")
    assert "run fit_curvature again, or" in err
    assert run(re.search("or 'ooc-influence (.*)'", err)[1])[0] == 0
    assert run("self-influence train.zarr --curvature other")[0] == 0


def test_version(run):
    code, out, _ = run("--version")
    assert code == 0
    assert out.startswith("ooc-influence, version ")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="of glibc")
def test_freed_memory_is_kept():
    """Pages of a large block that was freed are not touched anew."""
    script = """if True:
        import resource
        from ooc_influence.cli.options import keep_freed_memory
        faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        keep = KEEP and keep_freed_memory()
        before = faults()
        for _ in range(8):
            b"x" * 2**26
        print(faults() - before)
    """
    found = []
    for keep in (False, True):
        environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
        done = subprocess.run(
            [sys.executable, "-c", script.replace("KEEP", str(keep))], capture_output=True, text=True, env=environment
        )
        assert done.returncode == 0, done.stderr
        found.append(int(done.stdout))
    assert found[1] < found[0] / 4


def test_modules_are_left_out(run):
    code, _, err = run("extract --recipe my_recipe:as_tuple --store s.zarr --k 50 --modules !last")
    assert code == 0, err
    names = [module.layer.name for module in GradientStore.open("s.zarr").mask.modules]
    assert names == ["first", "second"]


def test_the_help_has_sections():
    """Every option of a long command is in one section, those that come first exist, and no sentence is cut."""
    from ooc_influence.cli.help import COMMANDS, SectionedCommand
    from ooc_influence.cli.main import ALL, cli

    context = click.Context(cli, max_content_width=110)
    assert "..." not in cli.get_help(context).split("Options:")[1]
    assert sorted(name for names in COMMANDS.values() for name in names) == sorted(each.name for each in ALL)
    for command in ALL:
        options = [each for each in command.params if isinstance(each, click.Option)]
        assert isinstance(command, SectionedCommand) or len(options) <= 22, command.name
        for each in options:
            assert re.fullmatch(r"[A-Z].*\.", each.help), (command.name, each.name)
        if isinstance(command, SectionedCommand):
            found = dict(command.parts(context))
            assert [each.name for each in found["Most used"]] == list(command.first)
            assert {each.name for each in found["Other options"] if each in options} <= {"as_json", "yes", "open_page"}
            shown = command.get_help(context)
            assert all(shown.count(f"  {each.opts[-1]} ") + shown.count(f", {each.opts[-1]} ") == 1 for each in options)
