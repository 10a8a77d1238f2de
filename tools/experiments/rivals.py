"""Scores of other packages on the fine-tuned model of finetuned.py, in an environment of their own.

They want other versions than the project, so this script imports nothing of it: it reads the model and the rows that
``finetuned.py --hand-over`` wrote, and writes scores that ``finetuned.py`` puts in its table::

    python -m venv rivals
    rivals/bin/pip install torch==2.13.0 transformers accelerate kronfluence==1.0.1 bergson==2.5.1
    rivals/bin/pip install dattri-llm==0.1.0 dattri==0.3.0  # dattri: the random projections of dattri-LLM
    python tools/experiments/finetuned.py --data DIR --hand-over
    rivals/bin/python tools/experiments/rivals.py [--folder finetuned-output] [--only kronfluence]

Nothing that is there is computed again. Dampings are relative to each layer's mean eigenvalue, as kronfluence and
bergson have it by default. dattri-LLM's default is absolute, 0.001 on the eigenvalues of losses summed over tokens; the
table says "default" for it. All of it runs on a CPU.

    kronfluence  EK-FAC with factors from labels sampled from the model (its default) and from the dataset's
    bergson      EK-FAC with factors from the dataset's labels; TrackStar with 16 x 16 and 32 x 32 numbers a layer
                 (cosines, preconditioned)
    dattri-LLM   EK-FAC of stored gradients in factors, as it stores them by default; LoGra with 16 x 16, 32 x 32 and
                 64 x 64 numbers a layer, the curvature of the projected gradients EK-FAC's (as in its benchmark) or
                 the dense Fisher matrix of each layer
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

DAMPINGS = (0.003, 0.01, 0.03, 0.1, 0.3)
PACKAGE_DEFAULT = -1.0  # in place of a damping: the package's own default
Floats = np.ndarray[Any, np.dtype[np.floating[Any]]]
Integers = np.ndarray[Any, np.dtype[np.integer[Any]]]


class Handed:
    """The model's folder and the rows, (n, 65) and (q, 65) tokens."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with np.load(folder / "handed-over/rows.npz") as held:
            self.train, self.query = held["train"], held["query"]

    def model(self) -> Any:
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(self.folder / "handed-over/model", dtype=torch.float32).eval()

    def names(self) -> list[str]:
        modules = self.model().named_modules()
        return [name for name, each in modules if type(each) is torch.nn.Linear and "layers" in name]


def save(
    path: Path, method: str, stored: str, size: int, dampings: Sequence[float], default: int, scores: Sequence[Floats],
    normalized: str = "none",
) -> None:  # fmt: skip
    """Write (q, n) scores, one a damping, as ``finetuned.py`` reads them."""
    facts = {"method": method, "stored": stored, "row_bytes": size, "dampings": list(dampings), "default": default}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial.npz")
    held = np.stack(scores).astype(np.float32)
    np.savez(partial, facts=np.array(json.dumps(facts)), **{"none": held, normalized: held})
    partial.replace(path)


def token_loss(model: Any, tokens: torch.Tensor, sample: bool = False) -> torch.Tensor:
    """Return the sum over samples of the mean loss of their tokens, or of labels drawn from the model."""
    logits = model(input_ids=tokens[:, :-1]).logits
    targets = tokens[:, 1:]
    if sample:
        chances = torch.softmax(logits.detach(), -1)
        targets = torch.multinomial(chances.flatten(0, 1), 1).view(targets.shape)
    each = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return each.view(targets.shape).mean(1).sum()


