"""The protocol of compressors: what extraction asks of dropout and of the baselines that it is compared with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, ClassVar, Protocol, Self

import numpy as np

from ooc_influence.compress.eigenbasis import Eigenbasis
from ooc_influence.errors import InputError
from ooc_influence.store import GeneratedReduction, LayerShape, Mask, PilotMoments


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


def parse_whole_numbers(settings: Any, least: Mapping[str, int]) -> None:
    """Check attributes of a frozen dataclass against their least values, and make them plain integers.

    Raises
    ------
    InputError
        If one is not a whole number, or is below its least value.
    """
    for name, bound in least.items():
        value = getattr(settings, name)
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < bound:
            raise InputError(f"expected a whole number {name} >= {bound}; received {value!r}")
        object.__setattr__(settings, name, int(value))
