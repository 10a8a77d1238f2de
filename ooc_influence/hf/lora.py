"""Training a LoRA again on some of a store's documents: from the base model, as often as a removal test asks.

Every run starts from the base model as it is saved, and visits the rows in an order of all that are not dropped, in
which those left out are skipped: two runs of the same seed differ by their rows alone.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, Unpack

import numpy as np
import numpy.typing as npt
import torch

from ooc_influence.errors import InputError, warn
from ooc_influence.extract import BudgetBatches, batches_of_rows, even_numbers, parse_device, to_device
from ooc_influence.fingerprint import array_digest, check_same_rows
from ooc_influence.hf.extraction import job_of, recorded_documents
from ooc_influence.hf.models import Adapter, Loaded, load_base, named_model
from ooc_influence.options import LoadingOptions, LoraOptions, select, takes
from ooc_influence.progress import optional_library
from ooc_influence.store import GradientStore, PathLike, as_store

Numbers = npt.NDArray[np.int64]
_RANK = 16
_TOLD_BY = ("text_digest", "n_tokens")  # columns by which a store's rows are told from those of other documents


class _Base(NamedTuple):
    """The model that training begins with: what it is called, and the adapter whose settings are taken."""

    name: str
    adapter: Adapter | None

    @classmethod
    def of(cls, train: GradientStore, model: str | Path | None, adapter: str | Path | None) -> _Base:
        origin = train.attrs.get("origin") or {}
        trained_whole = not (train.attrs.get("model") or {}).get("class", "").startswith("Peft")
        asked = model if model is not None else origin.get("model")
        if not asked:
            raise InputError(
                f"expected the model that training began with (--model); received none, and {train.path} records none"
            )
        recorded = origin.get("adapter") if model is None else None
        base = cls(str(asked), named_model(str(asked), adapter or recorded).adapter)
        if base.adapter is None and trained_whole and str(asked) == origin.get("model"):
            if model is None:
                raise InputError(
                    f"expected the base model (--model) to train a LoRA from; received {train.path}, of a model that "
                    "was trained whole: name the model that training began with, or train by a function of yours "
                    "(--train)"
                )
            warn(
                f"{asked} is the model that {train.path} was made with: if it was trained on these rows, name the "
                "model that its training began with (--model)"
            )
        return base


@takes(LoraOptions)
def lora_training(
    query: GradientStore | PathLike,
    train: GradientStore | PathLike,
    model: str | Path | None = None,
    *,
    data: tuple[Any, Any] = (None, None),
    dtype: str = "auto",
    device: str | None = None,
    **options: Unpack[LoraOptions],
) -> LoraTraining:
    """Return the training of a LoRA on a store's documents, for :func:`ooc_influence.evaluate.verify_influence`.

    AdamW without weight decay, a learning rate that falls linearly to 0, the loss that the rows' gradients are of.

    Parameters
    ----------
    query, train : GradientStore or path
        Stores made by :func:`ooc_influence.hf.extract` of a causal language model, which record their documents.
    model : str or path, optional
        The model that training began with; or an adapter, whose base model and settings are taken. Default: the one
        that the train store recorded, where its gradients are of an adapter.
    data : tuple, optional
        The documents of the queries and of the train rows; by default those at the paths that the stores recorded.
    dtype : {"auto", "float32", "bfloat16", "float16", "8bit"}
        Of the base model's weights; auto is the one they were saved in. The LoRA's are float32.
    device : str, optional
        Where to train, such as ``"cuda"``; default the CPU.
    **options : LoraOptions
        See :mod:`ooc_influence.options`.

    Raises
    ------
    InputError
        For stores that recorded no documents or have rows of sampled labels, a store of a model that was trained whole
        where no base model is given, an adapter that is no LoRA, or settings that do not fit.
    MissingExtraError
        Without the extra ``hf``.
    """
    peft = optional_library("peft", "training a LoRA", "hf")
    stores = as_store(query), as_store(train)
    if (stores[1].attrs.get("labels") or {}).get("kind", "dataset") != "dataset":
        raise InputError(f"expected rows of the data set's labels; received {stores[1].path}, of sampled ones")
    for store, documents in zip(stores, data, strict=True):
        recorded_documents(store, documents)
    for name, least in (("epochs", 1), ("batch_size", 1), ("learning_rate", 0)):
        value: Any = dict(options)[name]
        if not value >= least or not value > 0:
            raise InputError(f"expected {name} {'>= 1' if least else '> 0'}; received {value!r}")
    if device is not None:
        parse_device(torch.nn.Linear(1, 1), device)
    base = _Base.of(stores[1], model, options["adapter"])
    if base.adapter is not None and base.adapter.task not in (None, "causal-lm"):
        raise InputError(
            f"expected a causal language model; received {base.adapter.path}, for {base.adapter.task}: train by a "
            "function of yours (--train)"
        )
    loading = {**select(LoadingOptions, options), "adapter": None, "task": "causal-lm"}
    if loading["revision"] is None and model is None:
        loading["revision"] = (stores[1].attrs.get("origin") or {}).get("revision")
    config = _config(peft, base.adapter, options)
    return LoraTraining(stores, base.name, config, data, {"dtype": dtype, "device": device, **loading}, options)


def _config(peft: Any, adapter: Adapter | None, options: LoraOptions) -> Any:
    """Return the LoRA's configuration: the adapter's, or the usual one, with what is asked for."""
    rank, alpha, targets = options["rank"], options["alpha"], list(options["targets"])
    if rank is not None and rank < 1:
        raise InputError(f"expected rank >= 1; received {rank}")
    asked = {"r": rank, "lora_alpha": alpha, "target_modules": targets or None}
    if adapter is None:
        rank = rank or _RANK
        defaults = {"r": rank, "lora_alpha": 2 * rank, "target_modules": "all-linear"}
        found = peft.LoraConfig(task_type="CAUSAL_LM", **defaults)
    else:
        try:
            found = peft.PeftConfig.from_pretrained(adapter.path)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise InputError(
                f"expected a PEFT adapter's configuration at {adapter.path}; received {type(error).__name__}: {error}"
            ) from error
        if found.peft_type != peft.PeftType.LORA:
            raise InputError(
                f"expected a LoRA; received {adapter.path}, an adapter of type {found.peft_type.value}: train by a "
                "function of yours (--train)"
            )
        found.inference_mode = False
    for name, value in asked.items():
        if value is not None:
            setattr(found, name, "all-linear" if value == ["all-linear"] else value)
    return found


class _Rows(NamedTuple):
    """The rows of a store as they are trained on or measured."""

    batches: BudgetBatches
    per_sample_loss: Any


class LoraTraining:
    """The training of a LoRA on the rows of a store: what :func:`lora_training` returns.

    Parameters
    ----------
    stores : tuple of GradientStore
        Queries, and train rows.
    base : str
        The base model, or an adapter of it.
    config : peft.LoraConfig
        The LoRA's.
    data : tuple
        Documents of both; None for those that the stores recorded.
    loading : mapping
        Arguments of :func:`load_base`.
    options : LoraOptions
        Epochs, learning rate, rows of a step.
    """

    def __init__(
        self, stores: tuple[GradientStore, GradientStore], base: str, config: Any, data: tuple[Any, Any],
        loading: dict[str, Any], options: LoraOptions,
    ) -> None:  # fmt: skip
        self._stores, self._base, self._config, self._data = stores, base, config, data
        self._loading, self._options = loading, options
        self._rows: dict[int, _Rows] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_rows": {}}  # every process reads the documents itself

    @property
    def settings(self) -> dict[str, Any]:
        """What the models depend on besides the rows."""
        defaults = type(self._config)().to_dict()
        own = {name: value for name, value in self._config.to_dict().items() if value != defaults.get(name)}
        dropped = ("base_model_name_or_path", "revision", "inference_mode", "peft_version")
        told, base = _TOLD_BY[0], named_model(self._base, None).base
        texts = [array_digest(store.column(told)) for store in self._stores if told in store.layout.columns]
        return {
            "base": str(Path(base).resolve()) if Path(base).exists() else base, "revision": self._loading["revision"],
            "dtype": self._loading["dtype"],
            "lora": {name: _plain(value) for name, value in sorted(own.items()) if name not in dropped},
            "epochs": self._options["epochs"], "learning_rate": self._options["learning_rate"],
            "batch_size": self._options["batch_size"], "texts": texts,
        }  # fmt: skip

    def train(self, indices: Numbers) -> Any:
        """Return the base model with a LoRA trained on rows, (m,) int64."""
        loaded = self._fresh()
        model, (batches, losses_of) = loaded.model, self._read(1, loaded)
        live, kept = np.flatnonzero(~self._stores[1].dropped), np.zeros(len(batches), bool)
        kept[indices] = True
        trained = [values for values in model.parameters() if values.requires_grad]
        rate, per_step = self._options["learning_rate"], self._options["batch_size"]
        optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
        total, model = self._options["epochs"] * -(-len(live) // per_step), model.train()
        for step, chosen in enumerate(self._steps(len(live))):
            rows = live[chosen]
            rows = rows[kept[rows]]
            if not len(rows):
                continue
            for group in optimizer.param_groups:
                group["lr"] = rate * (1 - step / total)
            optimizer.zero_grad()
            for part in batches.cut(rows):
                losses = losses_of(model, to_device(batches.load(part), model.device))
                (losses.sum() / len(rows)).backward()
            optimizer.step()
        return loaded._replace(model=model.eval())

    def loss(self, model: Any, queries: Numbers) -> npt.NDArray[np.float64]:
        """Return the losses of queries, (c,), by a model that :meth:`train` returned."""
        batches, losses_of = self._read(0, model)
        found = np.empty(len(batches))
        with torch.no_grad():
            for part in batches.cut(np.asarray(queries, np.int64)):
                losses = losses_of(model.model, to_device(batches.load(part), model.model.device))
                found[part] = losses.double().cpu().numpy()
        return found[queries]

    def _steps(self, n: int) -> Iterator[Numbers]:
        """Yield the numbers of each step, of n: orders that no other random number changes."""
        for seed in torch.randint(2**62, (self._options["epochs"],)).tolist():
            order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
            yield from (chosen.numpy() for chosen in order.split(self._options["batch_size"]))

    def _fresh(self) -> Loaded:
        """Return the base model with an untrained LoRA."""
        peft = optional_library("peft", "training a LoRA", "hf")
        loaded = load_base(self._base, **self._loading)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of layers whose weight is transposed, which it notices
                model = peft.get_peft_model(loaded.model, copy.deepcopy(self._config))  # which it changes
        except (ValueError, TypeError, KeyError) as error:
            raise InputError(
                f"expected a LoRA's settings that fit {self._base}; received {type(error).__name__}: {error}"
            ) from error
        return loaded._replace(model=model)

    def _read(self, side: int, loaded: Loaded) -> _Rows:
        """Return the rows of the queries (0) or the train store (1), made from their documents once in a process."""
        if side not in self._rows:
            store = self._stores[side]
            job = job_of(store, loaded, self._data[side])
            batches: Any = batches_of_rows(store.attrs, job.batches)
            sample = store.attrs.get("sample")
            numbers = even_numbers(len(job.samples), sample or len(job.samples))
            advice = "give the documents as they were (--data, --query-data)"
            if len(batches) != store.n or len(numbers) != store.n:
                raise InputError(
                    f"expected documents that make the {store.n} rows of {store.path}; received some that make "
                    f"{len(batches)}: {advice}"
                )
            columns = [name for name in _TOLD_BY if name in store.layout.columns]
            check_same_rows(
                store.path, 0, {name: store.column(name) for name in columns},
                {name: np.asarray(getattr(job.samples, name))[numbers] for name in columns}, advice,
            )  # fmt: skip
            self._rows[side] = _Rows(batches, job.per_sample_loss)
        return self._rows[side]


def _plain(value: Any) -> Any:
    """Return a setting as JSON has it."""
    if isinstance(value, (set, frozenset)):
        return sorted(map(str, value))
    return value if value is None or isinstance(value, (bool, int, float, str, list, dict)) else str(value)