def kronfluence(handed: Handed, path: Path, empirical: bool) -> None:
    import kronfluence.factor.config as constants
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments
    from kronfluence.task import Task

    class Loss(Task):
        def compute_train_loss(self, batch: Any, model: Any, sample: bool = False) -> torch.Tensor:
            return token_loss(model, batch[0], sample)

        def compute_measurement(self, batch: Any, model: Any) -> torch.Tensor:
            return token_loss(model, batch[0])

        def get_influence_tracked_modules(self) -> list[str]:
            return handed.names()

    torch.manual_seed(0)
    task = Loss()
    model = prepare_model(handed.model(), task)
    kind = "dataset" if empirical else "sampled"
    analyzer = Analyzer(f"ekfac-{kind}", model, task, cpu=True, output_dir=str(handed.folder / "kronfluence"))
    train, query = (torch.utils.data.TensorDataset(torch.from_numpy(part)) for part in (handed.train, handed.query))
    factors = FactorArguments(strategy="ekfac", use_empirical_fisher=empirical)
    analyzer.fit_all_factors("factors", train, per_device_batch_size=64, factor_args=factors)
    scores = []
    for damping in DAMPINGS:
        constants.HEURISTIC_DAMPING_SCALE = damping
        analyzer.compute_pairwise_scores(
            f"scores-{damping}", "factors", query, train, per_device_query_batch_size=64,
            per_device_train_batch_size=64, score_args=ScoreArguments(damping_factor=None),
        )  # fmt: skip
        scores.append(analyzer.load_pairwise_scores(f"scores-{damping}")["all_modules"].numpy())
    method = f"kronfluence EK-FAC, factors from {kind} labels"
    save(path, method, "nothing", 0, DAMPINGS, DAMPINGS.index(0.1), scores)


def bergson_settings(handed: Handed, path: Path, part: str, **more: Any) -> dict[str, Any]:
    """Return what bergson's pipelines are given, and write their data sets."""
    from bergson.config.config import DataConfig
    from datasets import Dataset

    work = path.with_suffix("")
    work.mkdir(parents=True, exist_ok=True)
    for name in ("train", "query"):
        if not (work / name).exists():
            Dataset.from_dict({"input_ids": getattr(handed, name).tolist()}).save_to_disk(str(work / name))
    return {
        "run_path": str(work / part), "model": str(handed.folder / "handed-over/model"), "precision": "fp32",
        "data": DataConfig(dataset=str(work / "train")), "loss_reduction": "mean", "modules": handed.names(),
        "overwrite": True, **more,
    }  # fmt: skip


def bergson_scores(folder: Path) -> Floats:
    from bergson.data import load_scores

    return np.asarray(load_scores(folder)[:], np.float64).T


def trackstar(handed: Handed, path: Path, side: int) -> None:
    from bergson.cli.trackstar import trackstar as pipeline
    from bergson.config.config import (
        InversionConfig,
        PreprocessConfig,
        QuerySetConfig,
        TrackstarConfig,
        TrackstarIndexConfig,
    )

    dampings, scores = (0.01, 0.1), []
    for damping in dampings:
        settings = bergson_settings(handed, path, f"run-{damping}", projection_dim=side, projection_seed=0)
        prepared = PreprocessConfig(unit_normalize=True, inversion_cfg=InversionConfig(damping_factor=damping))
        query = QuerySetConfig(dataset=str(path.with_suffix("") / "query"))
        pipeline(TrackstarIndexConfig(**settings), TrackstarConfig(query=query, preprocess_cfg=prepared))
        scores.append(bergson_scores(path.with_suffix("") / f"run-{damping}/scores"))
    size = 4 * side * side * len(handed.names())
    save(path, f"bergson TrackStar {side} x {side}", "float32", size, dampings, 1, scores, "cosine")


def bergson_ekfac(handed: Handed, path: Path) -> None:
    from bergson.config.config import (
        HessianConfig,
        HessianPipelineConfig,
        IndexConfig,
        InversionConfig,
        PreprocessConfig,
        QuerySetConfig,
        ScoreConfig,
    )
    from bergson.hessians.pipeline import hessian_pipeline

    work, scores = path.with_suffix(""), []
    shutil.rmtree(work, ignore_errors=True)
    settings = bergson_settings(handed, path, "run")
    hessian = HessianConfig(method="kfac", ev_correction=True, use_dataset_labels=True)
    query = QuerySetConfig(dataset=str(work / "query"))
    for damping in DAMPINGS:
        for part in ("kfac_query", "scores"):  # the pipeline resumes after the factors, which no damping enters
            shutil.rmtree(work / "run" / part, ignore_errors=True)
        pipeline = HessianPipelineConfig(
            query=query, inversion_cfg=InversionConfig(damping_factor=damping), resume=True
        )
        hessian_pipeline(IndexConfig(**settings), hessian, ScoreConfig(), PreprocessConfig(), pipeline)
        scores.append(bergson_scores(work / "run/scores"))
    method = "bergson EK-FAC, factors from dataset labels"
    save(path, method, "nothing", 0, DAMPINGS, DAMPINGS.index(0.1), scores)


