"""The pilot of a training that a Trainer runs: its own training data, and the loss of a language model."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ooc_influence.errors import InputError
from ooc_influence.extract import BudgetBatches, PerSampleLoss
from ooc_influence.hf.losses import CausalLoss


def training_pilot(trainer: Any, ids: str, loss: PerSampleLoss | None) -> tuple[PerSampleLoss, BudgetBatches | None]:
    """Return a loss of single samples, and batches of a Trainer's training data as its collator makes them.

    Parameters
    ----------
    trainer : transformers.Trainer
        The Trainer.
    ids : str
        The batches' entry with the ids of samples, which is left out.
    loss : callable (model, batch) -> (b,) tensor or None
        The loss; default the mean cross-entropy over a sample's targets, of a language model.

    Returns
    -------
    callable, BudgetBatches or None
        None for data whose samples have no numbers, such as a stream.
    """
    of_tokens, data = loss is None, trainer.train_dataset

    def collate(samples: list[Any]) -> Any:
        batch = {name: value for name, value in trainer.data_collator(samples).items() if name != ids}
        labels = batch.get("labels")
        if of_tokens and (not isinstance(labels, Tensor) or labels.dim() != 2):
            raise InputError(
                "expected batches of a language model, with labels of tokens, for a pilot; received others: give the "
                "loss of single samples (per_sample_loss=)"
            )
        return batch

    if not hasattr(data, "__getitem__") or not hasattr(data, "__len__"):
        return loss or CausalLoss(), None
    return loss or CausalLoss(), BudgetBatches(data, collate, batch_size=trainer.args.per_device_train_batch_size)
