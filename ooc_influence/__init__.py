"""Training-data attribution at corpus scale: out-of-core influence functions over memory-mapped gradient stores."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ooc_influence._version import __version__

if TYPE_CHECKING:
    from ooc_influence.compress import (
        Dropout,
        Eigenbasis,
        Gaussian,
        Grass,
        Identity,
        KroneckerBasis,
        LoGra,
        Pca,
        Rademacher,
        RowBudget,
        Sjlt,
        reduce_store,
        rewrite_store,
    )
    from ooc_influence.curvature import (
        Curvature,
        fit_curvature,
        fit_fisher,
        fit_gram,
        fit_kronecker,
        fit_trajectory,
        gram_matrix,
    )
    from ooc_influence.errors import OocInfluenceError, OocInfluenceWarning
    from ooc_influence.extract import (
        AdamMetric,
        Batching,
        BudgetBatches,
        Recipe,
        Split,
        collect,
        cross_entropy,
        extract_gradients,
        extract_shards,
        init_store,
        token_cross_entropy,
    )
    from ooc_influence.influence import (
        Selection,
        TopInfluential,
        group_influence,
        influence_scores,
        module_influence,
        select_rows,
        self_influence,
        sketch_store,
        top_influential,
    )
    from ooc_influence.influence.online import online_selection
    from ooc_influence.influence.rerank import rerank
    from ooc_influence.influence.tokens import TokenInfluence, token_influence
    from ooc_influence.interchange import export_rows, export_scores, import_rows
    from ooc_influence.planning import plan
    from ooc_influence.store import (
        ChunkCache,
        GradientStore,
        Storage,
        average_rows,
        compact_store,
        merge_stores,
        upgrade_store,
    )
    from ooc_influence.tracing import Trace, trace

# Loaded on first use: opening a store and scoring never import torch.
_EXPORTS = {
    "compress": [
        "Dropout", "Eigenbasis", "Gaussian", "Grass", "Identity", "KroneckerBasis", "LoGra", "Pca",
        "Rademacher", "RowBudget", "Sjlt", "reduce_store", "rewrite_store",
    ],
    "curvature": [
        "Curvature", "fit_curvature", "fit_fisher", "fit_gram", "fit_kronecker", "fit_trajectory", "gram_matrix",
    ],
    "errors": ["OocInfluenceError", "OocInfluenceWarning"],
    "extract": [
        "AdamMetric", "Batching", "BudgetBatches", "Recipe", "Split", "collect", "cross_entropy", "extract_gradients",
        "extract_shards", "init_store", "token_cross_entropy",
    ],
    "influence": [
        "Selection", "TopInfluential", "group_influence", "influence_scores", "module_influence", "select_rows",
        "self_influence", "sketch_store", "top_influential",
    ],
    "influence.online": ["online_selection"],  # apart from the package, as the next ones: they need torch
    "influence.rerank": ["rerank"],
    "influence.tokens": ["TokenInfluence", "token_influence"],
    "interchange": ["export_rows", "export_scores", "import_rows"],
    "planning": ["plan"],
    "store": [
        "ChunkCache", "GradientStore", "Storage", "average_rows", "compact_store", "merge_stores", "upgrade_store",
    ],
    "tracing": ["Trace", "trace"],
}  # fmt: skip
_MODULES = {"evaluate": "evaluate", "hf": "hf", "plot": "report.plot", "report": "report"}
_MODULE_OF = {name: module for module, names in _EXPORTS.items() for name in names}

__all__ = [
    "AdamMetric", "Batching", "BudgetBatches", "ChunkCache", "Curvature", "Dropout", "Eigenbasis", "Gaussian",
    "GradientStore", "Grass", "Identity", "KroneckerBasis", "LoGra", "OocInfluenceError", "OocInfluenceWarning",
    "Pca", "Rademacher", "Recipe", "RowBudget", "Selection", "Sjlt", "Split", "Storage", "TokenInfluence",
    "TopInfluential", "Trace", "__version__", "average_rows", "collect", "compact_store", "cross_entropy",
    "export_rows", "export_scores", "extract_gradients", "extract_shards", "fit_curvature", "fit_fisher", "fit_gram",
    "fit_kronecker", "fit_trajectory", "gram_matrix", "group_influence", "import_rows", "influence_scores",
    "init_store", "merge_stores", "module_influence", "online_selection", "plan", "reduce_store", "rerank",
    "rewrite_store", "select_rows", "self_influence", "sketch_store", "token_cross_entropy", "token_influence",
    "top_influential", "trace", "upgrade_store",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"{__name__}.{_MODULES[name]}")
    module = _MODULE_OF.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{module}"), name)


def __dir__() -> list[str]:
    return sorted([*__all__, *_MODULES])
