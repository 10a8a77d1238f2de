"""What the numbers of imported rows are: which entries of which module's gradient, or unknown."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from ooc_influence.errors import InputError
from ooc_influence.store import LayerShape, Mask, ModuleMask, expand_home

MaskDescription: TypeAlias = Mask | Mapping[str, Any] | Sequence[Mapping[str, Any]] | str | Path
_FIELDS = ("name", "shape", "indices", "weights", "kind", "bias")
_LARGEST = 2**31 - 1  # rows and columns of a module are kept as int32
UNKNOWN = "unknown"  # the kind of the one module of rows of whose numbers nothing is known


def unknown_mask(k: int) -> Mask:
    """Return the mask of ``k`` numbers of which nothing is known: unlike that of any other store."""
    return Mask((_module(LayerShape(f"unknown-{uuid.uuid4().hex[:12]}", UNKNOWN, (1, k), False), np.arange(k), 1.0),))


def is_unknown(mask: Mask) -> bool:
    """Return whether nothing is known of the numbers that a mask is of."""
    return all(module.layer.kind == UNKNOWN for module in mask.modules)


def describe_mask(description: MaskDescription, k: int) -> Mask:
    """Return the mask that a description says.

    Parameters
    ----------
    description : Mask, mapping, sequence of mappings, or path of a JSON file
        The modules in the order of their columns, as a list, or under the key ``modules``. Each has its ``name`` and
        the ``shape`` (out, in) of its matrix of entries, and may have ``indices``, flat in C order, of those kept
        (default all), ``weights``, a number or one for each, that they were multiplied by (default 1), ``kind``
        (default ``"linear"``) and ``bias``, whether the last column of the matrix is the bias.
    k : int
        Numbers a row.

    Raises
    ------
    InputError
        For anything else, indices that are not the module's or repeat, or another number of entries than ``k``.
    """
    if isinstance(description, (str, Path)):
        description = _read(expand_home(description))
    mask = description if isinstance(description, Mask) else Mask(tuple(_parse_modules(description)))
    names = [module.layer.name for module in mask.modules]
    if len(set(names)) < len(names):
        again = next(name for name in names if names.count(name) > 1)
        raise InputError(f"expected each module once in the mask; received {again!r} again")
    if mask.k != k:
        raise InputError(f"expected a mask of {k} entries, the numbers of a row; received one of {mask.k}")
    return mask


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"expected a JSON file that describes the mask; received {path}: {error}") from error


def _parse_modules(description: Any) -> list[ModuleMask]:
    listed = description.get("modules") if isinstance(description, Mapping) else description
    if not isinstance(listed, Sequence) or isinstance(listed, str) or not listed:
        raise InputError(
            "expected the mask as a list of modules, each with its name and shape, or under 'modules'; received "
            f"{str(description)[:80]!r}"
        )
    return [_parse_module(each) for each in listed]


def _parse_module(fields: Any) -> ModuleMask:
    if not isinstance(fields, Mapping) or not isinstance(fields.get("name"), str) or set(fields) - set(_FIELDS):
        received = f"{sorted(fields)}" if isinstance(fields, Mapping) else f"{fields!r}"[:80]
        raise InputError(f"expected a module of the mask with name, shape and of {_FIELDS[2:]}; received {received}")
    name, shape = fields["name"], fields.get("shape")
    sizes = list(shape) if isinstance(shape, (list, tuple)) else []
    if len(sizes) != 2 or not all(type(size) is int and 0 < size <= _LARGEST for size in sizes):
        raise InputError(f"expected the shape of module {name!r} as two positive whole numbers; received {shape!r}")
    layer = LayerShape(name, str(fields.get("kind", "linear")), (sizes[0], sizes[1]), bool(fields.get("bias", False)))
    given = fields.get("indices")
    indices = np.arange(layer.entries) if given is None else np.asarray(given)
    if indices.ndim != 1 or (indices.size and indices.dtype.kind not in "iu"):
        raise InputError(f"expected flat indices of module {name!r}, a list of whole numbers; received {given!r:.80}")
    if indices.size and not 0 <= indices.min() <= indices.max() < layer.entries:
        raise InputError(
            f"expected indices of module {name!r} in [0, {layer.entries}); received {indices.min()} to {indices.max()}"
        )
    if len(np.unique(indices)) < len(indices):
        raise InputError(f"expected each index of module {name!r} once; received some twice")
    return _module(layer, indices.astype(np.int64), fields.get("weights", 1.0))


def _module(layer: LayerShape, indices: Any, weights: Any) -> ModuleMask:
    rows, cols = np.divmod(indices, layer.shape[1])
    try:
        weight = np.broadcast_to(np.asarray(weights, np.float32), indices.shape).copy()
    except (ValueError, TypeError) as error:
        raise InputError(
            f"expected a weight for all or each of {len(indices)} entries of module {layer.name!r}; received "
            f"{np.shape(weights)}"
        ) from error
    if not np.isfinite(weight).all():
        raise InputError(f"expected finite weights of module {layer.name!r}; received others")
    return ModuleMask(layer, rows.astype(np.int32), cols.astype(np.int32), weight)
