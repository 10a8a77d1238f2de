"""A model's fingerprint: a digest of all bytes of its tensors, independent of device, sharding and wrappers.

Blocks of bytes are summed up by CRC-32C, several at once, and SHA-256 joins the sums: within a block a changed entry of
up to 32 bits, or up to three changed bits, are always detected, any other change with probability 1 − 2^-32. Nothing is
cached between calls: an assignment through ``.data`` changes weights without a trace.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from crc32c import crc32c
from torch import Tensor, nn

from ooc_influence.extract.layers import clean_name
from ooc_influence.parallel import cores

_TAG = "2:"  # how fingerprints of all bytes begin; those of format 1, of sampled entries, are bare SHA-256
_PIECE = 8 * 2**20  # bytes that a thread copies from the device and sums up
_BLOCK = 2**20  # bytes of a CRC-32C
_THREADS = 8
_SAMPLED_ENTRIES = 64  # of each tensor, in a fingerprint of format 1


def model_fingerprint(model: nn.Module) -> str:
    """Return a digest of the names, shapes, dtypes and bytes of a model's tensors, ``"2:"`` and 64 hexadecimal digits.

    Sharded tensors count as a whole, so every process has to make this call.
    """
    digest = hashlib.sha256()
    with ThreadPoolExecutor(min(_THREADS, cores())) as pool:
        for name, tensor in _tensors(model):
            digest.update(repr((name, tuple(tensor.shape), str(tensor.dtype))).encode())
            if tensor.numel() and not tensor.is_meta:
                flat = _flat_bytes(tensor)
                pieces = (flat[start : start + _PIECE] for start in range(0, len(flat), _PIECE))
                for sums in pool.map(_block_sums, pieces):
                    digest.update(sums)
    return _TAG + digest.hexdigest()


def fingerprint_as(model: nn.Module, recorded: str | None) -> str:
    """Return a model's fingerprint, to be compared with one that a store recorded, perhaps in an earlier version.

    That is ``recorded`` itself if the model has it by the algorithm it was made with, otherwise
    :func:`model_fingerprint`.
    """
    earlier = recorded is not None and not recorded.startswith(_TAG)
    if earlier and _sampled_fingerprint(model) == recorded:
        return recorded or ""
    return model_fingerprint(model)


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Return a model's tensors by clean name, in the order of names; of a quantised one, its codes and their scales."""
    values = {clean_name(model, name): value for name, value in model.state_dict().items()}
    for name in sorted(values):
        value = values[name]
        if isinstance(value, Tensor):
            yield from _parts(name, value)
        elif isinstance(value, (tuple, list)):
            for number, part in enumerate(value):
                if isinstance(part, Tensor):
                    yield from _parts(f"{name}[{number}]", part)


def _parts(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    if hasattr(tensor, "full_tensor"):  # sharded over processes, each of which asks for it at this moment
        tensor = tensor.full_tensor()
    if tensor.is_quantized:
        yield f"{name}.codes", tensor.int_repr()
        affine = tensor.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric)
        scale: Any = tensor.q_scale() if affine else tensor.q_per_channel_scales()
        zero: Any = tensor.q_zero_point() if affine else tensor.q_per_channel_zero_points()
        yield f"{name}.scale", torch.as_tensor(scale)
        yield f"{name}.zero_point", torch.as_tensor(zero)
    elif hasattr(tensor, "__tensor_flatten__"):  # a subclass made of other tensors
        for inner in tensor.__tensor_flatten__()[0]:
            yield from _parts(f"{name}.{inner}", getattr(tensor, inner))
    else:
        yield name, tensor


def _flat_bytes(tensor: Tensor) -> Tensor:
    """Return a tensor's bytes, in the order of its entries, on its own device."""
    plain = tensor.detach().to_dense() if tensor.layout != torch.strided else tensor.detach()
    return plain.resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)


def _block_sums(piece: Tensor) -> bytes:
    """Return the CRC-32C of every block of some bytes."""
    values = piece.cpu().numpy()
    sums = [crc32c(values[start : start + _BLOCK].data) for start in range(0, len(values), _BLOCK)]
    return np.array(sums, "<u4").tobytes()


def _sampled_fingerprint(model: nn.Module) -> str:
    """Return the fingerprint of format 1: names, shapes, dtypes and a seeded sample of every tensor's entries."""
    digest = hashlib.sha256()
    generator = np.random.Generator(np.random.PCG64(0))
    named = {clean_name(model, n): t for n, t in model.state_dict().items() if isinstance(t, Tensor)}
    for name, tensor in sorted(named.items()):
        digest.update(repr((name, tuple(tensor.shape), str(tensor.dtype))).encode())
        if tensor.numel() and not tensor.is_meta:
            offsets = torch.from_numpy(generator.integers(0, tensor.numel(), _SAMPLED_ENTRIES))
            whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
            values: Any = whole.detach().reshape(-1)[offsets.to(whole.device)].cpu()
            digest.update(values.to(torch.float64).numpy().tobytes())
    return digest.hexdigest()
