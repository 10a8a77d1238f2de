"""Whether `select` chooses better training data than a search for words (BM25) and than chance, at the same size.

Targets are of one source, and held out: 32 of them are given to `select`, and the loss is measured on others. As in
LESS, a model is first trained on a random twentieth of the candidates, four epochs; gradients are that model's, as a
user gets them who gives nothing but files. Then 10 % are chosen, and the model from before is trained on them.

    mixed           2800 candidates of seven sources in equal parts: AG News's four topics, speeches of Shakespeare,
                    definitions of the Free On-line Dictionary of Computing (without those it took from the Jargon File)
                    and of the Jargon File. A quarter of the documents are there four times, the copies starting up to
                    five words later, as in a crawl: 57 % of the rows. Targets: the Jargon File; Business
    news            2800 candidates of the four topics, without copies. Targets: Business
    mixed, SmolLM2  420 candidates made like those of "mixed"

The model is the Llama of finetuning.py, pretrained on the other half of AG News and trained in all weights for four
epochs on texts of up to 64 tokens; or SmolLM2-135M-Instruct (``facts.py --convert``) with LoRA in bfloat16, two epochs,
up to 32 tokens, whose gradients are of one model for all seeds.

Chosen by influence (the defaults of ``select_rows``), without repeats (``redundancy=0.5`` and 1; or, as if it were
known what is a copy of what, one row of each document), by scores that are not divided by norms, and by cosines of
gradients without a curvature; by the controls that ``write_selection`` writes, BM25 (also one of each document) and
random. A seed is one of the targets of both kinds, of the model that gradients are taken from, of the random
choice and of the training. Means over seeds with 95 % intervals (Student's t), of differences by seed.

Definitions: the Debian packages dict-foldoc and dict-jargon, of which /usr/share/dictd (--dictionaries) has the files.
Without --data the sources are Python's topics of help and its library's code.

Run: python tools/experiments/selection.py [--data DIR] [--model SMOLLM2] [--folder selection-output] [--only TEXT].
"""

from __future__ import annotations

import gzip
import json
import pydoc_data.topics
import re
import sys
import sysconfig
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from common import Result, Runs, arguments, report
from finetuning import FineTuning
from retraining import interval
from tasks import news

import ooc_influence as ooc
from ooc_influence import hf
from ooc_influence.evaluate.retrain import seeded
from ooc_influence.report import write_selection

COPIES, LATER = 4, 5
WARM_SHARE, WARM_EPOCHS = 0.05, 4
LEAST_WORDS = 12
RANK = 16  # of LoRA
ASKED: Mapping[str, dict[str, Any]] = {
    "influence": {},
    "influence, redundancy 0.5": {"redundancy": 0.5},
    "influence, redundancy 1": {"redundancy": 1.0},
    "influence, one of each document": {"unit": "name"},
    "influence, not normalised": {"normalize": "none"},
    "cosine of gradients": {"curvature": False},
}
CONTROLS = {"influence": {"random": "random", "BM25": "bm25"},
            "influence, one of each document": {"BM25, one of each document": "bm25"}}  # fmt: skip
CHOICES = ("none", "random", "BM25", "BM25, one of each document", *ASKED)
SUBTRACTED = ("random", "BM25", "BM25, one of each document", "influence")
COLUMNS = ("corpus", "targets", "chosen by", "loss on test targets", *(f"minus {name}" for name in SUBTRACTED),
           "documents", "right source", "seeds")  # fmt: skip
TOPICS = ("Business", "Sci/Tech", "Sports", "World")


class Document(NamedTuple):
    """A text; copies of one document have its name."""

    name: str
    source: str
    text: str


class Places(NamedTuple):
    """Folders: of the data, if any, of the dictionaries, of SmolLM2, and where everything is kept."""

    data: Path | None
    dictionaries: Path
    model: Path | None
    folder: Path


