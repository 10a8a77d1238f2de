"""What a model family is: a small random model, a loss of each sample, and batches of several shapes.

A module of builders registers them with :func:`families_of`. The losses here are written without the package's.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.utils import _pytree as pytree

VOCABULARY = 31
CLASSES = 5
SHAPES = ((3, 7), (5, 5), (1, 6), (2, 8))  # samples and tokens of the batches; of one they are as many

Loss = Callable[[nn.Module, Any], Tensor]


class Lazy:
    """A library that is imported when something of it is needed: families are listed without it."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> Any:
        return getattr(importlib.import_module(self._name), name)


hf, peft = Lazy("transformers"), Lazy("peft")


def cut(batch: Any, sample: int) -> Any:
    """Return the batch of one sample: that part of every tensor."""
    return pytree.tree_map(lambda v: v[sample : sample + 1] if isinstance(v, Tensor) and v.dim() else v, batch)


def twins(batch: Any, sample: int) -> Any:
    """Return the batch of one sample twice, for models that PyTorch differentiates wrongly at one sample.

    The backward pass of batch norm in evaluation mode is wrong on CPU for one sample whose memory is not in the usual
    order of axes (PyTorch 2.13).
    """
    return pytree.tree_map(lambda v: v[[sample, sample]] if isinstance(v, Tensor) and v.dim() else v, batch)


@dataclass
class Case:
    """A model with its loss and batches.

    Attributes
    ----------
    model : nn.Module
        In evaluation mode.
    loss : callable (model, batch) -> (b,)
        The loss of each sample.
    batches : list
        Batches of several shapes.
    options : mapping
        Further arguments of ``extract_gradients``.
    cut : callable (batch, sample) -> batch
        The batch of one sample, or of that sample several times.
    """

    model: nn.Module
    loss: Loss
    batches: list[Any]
    options: Mapping[str, Any] = field(default_factory=dict)
    cut: Callable[[Any, int], Any] = cut


@dataclass(frozen=True)
class Family:
    """A named builder."""

    name: str
    field: str
    build: Callable[[], Case]

    def case(self) -> Case:
        """Return the family's model, the same at every call, with no parameter at a special value."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            case = self.build()
        case.model.eval()
        unsettle(case.model)
        return case


FAMILIES: dict[str, Family] = {}


def families_of(module: str) -> Callable[..., Any]:
    """Return what registers a field's builders under their names; as a decorator without a builder."""
    field = module.rpartition(".")[2]

    def family(name: str, build: Callable[[], Case] | None = None) -> Any:
        def register(builder: Callable[[], Case]) -> Callable[[], Case]:
            assert name not in FAMILIES, name
            FAMILIES[name] = Family(name, field, builder)
            return builder

        return register if build is None else register(build)

    return family


def unsettle(model: nn.Module) -> None:
    """Move all parameters, and statistics of batch norms, off the zeros and ones that they start at."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                size = 0.2 if parameter.dim() < 2 else 0.05
                parameter += size * torch.randn(parameter.shape, generator=generator).to(parameter)
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer += 0.2 * torch.randn(buffer.shape, generator=generator)
            elif name.endswith("running_var"):
                buffer *= 0.5 + torch.rand(buffer.shape, generator=generator)


def tokens(
    b: int, t: int, *, low: int = 3, high: int = VOCABULARY, seed: int = 0, padding: int = 1
) -> dict[str, Tensor]:
    """Return ids, mask and labels of b sequences padded on the right to t tokens; the first is t long."""
    generator = torch.Generator().manual_seed(100 * seed + 10 * b + t)
    ids = torch.randint(low, high, (b, t), generator=generator)
    lengths = torch.randint(max(2, t - 3), t + 1, (b,), generator=generator)
    lengths[0] = t
    mask = (torch.arange(t) < lengths[:, None]).long()
    ids = torch.where(mask == 1, ids, padding)
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.where(mask == 1, ids, -100)}


def token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean cross-entropy of each sequence over its labels."""
    losses = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=-100)
    return losses.sum(1) / (labels != -100).sum(1)


def causal_loss(model: nn.Module, batch: Any) -> Tensor:
    """Return the loss of each sequence's next tokens."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return token_loss(logits[:, -batch["labels"].shape[1] :][:, :-1], batch["labels"][:, 1:])


def masked_loss(model: nn.Module, batch: Any) -> Tensor:
    """Return the loss of each sequence's tokens at their places."""
    return token_loss(
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits, batch["labels"]
    )


def class_loss(model: nn.Module, batch: Any) -> Tensor:
    """Return the cross-entropy of each sample's class; the model is called with all but ``labels``."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    return F.cross_entropy(model(**inputs).logits, batch["labels"], reduction="none")


def feature_loss(model: nn.Module, batch: Any) -> Tensor:
    """Return a smooth loss of a model's last hidden states."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    hidden = model(**inputs).last_hidden_state.flatten(1)
    return torch.cos(hidden + torch.arange(hidden.shape[1])).mean(1)


def plain_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Return the cross-entropy of a model of torch's kind: one input, scores out."""
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def text_batches(**options: Any) -> list[dict[str, Tensor]]:
    """Return padded token batches of every shape."""
    return [tokens(b, t, **options) for b, t in SHAPES]


def labelled(batches: list[Any], classes: int = CLASSES) -> list[Any]:
    """Return the batches with a class for each sample as ``labels``."""
    found = []
    for number, batch in enumerate(batches):
        b = len(next(iter(batch.values())))
        generator = torch.Generator().manual_seed(number)
        found.append({**batch, "labels": torch.randint(0, classes, (b,), generator=generator)})
    return found


def vectors(*shape: int, sizes: tuple[int, ...] = (3, 5, 1), seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Return batches of normal values with classes."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(b, *shape, generator=generator), torch.randint(0, CLASSES, (b,), generator=generator))
        for b in sizes
    ]


def images(name: str = "pixel_values", *shape: int, sizes: tuple[int, ...] = (3, 5, 1)) -> list[dict[str, Tensor]]:
    """Return batches of images, or other values, under a name, with classes."""
    return [{name: x, "labels": y} for x, y in vectors(*(shape or (3, 32, 32)), sizes=sizes)]
