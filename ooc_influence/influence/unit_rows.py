"""Train rows divided by their norms, so that plain inner products with queries are scores in a unit."""

from __future__ import annotations

from collections.abc import Iterator

from ooc_influence.influence.request import ScoreRequest
from ooc_influence.influence.tiles import make_engine, row_blocks, row_weights
from ooc_influence.parallel import Stripe
from ooc_influence.store import Block


def rows_in_unit(scoring: ScoreRequest, block_rows: int) -> Iterator[Block]:
    """Yield all train rows of a request for one checkpoint and λ, block by block, as scores in its unit take them.

    That is times 1/√(gᵀ (F + λI)⁻¹ g), where the request has a unit, and 0 for a row without gradient; dropped rows are
    among them. The next block overwrites the last.
    """
    work = scoring.work(block_rows)
    with make_engine(work.device) as engine:
        for (block,) in row_blocks(engine, Stripe(0, scoring.n), work):
            weights = row_weights(engine, work, None, 0, block)
            if weights is not None:
                block.gradients[...] *= weights[0, :, None]
            yield block
