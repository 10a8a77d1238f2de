"""Rows and sums on a torch device: stored rows are sent as they are and decoded there, two blocks in flight."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from typing_extensions import override

from ooc_influence.linalg import device_signs
from ooc_influence.linalg.accumulate import Accumulator
from ooc_influence.linalg.backend import Matrix
from ooc_influence.process import MATMUL_PRECISION
from ooc_influence.store import FACTORS, Encoding, GradientStore, RawBlock

_TILE = 2048  # columns of a tile of a triangle


def send_array(values: npt.NDArray[Any], device: torch.device) -> Tensor:
    """Return an array as a tensor on a device."""
    whole: npt.NDArray[Any] = np.ascontiguousarray(values)
    return torch.from_numpy(whole if whole.flags.writeable else whole.copy()).to(device)


class _Slot:
    """Host and device memory of one block in transfer, and when each may be overwritten."""

    def __init__(self, store: GradientStore, rows: int, device: torch.device) -> None:
        raw = torch.from_numpy(store.raw_rows(0, 1))
        pinned = device.type == "cuda"
        shape = (rows, raw.shape[1])
        self.raw = torch.empty(shape, dtype=raw.dtype, pin_memory=pinned)
        self.scale = torch.empty(rows, pin_memory=pinned)
        self.device_raw = torch.empty(shape, dtype=raw.dtype, device=device)
        self.device_scale = torch.empty(rows, device=device)
        self.sent = torch.cuda.Event() if pinned else None
        self.decoded = torch.cuda.Event() if pinned else None


class DeviceRows:
    """The rows of blocks, decoded on a device.

    Parameters
    ----------
    store : GradientStore
        Where the blocks come from.
    device : torch.device
        The device.
    block_rows : int
        Rows of a block, at most.
    factors : (k,) float32, optional
        What columns are multiplied by.
    as_stored : bool
        Give rows as :meth:`Encoding.read_stored_into` does.
    """

    def __init__(
        self,
        store: GradientStore,
        device: torch.device,
        block_rows: int,
        factors: npt.NDArray[np.float32] | None = None,
        *,
        as_stored: bool = False,
    ) -> None:
        self._form, self._device, self._as_stored = store.layout.encoding, device, as_stored
        self._slots = [_Slot(store, block_rows, device) for _ in range(2)]
        width = self._form.stored_columns if as_stored else store.k
        self._rows = torch.empty((block_rows, width), device=device)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        scales = [send_array(scale, device) for scale in (store.column_scale, factors) if scale is not None]
        self._column_scale = math.prod(scales[1:], start=scales[0]) if scales else None

    def read(self, raw: Iterator[RawBlock]) -> Iterator[tuple[RawBlock, Tensor]]:
        """Yield blocks and their rows (b, k) float32, which the next one overwrites."""
        with ThreadPoolExecutor(1, "ooc_influence-device") as thread:
            coming = thread.submit(self._send, raw, self._slots[0])
            turn = 0
            while (block := coming.result()) is not None:
                slot = self._slots[turn % 2]
                turn += 1
                coming = thread.submit(self._send, raw, self._slots[turn % 2])
                rows = self._rows[: block.stop - block.start]
                self._decode(slot, rows)
                yield block, rows

    def multiply(self, rows: Tensor, factors: npt.NDArray[np.float32]) -> None:
        """Multiply rows by factors (b,), in place."""
        rows.mul_(send_array(factors, self._device)[:, None])

    def clear(self, rows: Tensor, which: npt.NDArray[np.bool_]) -> None:
        """Set some rows to zero, whatever they hold."""
        rows[send_array(which, self._device)] = 0

    def _send(self, raw: Iterator[RawBlock], slot: _Slot) -> RawBlock | None:
        """Start to send the next block; None after the last."""
        with torch.inference_mode():
            if slot.sent is not None:
                slot.sent.synchronize()
            block = next(raw, None)
            if block is None:
                return None
            first = 0
            for part, scale in block.parts:
                slot.raw[first : first + len(part)].copy_(torch.from_numpy(part))
                slot.scale[first : first + len(part)].copy_(torch.from_numpy(scale))
                first += len(part)
            with torch.cuda.stream(self._stream) if self._stream is not None else contextlib.nullcontext():
                if self._stream is not None and slot.decoded is not None:
                    self._stream.wait_event(slot.decoded)
                slot.device_raw[:first].copy_(slot.raw[:first], non_blocking=True)
                slot.device_scale[:first].copy_(slot.scale[:first], non_blocking=True)
                if slot.sent is not None:
                    slot.sent.record()
            return block

    def _decode(self, slot: _Slot, out: Tensor) -> None:
        """Write the values of a block that was sent into ``out`` (b, k); see :mod:`ooc_influence.store.encoding`."""
        if slot.sent is not None:
            torch.cuda.current_stream(self._device).wait_event(slot.sent)
        form = self._form
        raw, scale = slot.device_raw[: len(out)], slot.device_scale[: len(out), None]
        if form.quantised:
            self._restore(form, raw, scale, out)
        elif form.name == "sign":
            rows = device_signs.unpack(form.stored_columns, raw).mul_(scale)
            out.copy_(rows if self._as_stored else device_signs.rotate_back(form.k, form.block or 1, rows))
        else:
            out.copy_(raw.view(torch.bfloat16) if form.name == "bfloat16" else raw)
            if form.name == "float16" or form.linear:
                out.mul_(scale)
        if self._column_scale is not None and not self._as_stored:
            out.mul_(self._column_scale)
        if slot.decoded is not None:
            slot.decoded.record()

    def _restore(self, form: Encoding, raw: Tensor, scale: Tensor, out: Tensor) -> None:
        """Turn whole numbers into what they stand for; see :mod:`ooc_influence.store.encoding`."""
        numbers, codes = raw[:, : form.number_columns], raw[:, form.number_columns :].view(torch.uint8)
        if form.name == "int4":
            packed, half = numbers.view(torch.int8), form.number_columns
            out[:, :half] = (packed << 4) >> 4
            out[:, half:] = (packed >> 4)[:, : out.shape[1] - half]
        else:
            out.copy_(numbers)
        out.mul_(out.abs().add_(0 if form.block is None else form.top))
        if form.block is None:
            out.mul_(scale)
            return
        steps = (scale * send_array(FACTORS, self._device)[codes.long()]).clamp_(min=torch.finfo(torch.float32).tiny)
        out.mul_(steps.repeat_interleave(form.block, 1)[:, : out.shape[1]])


class DeviceAccumulator(Accumulator):
    """The sum Σ XᵀY, or Σ XᵀX, of blocks on a device: in float32, not TF32, folded into float64 as on the host.

    Parameters
    ----------
    a, b : int
        Columns of X and Y. Holds a b float32 and a b float64 there.
    device : str
        The device.
    """

    def __init__(self, a: int, b: int, device: str) -> None:
        super().__init__(torch.zeros((a, b), device=device, dtype=torch.float64))
        self._single = torch.zeros((a, b), device=device)

    def add(self, left: Tensor, right: Tensor | None = None) -> None:
        """Add leftᵀ right; without ``right``, the upper triangle of leftᵀ left."""
        with MATMUL_PRECISION.held("highest"):
            for start in range(0, len(self._single), _TILE):
                stop = start + _TILE
                tile = self._single[start:stop] if right is not None else self._single[start:stop, start:]
                torch.addmm(tile, left[:, start:stop].T, left[:, start:] if right is None else right, out=tile)
        self.added(len(left))

    @override
    def _fold_pending(self) -> None:
        self._double += self._single
        self._single.zero_()

    @override
    def restore(self, total: Matrix, rows: int) -> None:
        self._double.copy_(torch.from_numpy(total))
        self.folded = rows

    @override
    def _host(self) -> Matrix:
        host: Matrix = self._double.cpu().numpy()
        return host
