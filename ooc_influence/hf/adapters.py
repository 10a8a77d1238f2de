"""Folders of PEFT adapters: which model they are for, what it does, and of how many classes."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from ooc_influence.errors import InputError
from ooc_influence.hf.documents import need

Task = Literal["causal-lm", "classification"]
_TASKS: dict[str, Task] = {"CAUSAL_LM": "causal-lm", "SEQ_CLS": "classification"}
_PREFIX = "base_model.model."  # of what an adapter saves
_UNLIKELY = 7919  # classes: where a shape says that, it means the classes


class Adapter(NamedTuple):
    """What an adapter says about its model.

    Attributes
    ----------
    path : str
        Its folder, or id of the hub.
    base : str or None
        The model it was trained on; None if it does not say.
    task : {"causal-lm", "classification"} or None
        What it was trained for; None if it does not say.
    shapes : dict of str to tuple
        The model's own parameters that it holds, such as a classifier's head, by their names there.
    """

    path: str
    base: str | None
    task: Task | None
    shapes: dict[str, tuple[int, ...]]

    @classmethod
    def read(cls, path: str | Path) -> Adapter | None:
        """Return what a folder says; None where it holds no adapter.

        Raises
        ------
        InputError
            If its configuration or its weights cannot be read.
        """
        file = Path(path) / "adapter_config.json"
        if not file.is_file():
            return None
        try:
            said = json.loads(file.read_text())
            base, kind = said.get("base_model_name_or_path"), said.get("task_type")
        except (OSError, ValueError, AttributeError) as error:
            raise InputError(f"expected a PEFT adapter's configuration in {file}; received {error}") from error
        return cls(str(path), str(base) if base else None, _TASKS.get(kind), _saved_shapes(Path(path)))

    def classes(self, config: Any, **common: Any) -> int | None:
        """Return the classes of the classifier's head that it holds; None if it holds none.

        ``config`` is the base model's; ``common`` is for ``transformers``.
        """
        if self.task != "classification" or not self.shapes:
            return None
        transformers = need("transformers")
        probe = type(config).from_dict({**config.to_dict(), "id2label": None, "label2id": None})
        probe.num_labels = _UNLIKELY
        with torch.device("meta"):
            empty = transformers.AutoModelForSequenceClassification.from_config(probe, **common)
        for name, parameter in empty.named_parameters():
            if name in self.shapes and _UNLIKELY in parameter.shape:
                return self.shapes[name][list(parameter.shape).index(_UNLIKELY)]
        return None


def put_adapter(model: Any, path: str) -> Any:
    """Return ``model`` with the adapter of a folder or of the hub.

    Raises
    ------
    InputError
        If it cannot be read, or is not one for this model.
    """
    peft = need("peft")
    from safetensors import SafetensorError

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="Found missing adapter keys")
            return peft.PeftModel.from_pretrained(model, path, is_trainable=True)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError, UserWarning) as error:
        raise InputError(
            f"expected a PEFT adapter for {type(model).__name__} at {path}; received {type(error).__name__}: {error}"
        ) from error


def _saved_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    from safetensors import SafetensorError, safe_open

    file = folder / "adapter_model.safetensors"
    if not file.is_file():
        return {}
    try:
        with safe_open(file, "pt") as held:
            return {
                name.removeprefix(_PREFIX): tuple(held.get_slice(name).get_shape())
                for name in held.keys()  # noqa: SIM118 - it is no mapping
                if "lora_" not in name
            }
    except SafetensorError as error:
        raise InputError(damaged(file, error)) from error


def damaged(file: Path, error: Exception) -> str:
    """Return what to say of a file of weights that cannot be read."""
    return f"expected weights in {file}; received a cut or damaged file ({error}): copy or download it again"
