"""Cross-source identification: whether the rows that influence a held-out text come from its source.

One causal language model of bytes (two layers) is trained on passages of 128 characters of seven sources: AG News's
four topics, Shakespeare, and, shipping with Python, the standard library's code and pydoc's topics. Queries are held-
out passages. For each query the 1, 5 and 10 highest rows; the share of them that is of the query's source, mean over
queries and seeds of masks. Influence at the default damping, as scores and as cosines (normalize="cosine"), from 1024
numbers a row or as near as it comes; plain gradient dot products; beside them BM25 on words, TF-IDF, and the cosine
of mean hidden states of the model itself. Without --data the sources are Python's two.

Run: python tools/experiments/sources.py [--data DIR] [--folder sources-output] [--seeds 3] [--quick].
"""

from __future__ import annotations

import pydoc_data.topics
import sys
import sysconfig
import tempfile
import warnings
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from baselines import state_cosine, tfidf
from common import Result, Runs, arguments, report
from retraining import compressor
from tasks import Encoder, batches, news
from torch import Tensor, nn

import ooc_influence as ooc
from ooc_influence.corpus import bm25
from ooc_influence.evaluate.retrain import seeded

LENGTH, BYTES = 128, 128
TOPS = (1, 5, 10)
GRADIENTS = ("uniform", "importance", "reduced", "Gaussian", "GraSS", "LoGra")
BASELINES = ("BM25", "TF-IDF", "hidden states", "random")
COLUMNS = ("compressor", "ranked by", "top 1", "top 5", "top 10", "seeds")


class Corpus(NamedTuple):
    """Passages, (n,) and (q,), with the numbers of their sources."""

    train: list[str]
    train_source: np.ndarray
    query: list[str]
    query_source: np.ndarray


def passages(text: str) -> list[str]:
    """Cut a text into passages of 129 characters; what is not ASCII becomes a question mark."""
    plain = text.encode("ascii", "replace").decode()
    return [plain[at : at + LENGTH + 1] for at in range(0, len(plain) - LENGTH, LENGTH + 1)]


@cache
def corpus(data: Path | None, n: int, q: int) -> Corpus:
    library = Path(sysconfig.get_path("stdlib"))
    code = "\n".join(path.read_text("utf-8") for path in sorted(library.glob("*.py"))[:80])
    sources = [passages(code), passages("\n".join(pydoc_data.topics.topics.values()))]
    if data is not None:
        sources.append(passages((data / "shakespeare/input.txt").read_text("utf-8")))
        texts, labels = news(data)
        for topic in range(4):
            own = [text for text, label in zip(texts, labels, strict=True) if label == topic]
            sources.append([part for text in own for part in passages(text)[:1]])
    generator = np.random.default_rng(0)
    train, query, places = [], [], ([], [])
    for number, held in enumerate(sources):
        order = generator.permutation(len(held))[: n + q].tolist()
        train += [held[place] for place in order[:n]]
        query += [held[place] for place in order[n:]]
        places[0].extend([number] * min(n, len(order)))
        places[1].extend([number] * (len(order) - n))
    return Corpus(train, np.array(places[0]), query, np.array(places[1]))


def tokens(texts: list[str]) -> tuple[Tensor, Tensor]:
    codes = torch.tensor([list(text.encode("ascii")) for text in texts])
    return codes[:, :-1], codes[:, 1:]


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return ooc.token_cross_entropy(model(batch[0]), batch[1])


def trained(folder: Path, data: Path | None, n: int, q: int, epochs: int) -> nn.Module:
    """Return the model, kept in the folder."""
    path = folder / f"model-{n}-{epochs}-{data is None}.pt"
    with seeded(0):
        model = Encoder(BYTES, LENGTH, BYTES, layers=2, causal=True)
        if path.exists():
            model.load_state_dict(torch.load(path, weights_only=True))
            return model.eval()
        inputs, targets = tokens(corpus(data, n, q).train)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for _ in range(epochs):
            for chosen in torch.randperm(len(inputs)).split(32):
                optimizer.zero_grad()
                loss(model, (inputs[chosen], targets[chosen])).mean().backward()
                optimizer.step()
    torch.save(model.state_dict(), path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)
    return model.eval()


