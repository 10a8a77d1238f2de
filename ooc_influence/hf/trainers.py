"""What the batches of trainers are: whose samples they hold, and by what the samples' own losses are multiplied.

A Trainer's loss is of a whole batch. These readers say, for those of transformers and TRL, how it is put together:

- of language models (``Trainer``, TRL's ``SFTTrainer``): Σ_i t_i ℓ_i / T, with t_i the targets of sample i, ℓ_i its
  mean loss over them and T the targets of all batches that gradients are accumulated over, in all processes;
- of preferences (``DPOTrainer``, arXiv 2305.18290): the mean over pairs, each of which is two sequences;
- of completions (``GRPOTrainer``, arXiv 2402.03300, and its variants): Σ_i c_i ℓ_i, with ℓ_i the mean over a
  completion's tokens and c_i as the trainer's ``loss_type`` has it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from ooc_influence.errors import InputError
from ooc_influence.hf.pretokenised import IGNORED


@dataclass(frozen=True)
class TrainedBatch:
    """A batch that a trainer trains on.

    Attributes
    ----------
    inputs : any
        What its training step is given.
    ids : list
        Of the samples, (b,).
    weights : (b,) tensor or None
        By what the samples' losses are multiplied; None for a mean.
    scale : float
        By what all of them are.
    sequences : (m,) list of int or None
        The sample that each sequence of the model's batch is of, where there are several of a sample.
    """

    inputs: Any
    ids: Any
    weights: Tensor | None
    scale: float
    sequences: list[int] | None = None


class TrainerReader(ABC):
    """Reads the batches of a kind of trainer; ``ids`` is the name of the entry with the samples' ids."""

    loss_kind: str | None = None

    def __init__(self, trainer: Any, ids: str) -> None:
        self.trainer, self._ids = trainer, ids

    @abstractmethod
    def read(self, inputs: Any, items: Any) -> TrainedBatch:
        """Return what a batch is; ``items`` are the targets that the trainer has counted, if it has."""

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Change what the trainer has to be changed in for its batches to be read."""
        yield

    def check(self) -> None:
        """Refuse settings by which a sample has no loss of its own."""
        config = getattr(self.trainer.accelerator.unwrap_model(self.trainer.model), "config", None)
        routed = getattr(config, "output_router_logits", False) or getattr(self.trainer, "aux_loss_enabled", False)
        if routed:
            raise InputError(
                "expected a loss that is a sum over samples; received one with the load balancing of a mixture of "
                "experts, which mixes them: set output_router_logits=False (router_aux_loss_coef=0 in TRL)"
            )

    def factor(self, *, scaled: bool) -> float:
        """Return by what a trainer multiplies a batch's loss: 1/accumulation unless it is scaled, and fp16's scale."""
        scaler = self.trainer.accelerator.scaler
        factor = 1.0 if scaler is None else float(scaler.get_scale())
        return factor if scaled else factor / getattr(self.trainer, "current_gradient_accumulation_steps", 1)

    def take_ids(self, inputs: dict[str, Any]) -> Any:
        """Remove the ids from a batch, and return them."""
        ids = inputs.pop(self._ids, None)
        if ids is None:
            raise InputError(
                f"expected the ids of samples as {self._ids!r} in every batch; received {', '.join(inputs)}: keep the "
                "column (remove_unused_columns=False), and have the data collator pass it on"
            )
        return ids

    def check_sequences(self, inputs: dict[str, Any], expected: int, what: str) -> None:
        """Refuse batches whose model has another number of sequences than samples."""
        sequences = inputs.get("input_ids", inputs.get("labels"))
        if isinstance(sequences, Tensor) and sequences.dim() == 2 and len(sequences) != expected:
            raise InputError(
                f"expected {what} of each of {expected} samples; received {len(sequences)} of them in all: train "
                "without packing and padding_free, which put several samples into one sequence"
            )


_UNSHIFTED = ("ForMaskedLMLoss", "ForTokenClassification")  # losses of transformers at the labels' own positions


class TokenReader(TrainerReader):
    """Of language models; other losses are taken to be means over their samples."""

    def __init__(self, trainer: Any, ids: str) -> None:
        super().__init__(trainer, ids)
        model = trainer.accelerator.unwrap_model(trainer.model)
        loss = getattr(getattr(model, "loss_function", None), "__name__", "")
        self._first = 0 if loss in _UNSHIFTED else 1  # the first label that is a target
        causal = loss == "ForCausalLMLoss" or getattr(trainer, "_loss_shifts_labels", False)
        self.loss_kind = "token_cross_entropy_mean" if causal else None

    @override
    def read(self, inputs: dict[str, Any], items: Any) -> TrainedBatch:
        trainer, ids = self.trainer, self.take_ids(inputs)
        self.check_sequences(inputs, len(ids), "a sequence")
        kept = getattr(trainer, "loss_is_scaled_for_ga", None)
        scaled = (trainer.model_accepts_loss_kwargs and items is not None) or trainer.compute_loss_func is not None
        factor = self.factor(scaled=scaled if kept is None else kept)
        labels = inputs.get("labels")
        if not isinstance(labels, Tensor) or labels.dim() != 2 or labels.is_floating_point():
            return TrainedBatch(inputs, ids, None, factor)
        targets = (labels[:, self._first :] != IGNORED).sum(1).float()
        total = targets.sum() if items is None else torch.as_tensor(items, dtype=torch.float32)
        if items is not None and trainer.args.average_tokens_across_devices:
            factor *= trainer.accelerator.num_processes  # which average their gradients
        return TrainedBatch(inputs, ids, targets.clamp(min=1) / total.clamp(min=1).to(targets.device), factor)


class PairReader(TrainerReader):
    """Of pairs: the chosen sequences of a batch, then the rejected ones."""

    loss_kind = "preference"
    _MIXING = ("aot", "aot_unpaired", "sft")

    @override
    def check(self) -> None:
        super().check()
        mixing = [each for each in self.trainer.loss_types if each in self._MIXING]
        if mixing:
            raise InputError(
                f"expected a DPO loss that is a mean over pairs; received {', '.join(mixing)}, which mixes pairs: use "
                "another loss_type, such as 'sigmoid'"
            )

    @override
    def read(self, inputs: dict[str, Any], items: Any) -> TrainedBatch:
        ids = self.take_ids(inputs)
        self.check_sequences(inputs, 2 * len(ids), "a chosen and a rejected sequence")
        return TrainedBatch(inputs, ids, None, self.factor(scaled=False), [*range(len(ids))] * 2)


class CompletionReader(TrainerReader):
    """Of completions that the trainer generates, and shuffles, in its training step."""

    loss_kind = "policy_gradient_mean"

    @override
    def check(self) -> None:
        super().check()
        trainer = self.trainer
        if getattr(trainer, "_entropy_bonus_enabled", False):
            raise InputError(
                "expected a loss that is a sum over completions; received one with an entropy bonus, a mean over all "
                "tokens of a batch: set entropy_coef=0"
            )
        if trainer.loss_type not in _SHARES:
            raise InputError(
                f"expected loss_type {', '.join(sorted(_SHARES))} to collect from; received {trainer.loss_type!r}"
            )

    @contextmanager
    @override
    def reading(self) -> Iterator[None]:
        """Have completions keep the ids of their prompts, and training steps take the batches that were read."""
        trainer = self.trainer
        generate, prepare = trainer._generate_and_score_completions, trainer._prepare_inputs

        def with_ids(prompts: list[dict[str, Any]]) -> dict[str, Any]:
            ids = [each.get(self._ids) for each in prompts]
            if any(each is None for each in ids):
                raise InputError(
                    f"expected the ids of samples as {self._ids!r} in every prompt; received {', '.join(prompts[0])}: "
                    "keep the column (remove_unused_columns=False)"
                )
            made: dict[str, Any] = generate(prompts)
            if len(made["completion_ids"]) != len(ids):
                raise InputError(f"expected a completion of each of {len(ids)} prompts; received {len(made)}")
            return made | {self._ids: ids}

        def take_prepared(inputs: Any) -> Any:
            return inputs.batch if isinstance(inputs, _Prepared) else prepare(inputs)

        with (
            replaced(trainer, "_generate_and_score_completions", with_ids),
            replaced(trainer, "_prepare_inputs", take_prepared),
        ):
            yield

    @override
    def read(self, inputs: Any, items: Any) -> TrainedBatch:
        trainer = self.trainer
        trainer.model.train()  # as the training step does before it generates
        batch = dict(trainer._prepare_inputs(inputs))
        ids = batch.pop(self._ids)
        mask = batch["completion_mask"]
        counts = (mask if "tool_mask" not in batch else mask * batch["tool_mask"]).sum(1).float()
        shares = _SHARES[trainer.loss_type](trainer, counts.clamp(min=1), batch)
        return TrainedBatch(_Prepared(batch), ids, shares, self.factor(scaled=True))


@dataclass(frozen=True)
class _Prepared:
    """A batch of completions that was prepared before the training step."""

    batch: dict[str, Any]


def _accumulated(trainer: Any) -> int:
    """Return the number of batches that gradients are accumulated over."""
    return int(trainer.current_gradient_accumulation_steps)


def _of_sequences(trainer: Any, counts: Tensor, _: Any) -> Tensor:
    return torch.ones_like(counts) / (len(counts) * _accumulated(trainer))


def _of_summed_sequences(trainer: Any, counts: Tensor, _: Any) -> Tensor:
    return counts / (len(counts) * _accumulated(trainer))


def _of_batch_tokens(trainer: Any, counts: Tensor, batch: dict[str, Any]) -> Tensor:
    mask = batch["completion_mask"] * batch.get("tool_mask", 1)
    tokens: Tensor = mask.sum().clamp(min=1)
    return counts / (tokens * _accumulated(trainer))


def _of_longest(trainer: Any, counts: Tensor, _: Any) -> Tensor:
    return counts / (len(counts) * int(trainer.max_completion_length) * _accumulated(trainer))


def _of_all_tokens(trainer: Any, counts: Tensor, batch: dict[str, Any]) -> Tensor:
    tokens: Tensor = batch["num_items_in_batch"].clamp(min=1)  # of as many batches as were generated at once
    batches = _accumulated(trainer) / trainer.args.steps_per_generation
    return counts / (tokens / int(trainer.accelerator.num_processes) * float(batches))


# by loss_type: what a completion's mean over its own tokens is multiplied by, (b,), of the (b,) counts of these
_SHARES: dict[str, Callable[[Any, Tensor, dict[str, Any]], Tensor]] = {
    "grpo": _of_sequences, "sapo": _of_sequences, "luspo": _of_summed_sequences, "bnpo": _of_batch_tokens,
    "dr_grpo": _of_longest, "cispo": _of_all_tokens, "dapo": _of_all_tokens, "vespo": _of_all_tokens,
}  # fmt: skip
_READERS: dict[str, type[Any]] = {"SFTTrainer": TokenReader, "DPOTrainer": PairReader, "GRPOTrainer": CompletionReader}


@contextmanager
def replaced(trainer: Any, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """Replace a method of one trainer meanwhile."""
    previous = vars(trainer).get(name)
    setattr(trainer, name, function)
    try:
        yield
    finally:
        if previous is None:
            delattr(trainer, name)
        else:
            setattr(trainer, name, previous)


def reader_of(trainer: Any, ids: str) -> TrainerReader:
    """Return the reader of a trainer's batches.

    Raises
    ------
    InputError
        For a trainer of TRL whose losses are not known.
    """
    of_trl = [each.__name__ for each in type(trainer).__mro__ if each.__module__.split(".")[0] == "trl"]
    readable = [name for name in of_trl if name in _READERS]
    if of_trl and not readable:
        raise InputError(
            f"expected a Trainer, or {', '.join(_READERS)} of TRL, to collect from; received {of_trl[0]}: collect in a "
            "loop of your own (collect), or extract rows from its checkpoints (extract_gradients)"
        )
    return _READERS[readable[0]](trainer, ids) if readable else TokenReader(trainer, ids)


def unhooked_head(model: nn.Module) -> list[str]:
    """Return the names of a model's output layer, and of those that share its weight, if TRL computes it by itself.

    Its trainers compute log-probabilities from the layer's weight, tile by tile, without calling the layer.
    """
    fused = any("fused_lm_head" in _argument_names(each) for each in model.modules())
    head = getattr(model, "get_output_embeddings", lambda: None)() if fused else None
    weight = getattr(head, "weight", None)
    if weight is None or not weight.requires_grad:
        return []
    return [name for name, each in model.named_modules() if getattr(each, "weight", None) is weight]


def _argument_names(module: nn.Module) -> tuple[str, ...]:
    forward = vars(module).get("forward")
    code = getattr(getattr(forward, "__func__", forward), "__code__", None)
    return () if code is None else code.co_varnames
