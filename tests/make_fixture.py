"""Writes tests/fixtures/format-3*.zarr: run once a format version, then kept; later versions must still read them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from conftest import random_rows

from ooc_influence import Dropout, GradientStore, Storage, fit_fisher
from ooc_influence.store import LayerShape

NAMES = [f"row-{number}" for number in range(11)]
LAYERS = [LayerShape("block.first", "linear", (3, 5), True), LayerShape("last", "linear", (2, 3), False)]


def rows_of(k: int) -> np.ndarray:
    """What a fixture of k columns holds."""
    return random_rows(11, k, seed=42)


def write(path: Path, k: int, dtype: str) -> None:
    mask = Dropout(k=k, seed=3).draw(LAYERS)
    attributes = {"compressor": Dropout(k=k, seed=3).to_dict(), "loss_kind": "cross_entropy", "covered": 1.0}
    attributes["model"] = {"fingerprint": "0" * 64, "class": "Example"}
    with GradientStore.create(
        path, mask, dtype=dtype, storage=Storage(4, 2), ids="str", columns={"label": "int64", "source": "str"},
        attributes=attributes,
    ) as store:  # fmt: skip
        columns = {"label": np.arange(11) % 3, "source": ["a", "b"] * 5 + ["ç"]}
        store.append(rows_of(k), loss=np.arange(11) / 8, ids=NAMES, columns=columns)
        store.drop([4])
        store.record(created=dict(store.attrs["created"]) | {"host": "example"})
    if dtype != "sign":  # of which there is no Fisher matrix
        fit_fisher(path)
    for claim in (path / "commits").glob(".claim*"):
        claim.unlink()


if __name__ == "__main__":
    write(Path(__file__).parent / "fixtures" / "format-3.zarr", 20, "int8")
    write(Path(__file__).parent / "fixtures" / "format-3-sign.zarr", 20, "sign")
