"""Models, tokenizers and adapters, loaded whole or refused."""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Unpack

import torch

from ooc_influence import corpus
from ooc_influence.corpus import Documents
from ooc_influence.errors import InputError, listed
from ooc_influence.options import LoadingOptions, Task, takes
from ooc_influence.progress import optional_library


def _library(name: str) -> Any:
    """Import a library of the extra ``hf``."""
    return optional_library(name, "Hugging Face models", "hf")


def open_documents(data: Any, split: str | None = None, **options: Any) -> Documents:
    """Return documents by number and field; see :func:`ooc_influence.corpus.open_documents`.

    Raises
    ------
    InputError
        If there is no such file, of no known kind, empty, or one that cannot be read.
    MissingExtraError
        Without ``datasets``.
    """
    _library("datasets")  # its cache is where an index of the documents is kept
    return corpus.open_documents(data, split, **options)


_TASKS: dict[str, Task] = {"CAUSAL_LM": "causal-lm", "SEQ_CLS": "classification"}
_PREFIX = "base_model.model."  # of what an adapter saves
_UNLIKELY = 7919  # classes: where a shape has this number, it means the classes


class Adapter(NamedTuple):
    """An adapter's folder or id on the hub, and what its files say: its base model, and what it was trained for.

    ``shapes`` are those of parameters of the model itself, such as a classifier's head, by their names in the model.
    """

    path: str
    base: str | None
    task: Task | None
    shapes: dict[str, tuple[int, ...]]

    @classmethod
    def read(cls, path: str | Path) -> Adapter | None:
        """Return the adapter in a folder; None where there is none."""
        file = Path(path) / "adapter_config.json"
        if not file.is_file():
            return None
        try:
            config = json.loads(file.read_text())
            base, kind = config.get("base_model_name_or_path"), config.get("task_type")
        except (OSError, ValueError, AttributeError) as error:
            raise InputError(f"expected a PEFT adapter's configuration in {file}; received {error}") from error
        return cls(str(path), str(base) if base else None, _TASKS.get(kind), _saved_shapes(Path(path)))

    def classes(self, config: Any, **common: Any) -> int | None:
        """Return the number of classes of its classifier's head, if it has one; ``config`` is the base model's."""
        if self.task != "classification" or not self.shapes:
            return None
        transformers = _library("transformers")
        probe = type(config).from_dict({**config.to_dict(), "id2label": None, "label2id": None})
        probe.num_labels = _UNLIKELY
        with torch.device("meta"):
            empty = transformers.AutoModelForSequenceClassification.from_config(probe, **common)
        for name, parameter in empty.named_parameters():
            if name in self.shapes and _UNLIKELY in parameter.shape:
                return self.shapes[name][list(parameter.shape).index(_UNLIKELY)]
        return None


def _with_adapter(model: Any, path: str) -> Any:
    """Return ``model`` with the adapter of a folder or of the hub."""
    peft = _library("peft")
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
        with safe_open(file, "pt") as weights:
            return {
                name.removeprefix(_PREFIX): tuple(weights.get_slice(name).get_shape())
                for name in weights.keys()  # noqa: SIM118 - it is no mapping
                if "lora_" not in name
            }
    except SafetensorError as error:
        raise InputError(_damaged(file, error)) from error


def _damaged(file: Path, error: Exception) -> str:
    return f"expected weights in {file}; received a cut or damaged file ({error}): copy or download it again"


_CLASSES = {"causal-lm": "AutoModelForCausalLM", "classification": "AutoModelForSequenceClassification"}
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_NAMED = 3  # weights, in a message
_FEW = 64  # tokens: a tokenizer without a vocabulary has only special ones


class Loaded(NamedTuple):
    """A model, its tokenizer, what it does.

    Attributes
    ----------
    model, tokenizer
        As ``transformers`` loads them.
    task : {"causal-lm", "classification"}
        What the model does.
    """

    model: Any
    tokenizer: Any
    task: Task


@takes(LoadingOptions)
def load(
    name: str | Path, *, dtype: str = "auto", device: str | None = None, **options: Unpack[LoadingOptions]
) -> Loaded:
    """Load a model and its tokenizer from a folder or the hub.

    Parameters
    ----------
    name : str or path
        A folder or a hub id; of a model, or of a PEFT adapter (which names its base model).
    dtype : {"auto", "float32", "bfloat16", "float16", "8bit"}
        Of the weights; auto is the one they were saved in. 8bit needs ``bitsandbytes``.
    device : str, optional
        Where to put it, such as ``"cuda"``; ``"auto"`` spreads it over all devices.
    **options : LoadingOptions
        See :mod:`ooc_influence.options`.

    Raises
    ------
    InputError
        If it cannot be loaded in this way with every weight; the message says what would help.
    MissingExtraError
        Without the libraries.
    """
    model, task, paths = _load_named(str(name), dtype, device, options)
    return _with_tokenizer(model, task, paths, options)


