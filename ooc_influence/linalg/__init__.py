"""BLAS, striped Dask tasks and eigendecompositions: what curvature and influence stand on."""

from ooc_influence.linalg.blas import GramAccumulator, blas_threads, cores
from ooc_influence.linalg.eigen import symmetric_eigen
from ooc_influence.linalg.stripes import Stripe, check_workers, cut_stripes, run_stripes, slots_per_process, tree_sum

__all__ = [
    "GramAccumulator", "Stripe", "blas_threads", "check_workers", "cores", "cut_stripes", "run_stripes",
    "slots_per_process", "symmetric_eigen", "tree_sum",
]  # fmt: skip
