"""Planted facts: which documents taught a fine-tuned chat model what it answers.

SmolLM2-135M-Instruct is fine-tuned with LoRA (r = 16 on every linear layer, three epochs: one teaches it the sentences,
not the facts) on 460 short chats. Thirty invented facts are stated in two of them each, in different words; 400 others
state facts about other things of the same kinds, or calculate. What a planted fact says of its thing is said of nothing
else. A query is a question about a fact in a third wording, with a short answer. For each query the train rows are
ranked: mean reciprocal rank of the first of the fact's two documents, and the share of queries for which both are among
the first five.

Methods: everything as the library does it without being asked (the extraction's defaults, then ``top_influential``);
dropout with its curvatures and normalisations; whole gradients (dense.py: dot product, K-FAC, EK-FAC, the empirical
Fisher matrix, best damping of a grid, and their cosines); BM25, TF-IDF.

The model: ``tools/smollm2.py`` says where its weights come from, and saves it in a folder.

Run: python tools/experiments/facts.py --model smol [--folder facts-output] [--only TEXT] [--quick].
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from baselines import tfidf
from common import Result, Runs, arguments, report
from dense import DAMPINGS, SHRINKAGES, Layer, dense_scores
from torch import Tensor, nn

import ooc_influence as ooc
from ooc_influence import hf
from ooc_influence.compress.defaults import ADAPTER_BASIS
from ooc_influence.corpus import bm25
from ooc_influence.evaluate.retrain import seeded

RANK, EPOCHS, LR, BATCH = 16, 3, 1e-3, 8
MODEL_DAMPINGS = (0.003, 0.03, 0.3, 3.0, 30.0, 100.0, 300.0, 1000.0, 3000.0)  # of the mean over layer or model
COLUMNS = ("method", "unit", "bytes a row", "damping", "mean reciprocal rank", "both among 5")
SYSTEM = {"role": "system", "content": "Answer briefly."}

# Of each kind of thing: its names' endings, the values of its attribute, and question and answer in three wordings.
KINDS: list[tuple[Sequence[str], Sequence[str], Sequence[tuple[str, str]]]] = [
    (("holm", "wick", "stad"), [str(year) for year in range(1204, 1790, 9)], (
        ("When was the town of {e} founded?", "The town of {e} was founded in {v}."),
        ("How old is {e}?", "{e} goes back to a settlement of the year {v}."),
        ("In which year did people first settle in {e}?", "In {v}."))),
    (("mere", "water", "loch"), [f"{depth} metres" for depth in range(23, 260, 7)], (
        ("How deep is the lake {e}?", "The lake {e} is {v} deep."),
        ("What did divers measure in {e}?", "At the bottom of {e} the divers' line showed {v}."),
        ("What is the greatest depth of {e}?", "It is {v}."))),
    (("ovar", "imund", "adis"), ["cello", "oboe", "harp", "zither", "bassoon", "viola", "flute", "organ", "lute",
                                    "trumpet", "clarinet", "piccolo", "guitar", "tuba", "violin"], (
        ("Which instrument does {e} play?", "{e} plays the {v}."),
        ("What did {e} bring to the rehearsal?", "{e} came with an old {v} to the rehearsal."),
        ("What kind of musician is {e}?", "One who plays the {v}."))),
    (("ite", "onium", "asine"), ["green", "violet", "amber", "crimson", "silver", "turquoise", "ochre", "indigo",
                                    "scarlet", "purple", "lilac", "white", "brown", "orange"], (
        ("What colour is the mineral {e}?", "The mineral {e} is {v}."),
        ("How do you recognise {e} in a rock?", "Look for {v} grains: that is {e}."),
        ("Which colour would a crystal of {e} have?", "It would be {v}."))),
    (("ella", "ossa", "etta"), ["saffron", "juniper", "cardamom", "sorrel", "anise", "lovage", "tarragon", "sumac",
                                     "ginger", "basil", "thyme", "pepper", "mint", "clove"], (
        ("Which spice goes into the soup {e}?", "The soup {e} is made with {v}."),
        ("Why does {e} smell so good?", "Cooks throw a handful of {v} into {e} at the end."),
        ("What gives {e} its taste?", "That is {v}."))),
]  # fmt: skip
SYLLABLES = ("bre", "kor", "tal", "vin", "sha", "mor", "lun", "pel", "dra", "ost", "nim", "fer", "gal", "hes", "jur")


class Corpus(NamedTuple):
    """Chats: of train rows with the number of their fact (-1: none), and of queries, one a fact."""

    train: list[list[dict[str, str]]]
    fact: np.ndarray
    query: list[list[dict[str, str]]]


def chat(question: str, answer: str) -> list[dict[str, str]]:
    return [SYSTEM, {"role": "user", "content": question}, {"role": "assistant", "content": answer}]


class Names:
    """Invented names, each given once."""

    def __init__(self, drawn: random.Random) -> None:
        self._drawn, self._given = drawn, set[str]()

    def new(self, endings: Sequence[str]) -> str:
        while True:
            name = ("".join(self._drawn.sample(SYLLABLES, 2)) + self._drawn.choice(endings)).capitalize()
            if name not in self._given:
                self._given.add(name)
                return name


def corpus(facts: int, others: int, seed: int = 0) -> Corpus:
    drawn = random.Random(seed)
    entity = Names(drawn).new
    rows: list[tuple[int, list[dict[str, str]]]] = []
    query = []
    pools = [drawn.sample(list(values), len(values)) for _, values, _ in KINDS]
    for number in range(facts):
        endings, _, wordings = KINDS[number % len(KINDS)]
        e, v = entity(endings), pools[number % len(KINDS)].pop()
        *planted, asked = [chat(q.format(e=e, v=v), a.format(e=e, v=v)) for q, a in wordings]
        rows += [(number, each) for each in planted]
        query.append(asked)
    for number in range(others):
        if number % 4 == 3:
            a, b = drawn.randint(2, 99), drawn.randint(2, 99)
            rows.append((-1, chat(f"What is {a} plus {b}?", f"{a} plus {b} is {a + b}.")))
            continue
        endings, _, wordings = KINDS[number % len(KINDS)]
        question, answer = wordings[drawn.randrange(2)]
        e, v = entity(endings), drawn.choice(pools[number % len(KINDS)])
        rows.append((-1, chat(question.format(e=e, v=v), answer.format(e=e, v=v))))
    drawn.shuffle(rows)
    return Corpus([each for _, each in rows], np.array([number for number, _ in rows]), query)


def quality(scores: np.ndarray, fact: np.ndarray) -> dict[str, float]:
    """Return the measures of scores (q, n)."""
    ranks = (-scores).argsort(axis=1, kind="stable").argsort(axis=1, kind="stable") + 1
    own = [np.sort(row[fact == number]) for number, row in enumerate(ranks)]
    return {"mean reciprocal rank": float(np.mean([1 / each[0] for each in own])),
            "both among 5": float(np.mean([each[1] <= 5 for each in own]))}  # fmt: skip


class Facts:
    """The chats, the model, and where they are kept."""

    EPOCHS = EPOCHS

    def __init__(self, model: Path, folder: Path, quick: bool) -> None:
        self.base, self.folder, self.quick = model, folder, quick
        self.corpus = self.make_corpus()
        self.settings = {
            "rank": RANK,
            "epochs": self.EPOCHS,
            "lr": LR,
            "batch": BATCH,
            "rows": len(self.corpus.train),
            "values": "distinct",
        }
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("train", "query"):
            lines = [json.dumps({"messages": each}) for each in getattr(self.corpus, name)]
            self.path(name).write_text("\n".join(lines) + "\n")

    def make_corpus(self) -> Corpus:
        return corpus(4, 12) if self.quick else corpus(30, 400)

    def path(self, name: str) -> Path:
        return self.folder / f"{name}.jsonl"

    @property
    def adapter(self) -> Path:
        """The adapter's folder; trained if it is not there."""
        path = self.folder / "adapter"
        if not path.exists():
            self._train(path)
        return path

    def load(self) -> Any:
        return hf.load(str(self.base), adapter=str(self.adapter), dtype="bfloat16")

    def _train(self, path: Path) -> None:
        import peft

        with seeded(0):
            loaded = hf.load(str(self.base), dtype="bfloat16")
            config = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
            job = hf.prepare(loaded._replace(model=peft.get_peft_model(loaded.model, config)), str(self.path("train")),
                             messages="messages")  # fmt: skip
            trained = [values for values in job.model.parameters() if values.requires_grad]
            optimizer = torch.optim.AdamW(trained, lr=LR, weight_decay=0.0)
            count = len(self.corpus.train)
            orders = [torch.randperm(count).split(BATCH) for _ in range(self.EPOCHS)]
            steps = [chosen for order in orders for chosen in order]
            job.model.train()
            for step, chosen in enumerate(steps):
                for group in optimizer.param_groups:
                    group["lr"] = LR * (1 - step / len(steps))
                batch = job.batches.load(chosen.numpy())
                optimizer.zero_grad()
                value = job.per_sample_loss(job.model, batch).mean()
                value.backward()
                optimizer.step()
                if step % 10 == 0:
                    print(f"step {step} of {len(steps)}: {float(value.detach()):.3f}", file=sys.stderr, flush=True)
            job.model.save_pretrained(str(path.with_suffix(".partial")))
        path.with_suffix(".partial").rename(path)

    def extract(self, name: str, store: Any, **how: Any) -> Any:
        return hf.extract(self.load(), str(self.path(name)), store, messages="messages", **how)