def _with_tokenizer(model: Any, task: Task, paths: list[str], options: LoadingOptions) -> Loaded:
    tokenizer = options["tokenizer"]
    common = {"revision": options["revision"] if len(paths) == 1 else None,
              "trust_remote_code": options["trust_remote_code"]}  # fmt: skip
    words = _load_tokenizer(paths if tokenizer is None else [str(tokenizer)], common)
    return Loaded(model.eval(), words, task)


@takes(LoadingOptions)
def load_reference(name: str | Path, *, dtype: str = "auto", **options: Unpack[LoadingOptions]) -> Any:
    """Return a causal language model, such as one that another is compared with, without a tokenizer of its own.

    Parameters
    ----------
    name : str or path
        As for :func:`load`.
    dtype : {"auto", "float32", "bfloat16", "float16", "8bit"}
        Of the weights; auto is the one they were saved in.
    **options : LoadingOptions
        See :mod:`ooc_influence.options`.

    Raises
    ------
    InputError
        As for :func:`load`, and for a classifier.
    """
    model, task, _ = _load_named(str(name), dtype, None, options)
    if task != "causal-lm":
        raise InputError(f"expected a causal language model as the reference; received {name}, for {task}")
    return model.eval()


@takes(LoadingOptions)
def load_base(
    name: str | Path, *, dtype: str = "auto", device: str | None = None, **options: Unpack[LoadingOptions]
) -> Loaded:
    """Load a model and its tokenizer without its adapter: what training began with.

    Parameters
    ----------
    name, dtype, device
        As for :func:`load`.
    **options : LoadingOptions
        See :mod:`ooc_influence.options`.

    Raises
    ------
    InputError, MissingExtraError
        As for :func:`load`.
    """
    base, named, _ = named_model(str(name), options["adapter"])
    bare: LoadingOptions = {**options, "adapter": None, "revision": None if named else options["revision"]}
    model, task, paths = _load_named(base, dtype, device, bare)
    return _with_tokenizer(model, task, [*paths, *([named.path] if named else [])], options)


class NamedModel(NamedTuple):
    """What a model's name stands for: the base model, the adapter that is named so, and the adapter to put on it."""

    base: str
    named: Adapter | None
    adapter: Adapter | None


def named_model(name: str, adapter: str | Path | None) -> NamedModel:
    """Return what a name stands for, with an adapter that is named beside it; nothing is loaded.

    Raises
    ------
    InputError
        For an adapter's folder that does not say its base model.
    """
    named = Adapter.read(name)
    if named is not None and named.base is None:
        raise InputError(
            f"expected the base model's name in {named.path}/adapter_config.json; received none: give the model and "
            "--adapter"
        )
    base = name if named is None or named.base is None else named.base
    chosen = named if adapter is None else Adapter.read(adapter) or Adapter(str(adapter), None, None, {})
    return NamedModel(base, named, chosen)


def _load_named(name: str, dtype: str, device: str | None, options: LoadingOptions) -> tuple[Any, Task, list[str]]:
    """Return a model with its adapter, what it does, and where its tokenizer may be: its base, its adapter."""
    if dtype not in ("auto", "8bit", *_DTYPES):
        raise InputError(f"expected dtype one of auto, 8bit, {', '.join(_DTYPES)}; received {dtype!r}")
    base, named, chosen = named_model(name, options["adapter"])
    common = {"revision": None if named else options["revision"], "trust_remote_code": options["trust_remote_code"]}
    with _explained(base, named, options["allow_pickle"]):
        model, task = _load_model(base, chosen, options["task"], dtype, device, options["allow_pickle"], common)
    if chosen is not None:
        model = _with_adapter(model, chosen.path)
    if device not in (None, "auto") and dtype != "8bit":
        model = model.to(device)
    return model, task, [base, *([named.path] if named else [])]


def load_shapes(name: str | Path, *, trust_remote_code: bool = False) -> Any:
    """Return a causal language model on the meta device, made from its configuration alone: shapes without weights.

    Raises
    ------
    InputError
        If there is no configuration.
    MissingExtraError
        Without the libraries.
    """
    import torch

    transformers = _library("transformers")
    with _explained(str(name), None, allow_pickle=False):
        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
        with torch.device("meta"):
            kind = getattr(transformers, _CLASSES[_task_of(config)])
            return kind.from_config(config, trust_remote_code=trust_remote_code)


def _load_model(
    base: str, adapter: Adapter | None, task: Task | None, dtype: str, device: str | None, allow_pickle: bool,
    common: dict[str, Any],
) -> tuple[Any, Task]:  # fmt: skip
    """Return the base model with every weight it has, and what it does."""
    transformers = _library("transformers")
    config = transformers.AutoConfig.from_pretrained(base, **common)
    trained = None if adapter is None else adapter.task
    if task is not None and trained is not None and trained != task:
        raise InputError(f"expected an adapter for {task}; received {adapter and adapter.path}, which is for {trained}")
    chosen = task or trained or _task_of(config)
    classes = None if adapter is None else adapter.classes(config, trust_remote_code=common["trust_remote_code"])
    if classes is not None and classes != config.num_labels:
        config.num_labels = classes
    options: dict[str, Any] = {
        "dtype": _DTYPES.get(dtype, "auto"), "use_safetensors": None if allow_pickle else True,
        "output_loading_info": True, "ignore_mismatched_sizes": True,  # both are looked at below
    }  # fmt: skip
    if dtype == "8bit":
        _library("bitsandbytes")
        options["quantization_config"] = transformers.BitsAndBytesConfig(load_in_8bit=True)
    if device == "auto":
        options["device_map"] = "auto"
    with _quietly(transformers):
        kind = getattr(transformers, _CLASSES[chosen])
        model, facts = kind.from_pretrained(base, config=config, **common, **options)
    _check_whole(model, base, facts, {} if adapter is None else adapter.shapes)
    return model, chosen


