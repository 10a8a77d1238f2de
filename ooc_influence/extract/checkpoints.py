"""Several checkpoints in one row: gradients at each, averaged in the basis of the last one, which is the model itself.

Checkpoints must have the model's tensors, by name and shape. Only those that differ from the model's are used, mapped
from files, and stand in for them while a batch runs; no second copy of the model is held.
"""

from __future__ import annotations

import json
import logging
import pickle
import re
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ooc_influence.errors import InputError, MismatchError, StoreWriteError, listed
from ooc_influence.extract.fingerprint import model_fingerprint
from ooc_influence.extract.layers import clean_name
from ooc_influence.progress import optional_library
from ooc_influence.store import GradientStore

logger = logging.getLogger("ooc_influence")
Tensors = Mapping[str, Tensor]
CheckpointSource = str | Path | Tensors | nn.Module

_WEIGHTS = ("model.safetensors", "adapter_model.safetensors", "pytorch_model.bin", "adapter_model.bin")
_PICKLED = (".pt", ".pth", ".bin", ".ckpt")  # which PyTorch maps; safetensors are mapped from a copy
_INSIDE = ("state_dict", "model_state_dict", "model")  # where training scripts keep the weights in a file


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """An earlier state of a model.

    Attributes
    ----------
    fingerprint : str
        The model's fingerprint in this state.
    path : str or None
        Where it was read from.
    tensors : mapping of str to Tensor
        Its tensors that differ from the model's.
    """

    fingerprint: str
    path: str | None
    tensors: Tensors

    @contextmanager
    def loaded(self, model: nn.Module) -> Iterator[None]:
        """Put the model in this state, and back."""
        targets = _targets(model)
        before = {name: targets[name].data for name in self.tensors}
        try:
            for name, values in self.tensors.items():
                targets[name].data = values.to(before[name].device)
            yield
        finally:
            for name, own in before.items():
                targets[name].data = own

    def to_dict(self) -> dict[str, Any]:
        """Return what a store records."""
        return {"fingerprint": self.fingerprint, "path": self.path}


def open_checkpoints(
    model: nn.Module, sources: Sequence[CheckpointSource] | CheckpointSource | None
) -> tuple[Checkpoint, ...]:
    """Return checkpoints of a model, without those that are the model as it is.

    Raises
    ------
    InputError
        For what is no checkpoint, or cannot be read.
    MismatchError
        For a checkpoint of another model.
    StoreWriteError
        If there is no room for temporary files.
    """
    if isinstance(sources, (str, Path, Mapping, nn.Module)):
        sources = (sources,)
    found = []
    for source in sources or ():
        if isinstance(source, (str, Path)):
            found += [_open(model, path, read_tensors(path)) for path in checkpoint_paths(source)]
        elif isinstance(source, nn.Module):
            found.append(_open(model, None, {n: v.data for n, v in _targets(source).items()}))
        elif isinstance(source, Mapping) and all(isinstance(value, Tensor) for value in source.values()):
            found.append(_open(model, None, source))
        else:
            raise InputError(f"expected checkpoints as paths, state dicts or modules; received {type(source).__name__}")
    others = tuple(each for each in found if each.tensors)
    if len(others) < len(found):
        logger.info("a checkpoint has the weights of the model itself: it counts once")
    return others


def recorded_checkpoints(store: GradientStore) -> list[str] | None:
    """Return the paths of the checkpoints that a store's rows are averages over, None for a store of one model.

    Raises
    ------
    InputError
        If they were not read from files.
    """
    recorded = store.attrs.get("checkpoints") or None
    if recorded is None:
        return None
    paths = [each["path"] for each in recorded]
    if any(path is None for path in paths):
        raise InputError(
            f"expected checkpoints= for rows like those of {store.path}, which are averages over {len(paths)} "
            "checkpoints and the model; received none: give the same, or checkpoints=() for the model's own gradients"
        )
    return paths


def checkpoint_paths(path: str | Path) -> list[Path]:
    """Return the checkpoints at a path: a file, or a folder of one; or those in a folder, by number.

    Raises
    ------
    InputError
        If there are none.
    """
    path = Path(path).absolute()
    if path.is_file():
        return [path]
    inside = sorted(path.iterdir(), key=_number) if path.is_dir() else []
    folders = [each for each in inside if re.fullmatch(r"checkpoint-\d+", each.name) and each.is_dir()]
    if folders:  # of a Trainer; a model beside them is the last one again
        return folders
    if _weight_files(path):
        return [path]
    files = [each for each in inside if each.suffix in (".safetensors", *_PICKLED)]
    if not files:
        raise InputError(
            f"expected a checkpoint or a folder of them at {path}; received "
            f"{'nothing there' if not path.exists() else 'a folder without any'}: expected checkpoint-N folders, or "
            "files such as model.safetensors or *.pt"
        )
    return files


