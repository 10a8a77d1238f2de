"""Other ways to the same scores where a budget does not hold them: fewer columns, or another form of the curvature."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

from ooc_influence.curvature import Curvature
from ooc_influence.curvature.gram import gram_self_bytes, gram_working_bytes
from ooc_influence.curvature.need import FitShapes, module_ranges
from ooc_influence.curvature.rows import choose_rows
from ooc_influence.curvature.spectral import self_bytes, working_bytes
from ooc_influence.influence.checkpoints import Checkpoint
from ooc_influence.memory import Need, Room, WayOut


class Form(NamedTuple):
    """What rows and a curvature hold.

    Attributes
    ----------
    columns : int
        Stored numbers a row.
    working : callable
        Bytes to precondition, given queries and λs; see :meth:`Curvature.working_bytes`.
    norms : callable
        Bytes for self-influence, given λs; see :meth:`Curvature.self_working_bytes`.
    curved : bool
        Whether there is a curvature.
    """

    columns: int
    working: Callable[[int, int], int]
    norms: Callable[[int], int]
    curved: bool = True

    @classmethod
    def of(cls, columns: int, curvature: Curvature | None) -> Form:
        """Return the form of a curvature, or of none."""
        if curvature is None:
            return cls(columns, lambda queries, values: 0, lambda values: 0, False)
        return cls(columns, curvature.working_bytes, curvature.self_working_bytes)

    @classmethod
    def spectral(cls, columns: int, squares: int | None = None) -> Form:
        """Return the form of F's whole spectrum, in blocks of Σ d_b² = ``squares`` numbers."""
        return cls(
            columns, partial(working_bytes, columns, squares=squares), partial(self_bytes, columns, squares=squares)
        )

    @classmethod
    def gram(cls, columns: int, rows: int) -> Form:
        """Return the form of the spectrum of a Gram matrix of some rows."""
        return cls(columns, partial(gram_working_bytes, columns, rows), partial(gram_self_bytes, columns, rows))


def form_ways(own: Checkpoint, need: Callable[[Form], Need], room: Room) -> Iterator[WayOut]:
    """Return the ways by other forms of a checkpoint's rows and curvature, given what a form would need."""
    train, found = own.train, own.curvature
    shapes = FitShapes.of(choose_rows(train))

    def of_reduced(r: int) -> Need:
        return need(Form.of(r, None) if found is None else Form.spectral(r))

    yield from shapes.reduced(room, of_reduced)
    if found is None or found.kind != "whole":
        return
    if len(shapes.modules) > 1:
        squares = sum((last - first) ** 2 for first, last in module_ranges(train))
        text = f"a curvature by module ({{}}: ooc-influence fisher {train.path} --blocks module)"
        yield WayOut(text, need(Form.spectral(train.k, squares)))
    if found.rows < train.k and room.fits(shapes.gram):
        text = f"the Gram side ({{}}: ooc-influence fisher {train.path} --side gram)"
        yield WayOut(text, max(shapes.gram, need(Form.gram(train.k, found.rows)), key=room.price))
