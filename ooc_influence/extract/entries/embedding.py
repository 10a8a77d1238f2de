"""Per-sample gradients of an embedding: entry (v, d) of a sample is Σ_t [id_t = v] δ[t, d].

Kept entries are grouped by v, so that a token costs the kept entries of its own id only.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from typing_extensions import override

from ooc_influence.errors import UnsupportedModelError
from ooc_influence.extract.entries.base import Entries, Moments, Operands, square_sums, wide
from ooc_influence.extract.entries.calls import Call
from ooc_influence.store import LayerShape, ModuleMask

_TILE = 2**22  # (token, entry) pairs at a time
_PROBED = 64  # ids that show what an embedding with a forward of its own does


class EmbeddingEntries(Entries):
    """``torch.nn.Embedding``, also times a number (Gemma, BART); the entry matrix is its weight (ids, features)."""

    kind = "embedding"

    def __init__(self, kept: ModuleMask, module: nn.Module, device: torch.device) -> None:
        super().__init__(kept, module, device)
        self._order = torch.argsort(self._rows, stable=True)
        self._count = torch.bincount(self._rows, minlength=kept.layer.shape[0])
        self._start = self._count.cumsum(0) - self._count
        self._scale = _scale(module)
        padding: Any = getattr(module, "padding_idx", None)
        if padding is not None:  # its row is never trained
            self._count[padding] = 0

    @classmethod
    @override
    def describe(cls, name: str, module: nn.Module) -> LayerShape | None:
        if not isinstance(module, nn.Embedding) or module.scale_grad_by_freq or module.max_norm is not None:
            return None
        if _scale(module) is None:
            return None
        return LayerShape(name, cls.kind, (module.num_embeddings, module.embedding_dim), False)

    @classmethod
    @override
    def moments(cls, layer: LayerShape, module: nn.Module, x: Any, delta: Any) -> Moments:
        # rows are how often an id occurs, columns Σ δ_d²
        rows = torch.bincount(x.reshape(-1).long(), minlength=layer.shape[0]).double()
        d = delta.reshape(-1, delta.shape[-1])
        return Moments(rows, square_sums(d, 0), x.numel())

    @classmethod
    @override
    def rotates(cls, module: nn.Module) -> tuple[bool, bool]:
        return False, True

    @classmethod
    @override
    def operands(cls, module: nn.Module, x: Any, delta: Any) -> Operands:
        """Return ids and δ, without the factor that :meth:`gather` multiplies by."""
        return Operands(x.reshape(len(x), -1).long(), delta.reshape(len(x), -1, delta.shape[-1]))

    def gather(self, x: Any, delta: Any) -> Tensor:
        """Return the entries, (b, m), of ids x (b, ...) and δ (b, ..., features)."""
        b = len(x)
        d = delta.reshape(-1, delta.shape[-1])
        ids = x.reshape(-1).long()
        rows = self.layer.shape[0]
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < rows:
            raise UnsupportedModelError(
                f"expected ids below {rows} in embedding {self.layer.name!r}; received {int(ids.max())}: it does not "
                "look up ids as they are; leave it out with modules= (--modules)"
            )
        out = torch.zeros(b * self.entries, dtype=wide(delta.dtype), device=delta.device)
        sample = torch.arange(b, device=ids.device).repeat_interleave(len(ids) // max(1, b))
        step = max(1, _TILE // max(1, int(self._count.max()))) if self.entries else len(ids)
        for first in range(0, len(ids), step):
            part = slice(first, first + step)
            count = self._count[ids[part]]
            token = torch.arange(len(count), device=ids.device).repeat_interleave(count)
            # the n-th pair of a token is its id's n-th kept entry
            nth = torch.arange(len(token), device=ids.device) - (count.cumsum(0) - count)[token]
            entry = self._order[self._start[ids[part]][token] + nth]
            values = d[part][token, self._cols[entry]].to(out.dtype).mul_(self._scale)
            out.index_add_(0, sample[part][token] * self.entries + entry, values)
        return out.view(b, self.entries)


def _scale(module: nn.Module) -> float | None:
    """Return the factor that an embedding multiplies its rows by, 1 for torch's; None if it does something else."""
    if isinstance(module, nn.EmbeddingBag) or type(module).forward is nn.Embedding.forward:
        return 1.0
    assert isinstance(module, nn.Embedding)
    if module.weight.is_meta or module.num_embeddings < 2:
        return None
    spread = torch.linspace(0, module.num_embeddings - 1, min(module.num_embeddings, _PROBED))
    ids = spread.round().long().to(module.weight.device)[None]
    with torch.inference_mode(False), torch.no_grad():
        plain = nn.functional.embedding(ids, module.weight.detach()).float()
        try:
            output = module(ids).detach().float()
        except Exception:  # it takes something else than ids
            return None
    norm = float(plain.norm())
    if output.shape != plain.shape or norm == 0:
        return None
    factor = float((output * plain).sum()) / norm**2
    return factor if torch.allclose(output, factor * plain, rtol=1e-2, atol=1e-6) else None


