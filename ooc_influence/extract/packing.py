"""Rows of signs, packed where they were computed, so that a batch leaves one bit an entry and not a float."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ooc_influence.linalg import KeptNorms, device_signs
from ooc_influence.linalg.device import send_array
from ooc_influence.store import Encoding

_TILE_BYTES = 2**26  # of float32 rows at a time


class SignPacker:
    """Turns rows of a batch into their stored form, on the device they are on.

    Parameters
    ----------
    encoding : Encoding
        Of signs.
    column_scale : (k,) float32 or None
        What columns are divided by.
    kept : KeptNorms
        The norms that are kept beside rows.
    device : torch.device
        Of the rows.
    """

    def __init__(
        self, encoding: Encoding, column_scale: npt.NDArray[np.float32] | None, kept: KeptNorms, device: torch.device
    ) -> None:
        self._encoding, self._column_scale, self._kept = encoding, column_scale, kept
        self._host = device.type == "cpu"
        if not self._host:
            self._weights = [send_array(weights, device) for weights in kept.weights.values()]
            self._divisor = None if column_scale is None else send_array(column_scale, device)

    def __call__(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return the stored form of rows (b, k) float32, (b, columns) uint8, and float64 sums (b, 1 + m).

        The sums are the rows' scales and, in their order, the norms that are kept.
        """
        packed = rows.new_empty((len(rows), self._encoding.columns), dtype=torch.uint8)
        sums = rows.new_empty((len(rows), 1 + len(self._kept.weights)), dtype=torch.float64)
        step = max(1, _TILE_BYTES // (4 * rows.shape[1]))
        for start in range(0, len(rows), step):
            part = slice(start, start + step)
            if self._host:
                self._pack_on_host(rows[part].numpy(), packed[part].numpy(), sums[part].numpy())
            else:
                self._pack_on_device(rows[part], packed[part], sums[part])
        return packed, sums

    def _pack_on_host(
        self, rows: npt.NDArray[np.float32], packed: npt.NDArray[np.uint8], sums: npt.NDArray[np.float64]
    ) -> None:
        scale = np.empty(len(rows), np.float32)
        self._encoding.encode_into(rows, packed, scale, self._column_scale)
        sums[:, 0] = scale
        for number, norms in enumerate(self._kept.columns(rows).values(), 1):
            sums[:, number] = norms

    def _pack_on_device(self, rows: Tensor, packed: Tensor, sums: Tensor) -> None:
        packed[:], sums[:, 0] = device_signs.encode(rows, self._encoding, self._divisor)
        squares = rows.square()
        for number, weights in enumerate(self._weights, 1):
            sums[:, number] = squares @ weights