@dataclass(frozen=True)
class Setting:
    """A corpus, a model, and sizes for it.

    Attributes
    ----------
    length, rows : int
        Tokens of a text, and candidates of each source.
    given, tests, held : int
        Targets for `select`, those the loss is measured on, and the documents both are drawn from.
    warm : int
        Models that gradients are taken from: one for each seed, or one for all.
    copied : float
        The share of the documents that are there four times.
    sources : tuple of str
        Those that candidates are of; all where none is named.
    """

    name: str
    targets: tuple[str, ...]
    length: int
    rows: int
    given: int
    tests: int
    held: int
    epochs: int
    lr: float
    batch: int
    warm: int
    adapter: bool = False
    pretraining: int = 12_000
    copied: float = 0.25
    sources: tuple[str, ...] = ()

    @property
    def choices(self) -> list[str]:
        """The ways to choose that differ here."""
        return [name for name in CHOICES if self.copied or "one of each" not in name]


def settings(data: Path | None, model: Path | None, quick: bool) -> list[Setting]:
    if quick:
        targets = ("topics",) if data is None else ("Jargon",)
        return [Setting("mixed", targets, 64, 80, 8, 8, 24, 1, 1e-3, 16, 1, pretraining=320)]
    if data is None:
        return [Setting("Python", ("topics",), 64, 1000, 32, 96, 400, 4, 1e-3, 32, 5)]
    mixed = Setting("mixed", ("Jargon", "Business"), 64, 400, 32, 96, 400, 4, 1e-3, 32, 5)
    few = Setting("mixed, SmolLM2", ("Jargon", "Business"), 32, 60, 32, 40, 200, 2, 1e-3, 8, 1, adapter=True)
    news_only = replace(mixed, name="news", targets=("Business",), rows=700, copied=0.0, sources=TOPICS)
    return [mixed, news_only, *([few] if model is not None else [])]


class Base(FineTuning):
    """The small model and its tokens; without data, of texts that Python has."""

    @property
    def _headlines(self) -> str:
        return super()._headlines if self.data is not None else library()

    @property
    def _play(self) -> str:
        return super()._play if self.data is not None else "\n".join(pydoc_data.topics.topics.values())

    def save(self, path: Path) -> None:
        """Write it as transformers reads it."""
        from transformers import PreTrainedTokenizerFast

        partial_path = path.with_suffix(".partial")
        self.model().save_pretrained(partial_path)
        PreTrainedTokenizerFast(tokenizer_object=self.tokenizer._tokenizer).save_pretrained(partial_path)
        partial_path.rename(path)


def library() -> str:
    """Return code of Python's library."""
    places = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:40]
    return "\n".join(path.read_text("utf-8") for path in places)


def definitions(path: Path, source: str) -> Iterator[Document]:
    """Yield a dictionary's definitions: the first headword, and the text below the lines of headwords."""
    digits = {digit: number for number, digit in enumerate(
        "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/")}  # fmt: skip
    whole = gzip.decompress(path.with_suffix(".dict.dz").read_bytes())
    seen = set()
    for line in path.with_suffix(".index").read_text("utf-8").splitlines():
        name, *place = line.split("\t")
        start, length = (sum(digits[d] * 64**at for at, d in enumerate(reversed(each))) for each in place[:2])
        head, _, body = whole[start : start + length].decode("utf-8").strip().partition("\n\n")
        if start in seen or name.startswith("00-database") or "Jargon File" in body:
            continue
        seen.add(start)
        word = head.splitlines()[0].strip() if head else name
        yield Document(f"{source}: {word}", source, f"{word}: {plain(body)}")


def plain(text: str) -> str:
    """Return a text with blanks between words, ASCII quotation marks and no brackets of cross-references."""
    for there, here in (("“”", '"'), ("‘’", "'"), ("—–", "-"), ("{}", "")):
        text = re.sub(f"[{there}]", here, text)
    return re.sub(r"\s+", " ", text.encode("ascii", "ignore").decode()).strip()


