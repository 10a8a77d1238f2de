"""Collecting the rows of a training: what is refused, and the plan of the store, which no training notices."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Unpack

import numpy as np
import torch
from torch import nn

from ooc_influence.errors import InputError, MismatchError, StoreNotFoundError, UnsupportedModelError, listed
from ooc_influence.extract.averages import Averages
from ooc_influence.extract.collected_rows import CollectedRows
from ooc_influence.extract.collector import Collector
from ooc_influence.extract.extraction import Settings, adjusting, parse_device, plan_store
from ooc_influence.extract.layers import named_layers
from ooc_influence.extract.passes import ModelSetup
from ooc_influence.extract.pilot import Pilot
from ooc_influence.extract.ranks import Ranks
from ooc_influence.extract.sink import StorePlan
from ooc_influence.extract.taps import PerSampleLoss
from ooc_influence.options import CollectOptions, takes
from ooc_influence.store import GradientStore, PathLike


@takes(CollectOptions)
def collect(
    model: nn.Module, store: PathLike, per_sample_loss: PerSampleLoss | None = None, **options: Unpack[CollectOptions]
) -> Collector:
    """Return what collects compressed per-sample gradients of a model while it trains, into a store.

    Rows come from the backward passes that train the model. Parameters after any number of steps are those of a
    training without it, to the bit. A sample has a row for each step that it is in. Columns ``example`` and ``step``
    say which, so that ``group_influence(..., by="example")`` adds up those of a sample. With ``average=True`` it has
    one row, their average; the store is there once the context has ended.

    Parameters
    ----------
    model : torch.nn.Module
        The model, in training.
    store : path
        The store to write, or, in a training that was interrupted, to continue (:meth:`Collector.load_state_dict`).
    per_sample_loss : callable (model, batch) -> (b,) tensor, optional
        The loss of each sample, for a ``pilot``.
    **options : CollectOptions
        See :mod:`ooc_influence.options`.

    Returns
    -------
    Collector
        A context: the loop's steps are inside it.

    Raises
    ------
    InputError
        For a compressor that needs a pilot without data for one, or a compressor beside ``select``, whose queries have
        theirs; for averages of signs or not on a local disk; and for averages, or an optimiser's record, of a training
        in several processes.
    UnsupportedModelError
        For batch norms that train, which mix the samples of a batch, and ``FullyShardedDataParallel``.
    MismatchError
        If ``store`` holds rows of other layers or settings.

    Examples
    --------
    >>> with ooc.collect(model, "train.zarr", compressor=ooc.Dropout(k=4096), columns=["epoch"]) as collector:
    ...     for epoch, (ids, x, y) in batches:
    ...         with collector.step(ids, epoch=epoch):
    ...             loss = F.cross_entropy(model(x), y)
    ...             loss.backward()
    ...         optimizer.step()
    ...         optimizer.zero_grad()
    """
    if options["every"] < 1:
        raise InputError(f"expected every >= 1; received {options['every']}")
    model = _inner(model)
    _refuse(model)
    selector, ranks, device = options["select"], Ranks.current(), parse_device(model, None)
    _check_combination(options, ranks)
    averages = _averages(store, options)
    home = store if averages is None else averages.reference()  # what has the mask already, or will be made first
    like = None if selector is None else selector.store
    settings = replace(Settings.of(options), like=like, in_training=True)  # type: ignore[arg-type]
    pilot = None
    if per_sample_loss is not None and options["pilot"] is not None:
        if ranks is not None and any(hasattr(each, "full_tensor") for each in model.parameters()):
            raise UnsupportedModelError(
                "expected a model that is whole in each process, to run a pilot in one of them; received one with "
                "sharded parameters: use a compressor that needs no pilot, or DistributedDataParallel"
            )
        setup = ModelSetup(model, per_sample_loss, device, options["progress"], options["check_gradients"])
        pilot = Pilot(setup, options["pilot"], options["memory"])

    def make_plan() -> StorePlan:
        return adjusting(settings, lambda settings: plan_store(model, settings, home, pilot))

    with _same_draws():  # a training draws what it would without it
        plan = make_plan() if ranks is None or pilot is None else ranks.from_first(make_plan)
    plan.attributes["collected"] = {"every": options["every"], "loss": options["loss"]}
    if ranks is not None:
        plan.attributes["collected"]["processes"] = ranks.count
    return Collector(model, CollectedRows(store, plan, options, ranks, averages), options)


def _check_combination(options: CollectOptions, ranks: Ranks | None) -> None:
    """Refuse options that do not go together."""
    if ranks is not None and (options["optimizer"] is not None or options["average"]):
        asked = "average=True" if options["average"] else "optimizer="
        raise InputError(
            f"expected a training in one process for {asked}; received one in {ranks.count}: collect single rows "
            "without it, and average them afterwards (average_rows)"
        )
    if options["average"] and options["optimizer"] is not None:
        raise InputError(
            "expected single rows to record an optimiser with, whose effects differ from step to step; received "
            "average=True too: collect either"
        )


def _inner(model: nn.Module) -> nn.Module:
    """Return the model inside what DistributedDataParallel and torch.compile wrap it in."""
    while isinstance(model, nn.parallel.DistributedDataParallel) or hasattr(model, "_orig_mod"):
        inside = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model._orig_mod
        assert isinstance(inside, nn.Module)
        model = inside
    return model


@contextmanager
def _same_draws() -> Iterator[None]:
    """Leave the random numbers of PyTorch, NumPy and Python as they were, whatever a pilot's data draws."""
    of_python, of_numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)


def earlier_rows(store: PathLike, *, average: bool = False) -> int:
    """Return how many rows, or averages, there are of an earlier training."""
    try:
        return GradientStore.open(Averages(store).reference() if average else store).committed
    except StoreNotFoundError:
        return 0


def _averages(store: PathLike, options: CollectOptions) -> Averages | None:
    """Return where averages are made, if they are to be; refuse what cannot be averaged."""
    if not options["average"]:
        with suppress(StoreNotFoundError):
            if "averaged" in GradientStore.open(store).attrs:
                raise MismatchError(
                    f"expected single rows at {store}, or nothing; received averages: continue them with average=True, "
                    "or collect to another path"
                )
        return None
    if options["dtype"] == "sign":
        raise InputError(
            "expected averages of numbers; received dtype='sign': collect float16 rows, and rewrite the averages as "
            "signs (rewrite_store)"
        )
    return Averages(store)


def _refuse(model: nn.Module) -> None:
    """Refuse models whose samples have no gradients of their own, or that free their weights while they train."""
    modules = named_layers(model)
    mixing = [
        name for name, each in modules.items() if each.training and isinstance(each, nn.modules.batchnorm._BatchNorm)
    ]
    if mixing:
        raise UnsupportedModelError(
            "expected layers that compute each sample by itself; received batch norms in training mode "
            f"({listed(mixing, 3)}): a sample has no gradient of its own there. Freeze their statistics (.eval()), use "
            "another norm, or extract rows from checkpoints (extract_gradients)"
        )
    if any(type(each).__name__ == "FullyShardedDataParallel" for each in model.modules()):
        raise UnsupportedModelError(
            "expected a model sharded with torch.distributed.fsdp.fully_shard; received FullyShardedDataParallel: wrap "
            "it with fully_shard, or extract rows from checkpoints (extract_gradients)"
        )
