"""Options are defined once: signatures, docstrings, defaults, commands come from the definitions."""

from __future__ import annotations

import ast
import importlib
import inspect
from pathlib import Path
from typing import get_args

import click
import pytest

import ooc_influence as ooc
from ooc_influence import options
from ooc_influence.cli.main import cli
from ooc_influence.options import Option, complete, definitions, select, takes

PACKAGE = Path(ooc.__file__).parent
KINDS = {name: kind for name, kind in vars(options).items() if isinstance(kind, type) and hasattr(kind, "__total__")}


def functions():
    """Yield (function, kind) of every function that takes a kind of options, in all modules."""
    for path in sorted(PACKAGE.rglob("*.py")):
        tree = ast.parse(path.read_text())
        owners = {
            id(child): node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef) for child in node.body
        }
        for node in ast.walk(tree):
            if not isinstance(node, ast.FunctionDef) or node.args.kwarg is None:
                continue
            kind = ast.unparse(node.args.kwarg.annotation) if node.args.kwarg.annotation else ""
            decorators = [ast.unparse(each) for each in node.decorator_list]
            if kind.startswith("Unpack["):
                name = kind.removeprefix("Unpack[").removesuffix("]")
                assert f"takes({name})" in decorators, f"{path}: {node.name}'s decorator is of another kind"
                module = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
                home = importlib.import_module(module)
                yield getattr(getattr(home, owners[id(node)]) if id(node) in owners else home, node.name), KINDS[name]


def test_signatures_and_docstrings_show_every_option_with_its_default():
    pytest.importorskip("transformers")
    found = list(functions())
    assert {function.__name__ for function, _ in found} >= {
        "top_influential", "influence_scores", "group_influence", "module_influence", "self_influence", "fit_fisher",
        "fit_gram", "gram_matrix", "fit_curvature", "reduce_store", "extract_gradients", "init_store", "plan", "create",
        "write_report", "live_report", "check", "retrain", "leave_one_out", "removal_curve", "verify_influence",
        "extract", "prepare", "load", "load_base", "lora_training",
    }  # fmt: skip
    for function, kind in found:
        parameters, doc = inspect.signature(function).parameters, function.__doc__
        assert "**options" not in doc
        for name, option in definitions(kind).items():
            assert parameters[name].default == option.default, (function, name)
            assert parameters[name].kind is inspect.Parameter.KEYWORD_ONLY
            assert doc.count(f" {name} : {option.type}\n") == 1, (function, name)
            assert " ".join(option.doc.split()[:5]) in " ".join(doc.split())


def test_no_function_has_more_than_eight_parameters():
    """Options count as one. A Triton kernel takes what it takes."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name != "sampled_outer_kernel":
                own = [each.arg for each in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
                assert len([name for name in own if name not in ("self", "cls")]) <= 8, f"{path}: {node.name}"


def test_definitions_are_whole():
    for name, kind in KINDS.items():
        assert kind.__doc__, name
        for each, option in definitions(kind).items():
            assert isinstance(option, Option), (name, each)
            assert option.type, (name, each)
            assert option.doc.endswith("."), (name, each)
            assert not option.help or option.help.endswith((".", "default.")), (name, each)
            if option.choices:
                assert option.default is None or option.default in option.choices
    assert list(definitions(options.PairOptions))[-4:] == ["device", "workers", "memory", "progress"]
    assert definitions(options.ScoringOptions)["damping_mode"].choices == get_args(options.DampingMode)


def test_unknown_names_are_refused_with_the_closest_one():
    with pytest.raises(TypeError, match=r"^top_influential\(\) got an unexpected keyword argument 'dampng'\. Did"):
        ooc.top_influential("q.zarr", "t.zarr", dampng=0.1)
    with pytest.raises(TypeError, match=r"'zzz'$"):
        ooc.fit_fisher("t.zarr", zzz=1)
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'train'"):
        ooc.top_influential("q.zarr")
    with pytest.raises(TypeError, match="'rank'"):  # of another kind
        ooc.fit_gram("t.zarr", rank=3)
    with pytest.raises(TypeError, match=r"'exist'\. Did you mean 'exist_ok'\?"):
        ooc.GradientStore.create("t.zarr", None, exist=True)


def test_calls_get_every_option():
    @takes(options.ListOptions)
    def call(first, second=2, **given):
        """Do it.

        Parameters
        ----------
        first, second
            Numbers.
        **options : ListOptions
            These.

        Returns
        -------
        int
        """
        return first, second, given

    first, second, given = call(1, damping=[0.1], resume="r")
    assert (first, second, given.pop("damping"), given.pop("resume")) == (1, 2, [0.1], "r")
    defaults = complete(options.ListOptions, {})
    assert given == {name: value for name, value in defaults.items() if name not in ("damping", "resume")}
    assert select(options.Resumable, {"resume": 1, "rows": 2}) == {"resume": 1}
    entries = [line.partition(" : ")[0].strip() for line in call.__doc__.splitlines() if " : " in line]
    assert entries == list(defaults)
    assert call.__doc__.split()[-3:] == ["Returns", "-------", "int"]


@pytest.mark.parametrize(("command", "kind", "others"), [
    ("top", options.ListOptions, {}), ("score", options.PairOptions, {}), ("groups", options.ListOptions, {}),
    ("modules", options.PairOptions, {}), ("self-influence", options.SelfInfluenceOptions, {}),
    ("fisher", options.FisherOptions, {}), ("reduce", options.ReduceOptions, {}),
    ("rewrite", options.RewriteOptions, {}), ("average", options.AverageOptions, {}),
    ("trajectory", options.TrajectoryOptions, {}), ("plan", options.PlanOptions, {}),
    ("extract", options.HuggingFaceOptions, {}), ("init", options.ExtractionOptions, {}),
    ("report", options.ReportOptions, {"device": None}), ("check", options.CheckOptions, {}),
    ("verify-influence", options.VerifyOptions, {}), ("verify-influence", options.LoraOptions, {"task": None}),
])  # fmt: skip
def test_commands_have_the_options_that_calls_have(command, kind, others):
    flags = {param.name: param for param in cli.commands[command].params if isinstance(param, click.Option)}
    for name, option in definitions(kind).items():
        if not option.help or name in others:
            continue
        assert (option.flag or f"--{name.replace('_', '-')}") in flags[name].opts
        if option.choices:
            assert tuple(flags[name].type.choices) == option.choices
        if not option.multiple and not isinstance(option.default, bool):
            assert flags[name].default == option.default
