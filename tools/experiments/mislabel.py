"""Finding wrong labels: a tenth of them flipped, rows ranked by influence, by the loss, by the gradient's norm.

Data: scikit-learn's digits (1,797 images, a small MLP), and with --data DIR MNIST's test set (DIR/mnist/...: 6,000
images, an MLP and a CNN). Ranked by self-influence, and by influence on clean validation images (lowest first: rows
that raised their loss), at the default damping. AUC, average precision, and recall after checking 10, 20 and 30 % of
the rows; means over --seeds seeds of flips, model and mask. "exact" keeps every entry (digits' MLP only).

Run: python tools/experiments/mislabel.py [--data DIR] [--folder mislabel-output] [--seeds 3] [--quick].
"""

from __future__ import annotations

import gzip
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from common import Result, Runs, arguments, report
from torch import Tensor, nn

import ooc_influence as ooc
from ooc_influence.evaluate import auc, recall_at

FLIPPED, BATCH = 0.1, 64
COLUMNS = ("data", "compressor", "ranked by", "AUC", "average precision", "recall 10 %", "recall 20 %", "recall 30 %")


class Data(NamedTuple):
    """What one seed is about."""

    train: tuple[Tensor, Tensor]  # images, labels of which some are wrong
    validation: tuple[Tensor, Tensor]
    wrong: np.ndarray
    model: Callable[[], nn.Module]
    epochs: int


def digits(seed: int, quick: bool) -> Data:
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.tensor(data.data / 16, dtype=torch.float32)
    hidden = 32 if quick else 128

    def model() -> nn.Module:
        return nn.Sequential(nn.Linear(64, hidden), nn.ReLU(), nn.Linear(hidden, 64), nn.ReLU(), nn.Linear(64, 10))

    return split(images, torch.tensor(data.target), 400 if quick else 1437, 200, seed, model, 5 if quick else 20)


