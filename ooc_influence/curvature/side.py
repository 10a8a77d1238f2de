"""Which side a curvature is fitted by: F (k, k), or the Gram matrix of its rows (m, m). Both give the same scores."""

from __future__ import annotations

import logging
from typing import Any, Literal

from ooc_influence.curvature.curvature import Curvature
from ooc_influence.curvature.fisher import fit_fisher
from ooc_influence.curvature.gram_fit import fit_gram
from ooc_influence.curvature.need import FitShapes, fisher_need
from ooc_influence.curvature.rows import choose_rows
from ooc_influence.errors import InputError
from ooc_influence.memory import Room, format_bytes
from ooc_influence.store import GradientStore, PathLike

logger = logging.getLogger("ooc_influence")
Side = Literal["auto", "fisher", "gram"]
_OF_FISHER = ("blocks", "rank")  # options that only F has


def choose_side(rows: int, k: int) -> Literal["fisher", "gram"]:
    """Return which side is cheaper: ``"gram"`` for fewer rows than columns, else ``"fisher"``."""
    return "gram" if rows < k else "fisher"


def fit_curvature(store: GradientStore | PathLike, *, side: Side = "auto", **options: Any) -> Curvature:
    """Fit the curvature of a store by the cheaper side, and save it there.

    Parameters
    ----------
    store : GradientStore or path
        The train store, (n, k).
    side : {"auto", "fisher", "gram"}
        By :func:`fit_fisher` or :func:`fit_gram`. By default the smaller matrix: the Gram side where fewer rows are
        chosen than there are columns; the other one where only that fits the budget; and Fisher where an option is
        given that only it has, such as ``blocks``.
    **options
        Those of :func:`fit_fisher` and :func:`fit_gram`: ``rows``, ``sample``, ``weights``, ``memory``, ... The name
        in the store is by default ``"default"``, or ``"gram"``; scores find either.

    Returns
    -------
    Curvature
        As from these.

    Raises
    ------
    InputError
        For another side, or one that does not have an option given.
    MemoryBudgetError, StoreExistsError, StoreDamagedError
        As for these.
    """
    if side not in ("auto", "fisher", "gram"):
        raise InputError(f"expected side 'auto', 'fisher' or 'gram'; received {side!r}")
    train = store if isinstance(store, GradientStore) else GradientStore.open(store)
    asked = [option for option in _OF_FISHER if options.get(option) is not None]
    if side == "auto":
        side = "fisher" if asked or not train.n else _cheaper_side(train, options)
    given = {option: value for option, value in options.items() if value is not None or option not in _OF_FISHER}
    if given.get("name", "") is None:
        del given["name"]
    if side == "fisher":
        return fit_fisher(train, **given)
    if asked:
        raise InputError(f"expected side='fisher' for {', '.join(asked)}; received side='gram': F only has that")
    return fit_gram(train, **given)


def _cheaper_side(train: GradientStore, options: dict[str, Any]) -> Literal["fisher", "gram"]:
    """Return the side of the smaller matrix, or the other one where only that fits the budget."""
    chosen = choose_rows(train, options.get("rows"), options.get("sample"), options.get("seed", 0))
    cheaper = choose_side(chosen.count, train.k)
    room, shapes = Room.of(options.get("memory")), FitShapes.of(chosen)
    needs = {"gram": shapes.gram, "fisher": fisher_need(train.k, 1, train.reading_bytes, rows=chosen.small_bytes)}
    other: Literal["fisher", "gram"] = "fisher" if cheaper == "gram" else "gram"
    if not room.fits(needs[cheaper]) and room.fits(needs[other]):
        logger.info(
            "the %s side needs %s, which the budget does not hold: the %s side is taken",
            cheaper, format_bytes(room.price(needs[cheaper])), other,
        )  # fmt: skip
        return other
    return cheaper