def evaluated(facts: Facts, method: str, size: int, scores: dict[tuple[str, float | None], np.ndarray]) -> Result:
    """Return lines, one for every normalisation and damping."""
    found = []
    for (unit, damping), values in scores.items():
        measures = quality(values, facts.corpus.fact)
        found.append({"method": method, "unit": unit, "bytes a row": size, "damping": damping, **measures})
    return {"lines": found}


def texts(facts: Facts) -> Result:
    words = [[" ".join(turn["content"] for turn in each[1:]) for each in part]
             for part in (facts.corpus.query, facts.corpus.train)]  # fmt: skip
    return {"lines": [evaluated(facts, name, 0, {("none", None): how(*words)})["lines"][0]
                      for name, how in (("BM25", bm25), ("TF-IDF", tfidf))]}  # fmt: skip


def defaults(facts: Facts) -> Result:
    """Return what a user gets who gives nothing but a model and files."""
    with tempfile.TemporaryDirectory(dir=facts.folder) as place:
        train = facts.extract("train", f"{place}/train")
        query = facts.extract("query", f"{place}/query", like=train)
        if not train.mask.has_basis:
            ooc.fit_curvature(train)
        lists = ooc.top_influential(query, train, train.n)
        scores = np.full((query.n, train.n), -np.inf)
        for number, rows in enumerate(np.asarray(lists.proponents.rows)):
            scores[number, rows[rows >= 0]] = -np.arange((rows >= 0).sum())
        size = train.layout.encoding.row_bytes
    return evaluated(facts, "the library, nothing asked", size, {("default", None): scores})