class EmbeddingBagEntries(EmbeddingEntries):
    """Sums and means of embeddings, of (bags, tokens) or of one row of tokens with offsets; (ids, features)."""

    kind = "embedding_bag"
    whole_call = True

    @classmethod
    @override
    def describe(cls, name: str, module: nn.Module) -> LayerShape | None:
        if not isinstance(module, nn.EmbeddingBag) or type(module).forward is not nn.EmbeddingBag.forward:
            return None
        if module.scale_grad_by_freq or module.max_norm is not None or module.mode == "max":
            return None  # the maximum needs the fallback
        return LayerShape(name, cls.kind, (module.num_embeddings, module.embedding_dim), False)

    @classmethod
    @override
    def rotates(cls, module: nn.Module) -> tuple[bool, bool]:
        return False, False

    @classmethod
    @override
    def batched(cls, module: nn.Module, x: Any, delta: Any, b: int) -> bool:
        # every sample has as many bags, one as a rule
        return len(x.outputs[0]) > 0 and len(x.outputs[0]) % b == 0

    @classmethod
    @override
    def strays(cls, module: nn.Module, x: Any, delta: Any, b: int, sample: int) -> bool:
        return super().strays(module, x, delta[0], b, sample)

    @classmethod
    @override
    def moments(cls, layer: LayerShape, module: nn.Module, x: Any, delta: Any) -> Moments:
        # rows are how often an id occurs, columns Σ (w δ_d)²
        ids, d, _ = _tokens(module, x, delta[0])
        return super().moments(layer, module, ids, d)

    def gather(self, x: Any, delta: Any) -> Tensor:
        """Return the entries, (b, m), of the call x and δ (bags, features)."""
        ids, d, bags = _tokens(self._module, x, delta[0])
        lengths = bags.view(x.samples, -1).sum(1).tolist()
        padded = [pad_sequence(list(part.split(lengths)), batch_first=True) for part in (ids, d)]
        return super().gather(*padded)


def _tokens(module: Any, call: Call, delta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the ids of all tokens, each one's weight times its bag's δ, and how many each bag holds."""
    arguments = dict(zip(("input", "offsets", "per_sample_weights"), call.args, strict=False)) | call.kwargs
    ids, offsets, weights = (arguments.get(name) for name in ("input", "offsets", "per_sample_weights"))
    assert ids is not None
    bags = len(delta)
    if offsets is None:
        counts = torch.full((bags,), ids.shape[1], device=ids.device)
    else:
        ends = offsets[1:] if module.include_last_offset else torch.cat([offsets[1:], offsets.new_tensor([len(ids)])])
        counts = (ends - offsets[:bags]).long()
    ids = ids.reshape(-1).long()[: int(counts.sum())]
    bag = torch.arange(bags, device=ids.device).repeat_interleave(counts)
    d = delta.to(wide(delta.dtype)).index_select(0, bag)
    if weights is not None:
        return ids, d * weights.reshape(-1)[: len(ids), None].to(d.dtype), counts
    if module.mode == "mean":
        counted = torch.ones_like(ids) if module.padding_idx is None else (ids != module.padding_idx).long()
        bag_sizes = torch.zeros(bags, dtype=torch.long, device=ids.device).index_add_(0, bag, counted)
        d = d / bag_sizes.clamp(min=1)[bag, None].to(d.dtype)
    return ids, d, counts
