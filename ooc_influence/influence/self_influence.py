"""Self-influence: score(i, i) = g_iᵀ (F + λI)⁻¹ g_i, how strongly a row speaks for itself.

Rows the rest of the data does not support (wrong labels, outliers) have large values. With z = Vᵀg it is
Σ_j z_j² / (e_j + λ): one GEMM a block.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ooc_influence.curvature import Curvature, DampingMode, resolve_curvature
from ooc_influence.influence.pair import open_store
from ooc_influence.memory import Need, block_limit, plan_block_rows
from ooc_influence.progress import Progress, tick
from ooc_influence.store import GradientStore, PathLike, read_blocks
from ooc_influence.stripes import Stripe, check_workers, cut_stripes, run_stripes, slots_per_process


def self_influence(
    train: GradientStore | PathLike,
    curvature: Curvature | PathLike | None = None,
    damping: float | None = None,
    damping_mode: DampingMode = "relative",
    *,
    workers: int | None = None,
    memory: int | str | None = None,
    progress: bool | None = None,
) -> npt.NDArray[np.float32]:
    """Return g_iᵀ (F + λI)⁻¹ g_i for every train row.

    Parameters
    ----------
    train : GradientStore or path
        (n, k).
    curvature, damping, damping_mode, workers, memory, progress
        As for :func:`influence_scores`.

    Returns
    -------
    (n,) float32
        Not negative; NaN for dropped rows.

    Raises
    ------
    CurvatureNotFoundError, StaleCurvatureError, SingularFisherError, MemoryBudgetError
        As for :func:`influence_scores`.
    """
    store = open_store(train)
    found = resolve_curvature(store, curvature)
    value = found.damping_value(damping, damping_mode)
    slots = check_workers(workers)
    k = store.k
    need = Need(
        stage=f"self-influence for k={k}",
        fixed=8 * k * k + 8 * store.n,  # V; the stripes' results and their concatenation
        per_worker=4 * k * k + store.reading_bytes,  # V in float32
        per_row=3 * 4 * k,
        max_rows=block_limit(k),
        advice="extract with a smaller k",
    )
    block_rows = plan_block_rows(need, memory, slots_per_process(slots))
    stripes = cut_stripes(0, store.n, block_rows, slots)
    with Progress("self-influence", store.n, progress) as bar:
        parts = run_stripes(_stripe, stripes, bar, store, block_rows, found, value, slots=slots)
    return np.concatenate(parts)


def _stripe(
    stripe: Stripe, key: str, store: GradientStore, block_rows: int, curvature: Curvature, value: float
) -> npt.NDArray[np.float32]:
    out = np.empty(stripe.stop - stripe.start, np.float32)
    for block in read_blocks(store, stripe.start, stripe.stop, block_rows):
        part = out[block.start - stripe.start : block.stop - stripe.start]
        part[:] = curvature.self_influence(block.gradients, [value])[0]
        if block.dropped is not None:
            part[block.dropped] = np.nan
        tick(key, block.stop - block.start)
    return out
