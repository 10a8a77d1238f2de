"""The protocol of compressors: what extraction asks of dropout and of the baselines that it is compared with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal, Protocol, Self, get_args

import numpy as np

from ooc_influence.errors import InputError
from ooc_influence.options import DampingScope
from ooc_influence.store import GeneratedReduction, LayerShape, Mask, PilotMoments

PILOT_ROWS = 4  # pilot rows per number kept, by default; more keep more of the other rows


def parse_whole_numbers(settings: Any, least: Mapping[str, int]) -> None:
    """Check attributes of a frozen dataclass against their least values, and make them plain integers."""
    for name, bound in least.items():
        value = getattr(settings, name)
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < bound:
            raise InputError(f"expected a whole number {name} >= {bound}; received {value!r}")
        object.__setattr__(settings, name, int(value))


@dataclass(frozen=True)
class Eigenbasis:
    """Reduce masked gradients to the top of their eigenbasis.

    Parameters
    ----------
    r : int
        Numbers stored per row.
    pilot : int, optional
        Rows that the basis is fitted to; by default four times ``r``. All rows, if the data has fewer.
    weights : {"ggn", "trak"}, optional
        Weights of the pilot rows (:mod:`ooc_influence.linalg.rows`), for one-label cross-entropy.

    Raises
    ------
    InputError
        For an r below 1, fewer pilot rows than r, or an unknown weighting.
    """

    r: int = 1024
    pilot: int | None = None
    weights: str | None = None

    def __post_init__(self) -> None:
        parse_whole_numbers(self, {"r": 1} if self.pilot is None else {"r": 1, "pilot": 1})
        if self.pilot is not None and self.pilot < self.r:
            raise InputError(f"expected at least r = {self.r} pilot rows; received {self.pilot}")
        if self.weights not in (None, "ggn", "trak"):
            raise InputError(f"expected weights 'ggn', 'trak' or none; received {self.weights!r}")

    @property
    def pilot_rows(self) -> int:
        """Rows that the basis is fitted to."""
        return PILOT_ROWS * self.r if self.pilot is None else self.pilot

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as JSON-ready values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Any) -> Self:
        """Return the settings that :meth:`to_dict` described.

        Raises
        ------
        InputError
            If it described others.
        """
        try:
            return cls(**values)
        except TypeError as error:
            raise InputError(f"expected the settings of an eigenbasis; received {values!r}") from error


@dataclass(frozen=True)
class KroneckerBasis:
    """Keep entries of gradients rotated into each layer's Kronecker basis, where EK-FAC's curvature is diagonal.

    Parameters
    ----------
    samples : int
        Samples of the pilot, from which the second moments of inputs and output gradients are estimated.
    damping : float
        λ of the whitened energy Λ/(Λ + λ) that entries are drawn by, relative to the mean Λ of ``damping_scope``. It is
        also the default damping of the curvature ``"kronecker"``, which takes any other.
    damping_scope : {"layer", "model"}
        Whose mean Λ dampings are relative to: each layer's own, or that of all tapped layers together, which gives them
        one λ. Recorded with the basis: it holds for every later use of its curvature.
    list_damping : float, optional
        Default damping of lists of rows for queries (:func:`top_influential`) under that curvature; default
        ``damping``. Which documents state a fact is best seen at one that would be far too large to predict the effect
        of their removal.
    moments : {"measured", "product"}
        Λ of the kept entries: measured by another pass over the pilot (EK-FAC), or K-FAC's product of eigenvalues.
    labels : {"dataset", "sampled"}
        Labels of the pilot's losses: the data set's, or drawn from the model's own distribution.
    seed : int
        Seed of sampled labels.

    Raises
    ------
    InputError
        For a number of samples below 1, a damping that is not positive, or an unknown choice.

    Examples
    --------
    >>> from ooc_influence import Dropout, KroneckerBasis
    >>> Dropout(k=65536, basis=KroneckerBasis(samples=512)).sampling
    'grid'
    """

    samples: int = 256
    damping: float = 0.03
    moments: Literal["measured", "product"] = "measured"
    labels: Literal["dataset", "sampled"] = "dataset"
    seed: int = 0
    damping_scope: DampingScope = "layer"
    list_damping: float | None = None

    def __post_init__(self) -> None:
        parse_whole_numbers(self, {"samples": 1, "seed": 0})
        for name in ("damping", "list_damping"):
            value = getattr(self, name)
            given = isinstance(value, (int, float)) and 0 < value < np.inf
            if not given and (name, value) != ("list_damping", None):
                raise InputError(f"expected {name} > 0; received {value!r}")
        known = {
            "moments": ("measured", "product"),
            "labels": ("dataset", "sampled"),
            "damping_scope": get_args(DampingScope),
        }
        for name, choices in known.items():
            if getattr(self, name) not in choices:
                raise InputError(f"expected {name} one of {', '.join(choices)}; received {getattr(self, name)!r}")

    @classmethod
    def parse(cls, basis: Any) -> Self | None:
        """Return the basis that an argument names: one, ``"kronecker"``, or None."""
        if basis is None or isinstance(basis, cls):
            return basis
        if basis == "kronecker":
            return cls()
        try:
            return cls(**basis)
        except TypeError as error:
            raise InputError(f"expected basis 'kronecker', a KroneckerBasis or none; received {basis!r}") from error


class Compressor(Protocol):
    """What is stored of a per-sample gradient: entries under a mask, and a map of these to fewer numbers.

    Implementations are frozen dataclasses of their settings. The members defined here suit a compressor that keeps
    weighted entries, needs no pilot and does not reduce.
    """

    name: ClassVar[str]

    @property
    def pilot_samples(self) -> int:
        """Samples whose moments :meth:`draw` needs; 0 if it needs none."""
        return 0

    @property
    def reduce(self) -> Eigenbasis | None:
        """The eigenbasis, fitted to the rows of a pilot, that rows are reduced to."""
        return None

    @property
    def kronecker(self) -> KroneckerBasis | None:
        """The Kronecker basis of which entries are kept; None for the parameters' own coordinates."""
        return None

    @property
    def wide(self) -> Compressor:
        """The compressor of the pilot's rows: this one without :attr:`reduce`."""
        return self

    @property
    def weighs_entries(self) -> bool:
        """Whether rows are made of single entries, so that a metric can weigh them."""
        return True

    def draw(self, layers: Sequence[LayerShape], moments: Sequence[PilotMoments] = ()) -> Mask:
        """Draw the mask over all entries of ``layers``.

        Parameters
        ----------
        layers : sequence of LayerShape
            The tapped layers.
        moments : sequence of PilotMoments
            Second moments of a pilot of :attr:`pilot_samples` samples.

        Raises
        ------
        InputError
            If more entries are to be kept than there are, or moments are missing.
        MemoryBudgetError
            If mask and rows do not fit half of the free memory.
        """
        ...

    def generated(self, mask: Mask) -> GeneratedReduction | None:
        """Return the seeded map of rows under ``mask``; None if there is none, or it is fitted to a pilot."""
        return None

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as JSON-ready values, with the compressor's name under ``"name"``."""
        return {"name": self.name, **asdict(self)}  # type: ignore[call-overload]

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Return the compressor that :meth:`to_dict` described.

        Raises
        ------
        InputError
            If it described another one.
        """
        settings = dict(values)
        try:
            if settings.pop("name", None) == cls.name:
                if settings.get("reduce") is not None:
                    settings["reduce"] = Eigenbasis.from_dict(settings["reduce"])
                return cls(**settings)
        except TypeError:
            pass
        raise InputError(f"expected the settings of {cls.__name__}; received {values!r}")