def _number(path: Path) -> list[Any]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", path.name)]


def _weight_files(folder: Path) -> list[Path]:
    """Return the files of one checkpoint's tensors, as ``save_pretrained`` leaves them; none for another folder."""
    for name in _WEIGHTS:
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            return [folder / name]
        if index.is_file():
            return [folder / file for file in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    return []


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return a checkpoint's tensors by name, mapped where the format allows it.

    Raises
    ------
    InputError
        If it cannot be read as tensors alone: pickled code is never run.
    """
    found: dict[str, Tensor] = {}
    for file in [path] if path.is_file() else _weight_files(path):
        try:
            found |= _read_file(file)
        except (OSError, ValueError, RuntimeError, pickle.UnpicklingError) as error:
            raise InputError(
                f"expected a file of tensors at {file}; received {type(error).__name__}: {error}: save the model's "
                "state_dict there"
            ) from error
    return found


def _read_file(file: Path) -> dict[str, Tensor]:
    if file.suffix == ".safetensors":
        library = optional_library("safetensors", "checkpoints in this format", "hf")
        with library.safe_open(file, "pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - no mapping
    held = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    inner = [held[name] for name in _INSIDE if isinstance(held, Mapping) and isinstance(held.get(name), Mapping)]
    held = inner[0] if inner else held
    if not isinstance(held, Mapping):
        raise ValueError(f"a {type(held).__name__}")
    return {name: value for name, value in held.items() if isinstance(value, Tensor)}


def _targets(model: nn.Module) -> dict[str, Tensor]:
    """Return a model's parameters and saved buffers by clean name, tied ones by each of their names."""
    saved = {clean_name(model, name) for name in model.state_dict()}
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    cleaned = {clean_name(model, name): tensor for name, tensor in named}
    return {name: tensor for name, tensor in cleaned.items() if name in saved}


def _adapter_name(name: str, adapters: Collection[str]) -> str:
    """Return the name that a PEFT adapter's file has for a tensor of a model with these adapters."""
    inner = "|".join(map(re.escape, adapters))
    return re.sub(rf"(\.modules_to_save)?\.({inner})(?=\.|$)", "", name)


def _open(model: nn.Module, path: Path | None, tensors: Tensors) -> Checkpoint:
    place = "a state dict" if path is None else str(path)
    given = {clean_name(model, name): value for name, value in tensors.items()}
    targets = _targets(model)
    if path is not None and (path / "adapter_config.json").is_file():
        adapters = getattr(model, "peft_config", ())
        own = {_adapter_name(name, adapters): name for name, target in targets.items() if target.requires_grad}
        given = {own.get(name, name): value for name, value in given.items()}
        targets = {name: targets[name] for name in own.values()}
    found = {id(targets[name]) for name in given if name in targets}
    unknown = [name for name in given if name not in targets]
    missing = [name for name, target in targets.items() if id(target) not in found]
    if unknown or missing:
        lack = f"without {listed(missing, 3)}" if missing else f"with {listed(unknown, 3)}"
        raise MismatchError(
            f"expected a checkpoint of {type(model).__name__}, with its tensors; received {place}, {lack}: give "
            "checkpoints of the same training"
        )
    different = {}
    for name, values in given.items():
        target = targets[name]
        if values.shape != target.shape or values.is_floating_point() != target.is_floating_point():
            kinds = (f"{tuple(each.shape)} {str(each.dtype).removeprefix('torch.')}" for each in (target, values))
            raise MismatchError(
                f"expected {name} as {next(kinds)} in a checkpoint of {type(model).__name__}; received {next(kinds)} "
                f"in {place}: give checkpoints of the same training, in the same representation"
            )
        values = values.detach().to(target.dtype)
        if not torch.equal(values.to(target.device), target.detach()):
            different[name] = values
    if path is not None and path.suffix not in _PICKLED:
        different = _mapped(different)
    checkpoint = Checkpoint("", None if path is None else str(path), different)
    with checkpoint.loaded(model):
        return replace(checkpoint, fingerprint=model_fingerprint(model))


def _mapped(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors mapped from a temporary file that is removed with them."""
    if not tensors:
        return {}
    try:
        with tempfile.NamedTemporaryFile(prefix="ooc_influence-", suffix=".pt") as file:
            torch.save(tensors, file.name)
            return dict(torch.load(file.name, mmap=True, weights_only=True))
    except (OSError, RuntimeError) as error:
        raise StoreWriteError(
            f"expected room for a checkpoint's tensors among the temporary files; received {error}: make room in "
            f"{tempfile.gettempdir()}, or name another folder by TMPDIR"
        ) from error
