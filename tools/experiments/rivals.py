"""Scores of other packages on the fine-tuned model of finetuned.py, in an environment of their own.

They want other versions than the project, so this script imports nothing of it: it reads the model and the rows that
``finetuned.py --hand-over`` wrote, and writes scores that ``finetuned.py`` puts in its table::

    python -m venv rivals && rivals/bin/pip install torch==2.13.0 transformers kronfluence bergson
    python tools/experiments/finetuned.py --data DIR --hand-over
    rivals/bin/python tools/experiments/rivals.py [--folder finetuned-output] [--only kronfluence]

Nothing that is there is computed again. Dampings are relative to each layer's mean eigenvalue, as the packages have it.

    kronfluence  EK-FAC with factors from labels sampled from the model (its default) and from the dataset's
    bergson      EK-FAC; TrackStar with 16 x 16 and 32 x 32 numbers a layer (cosines, preconditioned)
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

DAMPINGS = (0.003, 0.01, 0.03, 0.1, 0.3)
Floats = np.ndarray[Any, np.dtype[np.floating[Any]]]


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


def token_loss(model: Any, tokens: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor:
    """Return the sum over samples of the mean loss of their tokens."""
    logits = model(input_ids=tokens[:, :-1]).logits
    if targets is None:
        targets = tokens[:, 1:]
    each = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return each.view(targets.shape).mean(1).sum()


def kronfluence(handed: Handed, path: Path, empirical: bool) -> None:
    import kronfluence.factor.config as constants
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments
    from kronfluence.task import Task

    class Loss(Task):
        def compute_train_loss(self, batch: Any, model: Any, sample: bool = False) -> torch.Tensor:
            if not sample:
                return token_loss(model, batch[0])
            with torch.no_grad():
                chances = torch.softmax(model(input_ids=batch[0][:, :-1]).logits, -1)
                drawn = torch.multinomial(chances.flatten(0, 1), 1).view(len(batch[0]), -1)
            return token_loss(model, batch[0], drawn)

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
    dampings, scores = DAMPINGS if empirical else DAMPINGS[-2:], []
    for damping in dampings:
        constants.HEURISTIC_DAMPING_SCALE = damping
        analyzer.compute_pairwise_scores(
            f"scores-{damping}", "factors", query, train, per_device_query_batch_size=64,
            per_device_train_batch_size=64, score_args=ScoreArguments(damping_factor=None),
        )  # fmt: skip
        scores.append(analyzer.load_pairwise_scores(f"scores-{damping}")["all_modules"].numpy())
    method = f"kronfluence EK-FAC, factors from {kind} labels"
    save(path, method, "nothing", 0, dampings, dampings.index(0.1), scores)


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

    settings = bergson_settings(handed, path, "run-0.1")
    hessian = HessianConfig(method="kfac", ev_correction=True, use_dataset_labels=True)
    query = QuerySetConfig(dataset=str(path.with_suffix("") / "query"))
    pipeline = HessianPipelineConfig(query=query, inversion_cfg=InversionConfig(damping_factor=0.1))
    hessian_pipeline(IndexConfig(**settings), hessian, ScoreConfig(), PreprocessConfig(), pipeline)
    scores = [bergson_scores(path.with_suffix("") / "run-0.1/scores")]
    save(path, "bergson EK-FAC, factors from dataset labels", "nothing", 0, (0.1,), 0, scores)


METHODS: dict[str, Callable[[Handed, Path], None]] = {
    "kronfluence-dataset": lambda handed, path: kronfluence(handed, path, True),
    "bergson-trackstar-16": lambda handed, path: trackstar(handed, path, 16),
    "bergson-trackstar-32": lambda handed, path: trackstar(handed, path, 32),
    "bergson-ekfac": bergson_ekfac,
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