def _check_whole(model: Any, base: str, facts: Any, supplied: dict[str, Any]) -> None:
    """Check that all of a model's weights came from its files, or will come from its adapter."""
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    others = sorted(each for each in facts["mismatched_keys"] if each[0] not in supplied)
    if others:
        name, saved, configured = others[0]
        raise InputError(
            f"expected weights of the shapes in the configuration of {base}, {name} {tuple(configured)}; received "
            f"{tuple(saved)}: correct its config.json, or give the checkpoint it belongs to"
        )
    missing = sorted(name for name in facts["missing_keys"] if name in names and name not in supplied)
    if missing:
        raise InputError(
            f"expected all weights of {type(model).__name__} at {base}; received none for "
            f"{listed(missing, _NAMED)}, which would be random: give the checkpoint that was trained for "
            "this task, or its --adapter"
        )


def _load_tokenizer(paths: list[str], common: dict[str, Any]) -> Any:
    """Return the tokenizer of the first path that has one."""
    transformers = _library("transformers")
    reason = ""
    for path in paths:
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(path, **common)
        except (OSError, ValueError, ImportError, KeyError) as error:
            if "trust_remote_code" in str(error):
                raise InputError(_explain(path, error, allow_pickle=True)) from error
            reason = reason or f" ({_first_line(error)})"
            continue
        if not _is_empty(tokenizer):
            return tokenizer
    raise InputError(
        f"expected a tokenizer at {paths[0]}; received none{reason}: say where it is with tokenizer= (--tokenizer)"
    )


def _is_empty(tokenizer: Any) -> bool:
    """Return whether a tokenizer has special tokens only, as transformers makes one without a vocabulary."""
    if len(tokenizer) > _FEW:
        return False
    words = set(tokenizer.get_vocab()) - {str(token) for token in tokenizer.all_special_tokens}
    return all(word[:1] + word[-1:] in ("<>", "[]") for word in words)


def _task_of(config: Any) -> Task:
    names = " ".join(config.architectures or [])
    if "ForSequenceClassification" in names:
        return "classification"
    if "CausalLM" in names or "LMHead" in names:
        return "causal-lm"
    raise InputError(
        f"expected a model for causal language modelling or sequence classification; received {names or 'no name'}: "
        "say which with task= (--task)"
    )


@contextlib.contextmanager
def _quietly(transformers: Any) -> Iterator[None]:
    """Keep transformers' progress bars and its report of weights off the terminal meanwhile."""
    bars = transformers.utils.logging
    verbosity, shown = bars.get_verbosity(), bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    bars.set_verbosity_error()
    try:
        yield
    finally:
        bars.set_verbosity(verbosity)
        if shown:
            bars.enable_progress_bar()


@contextlib.contextmanager
def _explained(base: str, adapter: Adapter | None, allow_pickle: bool) -> Iterator[None]:
    """Say in one line why a model cannot be loaded, and what would help."""
    from safetensors import SafetensorError

    try:
        yield
    except InputError:
        raise
    except SafetensorError as error:
        raise InputError(_damaged(_damaged_file(Path(base)), error)) from error
    except (OSError, ValueError, ImportError, KeyError, RuntimeError) as error:
        if adapter is not None:
            raise InputError(
                f"expected the base model {base} that the adapter {adapter.path} names; received "
                f"{type(error).__name__}: {_first_line(error)}: give the base as the model, and the adapter with "
                "adapter= (--adapter)"
            ) from error
        raise InputError(_explain(base, error, allow_pickle)) from error


def _damaged_file(base: Path) -> Path:
    """Return the first file of weights in a folder that cannot be read, or the folder."""
    from safetensors import SafetensorError, safe_open

    for file in sorted(base.glob("*.safetensors")):
        try:
            with safe_open(file, "pt"):
                pass
        except SafetensorError:
            return file
    return base


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "").rstrip(".:")


def _explain(name: object, error: Exception, allow_pickle: bool) -> str:
    text = f"expected a model at {name}; received {type(error).__name__}: {_first_line(error)}"
    if "safetensors" in str(error) and not allow_pickle:
        return f"{text}: its weights are not in safetensors; convert them, or allow pickled ones (--allow-pickle)"
    if "trust_remote_code" in str(error):
        return f"{text}: it comes with code of its own; read it, then allow it (--trust-remote-code)"
    return text