def mnist(folder: Path, kind: str) -> Callable[[int, bool], Data]:
    def load(seed: int, quick: bool) -> Data:
        raw = gzip.decompress((folder / "mnist/t10k-images-idx3-ubyte.gz").read_bytes())[16:]
        marks = gzip.decompress((folder / "mnist/t10k-labels-idx1-ubyte.gz").read_bytes())[8:]
        images = torch.tensor(np.frombuffer(raw, np.uint8).reshape(-1, 1, 28, 28) / 255, dtype=torch.float32)
        labels = torch.tensor(np.frombuffer(marks, np.uint8).astype(np.int64))
        mlp = lambda: nn.Sequential(nn.Flatten(), nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 10))  # noqa: E731
        cnn = lambda: nn.Sequential(  # noqa: E731
            nn.Conv2d(1, 8, 5, 2), nn.ReLU(), nn.Conv2d(8, 16, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(400, 10)
        )
        return split(
            images, labels, 400 if quick else 6000, 300, seed, mlp if kind == "MLP" else cnn, 3 if quick else 8
        )

    return load


def split(images: Tensor, labels: Tensor, n: int, held: int, seed: int, model: Any, epochs: int) -> Data:
    generator = np.random.default_rng(seed)
    order = generator.permutation(len(labels))
    rows, rest = order[:n], order[n : n + held]
    wrong = np.zeros(n, bool)
    wrong[generator.permutation(n)[: round(FLIPPED * n)]] = True
    given, flipped = labels[rows].clone(), torch.from_numpy(wrong)
    given[flipped] = (given[flipped] + torch.from_numpy(generator.integers(1, 10, int(wrong.sum())))) % 10
    return Data((images[rows], given), (images[rest], labels[rest]), wrong, model, epochs)


def train(data: Data, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = data.model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-2)
    images, labels = data.train
    for _ in range(data.epochs):
        for chosen in torch.randperm(len(labels)).split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(model(images[chosen]), labels[chosen]).backward()
            optimizer.step()
    return model.eval()


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return ooc.cross_entropy(model(batch[0]), batch[1])


def batches(part: tuple[Tensor, Tensor]) -> list[tuple[Tensor, Tensor]]:
    return list(zip(part[0].split(BATCH), part[1].split(BATCH), strict=True))


def rank(load: Callable[[int, bool], Data], seed: int, quick: bool, make: Callable[[int, int], Any] | None) -> Result:
    """Return the measures of one seed, by way of ranking."""
    data = load(seed, quick)
    model = train(data, seed)
    p = sum(values.numel() for values in model.parameters())
    compressor = ooc.Identity() if make is None else make(p, seed)
    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings():
        warnings.simplefilter("ignore", ooc.OocInfluenceWarning)
        store = ooc.extract_gradients(model, loss, batches(data.train), Path(name) / "train", compressor=compressor)
        if make is None:
            ways = {
                "loss": store.loss,
                "gradient norm": store.grad_norm,
                "random": np.random.default_rng(seed).random(store.n),
            }
        else:
            query = ooc.extract_gradients(model, loss, batches(data.validation), Path(name) / "query", like=store)
            ooc.fit_curvature(store)
            held = ooc.influence_scores(query, store).mean(0).compute()
            ways = {"self-influence": ooc.self_influence(store), "influence on validation": -held}
    return {way: measures(np.asarray(scores), data.wrong) for way, scores in ways.items()}


def measures(scores: np.ndarray, wrong: np.ndarray) -> list[float]:
    order = np.argsort(-scores, kind="stable")
    hits = wrong[order]
    precision = float((np.cumsum(hits) / np.arange(1, len(hits) + 1))[hits].mean())
    return [auc(scores, wrong), precision, *(recall_at(scores, wrong, share) for share in (0.1, 0.2, 0.3))]


def compressors(quick: bool) -> dict[str, Callable[[int, int], Any]]:
    k = 256 if quick else 4096
    return {
        f"importance {k}": lambda p, seed: ooc.Dropout(k=min(k, p), sampling="importance", seed=seed),
        f"uniform {k}": lambda p, seed: ooc.Dropout(k=min(k, p), seed=seed),
        f"Gaussian {k // 4}": lambda p, seed: ooc.Gaussian(k // 4, seed),
        f"SJLT {k}": lambda p, seed: ooc.Sjlt(min(k, p), seed),
    }


def lines(results: list[Result]) -> Iterator[Result]:
    groups: dict[tuple[str, str, str], list[list[float]]] = {}
    for result in results:
        data, compressor, _ = result["run"].split(" / ")
        for way, values in result.items():
            if way != "run":
                groups.setdefault((data, compressor, way), []).append(values)
    for names, values in groups.items():
        yield dict(zip(COLUMNS, [*names, *np.mean(values, axis=0).tolist()], strict=True))


def main() -> None:
    parser = arguments(__doc__, "mislabel-output")
    parser.add_argument("--data", type=Path, help="a folder with mnist/; default: the digits only")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    sets: dict[str, Callable[[int, bool], Data]] = {"digits, MLP": digits}
    if options.data:
        sets |= {f"MNIST, {kind}": mnist(options.data, kind) for kind in ("MLP", "CNN")}
    runs = Runs(options.folder)
    for name, load in sets.items():
        ways: dict[str, Callable[[int, int], Any] | None] = {"none": None, **compressors(options.quick)}
        if load is digits:
            ways["exact"] = lambda p, seed: ooc.Identity()
        for way, make in ways.items():
            for seed in range(1 if options.quick else options.seeds):
                settings = {"quick": options.quick, "seed": seed}
                runs.add(f"{name} / {way} / {seed}", settings,
                         lambda load=load, seed=seed, make=make: rank(load, seed, options.quick, make))  # fmt: skip
    if options.status:
        print("\n".join(runs.missing()) or "nothing is missing")
        return
    print(f"{len(runs.missing())} runs to do", file=sys.stderr)
    found = list(lines(runs.finish()))

    def plot(axes: Any) -> None:
        named = [f"{each['data']}: {each['ranked by']} ({each['compressor']})" for each in found]
        axes.barh(named, [each["AUC"] for each in found])
        axes.set(xlabel="AUC", xlim=(0.4, 1))
        axes.tick_params(labelsize=6)

    report("mislabel", options.folder, found, COLUMNS, plot)


if __name__ == "__main__":
    main()
