"""Block products on a device through torch, with copies beside them.

A thread copies the stored form of the next block (half a float32's bytes, for float16) into pinned memory and sends it
to the device on a stream of its own; there it is decoded. Two blocks are in flight. ``cpu`` runs the same code with
ordinary memory and without streams.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ooc_influence.curvature import Curvature
from ooc_influence.influence.aggregate import Codes
from ooc_influence.influence.engine import Engine, Floats, Found, Rows
from ooc_influence.store import GradientStore, RawBlock, read_raw_blocks
from ooc_influence.store.encoding import Encoding
from ooc_influence.store.quantised import FACTORS


class _Slot:
    """Host and device memory of one block on its way, and when each may be written again."""

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


class DeviceEngine(Engine):
    """Torch on one device.

    Parameters
    ----------
    device : str
        Its name.
    """

    def __init__(self, device: str) -> None:
        self._device = torch.device(device)
        self._stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
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
        size = min(block_rows, stop - start)
        slots = [_Slot(store, size, self._device) for _ in range(2)]
        rows = torch.empty((size, store.k), device=self._device)
        scale = None if store.column_scale is None else self.array(store.column_scale)
        raw = read_raw_blocks(store, start, stop, block_rows)
        with ThreadPoolExecutor(1, "ooc_influence-device") as thread:
            coming = thread.submit(self._send, raw, slots[0])
            turn = 0
            while (block := coming.result()) is not None:
                slot = slots[turn % 2]
                turn += 1
                coming = thread.submit(self._send, raw, slots[turn % 2])
                count = block.stop - block.start
                self._decode(store.layout.encoding, slot, rows[:count], scale)
                yield Rows(block.start, block.stop, rows[:count], block.dropped)

    def _send(self, raw: Iterator[RawBlock], slot: _Slot) -> RawBlock | None:
        """Start the next block on its way; None behind the last."""
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

    def _decode(self, form: Encoding, slot: _Slot, out: Tensor, column_scale: Tensor | None) -> None:
        """Write the values of a block that was sent into ``out`` (b, k); see :mod:`ooc_influence.store.encoding`."""
        if slot.sent is not None:
            torch.cuda.current_stream(self._device).wait_event(slot.sent)
        raw, scale = slot.device_raw[: len(out)], slot.device_scale[: len(out), None]
        if form.quantised:
            self._restore(form, raw, scale, out)
        else:
            out.copy_(raw.view(torch.bfloat16) if form.name == "bfloat16" else raw)
            if form.name == "float16":
                out.mul_(scale)
        if column_scale is not None:
            out.mul_(column_scale)
        if slot.decoded is not None:
            slot.decoded.record()

    def _restore(self, form: Encoding, raw: Tensor, scale: Tensor, out: Tensor) -> None:
        """Turn whole numbers into what they stand for; see :mod:`ooc_influence.store.quantised`."""
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
        steps = (scale * self.array(FACTORS)[codes.long()]).clamp_(min=torch.finfo(torch.float32).tiny)
        out.mul_(steps.repeat_interleave(form.block, 1)[:, : out.shape[1]])

    def array(self, values: npt.NDArray[Any]) -> Tensor:
        """See :class:`Engine`."""
        whole: npt.NDArray[Any] = np.ascontiguousarray(values)
        return torch.from_numpy(whole if whole.flags.writeable else whole.copy()).to(self._device)

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
