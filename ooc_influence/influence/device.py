"""Score tiles made with torch on one device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

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

    def __exit__(self, *error: object) -> None:
        """See :class:`Engine`."""
        self._mode.__exit__(None, None, None)

    def blocks(self, store: GradientStore, start: int, stop: int, block_rows: int) -> Iterator[Rows]:
        """See :class:`Engine`."""
        if start >= stop:
            return
        sender = DeviceRows(store, self._device, min(block_rows, stop - start))
        for block, rows in sender.read(read_raw_blocks(store, start, stop, block_rows)):
            yield Rows(block.start, block.stop, rows, block.dropped)

    def array(self, values: npt.NDArray[Any]) -> Tensor:
        """See :class:`Engine`."""
        return send_array(values, self._device)

    def empty(self, *shape: int) -> Tensor:
        """See :class:`Engine`."""
        return torch.empty(shape, device=self._device)

    def multiply(self, left: Tensor, rows: Tensor, out: Tensor) -> None:
        """See :class:`Engine`."""
        torch.matmul(left, rows.T, out=out)

    def sums(self, rows: Tensor, codes: Codes, weights: Floats) -> tuple[Codes, Tensor]:
        """See :class:`Engine`."""
        held = np.flatnonzero(weights)
        groups, places = np.unique(codes[held], return_inverse=True)
        chosen = rows[self.array(held)] * self.array(weights[held])[:, None]
        total = torch.zeros((len(groups), rows.shape[1]), device=self._device)
        return groups, total.index_add_(0, self.array(places), chosen)

    def quadratic(self, curvature: Curvature | None, values: Sequence[float], rows: Tensor) -> Floats:
        """See :class:`Engine`; of (F + λI)⁻¹ = C Cᵀ, factorised once on the host, it is ‖Cᵀg‖²."""
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

    def above(self, tile: Tensor, limits: Floats, most: int, sign: int) -> Found | None:
        """See :class:`Engine`."""
        limit = self.array(limits)[:, None]
        exceeding = tile > limit if sign > 0 else tile < -limit
        if int(exceeding.count_nonzero()) > most:
            return None
        places = torch.nonzero(exceeding)
        numbers, columns = places[:, 0], places[:, 1]
        values = self.host(tile[numbers, columns])
        return Found(numbers.cpu().numpy(), columns.cpu().numpy(), values if sign > 0 else -values)

    def host(self, tile: Tensor) -> Floats:
        """See :class:`Engine`."""
        found: Floats = tile.cpu().numpy()
        return found