@cache
def sources(data: Path | None, dictionaries: Path) -> dict[str, list[Document]]:
    """Return all documents of each source."""
    found: dict[str, list[Document]] = {}
    if data is None:
        for name, texts in (("topics", list(pydoc_data.topics.topics.values())), ("code", library().split("\n\n\n"))):
            parts = [part for text in texts for part in text.split("\n\n")]
            found[name] = [Document(f"{name} {at}", name, plain(part)) for at, part in enumerate(parts)]
    else:
        for name, text in enumerate(zip(*news(data, "test"), strict=True)):
            topic = TOPICS[text[1]]
            found.setdefault(topic, []).append(Document(f"news {name}", topic, plain(text[0])))
        speeches = (data / "shakespeare/input.txt").read_text("utf-8").split("\n\n")
        found["Shakespeare"] = [Document(f"speech {at}", "Shakespeare", text) for at, text in enumerate(speeches)]
        found["FOLDOC"] = list(definitions(dictionaries / "foldoc", "FOLDOC"))
        found["Jargon"] = list(definitions(dictionaries / "jargon", "Jargon"))
    return {name: [each for each in own if len(each.text.split()) >= LEAST_WORDS] for name, own in found.items()}


class Selecting:
    """Candidates and targets of a setting, its models, and where they are kept."""

    def __init__(self, setting: Setting, places: Places) -> None:
        self.setting, self._data, self._model = setting, places.data, places.model
        self.folder = places.folder / setting.name
        self.folder.mkdir(parents=True, exist_ok=True)
        there = sources(places.data, places.dictionaries)
        self._sources = {name: own for name, own in there.items() if not setting.sources or name in setting.sources}

    @property
    def base(self) -> Path:
        """The folder of the model that training starts from."""
        if self.setting.adapter:
            assert self._model is not None
            return self._model
        rows = self.setting.pretraining
        folder = self.folder.parent / f"pretrained-{rows}"
        path = folder / "base"
        if not path.exists():
            Base("base", 0, 0, 0, self._data, folder=folder, pretraining_rows=rows).save(path)
        return path

    @property
    def dtype(self) -> str:
        return "bfloat16" if self.setting.adapter else "float32"

    def _divided(self) -> tuple[list[Document], dict[str, list[Document]]]:
        """Return the candidates, and the documents held out of each source that targets are of."""
        tokenizer, generator = hf.load(str(self.base)).tokenizer, np.random.default_rng(0)

        def cut(text: str) -> str:
            places = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
            return text if len(places) <= self.setting.length else text[: places[self.setting.length - 1][1]]

        rows: list[Document] = []
        held: dict[str, list[Document]] = {}
        for source, documents in self._sources.items():
            order = [documents[place] for place in generator.permutation(len(documents)).tolist()]
            if source in self.setting.targets:
                held[source] = [each._replace(text=cut(each.text)) for each in order[: self.setting.held]]
                order = order[self.setting.held :]
            own: list[Document] = []
            for each in order:
                later = [0, *generator.integers(1, LATER + 1, COPIES - 1).tolist()]
                later = later if generator.random() < self.setting.copied else later[:1]
                own += [each._replace(text=cut(each.text.split(" ", words)[-1])) for words in later]
                if len(own) >= self.setting.rows:
                    break
            rows += own[: self.setting.rows]
        return [rows[place] for place in generator.permutation(len(rows)).tolist()], held

    def candidates(self) -> Path:
        """Return the file of the candidates; beside it those of held-out documents are written."""
        path = self.folder / "candidates.jsonl"
        if not path.exists():
            rows, held = self._divided()
            for name, documents in held.items():
                write(self.folder / f"held-{name}.jsonl", documents)
            write(path, rows)
        return path

    def targets(self, target: str, seed: int) -> tuple[list[Any], list[Any]]:
        """Return the targets for `select`, and those for the measurement."""
        self.candidates()
        held = read(self.folder / f"held-{target}.jsonl")
        order = np.random.default_rng(seed).permutation(len(held)).tolist()
        given, tests = self.setting.given, self.setting.tests
        return [held[at] for at in order[:given]], [held[at] for at in order[given : given + tests]]

    def train(self, rows: Sequence[Any], epochs: int, seed: int) -> Any:
        """Return the model trained on documents."""
        with seeded(seed):
            loaded = hf.load(str(self.base), dtype=self.dtype)
            if self.setting.adapter:
                import peft

                how: dict[str, Any] = {"r": RANK, "lora_alpha": 2 * RANK, "target_modules": "all-linear"}
                config = peft.LoraConfig(**how, task_type="CAUSAL_LM")
                loaded = loaded._replace(model=peft.get_peft_model(loaded.model, config))
            model = loaded.model.train()
            trained = [values for values in model.parameters() if values.requires_grad]
            optimizer = torch.optim.AdamW(trained, lr=self.setting.lr, weight_decay=0.0)
            with tempfile.TemporaryDirectory() as place:
                job = hf.prepare(loaded, write(Path(place) / "rows.jsonl", rows), text="text")
                orders = [torch.randperm(len(rows)).split(self.setting.batch) for _ in range(epochs)]
                steps = [chosen for order in orders for chosen in order]
                for step, chosen in enumerate(steps):
                    for group in optimizer.param_groups:
                        group["lr"] = self.setting.lr * (1 - step / len(steps))
                    optimizer.zero_grad()
                    job.per_sample_loss(model, job.batches.load(chosen.numpy())).mean().backward()
                    optimizer.step()
        model.eval()
        return loaded

    def loss(self, loaded: Any, rows: Sequence[Any]) -> float:
        """Return the mean loss of documents, each the mean over its tokens."""
        with tempfile.TemporaryDirectory() as place, torch.no_grad():
            job = hf.prepare(loaded, write(Path(place) / "rows.jsonl", rows), text="text")
            parts = np.array_split(np.arange(len(rows)), -(-len(rows) // 32))
            found = [job.per_sample_loss(loaded.model, job.batches.load(part)).double() for part in parts]
        return float(torch.cat(found).mean())

    def gradients(self, warm: int) -> tuple[Path, Path]:
        """Return the model trained on a random part, and the store of the candidates' gradients."""
        path, store = self.folder / f"warm-{warm}", self.folder / f"candidates-{warm}.zarr"
        if not path.exists():
            rows = read(self.candidates())
            part = np.random.default_rng(warm).permutation(len(rows))[: max(1, round(WARM_SHARE * len(rows)))]
            loaded = self.train([rows[at] for at in part.tolist()], WARM_EPOCHS, warm)
            loaded.model.save_pretrained(path.with_suffix(".partial"))
            loaded.tokenizer.save_pretrained(path.with_suffix(".partial"))
            path.with_suffix(".partial").rename(path)
        self._extract(path, self.candidates(), store)
        return path, store

    def _extract(self, model: Path, data: Path, store: Path, **how: Any) -> ooc.GradientStore:
        own = {"text": "text", "id": "number", "keep": ["source", "name"], "model_dtype": self.dtype}
        return hf.extract(str(model), str(data), store, **own, **how)

    def choice(self, name: str, target: str, seed: int) -> list[int]:
        """Return the numbers of the candidates chosen in a way, in the data's order; all ways are kept in one file."""
        path = self.folder / f"chosen-{target}-{seed}.json"
        found = json.loads(path.read_text()) if path.exists() else {}
        if name not in found:
            self._choose(target, seed, found)
            path.with_suffix(".partial").write_text(json.dumps(found))
            path.with_suffix(".partial").replace(path)
        return found[name]

    def _choose(self, target: str, seed: int, found: dict[str, list[int]]) -> None:
        """Add what is not among the choices."""
        model, store = self.gradients(seed % self.setting.warm)
        with tempfile.TemporaryDirectory(dir=self.folder) as place, ooc.GradientStore.open(store) as train:
            given, out = Path(place) / "targets.jsonl", Path(place) / "kept.jsonl"
            write(given, self.targets(target, seed)[0])
            query = self._extract(model, given, Path(place) / "targets.zarr", like=train)
            for name in (name for name in self.setting.choices if name in ASKED and name not in found):
                chosen = ooc.select_rows(query, train, round(train.n / 10), **ASKED[name])
                rows = {name: chosen.rows}
                if name in CONTROLS:
                    how: dict[str, Any] = {"data": self.candidates(), "query_data": given, "seed": seed}
                    controls = write_selection(chosen, query, train, out, **how).controls
                    rows |= {control: controls[kind].rows for control, kind in CONTROLS[name].items()}
                found |= {key: sorted(map(int, train.ids(own).tolist())) for key, own in rows.items()}

    def measured(self, target: str, choice: str, seed: int) -> Result:
        """Return the loss on test targets after training on a choice, and what was chosen."""
        tests = self.targets(target, seed)[1]
        if choice == "none":
            return {"loss": self.loss(hf.load(str(self.base), dtype=self.dtype), tests)}
        candidates = read(self.candidates())
        rows = [candidates[number] for number in self.choice(choice, target, seed)]
        loss = self.loss(self.train(rows, self.setting.epochs, 1000 + seed), tests)
        right = float(np.mean([row["source"] == target for row in rows]))
        return {"loss": loss, "documents": len({row["name"] for row in rows}), "rows": len(rows), "right": right}


def write(path: Path, documents: Sequence[Any]) -> str:
    """Write documents, or what was read of some, as lines of JSON."""
    lines = [each if isinstance(each, dict) else {"number": at, **each._asdict()} for at, each in enumerate(documents)]
    partial_path = path.with_suffix(".partial")
    partial_path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    partial_path.replace(path)
    return str(path)


def read(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def run(setting: Setting, places: Places, target: str, choice: str, seed: int) -> Result:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Selecting(setting, places).measured(target, choice, seed)


def lines(results: list[Result]) -> Iterator[Result]:
    """Yield a line for each corpus, kind of targets and choice."""
    groups: dict[tuple[str, str], dict[str, dict[int, Result]]] = {}
    for result in results:
        corpus, target, choice, seed = result["run"].split(" / ")
        groups.setdefault((corpus, target), {}).setdefault(choice, {})[int(seed)] = result
    for (corpus, target), held in groups.items():
        for choice in (name for name in CHOICES if name in held):
            own = held[choice]
            losses = np.array([each["loss"] for each in own.values()])
            line: Result = {"corpus": corpus, "targets": target, "chosen by": choice, "seeds": len(own)}
            line["loss on test targets"] = f"{losses.mean():.3f} ± {interval(losses):.3f}"
            line["losses"] = {seed: each["loss"] for seed, each in own.items()}
            for control in SUBTRACTED:
                both = sorted(own.keys() & held.get(control, {}).keys())
                if both and choice not in ("none", control):
                    gaps = np.array([own[seed]["loss"] - held[control][seed]["loss"] for seed in both])
                    line[f"minus {control}"] = f"{gaps.mean():+.3f} ± {interval(gaps):.3f}"
            if choice != "none":
                parts = (np.mean([each[what] for each in own.values()]) for what in ("documents", "rows", "right"))
                documents, rows, right = map(float, parts)
                line |= {"documents": f"{documents:.0f} of {rows:.0f}", "right source": f"{right:.0%}"}
            yield line


def main() -> None:
    parser = arguments(__doc__, "selection-output")
    parser.add_argument("--data", type=Path, help="a folder with agnews/ and shakespeare/")
    parser.add_argument("--dictionaries", type=Path, default=Path("/usr/share/dictd"), help="where the definitions are")
    parser.add_argument("--model", type=Path, help="SmolLM2's folder (facts.py --convert makes it)")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--only", default="", help="runs whose names contain this")
    parser.add_argument("--table", action="store_true", help="compute nothing more: the table of what is there")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    places = Places(options.data, options.dictionaries, options.model, options.folder)
    runs = Runs(options.folder / "runs")
    for setting in settings(options.data, options.model, options.quick):
        for target in setting.targets:
            for seed in range(1 if options.quick else options.seeds):
                for choice in setting.choices:
                    name = f"{setting.name} / {target} / {choice} / {seed}"
                    if options.only in name:
                        own = {"setting": vars(setting), "data": options.data is not None}
                        runs.add(name, own, partial(run, setting, places, target, choice, seed))
    if options.status:
        print("\n".join(runs.missing()) or "nothing is missing")
        return
    print(f"{len(runs.missing())} runs to do", file=sys.stderr)
    results = runs.finished() if options.table else runs.finish()
    found = list(lines(results))

    def plot(axes: Any) -> None:
        for line in found:
            name = f"{line['corpus']}, {line['targets']}: {line['chosen by']}"
            axes.scatter(list(line["losses"].values()), [name] * line["seeds"], s=12)
        axes.set(xlabel="loss on test targets")
        axes.tick_params(axis="y", labelsize=5)

    missing = [{"corpus": f"missing: {', '.join(runs.missing())}"}] if runs.missing() else []
    report("selection", options.folder, [*found, *missing], COLUMNS, plot)


if __name__ == "__main__":
    main()