def shares(scores: np.ndarray, texts: Corpus) -> list[float]:
    """Return the share of rows of the right source among the highest 1, 5, 10."""
    order = np.argsort(-scores, axis=1, kind="stable")[:, : max(TOPS)]
    right = texts.train_source[order] == texts.query_source[:, None]
    return [float(right[:, :top].mean()) for top in TOPS]


def influence(way: str, seed: int, folder: Path, data: Path | None, n: int, q: int, epochs: int) -> Result:
    texts, model = corpus(data, n, q), trained(folder, data, n, q, epochs)
    p = sum(values.numel() for values in model.parameters())
    layers = sum(isinstance(module, nn.Linear) for module in model.modules())
    with tempfile.TemporaryDirectory() as place, warnings.catch_warnings():
        warnings.simplefilter("ignore", ooc.OocInfluenceWarning)
        chosen = compressor(way, p, len(texts.train), seed, layers)
        train = ooc.extract_gradients(model, loss, batches(tokens(texts.train)), f"{place}/train", compressor=chosen)
        query = ooc.extract_gradients(model, loss, batches(tokens(texts.query)), f"{place}/query", like=train)
        fit = ooc.fit_fisher(train)
        found = {
            "influence": ooc.influence_scores(query, train, curvature=fit),
            "influence, cosine": ooc.influence_scores(query, train, curvature=fit, normalize="cosine"),
            "dot products": ooc.influence_scores(query, train, curvature=False),
            "gradient cosine": ooc.influence_scores(query, train, curvature=False, normalize="cosine"),
        }
        return {name: shares(scores.compute(), texts) for name, scores in found.items()}


def baseline(way: str, seed: int, folder: Path, data: Path | None, n: int, q: int, epochs: int) -> Result:
    texts = corpus(data, n, q)

    def hidden() -> np.ndarray:
        model = trained(folder, data, n, q, epochs)
        with torch.no_grad():
            return state_cosine(*(model.states(tokens(part)[0]).mean(1) for part in (texts.query, texts.train)))

    ways: dict[str, Callable[[], np.ndarray]] = {
        "BM25": lambda: bm25(texts.query, texts.train),
        "TF-IDF": lambda: tfidf(texts.query, texts.train),
        "hidden states": hidden,
        "random": lambda: np.random.default_rng(seed).random((len(texts.query), len(texts.train))),
    }
    return {way: shares(ways[way](), texts)}


def lines(results: list[Result]) -> Iterator[Result]:
    groups: dict[tuple[str, str], list[list[float]]] = {}
    for result in results:
        compressed = result["run"].split(" / ")[0]
        for way, values in result.items():
            if way != "run":
                groups.setdefault(("" if compressed in BASELINES else compressed, way), []).append(values)
    for names, values in groups.items():
        yield dict(zip(COLUMNS, [*names, *np.mean(values, axis=0).tolist(), len(values)], strict=True))


def main() -> None:
    parser = arguments(__doc__, "sources-output")
    parser.add_argument("--data", type=Path, help="a folder with agnews/ and shakespeare/")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    size = (60, 10, 2) if options.quick else (300, 30, 12)
    runs = Runs(options.folder)
    for way in (*GRADIENTS, *BASELINES):
        for seed in range(1 if options.quick or way in BASELINES else options.seeds):
            call = influence if way in GRADIENTS else baseline
            settings = {"size": size, "data": options.data is not None}
            runs.add(f"{way} / {seed}", settings, partial(call, way, seed, options.folder, options.data, *size))
    if options.status:
        print("\n".join(runs.missing()) or "nothing is missing")
        return
    print(f"{len(runs.missing())} runs to do", file=sys.stderr)
    found = list(lines(runs.finish()))

    def plot(axes: Any) -> None:
        names = [f"{one['compressor']} {one['ranked by']}".strip() for one in found]
        axes.barh(names, [one["top 5"] for one in found])
        axes.set(xlabel="share of the top 5 from the query's source")
        axes.tick_params(axis="y", labelsize=6)

    report("sources", options.folder, found, COLUMNS, plot)


if __name__ == "__main__":
    main()
