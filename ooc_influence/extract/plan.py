"""What a run will store, fixed before it starts, and checked against what an earlier run stored."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ooc_influence.compress import Dropout
from ooc_influence.errors import InputError, MismatchError, StoreNotFoundError
from ooc_influence.extract.batching import Sharding
from ooc_influence.extract.layers import ModuleSelection, find_layers, model_fingerprint, select_layers
from ooc_influence.extract.taps import parameter_sequence
from ooc_influence.store import (
    GradientStore,
    Mask,
    PathLike,
    Representation,
    Storage,
    parse_path,
    parse_representation,
)


@dataclass(frozen=True)
class Plan:
    """All that fixes what a store will hold; ``chunk_rows`` is what the caller insists on, if anything."""

    mask: Mask
    dtype: Representation
    attributes: dict[str, Any]
    storage: Storage
    planned_rows: int | None
    chunk_rows: int | None

    @property
    def group_rows(self) -> int:
        """Rows that share a file of the small arrays, in a store made from this plan."""
        return self.storage.rows_for(self.mask.k, self.dtype) * self.storage.group_chunks


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
    dtype: str,
    loss_kind: str | None,
    storage: Storage | None,
    sharding: Sharding | None,
    path: PathLike,
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
        if train.attrs.get("model", {}).get("fingerprint") != fingerprint:
            raise MismatchError(
                f"expected the model that {train.path} was made with; received another (names, shapes or values of "
                "its tensors differ): load the same checkpoint"
            )
        mask = train.mask
        find_layers(model, [module.layer for module in mask.modules])
        attributes |= {name: train.attrs.get(name) for name in ("compressor", "covered")}
    else:
        chosen = compressor or Dropout()
        layers, share = select_layers(model, modules)
        mask = chosen.draw(layers)
        attributes |= {"compressor": chosen.to_dict(), "covered": share}
    wanted = storage.chunk_rows if storage is not None else None
    storage = storage or Storage()
    if sharding is not None:
        rows = storage.rows_for(mask.k, representation)
        storage = Storage(rows, sharding.group_chunks(rows, storage.group_chunks))
    return Plan(mask, representation, attributes, storage, sharding.rows if sharding else None, wanted)


def open_existing(path: PathLike, plan: Plan) -> GradientStore | None:
    """Open the store of an earlier run to go on with it; None where there is none."""
    try:
        store = GradientStore.open(path, mode="a")
    except StoreNotFoundError:
        _check_free(parse_path(path))
        return None
    attrs = store.attrs
    for what, expected, received in (
        ("compressor", attrs.get("compressor"), plan.attributes["compressor"]),
        ("model fingerprint", attrs.get("model", {}).get("fingerprint"), plan.attributes["model"]["fingerprint"]),
        ("selected layers (mask digest)", store.mask_digest, plan.mask.digest),
        ("dtype", store.layout.dtype, plan.dtype),
        ("chunk_rows", store.layout.chunk_rows, plan.chunk_rows or store.layout.chunk_rows),
        ("planned rows", store.layout.planned_rows, plan.planned_rows),
        ("loss_kind", attrs.get("loss_kind"), plan.attributes["loss_kind"]),
    ):
        if expected != received:
            raise MismatchError(
                f"expected the {what} of the store at {path}, {_short(expected)}; received {_short(received)}: "
                "extract to another path, or remove the store"
            )
    return store


def _check_free(path: Path) -> None:
    """Check, before a model runs for hours, that a store can be made at ``path``."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise InputError(f"expected a store or nothing at {path}; received something else: choose another path")
    parent = next(folder for folder in path.parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise InputError(f"expected a folder to write to above {path}; received {parent}, which is not one")


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) < 80 else text[:12]
