"""Score tiles made with torch on one device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from typing_extensions import override

from ooc_influence.curvature import Curvature
from ooc_influence.influence.engine import Codes, Engine, Floats, Found, Rows
from ooc_influence.linalg.device import DeviceRows, send_array
from ooc_influence.store import GradientStore, read_raw_blocks


class DeviceEngine(Engine):
    """Torch on one device.

    Parameters
    ----------
    device : str
        Its name.
    """

    def __init__(self, device: str) -> None:
        self._device = torch.device(device)
        self._factors: dict[tuple[str, tuple[float, ...]], list[Tensor]] = {}
        self._mode = torch.inference_mode()

    def __enter__(self) -> Self:
        self._mode.__enter__()
        return self

    @override
    def __exit__(self, *error: object) -> None:
        self._mode.__exit__(None, None, None)

    @override
    def blocks(self, store: GradientStore, start: int, stop: int, block_rows: int) -> Iterator[Rows]:
        if start >= stop:
            return
        sender = DeviceRows(store, self._device, min(block_rows, stop - start))
        for block, rows in sender.read(read_raw_blocks(store, start, stop, block_rows)):
            yield Rows(block.start, block.stop, rows, block.dropped)

    @override
    def array(self, values: npt.NDArray[Any]) -> Tensor:
        return send_array(values, self._device)

    @override
    def empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, device=self._device)

    @override
    def multiply(self, left: Tensor, rows: Tensor, out: Tensor) -> None:
        torch.matmul(left, rows.T, out=out)

    @override
    def sums(self, rows: Tensor, codes: Codes, weights: Floats) -> tuple[Codes, Tensor]:
        held = np.flatnonzero(weights)
        groups, places = np.unique(codes[held], return_inverse=True)
        chosen = rows[self.array(held)] * self.array(weights[held])[:, None]
        total = torch.zeros((len(groups), rows.shape[1]), device=self._device)
        return groups, total.index_add_(0, self.array(places), chosen)

    @override
    def quadratic(self, curvature: Curvature | None, values: Sequence[float], rows: Tensor) -> Floats:
        """Of (F + λI)⁻¹ = C Cᵀ, factorised once on the host, it is ‖Cᵀg‖²."""
        if curvature is None:
            return self.host((rows * rows).sum(1))[None]
        key = (str(curvature.path), tuple(values))
        if key not in self._factors:
            self._factors[key] = [self._factor(curvature, value) for value in values]
        return np.stack([self.host((rows @ factor).square_().sum(1)) for factor in self._factors[key]])

    def _factor(self, curvature: Curvature, value: float) -> Tensor:
        inverse = curvature.precondition(np.eye(curvature.d), [value])[0]
        inverse += inverse.T.copy()
        return self.array(np.linalg.cholesky(inverse / 2).astype(np.float32))

    @override
    def above(self, tile: Tensor, limits: Floats, most: int, sign: int) -> Found | None:
        limit = self.array(limits)[:, None]
        exceeding = tile > limit if sign > 0 else tile < -limit
        if int(exceeding.count_nonzero()) > most:
            return None
        places = torch.nonzero(exceeding)
        numbers, columns = places[:, 0], places[:, 1]
        values = self.host(tile[numbers, columns])
        return Found(numbers.cpu().numpy(), columns.cpu().numpy(), values if sign > 0 else -values)

    @override
    def host(self, tile: Tensor) -> Floats:
        found: Floats = tile.cpu().numpy()
        return found
