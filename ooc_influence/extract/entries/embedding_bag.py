"""``nn.EmbeddingBag``: entry (v, d) of a sample is Σ_t [id_t = v] w_t δ[bag of t, d].

w_t is the token's own weight, or 1, or one by the number of tokens in its bag that are no padding. Bags of different
lengths are padded with tokens without a gradient; kept entries are then gathered as those of an embedding.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ooc_influence.extract.entries.base import Moments, wide
from ooc_influence.extract.entries.calls import Call
from ooc_influence.extract.entries.embedding import EmbeddingEntries
from ooc_influence.store import LayerShape


class EmbeddingBagEntries(EmbeddingEntries):
    """Sums and means of embeddings, of (bags, tokens) or of one row of tokens with offsets; (ids, features)."""

    kind = "embedding_bag"
    whole_call = True

    @classmethod
    def describe(cls, name: str, module: nn.Module) -> LayerShape | None:
        """See :class:`Entries`; the maximum is left to the fallback."""
        if not isinstance(module, nn.EmbeddingBag) or type(module).forward is not nn.EmbeddingBag.forward:
            return None
        if module.scale_grad_by_freq or module.max_norm is not None or module.mode == "max":
            return None
        return LayerShape(name, cls.kind, (module.num_embeddings, module.embedding_dim), False)

    @classmethod
    def batched(cls, module: nn.Module, x: Any, delta: Any, b: int) -> bool:
        """See :class:`Entries`: every sample has as many bags, one as a rule."""
        return len(x.outputs[0]) > 0 and len(x.outputs[0]) % b == 0

    @classmethod
    def strays(cls, module: nn.Module, x: Any, delta: Any, b: int, sample: int) -> bool:
        """See :class:`Entries`."""
        return super().strays(module, x, delta[0], b, sample)

    @classmethod
    def moments(cls, layer: LayerShape, module: nn.Module, x: Any, delta: Any) -> Moments:
        """See :class:`Entries`: rows are how often an id occurs, columns Σ (w δ_d)²."""
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
        there = torch.ones_like(ids) if module.padding_idx is None else (ids != module.padding_idx).long()
        filled = torch.zeros(bags, dtype=torch.long, device=ids.device).index_add_(0, bag, there)
        d = d / filled.clamp(min=1)[bag, None].to(d.dtype)
    return ids, d, counts
