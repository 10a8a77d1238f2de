"""Loading Hugging Face models, safely by default: no code from the hub, weights from safetensors only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from ooc_influence.errors import InputError
from ooc_influence.hf.documents import need, without_bars

Task = Literal["causal-lm", "classification"]
_CLASSES = {"causal-lm": "AutoModelForCausalLM", "classification": "AutoModelForSequenceClassification"}
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


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


def load(
    name: str | Path,
    *,
    task: Task | None = None,
    dtype: str = "auto",
    adapter: str | Path | None = None,
    tokenizer: str | Path | None = None,
    revision: str | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
) -> Loaded:
    """Load a model and its tokenizer from a folder or the hub.

    Parameters
    ----------
    name : str or path
        A folder or a hub id; of a model, or of a PEFT adapter (which names its base model).
    task : {"causal-lm", "classification"}, optional
        What to load it for; default what its configuration says.
    dtype : {"auto", "float32", "bfloat16", "float16", "8bit"}
        Of the weights; auto is what they were saved in. 8bit needs ``bitsandbytes``.
    adapter : str or path, optional
        A PEFT adapter to put on it.
    tokenizer : str or path, optional
        Where the tokenizer is, if not with the model.
    revision : str, optional
        Of the hub's repository.
    device : str, optional
        Where to put it, such as ``"cuda"``; ``"auto"`` spreads it over what is there.
    trust_remote_code : bool
        Run Python code that comes with the model.
    allow_pickle : bool
        Load weights from ``.bin`` files too (with ``weights_only``).

    Raises
    ------
    InputError
        If it cannot be loaded so; the message says what would help.
    MissingExtraError
        Without the libraries.
    """
    transformers = need("transformers")
    if dtype not in ("auto", "8bit", *_DTYPES):
        raise InputError(f"expected dtype one of auto, 8bit, {', '.join(_DTYPES)}; received {dtype!r}")
    base, own_adapter = _base_of(name)
    adapter = adapter or own_adapter
    common = {"revision": None if own_adapter else revision, "trust_remote_code": trust_remote_code}
    try:
        config = transformers.AutoConfig.from_pretrained(base, **common)
        chosen = task or _task_of(config)
        kind = getattr(transformers, _CLASSES[chosen])
        options: dict[str, Any] = {
            "dtype": _DTYPES.get(dtype, "auto"),
            "use_safetensors": None if allow_pickle else True,
        }
        if dtype == "8bit":
            need("bitsandbytes")
            options["quantization_config"] = transformers.BitsAndBytesConfig(load_in_8bit=True)
        if device == "auto":
            options["device_map"] = "auto"
        bars = transformers.utils.logging
        with without_bars(bars.is_progress_bar_enabled(), bars.disable_progress_bar, bars.enable_progress_bar):
            model = kind.from_pretrained(base, config=config, **common, **options)
        words = transformers.AutoTokenizer.from_pretrained(tokenizer or base, **common)
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise InputError(_explain(name, error, allow_pickle)) from error
    if adapter is not None:
        model = _with_adapter(model, adapter)
    if device not in (None, "auto") and dtype != "8bit":
        model = model.to(device)
    return Loaded(model.eval(), words, chosen)


def _base_of(name: str | Path) -> tuple[str, str | None]:
    """Return the base model and, where ``name`` is an adapter's folder, the adapter."""
    file = Path(name) / "adapter_config.json"
    if not file.is_file():
        return str(name), None
    base = json.loads(file.read_text()).get("base_model_name_or_path")
    if not base:
        raise InputError(f"expected the base model's name in {file}; received none: give the model and --adapter")
    return str(base), str(name)


def _with_adapter(model: Any, adapter: str | Path) -> Any:
    peft = need("peft")
    try:
        found = peft.PeftModel.from_pretrained(model, str(adapter), is_trainable=True)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"expected a PEFT adapter at {adapter}; received {type(error).__name__}: {error}") from error
    return found


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


def _explain(name: object, error: Exception, allow_pickle: bool) -> str:
    text = f"expected a model at {name}; received {type(error).__name__}: {str(error).splitlines()[0]}"
    if "safetensors" in str(error) and not allow_pickle:
        return f"{text}: its weights are not in safetensors; convert them, or allow pickled ones (--allow-pickle)"
    if "trust_remote_code" in str(error):
        return f"{text}: it comes with code of its own; read it, then allow it (--trust-remote-code)"
    return text
