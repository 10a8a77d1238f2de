"""Self-influence: every train row's score on itself, which is its squared norm in the curvature's inverse."""

from __future__ import annotations

from typing import Unpack

import numpy as np
import numpy.typing as npt

from ooc_influence.influence.checkpoints import Marks, Stores
from ooc_influence.influence.request import ScoreRequest
from ooc_influence.influence.tiles import (
    Part,
    ScoreParts,
    ScoreTask,
    absent_rows,
    make_engine,
    row_blocks,
    row_shares,
    squared_norms,
)
from ooc_influence.memory import MemoryBudget
from ooc_influence.options import SelfInfluenceOptions, takes
from ooc_influence.parallel import Stripe, check_workers, slots_per_process, worker_memory
from ooc_influence.progress import Progress, tick


@takes(SelfInfluenceOptions)
def self_influence(train: Stores, **options: Unpack[SelfInfluenceOptions]) -> npt.NDArray[np.float32]:
    """Return g_iᵀ (F + λI)⁻¹ g_i for every train row; without a curvature (False) the squared norm ‖g_i‖².

    Rows that the rest of the data does not support (wrong labels, outliers) have large values. With z = Vᵀg it is
    Σ_j z_j² / (e_j + λ): one GEMM a block, whatever the number of λ.

    Parameters
    ----------
    train : GradientStore or path, or a list of them
        (n, k); a list for several checkpoints, whose values are averaged.
    **options : SelfInfluenceOptions
        See :mod:`ooc_influence.options`.

    Returns
    -------
    (n,) float32, or (L, n) for a list of dampings
        Not negative; NaN for dropped rows, and rows that no checkpoint saw.

    Raises
    ------
    CurvatureNotFoundError, StaleCurvatureError, SingularFisherError, MemoryBudgetError
        As for :func:`influence_scores`.
    StoreExistsError, StoreBusyError
        As for :func:`top_influential`.
    """
    return self_scores(ScoreRequest.open(None, train, options), options)


def self_scores(scoring: ScoreRequest, options: SelfInfluenceOptions) -> npt.NDArray[np.float32]:
    """Return what :func:`self_influence` does, of a request without queries; ``options`` are complete."""
    slots = check_workers(options["workers"])
    model = scoring.memory(slots_per_process(slots)).self_influence()
    block_rows = MemoryBudget.of(worker_memory(options["memory"])).plan(model)
    work = scoring.work(block_rows, normalized=True)
    parts = ScoreParts(options["resume"], scoring.digest(kind="self-influence"))
    values = np.empty((scoring.lambdas, scoring.n), np.float32)

    def put(stripe: Stripe, part: Part) -> None:
        values[:, stripe.start : stripe.stop] = part["values"]

    with parts.claimed(), Progress("self-influence", scoring.n, options["progress"]) as bar:
        parts.run("values", _self_stripe, work, bar, scoring.seen, slots=slots, on_result=put)
    result: npt.NDArray[np.float32] = scoring.squeeze(values)
    return result


def _self_stripe(stripe: Stripe, key: str, work: ScoreTask, seen: Marks | None) -> Part:
    out = np.empty((work.lambdas, stripe.stop - stripe.start), np.float32)
    with make_engine(work.device) as engine:
        for blocks in row_blocks(engine, stripe, work):
            start, stop = blocks[0].start, blocks[0].stop
            part = out[:, start - stripe.start : stop - stripe.start]
            part[:] = 0
            shares = row_shares(work, seen, start, stop)
            for number, block in enumerate(blocks):
                squares = squared_norms(engine, work, number, block)
                part += squares / len(blocks) if shares is None else squares * shares[number]
            absent = absent_rows(blocks, seen)
            if absent is not None:
                part[:, absent] = np.nan
            tick(key, stop - start)
    return {"values": out}