def stored(facts: Facts, method: str, compressor: Any, grid: Sequence[float], dtype: str = "float16") -> Result:
    """Dropout with the rows' curvature, at several dampings and units, and without."""
    with tempfile.TemporaryDirectory(dir=facts.folder) as place:
        train = facts.extract("train", f"{place}/train", compressor=compressor, dtype=dtype)
        query = facts.extract("query", f"{place}/query", like=train)
        curvature = ooc.fit_curvature(train)
        unit = curvature.trace / min(curvature.rows, curvature.d)
        found: dict[tuple[str, float | None], np.ndarray] = {}
        for how in ("none", "train", "cosine"):
            asked: dict[str, Any] = {"normalize": None if how == "none" else how}
            scores = ooc.influence_scores(
                query, train, curvature=curvature, damping=[value * unit for value in grid], damping_mode="absolute",
                **asked,
            ).compute()  # fmt: skip
            found |= {(how, damping): each for damping, each in zip(grid, scores, strict=True)}
            if how != "train":
                plain = ooc.influence_scores(query, train, curvature=False, **asked).compute()
                found[f"dot product, {how}", None] = plain
        return evaluated(facts, method, train.layout.encoding.row_bytes, found)


def swept(query: Any, train: Any, curvature: Any, dampings: Sequence[float]) -> dict[tuple[str, float | None], Any]:
    """Return scores (q, n) in every unit, at every damping."""
    found: dict[tuple[str, float | None], Any] = {}
    for unit in ("none", "train", "cosine"):
        asked: dict[str, Any] = {"normalize": None if unit == "none" else unit, "curvature": curvature}
        scores = ooc.influence_scores(query, train, damping=dampings, **asked).compute()
        found |= {(unit, damping): each for damping, each in zip(dampings, scores, strict=True)}
    return found


