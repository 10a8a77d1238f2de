"""The plan of a corpus: disk, memory, arithmetic and time of each stage."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ooc_influence.errors import InputError
from ooc_influence.memory import budget_bytes, held_now
from ooc_influence.planning.rates import Rates
from ooc_influence.planning.stages import Shapes, Stage, all_stages
from ooc_influence.store import PathLike, parse_representation


@dataclass(frozen=True)
class Plan:
    """What every stage will take.

    Attributes
    ----------
    stages : list of Stage
        In the order they run.
    budget : int
        Bytes that a process may take.
    rates : Rates
        What times rest on.
    """

    stages: list[Stage]
    budget: int
    rates: Rates

    @property
    def fits(self) -> bool:
        """Whether every stage fits the budget."""
        return all(stage.refusal is None for stage in self.stages)

    def __getitem__(self, name: str) -> Stage:
        for stage in self.stages:
            if stage.name == name:
                return stage
        raise KeyError(name)

    def to_dict(self) -> Mapping[str, Any]:
        """Return the plan as JSON-ready values."""
        return {
            "budget": self.budget,
            "fits": self.fits,
            "stages": [stage.to_dict() for stage in self.stages],
            "rates": asdict(self.rates),
        }


def plan(
    rows: int,
    k: int,
    *,
    queries: int = 100,
    dtype: str = "float16",
    reduce: int | None = None,
    top: int = 100,
    dampings: int = 1,
    memory: int | str | None = None,
    workers: int = 1,
    gflops: float | None = None,
    read_rate: float | None = None,
    folder: PathLike = ".",
) -> Plan:
    """Say what every stage will take, before anything runs.

    Parameters
    ----------
    rows, k : int
        Train rows, and gradient entries kept of each.
    queries : int
        Query rows.
    dtype : {"float16", "bfloat16", "float32", "int8", "int4"}
        Representation on disk.
    reduce : int, optional
        Numbers that kept entries are reduced to.
    top : int
        Rows of a top list.
    dampings : int
        λs at once.
    memory : int or str, optional
        Budget of a process; default half of what is free.
    workers : int
        Row stripes at once in a process.
    gflops, read_rate : float, optional
        10⁹ float32 FLOP, and bytes read, in a second; default measured here, in about two seconds.
    folder : path
        Where the stores will be: the disk that is measured.

    Returns
    -------
    Plan
        Stage by stage. Memory is what the stages themselves project; times are estimates for this machine.

    Raises
    ------
    InputError
        For sizes below one, a reduction beyond k, or rates that are not positive.
    """
    sizes = {"rows": rows, "k": k, "queries": queries, "top": top, "dampings": dampings, "workers": workers}
    for name, value in sizes.items():
        if type(value) is not int or value < 1:
            raise InputError(f"expected {name} >= 1; received {value!r}")
    if reduce is not None and not 1 <= reduce <= min(k, rows):
        raise InputError(f"expected reduce between 1 and {min(k, rows)}, k or the rows; received {reduce}")
    budget = budget_bytes(memory)
    rates = Rates.measure(str(folder), gflops=gflops, read=read_rate)
    dims = k if reduce is None else reduce
    shapes = Shapes(rows, k, queries, dims, parse_representation(dtype), dampings, top, workers, budget, held_now())
    return Plan(all_stages(shapes, rates), budget, rates)
