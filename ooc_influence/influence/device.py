"""Score tiles made with torch on one device."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from typing_extensions import override

from ooc_influence.curvature import Curvature
from ooc_influence.influence.engine import BEYOND, Codes, Engine, Entries, Floats
from ooc_influence.linalg import Matrix
from ooc_influence.linalg.device import DeviceRows, send_array
from ooc_influence.store import Block, GradientStore, read_raw_blocks


class DeviceEngine(Engine):
    """Torch on one device.

    Parameters
    ----------
    device : str
        Its name.
    """

    def __init__(self, device: str) -> None:
        self._device = torch.device(device)
        self._factors: dict[tuple[str, bytes], list[Tensor]] = {}
        self._mode = torch.inference_mode()

    def __enter__(self) -> Self:
        self._mode.__enter__()
        return self

    @override
    def __exit__(self, *error: object) -> None:
        self._mode.__exit__(None, None, None)

    @override
    def blocks(
        self, store: GradientStore, start: int, stop: int, block_rows: int, *, as_stored: bool
    ) -> Iterator[Block]:  # fmt: skip
        if start >= stop:
            return
        sender = DeviceRows(store, self._device, min(block_rows, stop - start), as_stored=as_stored)
        rows: Any
        for block, rows in sender.read(read_raw_blocks(store, start, stop, block_rows)):
            yield Block(block.start, block.stop, block.dropped, None, rows)

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
        weighted = np.flatnonzero(weights)
        groups, indices = np.unique(codes[weighted], return_inverse=True)
        chosen = rows[self.array(weighted)] * self.array(weights[weighted])[:, None]
        total = torch.zeros((len(groups), rows.shape[1]), device=self._device)
        return groups, total.index_add_(0, self.array(indices), chosen)

    @override
    def quadratic(self, curvature: Curvature | None, lambdas: Matrix, rows: Tensor) -> Floats:
        """Of (F + λI)⁻¹ = C Cᵀ, factorised once on the host, it is ‖Cᵀg‖²; of a diagonal, a sum of weighted squares."""
        if curvature is None:
            return self.host((rows * rows).sum(1))[None]
        key = (str(curvature.path), lambdas.tobytes())
        if curvature.is_diagonal:
            if key not in self._factors:
                inverse = curvature.precondition(np.ones((1, curvature.d)), lambdas)[:, 0]
                self._factors[key] = [self.array(inverse.T.astype(np.float32))]
            return self.host((rows.square() @ self._factors[key][0]).T)
        if key not in self._factors:
            self._factors[key] = [self._factor(curvature, each) for each in lambdas]
        return np.stack([self.host((rows @ factor).square_().sum(1)) for factor in self._factors[key]])

    def _factor(self, curvature: Curvature, lambdas: Matrix) -> Tensor:
        inverse = curvature.precondition(np.eye(curvature.d), lambdas[None])[0]
        inverse += inverse.T.copy()
        return self.array(np.linalg.cholesky(inverse / 2).astype(np.float32))

    @override
    def above(self, tile: Tensor, limits: Floats, most: int, sign: int) -> Entries | None:
        limit = self.array(limits)[:, None]
        exceeding = tile > limit if sign > 0 else tile < -limit
        if int(exceeding.count_nonzero()) > most:
            return None
        numbers, columns = torch.nonzero(exceeding).unbind(1)
        values = self.host(tile[numbers, columns])
        return Entries(numbers.cpu().numpy(), columns.cpu().numpy(), values if sign > 0 else -values)

    @override
    def raised(self, tile: Tensor, sign: int, factors: tuple[Floats, Floats], out: Tensor) -> Tensor:
        left, right = (self.array(each) for each in factors)
        target = out[: tile.numel()].view(tile.shape)
        torch.matmul(left.view(len(right), -1, left.shape[1]), right, out=target.view(len(right), -1, tile.shape[1]))
        return target.add_(tile, alpha=sign).clamp_(max=BEYOND)

    @override
    def nth_largest(self, tile: Tensor, n: int, sign: int) -> Floats:
        values = torch.nan_to_num(sign * tile, nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
        return self.host(values.topk(n, dim=1).values[:, -1])

    @override
    def host(self, tile: Tensor) -> Floats:
        values: Floats = tile.cpu().numpy()
        return values
