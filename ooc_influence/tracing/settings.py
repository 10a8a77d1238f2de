"""The settings of a run: a small YAML file beside its result, from which it can be repeated."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ooc_influence.corpus import local_path
from ooc_influence.errors import InputError, StoreExistsError, writing
from ooc_influence.options import TraceOptions, definitions
from ooc_influence.progress import optional_library

RUN = "run.yaml"
SOURCES = ("model", "data", "queries")
_FREE = ("memory", "device", "top", "token_rows")  # what no store depends on


def source_name(source: Any) -> str | None:
    """Return the absolute path of a file or folder, or a name on the hub; None for an object."""
    if not isinstance(source, (str, Path)):
        return None
    text = str(source)
    there = Path(text).exists() or any(sign in text for sign in "*?[")
    return os.path.abspath(local_path(text)) if there else text  # noqa: PTH100 - of a pattern, too


def claim_folder(folder: Path, settings: Mapping[str, Any]) -> None:
    """Write the settings of a run to its folder; refuse one with a run of other settings, or something else.

    Raises
    ------
    StoreExistsError
        If there is one.
    """
    path, asked = folder / RUN, _chosen(settings)
    if path.is_file():
        kept = read_settings(path)
        names = [name for name in {**kept, **asked} if name not in _FREE and kept.get(name) != asked.get(name)]
        if names:
            (name, *_) = names
            raise StoreExistsError(
                f"expected in {folder} a run with {name}={asked.get(name)!r}; received one with {kept.get(name)!r}: "
                f"choose another folder, or repeat that run with 'ooc-influence trace {path}'"
            )
    elif folder.exists() and any(folder.iterdir()):
        raise StoreExistsError(f"expected {folder} to be new, empty or a run's; received other files: choose another")
    with writing(f"to write the settings of a run to {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        yaml = optional_library("yaml", "the settings of a run", "hf")
        path.write_text(yaml.safe_dump(asked, sort_keys=False, allow_unicode=True), "utf-8")


def _chosen(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that are not the default, as YAML has them."""
    defaults = {name: option.default for name, option in definitions(TraceOptions).items()}
    plain = {name: _plain(value) for name, value in settings.items() if name != "progress"}
    return {name: value for name, value in plain.items() if name not in defaults or value != _plain(defaults[name])}


def _plain(value: Any) -> Any:
    """Return a setting as YAML reads it back."""
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return value if value is None or isinstance(value, (bool, int, float)) else str(value)


def read_settings(path: str | Path) -> dict[str, Any]:
    """Return the settings in a run's file: ``model``, ``data``, ``queries`` and options of :func:`trace`, by name.

    Raises
    ------
    InputError
        For a file that cannot be read, names that are not known, and values of another type.
    """
    yaml = optional_library("yaml", "the settings of a run", "hf")
    try:
        found = yaml.safe_load(Path(path).read_text("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"expected the settings of a run in {path}; received {error}") from error
    if not isinstance(found, dict):
        raise InputError(f"expected names and values in {path}; received {type(found).__name__}")
    known = dict.fromkeys((*SOURCES, "out"), "str, optional")
    known |= {name: option.type for name, option in definitions(TraceOptions).items()}
    for name, value in found.items():
        if name not in known:
            raise InputError(
                f"expected settings that trace has in {path}; received {name!r}: it has {', '.join(known)}"
            )
        if not _fits(value, known[name]):
            raise InputError(f"expected {name} as {known[name]} in {path}; received {value!r}")
    return found


def _fits(value: Any, kind: str) -> bool:
    """Return whether a value has the type that an option's documentation says."""
    if value is None:
        return "optional" in kind or "None" in kind
    if kind.startswith("{"):
        return f'"{value}"' in kind or str(value) in kind.strip("{}").split(", ")
    types: dict[str, tuple[type, ...]] = {
        "bool": (bool,), "int": (int,), "float": (float, int), "str": (str,), "path": (str,), "sequence": (list,),
        "torch.device": (str,),
    }  # fmt: skip
    allowed = tuple(each for name, group in types.items() if name in kind for each in group)
    return isinstance(value, allowed) and (bool in allowed or not isinstance(value, bool))