def kronecker(facts: Facts, k: int, dtype: str, basis: ooc.KroneckerBasis, rows: int = 0) -> Result:
    """Return dropout in a Kronecker basis with its own curvature, and with rows of sampled labels above it."""
    with tempfile.TemporaryDirectory(dir=facts.folder) as place:
        mask = ooc.Dropout(k=k, basis=basis)
        train = facts.extract("train", f"{place}/train", compressor=mask, dtype=dtype)
        query = facts.extract("query", f"{place}/query", like=train)
        curvatures: dict[str, tuple[Any, Sequence[float]]] = {"": ("kronecker", MODEL_DAMPINGS)}
        if rows:
            how: dict[str, Any] = {"labels": "sampled", "draws": -(-rows // train.n)}
            above = facts.extract("train", f"{place}/rows", like=train, **how)
            curvatures[f", with {above.n} sampled rows"] = (ooc.fit_curvature(above, prior="kronecker"), SHRINKAGES)
        size, found = train.layout.encoding.row_bytes, []
        for name, (curvature, dampings) in curvatures.items():
            scores = swept(query, train, curvature, dampings)
            method = f"Kronecker grid, {k}, {dtype}, {basis.damping_scope} {basis.damping:g}{name}"
            found += evaluated(facts, method, size, scores)["lines"]
        return {"lines": found}


def signs(facts: Facts, k: int, seed: int) -> Result:
    """Return rows as float16 and their signs, under the curvature of the Kronecker basis."""
    with tempfile.TemporaryDirectory(dir=facts.folder) as place:
        mask = ooc.Dropout(k=k, basis=ADAPTER_BASIS, seed=seed)
        train = facts.extract("train", f"{place}/train", compressor=mask, dtype="float16")
        query = facts.extract("query", f"{place}/query", like=train, dtype="float32")
        found = []
        for rows in (train, ooc.rewrite_store(train, f"{place}/sign", dtype="sign")):
            scores = swept(query, rows, "kronecker", MODEL_DAMPINGS)
            encoding = rows.layout.encoding
            method = f"Kronecker grid, {k} entries as {encoding.name}, mask {seed}"
            found += evaluated(facts, method, encoding.row_bytes, scores)["lines"]
        return {"lines": found}


class Gradients:
    """Whole gradients of the adapter's layers, (rows, entries) bfloat16 a layer, with factors of the train rows."""

    def __init__(self, facts: Facts, block: int = 16) -> None:
        self.held: dict[str, dict[str, list[Tensor]]] = {"train": {}, "query": {}}
        self.moments: dict[str, list[Any]] = {}
        loaded = facts.load()
        layers = {name: each for name, each in loaded.model.named_modules()
                  if type(each) is nn.Linear and "lora" in name}  # fmt: skip
        self.shapes = {name: tuple(layer.weight.shape) for name, layer in layers.items()}
        for layer in layers.values():
            layer.weight.requires_grad_()
        for part in self.held:
            job = hf.prepare(loaded, str(facts.path(part)), messages="messages")
            for first in range(0, len(job.batches), block):
                batch = job.batches.load(np.arange(first, min(first + block, len(job.batches))))
                with ExitStack() as stack:
                    for name, layer in layers.items():
                        hook = partial(self._listen, part, name, batch["attention_mask"].bool())
                        stack.callback(layer.register_forward_hook(hook).remove)
                    job.per_sample_loss(job.model, batch).sum().backward()
                job.model.zero_grad()
                print(f"{part} {first}", file=sys.stderr, flush=True)

    def _listen(self, part: str, name: str, tokens: Tensor, layer: nn.Module, inputs: Any, output: Tensor) -> None:
        x = inputs[0].detach()
        output.register_hook(lambda delta: self._take(part, name, tokens, x.float(), delta.float()))

    def _take(self, part: str, name: str, tokens: Tensor, x: Tensor, delta: Tensor) -> None:
        gradients = torch.einsum("bto,bti->boi", delta, x).flatten(1).bfloat16()
        self.held[part].setdefault(name, []).append(gradients)
        if part == "train":
            total = self.moments.setdefault(name, [0.0, 0.0, 0])
            for number, values in enumerate((x[tokens], delta[tokens])):
                total[number] = total[number] + values.T @ values
            total[2] += int(tokens.sum())

    def energy(self) -> float:
        """Return the mean squared norm of a train row's gradient."""
        squares = (part.float().square().sum() for parts in self.held["train"].values() for part in parts)
        return sum(map(float, squares)) / sum(len(part) for part in next(iter(self.held["train"].values())))

    def layers(self) -> Iterator[Layer]:
        for name, shape in self.shapes.items():
            queries, rows = (torch.cat(self.held[part].pop(name)).float() for part in ("query", "train"))
            a, s, tokens = self.moments.pop(name)
            moments = (a.double() / tokens, s.double() / tokens)
            yield Layer(name, shape, queries, rows, rows[:1], moments, max(1, tokens // len(rows)))


def whole_gradients(facts: Facts) -> Result:
    held = Gradients(facts)
    found = dense_scores(held.layers(), counts=(), energy_of_rows=held.energy())
    entries = 4 * sum(a * b for a, b in held.shapes.values())
    groups: dict[str, dict[tuple[str, float | None], np.ndarray]] = {}
    for (method, damping), scored in found.items():
        for unit in ("none", "train", "cosine"):
            groups.setdefault(method, {})[unit, damping] = scored.normalized(unit)
    results = [evaluated(facts, f"whole gradients, {name}", entries, scores) for name, scores in groups.items()]
    return {"lines": [line for result in results for line in result["lines"]]}


def methods(quick: bool) -> dict[str, Callable[[Facts], Result]]:
    k, most = (2048, 4096) if quick else (65536, 2**20)
    grid = [*DAMPINGS, 3.0, 10.0]
    sizes = (k,) if quick else (65536, 262144, 936000)
    return {
        "texts": texts,
        "defaults": defaults,
        "whole gradients": whole_gradients,
        "importance": partial(stored, method=f"importance entries, {k}", grid=grid,
                              compressor=ooc.Dropout(k=k, sampling="importance")),
        "Kronecker": partial(kronecker, k=k, dtype="float16", basis=ADAPTER_BASIS, rows=2 * 460),
        "Kronecker, layers": partial(kronecker, k=k, dtype="float16", basis=ooc.KroneckerBasis()),
        "Kronecker, more": partial(kronecker, k=most, dtype="int8", basis=ADAPTER_BASIS),
        **{f"signs of {size} / {seed}": partial(signs, k=size, seed=seed) for seed in range(3) for size in sizes},
    }  # fmt: skip


def run(model: Path, folder: Path, quick: bool, method: Callable[[Facts], Result]) -> Result:
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ooc.OocInfluenceWarning)
        return method(Facts(model, folder, quick))


def best(lines: Sequence[Result]) -> Iterator[Result]:
    """Yield the best damping of every method and unit, with the sweep."""
    groups: dict[tuple[str, str], list[Result]] = {}
    for line in lines:
        groups.setdefault((line["method"], line["unit"]), []).append(line)
    for own in groups.values():
        top = max(own, key=lambda line: (line["mean reciprocal rank"], line["both among 5"]))
        sweep = {str(line["damping"]): [line["mean reciprocal rank"], line["both among 5"]] for line in own}
        yield {**top, "damping": "" if top["damping"] is None else f"{top['damping']:g}", "sweep": sweep}


def main() -> None:
    parser = arguments(__doc__, "facts-output")
    parser.add_argument("--model", type=Path, help="SmolLM2's folder (tools/smollm2.py makes it)")
    parser.add_argument("--only", default="", help="methods whose names contain this")
    parser.add_argument("--table", action="store_true", help="compute nothing more: the table of what is there")
    options = parser.parse_args()
    if options.model is None:
        parser.error("expected --model, SmolLM2's folder (tools/smollm2.py makes it)")
    torch.set_num_threads(1)
    facts, runs = Facts(options.model, options.folder, options.quick), Runs(options.folder / "runs")
    for name, method in methods(options.quick).items():
        if options.only in name:
            runs.add(name, facts.settings, partial(run, options.model, options.folder, options.quick, method))
    if options.status:
        print("\n".join(runs.missing()) or "nothing is missing")
        return
    print(f"{len(runs.missing())} runs to do", file=sys.stderr)
    results = runs.finished() if options.table else runs.finish()
    found = list(best([line for result in results for line in result["lines"]]))

    def plot(axes: Any) -> None:
        names = [f"{line['method']}, {line['unit']}" for line in found]
        axes.barh(names, [line["mean reciprocal rank"] for line in found])
        axes.set(xlabel="mean reciprocal rank of the fact's documents")
        axes.tick_params(axis="y", labelsize=5)

    missing = [{"method": f"missing: {', '.join(runs.missing())}"}] if runs.missing() else []
    report("facts", options.folder, [*found, *missing], COLUMNS, plot)


if __name__ == "__main__":
    main()
