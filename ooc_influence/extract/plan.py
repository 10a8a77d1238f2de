"""What a run will store, fixed before it starts, and checked against what an earlier run stored."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from typing import Any

import torch

from ooc_influence.compress import Dropout
from ooc_influence.errors import InputError, MismatchError, OocInfluenceWarning, StoreNotFoundError
from ooc_influence.extract.layers import ModuleSelection, find_uses, model_fingerprint, select_layers
from ooc_influence.extract.taps import parameter_sequence
from ooc_influence.store import (
    GradientStore,
    Mask,
    PathLike,
    Representation,
    Storage,
    StorePath,
    is_local,
    parse_path,
    parse_representation,
)


@dataclass(frozen=True)
class Plan:
    """All that fixes what a store will hold.

    Attributes
    ----------
    mask : Mask
        The kept entries.
    dtype : str
        Representation of the rows.
    attributes : dict
        What the store records about how its rows are made.
    storage : Storage
        Chunking and codec, as far as the caller insists on them.
    check_model : bool
        Whether another model than the store's is an error, or a warning.
    """

    mask: Mask
    dtype: Representation
    attributes: dict[str, Any]
    storage: Storage
    check_model: bool

    @property
    def model(self) -> dict[str, Any]:
        """What is recorded about the model."""
        found: dict[str, Any] = self.attributes["model"]
        return found


def parse_device(model: torch.nn.Module, device: torch.device | str | None) -> torch.device:
    """Return where to run: the device asked for, if it is there, or the model's.

    Raises
    ------
    InputError
        For a device that is not known or not there.
    """
    home = parameter_sequence(model)[0].device
    try:
        chosen = home if device is None else torch.device(device)
    except RuntimeError as error:
        raise InputError(f"expected a device such as 'cuda' or 'cpu'; received {device!r}") from error
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise InputError(
            f"expected a device that is there; received {str(chosen)!r} and PyTorch sees no GPU: use 'cpu'"
        )
    return chosen


def make_plan(
    model: torch.nn.Module,
    compressor: Dropout | None,
    like: GradientStore | PathLike | None,
    modules: ModuleSelection,
    fallback: bool,
    dtype: str,
    loss_kind: str | None,
    storage: Storage | None,
    path: PathLike,
    *,
    check_model: bool = True,
) -> Plan:
    """Fix mask and attributes, from the compressor or from the train store.

    Raises
    ------
    InputError, MismatchError, UnsupportedModelError
        See :func:`extract_gradients`.
    """
    representation = parse_representation(dtype)
    if loss_kind is not None and not isinstance(loss_kind, str):
        raise InputError(f"expected loss_kind as a string; received {type(loss_kind).__name__}")
    fingerprint = model_fingerprint(model)
    attributes: dict[str, Any] = {"model": {"fingerprint": fingerprint, "class": type(model).__name__}}
    attributes["loss_kind"] = loss_kind
    if like is not None:
        if compressor is not None or modules is not None:
            raise InputError("expected either like= or compressor= and modules=; received both: like fixes the mask")
        train = like if isinstance(like, GradientStore) else GradientStore.open(like)
        if train.path == parse_path(path):
            raise InputError(f"expected a query store apart from its train store; received {path} for both")
        attributes["model"] = _same_model(train, attributes["model"], check_model)
        mask = train.mask
        find_uses(model, [module.layer for module in mask.modules])
        attributes |= {name: train.attrs.get(name) for name in ("compressor", "covered")}
    else:
        chosen = compressor or Dropout()
        layers, share = select_layers(model, modules, fallback=fallback)
        mask = chosen.draw(layers)
        attributes |= {"compressor": chosen.to_dict(), "covered": share}
    return Plan(mask, representation, attributes, storage or Storage(), check_model)


def _same_model(store: GradientStore, model: dict[str, Any], check: bool) -> dict[str, Any]:
    """Return what to record about a model that has to be the one of ``store``.

    Raises
    ------
    MismatchError
        If it is another, and that was not allowed.
    """
    expected = store.attrs.get("model") or {}
    if expected.get("fingerprint") == model["fingerprint"]:
        return model
    if check:
        raise MismatchError(
            f"expected the model that {store.path} was made with, model fingerprint "
            f"{_short(expected.get('fingerprint'))[:12]}; received {_short(model['fingerprint'])[:12]} (names, shapes "
            "or values of its tensors differ): load the same checkpoint, or allow another with check_model=False "
            "(--other-model)"
        )
    warnings.warn(
        f"the model is not the one that {store.path} was made with; its rows are taken as comparable because "
        "check_model=False (--other-model) says so",
        OocInfluenceWarning,
        stacklevel=4,
    )
    return {**expected, "other": [*expected.get("other", []), model["fingerprint"]]}


def open_existing(path: PathLike, plan: Plan) -> GradientStore | None:
    """Open the store of an earlier run to go on with it; None where there is none.

    Raises
    ------
    MismatchError
        If it was made with other settings or, unless that is allowed, another model.
    """
    try:
        store = GradientStore.open(path, mode="a")
    except StoreNotFoundError:
        _check_free(parse_path(path))
        return None
    attrs, layout, wanted = store.attrs, store.layout, plan.storage
    for what, expected, received in (
        ("compressor", attrs.get("compressor"), plan.attributes["compressor"]),
        ("selected layers (mask digest)", store.mask_digest, plan.mask.digest),
        ("dtype", layout.dtype, plan.dtype),
        ("chunk_rows", layout.chunk_rows, wanted.chunk_rows or layout.chunk_rows),
        ("group_chunks", layout.group_chunks, wanted.group_chunks or layout.group_chunks),
        ("codec", layout.codec, wanted.codec or layout.codec),
        ("loss_kind", attrs.get("loss_kind"), plan.attributes["loss_kind"]),
    ):
        if expected != received:
            raise MismatchError(
                f"expected the {what} of the store at {path}, {_short(expected)}; received {_short(received)}: "
                "extract to another path, or remove the store"
            )
    if (attrs.get("model") or {}).get("fingerprint") != plan.model["fingerprint"]:
        store.record(model=_same_model(store, plan.model, plan.check_model))
    return store


def _check_free(path: StorePath) -> None:
    """Check, before a model runs for hours, that a store can be made at ``path``."""
    if not is_local(path):
        return  # only a write tells
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise InputError(f"expected a store or nothing at {path}; received something else: choose another path")
    parent = next(folder for folder in path.parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise InputError(f"expected a folder to write to above {path}; received {parent}, which is not one")


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) < 80 else text[:12]