class Rows(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Rows of tokens as dattri-LLM takes them."""

    def __init__(self, tokens: Integers) -> None:
        self.tokens = torch.from_numpy(tokens)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"tokens": self.tokens[index]}

    def digests(self) -> list[str]:
        """Return what dattri-LLM knows the rows by: digests of the model's input."""
        from dattri_llm.utils import hash_sample

        return [hash_sample({"input_ids": row[:-1]}) for row in self.tokens]


def dattri_llm(handed: Handed, path: Path, side: int | None = None, dense: bool = False) -> None:
    """Store gradients, whole or projected to ``side`` x ``side`` numbers a layer, and score from the store."""
    from dattri_llm import AttributionArguments, AttributionTask, EKFACAttributor, HookManagerConfig

    def summed(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return token_loss(model, batch["tokens"]) * (batch["tokens"].shape[1] - 1)

    projection = {"style": "logra", "proj_dim": side, "proj_type": "rademacher", "proj_max_batch_size": 32}
    hooks = HookManagerConfig(
        hook_types=dict.fromkeys(handed.names(), "linear_io"),
        projection_kwargs={"__default__": projection} if side else None,
        capture_style="materialized" if side else "factorized",
    )
    work = path.with_suffix("")
    shutil.rmtree(work, ignore_errors=True)
    settings = AttributionArguments(str(work), per_device_train_batch_size=16, per_device_eval_batch_size=16,
                                    use_cpu=True, dataloader_pin_memory=False)  # fmt: skip
    attributor = EKFACAttributor(settings, task=AttributionTask(summed, handed.model()))
    train, query = Rows(handed.train), Rows(handed.query)
    [stores] = attributor.cache(train, query, hook_config=hooks, covariances_at_capture=not dense)
    files = [each for each in Path(stores[0]).rglob("*") if each.is_file() and "covariances" not in each.name]
    size = sum(each.stat().st_size for each in files) // len(train)
    dampings, scores = (*DAMPINGS, PACKAGE_DEFAULT), []
    for damping in dampings:
        relative = {} if damping == PACKAGE_DEFAULT else {"damping": damping, "relative_damping": True}
        scored = attributor.attribute_from_cache(
            *stores, fisher_dir=str(work / "fit"), covariances_at_capture=not dense, **relative
        )
        scores.append(scored.query(train.digests(), query.digests()).numpy().T)
    curvature = "dense Fisher" if dense else "EK-FAC"
    method = f"dattri-LLM LoGra, {curvature}, {side} x {side}" if side else f"dattri-LLM {curvature}"
    save(path, method, "float32", size, dampings, len(DAMPINGS), scores)
    shutil.rmtree(work)


METHODS: dict[str, Callable[[Handed, Path], None]] = {
    "kronfluence-dataset": lambda handed, path: kronfluence(handed, path, True),
    "bergson-trackstar-16": lambda handed, path: trackstar(handed, path, 16),
    "bergson-trackstar-32": lambda handed, path: trackstar(handed, path, 32),
    "bergson-ekfac": bergson_ekfac,
    "dattri-llm-ekfac": dattri_llm,
    **{f"dattri-llm-logra-{side}-ekfac": partial(dattri_llm, side=side) for side in (16, 32, 64)},
    **{f"dattri-llm-logra-{side}-dense": partial(dattri_llm, side=side, dense=True) for side in (16, 32, 64)},
    "kronfluence-sampled": lambda handed, path: kronfluence(handed, path, False),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("finetuned-output"))
    parser.add_argument("--only", default="", help="methods whose names contain this")
    parser.add_argument("--here", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name, make in METHODS.items():
        path = options.folder / "rivals" / f"{name}.npz"
        if options.only in name and not path.exists():
            if options.here:
                make(Handed(options.folder), path)
                continue
            print(f"{name}: running", file=sys.stderr)
            command = [sys.executable, __file__, "--folder", str(options.folder), "--only", name, "--here", "yes"]
            subprocess.run(command, check=False)


if __name__ == "__main__":
    main()
