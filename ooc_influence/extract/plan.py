"""What a run will store, fixed before it starts, and checked against what an earlier run stored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ooc_influence.compress import Dropout
from ooc_influence.errors import InputError, MismatchError, StoreNotFoundError
from ooc_influence.extract.batching import Sharding
from ooc_influence.extract.layers import ModuleSelection, find_layers, model_fingerprint, select_layers
from ooc_influence.extract.taps import parameter_sequence
from ooc_influence.store import GradientStore, Mask, PathLike, Storage, parse_path


@dataclass(frozen=True)
class Plan:
    """All that fixes what a store will hold."""

    mask: Mask
    dtype: str
    attributes: dict[str, Any]
    storage: Storage
    planned_rows: int | None


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
    storage: Storage,
    sharding: Sharding | None,
) -> Plan:
    """Fix mask and attributes, from the compressor or from the train store."""
    fingerprint = model_fingerprint(model)
    attributes: dict[str, Any] = {"model": {"fingerprint": fingerprint, "class": type(model).__name__}}
    attributes["loss_kind"] = loss_kind
    if like is not None:
        if compressor is not None or modules is not None:
            raise InputError("expected either like= or compressor= and modules=; received both: like fixes the mask")
        train = like if isinstance(like, GradientStore) else GradientStore.open(like)
        if train.attrs["model"]["fingerprint"] != fingerprint:
            raise MismatchError(
                f"expected the model that {train.path} was made with; received another (names, shapes or values of "
                "its tensors differ): load the same checkpoint"
            )
        mask = train.mask
        find_layers(model, [module.layer for module in mask.modules])
        attributes |= {"compressor": train.attrs["compressor"], "covered": train.attrs["covered"]}
    else:
        chosen = compressor or Dropout()
        layers, share = select_layers(model, modules)
        mask = chosen.draw(layers)
        attributes |= {"compressor": chosen.to_dict(), "covered": share}
    if sharding is not None:
        chunk_rows = storage.rows_for(mask.k, dtype)  # type: ignore[arg-type]
        storage = Storage(chunk_rows, sharding.group_chunks(chunk_rows, storage.group_chunks))
    return Plan(mask, dtype, attributes, storage, sharding.rows if sharding else None)


def open_existing(path: PathLike, plan: Plan) -> GradientStore | None:
    """Open the store of an earlier run to go on with it; None where there is none."""
    try:
        store = GradientStore.open(path, mode="a")
    except StoreNotFoundError:
        folder = parse_path(path)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise InputError(
                f"expected a store or nothing at {path}; received something else: choose another path"
            ) from None
        return None
    for what, expected, received in (
        ("compressor", store.attrs["compressor"], plan.attributes["compressor"]),
        ("model fingerprint", store.attrs["model"]["fingerprint"], plan.attributes["model"]["fingerprint"]),
        ("selected layers (mask digest)", store.mask_digest, plan.mask.digest),
        ("dtype", store.layout.dtype, plan.dtype),
        ("planned rows", store.layout.planned_rows, plan.planned_rows),
        ("loss_kind", store.attrs["loss_kind"], plan.attributes["loss_kind"]),
    ):
        if expected != received:
            raise MismatchError(
                f"expected the {what} of the store at {path}, {_short(expected)}; received {_short(received)}: "
                "extract to another path, or remove the store"
            )
    return store


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) < 80 else text[:12]
