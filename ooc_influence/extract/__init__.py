"""Extraction: the torch models' side. Taps on layers, sampled per-sample gradients, the loop that fills a store."""

from ooc_influence.extract.checkpoints import CheckpointSource, open_checkpoints, recorded_checkpoints
from ooc_influence.extract.collector import Collector, Step, collect, earlier_rows
from ooc_influence.extract.data import (
    Batches,
    Batching,
    BudgetBatches,
    RowChoice,
    batches_of_rows,
    count_rows,
    even_numbers,
    numbered_batches,
    to_device,
)
from ooc_influence.extract.direction import Derivatives, PartLosses, directional_derivatives, parameter_direction
from ooc_influence.extract.extraction import extract_gradients, init_store, parse_device, row_types
from ooc_influence.extract.factors import BasisPlan
from ooc_influence.extract.full_basis import (
    FullBasis,
    Samples,
    check_model,
    exact_scores,
    factors_path,
    keep_factors,
)
from ooc_influence.extract.losses import (
    LabelDraws,
    active_draws,
    binary_cross_entropy,
    cross_entropy,
    cross_entropy_at,
    sampled_labels,
    token_cross_entropy,
)
from ooc_influence.extract.metric import AdamMetric
from ooc_influence.extract.online import Selector
from ooc_influence.extract.passes import ModelSetup
from ooc_influence.extract.pilot import Pilot, part_of
from ooc_influence.extract.recipe import (
    Recipe,
    Split,
    by_path,
    call_function,
    choose_split,
    extract_shards,
    load_recipe,
    loaded,
    run_shards,
    running,
)
from ooc_influence.extract.selection import ModuleSelection
from ooc_influence.extract.speed import measure_speed
from ooc_influence.extract.taps import PerSampleLoss, tapped

__all__ = [
    "AdamMetric", "BasisPlan", "Batches", "Batching", "BudgetBatches", "CheckpointSource", "Collector",
    "Derivatives", "FullBasis", "LabelDraws", "ModelSetup", "ModuleSelection", "PartLosses", "PerSampleLoss",
    "Pilot", "Recipe", "RowChoice", "Samples", "Selector", "Split", "Step", "active_draws", "batches_of_rows",
    "binary_cross_entropy", "by_path", "call_function", "check_model", "choose_split", "collect", "count_rows",
    "cross_entropy", "cross_entropy_at", "directional_derivatives", "earlier_rows", "even_numbers", "exact_scores",
    "extract_gradients", "extract_shards", "factors_path", "init_store", "keep_factors", "load_recipe", "loaded",
    "measure_speed", "numbered_batches", "open_checkpoints", "parameter_direction", "parse_device", "part_of",
    "recorded_checkpoints", "row_types", "run_shards", "running", "sampled_labels", "tapped", "to_device",
    "token_cross_entropy",
]  # fmt: skip
