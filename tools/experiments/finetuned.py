"""Which rows made a fine-tuned language model say what it says: methods side by side, LDS over bytes a row.

The truth is that of finetuning.py, which trains it: models fine-tuned on random halves of 1024 passages, with the same
seed and order. The table is of the models that are finished, and names what is missing.
Every method scores the model of all rows; LDS at each of a list of dampings, of scores as they are, divided by the
train row's norm, and as cosines. Curvatures of whole gradients are those of dense.py; other packages' scores come from
rivals.py, run in an environment of its own on what ``--hand-over`` writes, and are read from the folder ``rivals``.
``--qld N`` trains again without the 1 % and 5 % of the rows that each of the main methods ranks highest for N queries
(the query-loss difference: the loss gained over removing random rows).

``--kind`` chooses another truth of finetuning.py, models trained from random weights or adapters, whose results are in
a folder of that name.

Run: python tools/experiments/finetuned.py --data DIR [--folder finetuned-output] [--only TEXT] [--qld N] [--quick].
"""

from __future__ import annotations

import json
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from baselines import state_cosine, tfidf
from common import Result, Runs, arguments, report, table
from dense import DAMPINGS, SHRINKAGES, Scored, dense_scores, layers
from finetuning import KINDS, LAYERS, FineTuning, make_finetuning
from tasks import sampled
from transformers import PreTrainedTokenizerFast

import ooc_influence as ooc
from ooc_influence.corpus import bm25
from ooc_influence.evaluate import lds, removal_curve

NORMALIZATIONS = ("none", "train", "cosine")
COLUMNS = (
    "method",
    "stored",
    "bytes a row",
    "LDS",
    "at damping",
    "default LDS",
    "of EK-FAC's",
    "by train norm",
    "masks",
)
EXACT = "whole gradients, ekfac"
LABELS = {
    "whole gradients, dot": "whole gradients, dot product",
    "whole gradients, kfac": "whole gradients, K-FAC",
    "whole gradients, diagonal": "whole gradients, diagonal Fisher",
    EXACT: "whole gradients, EK-FAC",
    "whole gradients, adam": "whole gradients, AdamW's metric",
    ", prior 0.03": " sampled rows",
    "whole gradients, empirical": "whole gradients, empirical Fisher",
    "whole gradients, shrunk": "EK-FAC with",
    "whole gradients, true 1024": "whole gradients, Fisher of 1024 sampled rows",
}  # of dense.py's methods, in the table
MASKED = ("Kronecker", "importance", "uniform", "LoGra", "TRAK")  # methods that draw something
QLD_SHARES = (0.01, 0.05)


class Sheet(NamedTuple):
    """Scores of one method: by damping and normalisation, (L, q, n) each, and what a stored row takes."""

    method: str
    stored: str
    row_bytes: int
    dampings: list[float]
    default: int | None  # index of the default damping
    scores: dict[str, np.ndarray]

    def save(self, path: Path) -> None:
        facts = {name: getattr(self, name) for name in self._fields if name != "scores"}
        held = {name: values.astype(np.float32) for name, values in self.scores.items()}
        np.savez(path.with_suffix(".partial.npz"), facts=np.array(json.dumps(facts)), **held)
        path.with_suffix(".partial.npz").replace(path)

    @classmethod
    def load(cls, path: Path) -> Sheet:
        with np.load(path) as held:
            facts = json.loads(str(held["facts"]))
            return cls(**facts, scores={name: held[name] for name in NORMALIZATIONS if name in held})

    @classmethod
    def dense(cls, method: str, stored: str, row_bytes: int, default: float | None, found: dict[Any, Scored]) -> Sheet:
        """Return the sheet of a method of dense.py, by damping."""
        dampings = [value or 0.0 for value in found]
        scores = {how: np.stack([one.normalized(how) for one in found.values()]) for how in NORMALIZATIONS}
        return cls(method, stored, row_bytes, dampings, dampings.index(default or 0.0), scores)


class Study(NamedTuple):
    """A task, its explained model, and where scores are kept."""

    task: FineTuning
    model: Any

    @classmethod
    def of(cls, task: FineTuning) -> Study:
        torch.set_num_threads(1)
        return cls(task, task.explained_model())

    def extract(self, part: Any, store: Any, **how: Any) -> Any:
        batches = self.task.split(part)
        chosen = {} if "like" in how else {"modules": LAYERS}
        return ooc.extract_gradients(self.model, self.task.loss, batches, store, **chosen, **how)

    def scores(self, query: Any, train: Any, dampings: Sequence[float], **means: Any) -> dict[str, np.ndarray]:
        """Return scores of every normalisation, (L, q, n), the last ones at the default damping."""
        found = {}
        for how in NORMALIZATIONS:
            asked: dict[str, Any] = {**means, "normalize": None if how == "none" else how}
            swept = [ooc.influence_scores(query, train, damping=dampings, **asked).compute()] if dampings else []
            default = {name: value for name, value in asked.items() if name != "damping_mode"}
            found[how] = np.concatenate([*swept, ooc.influence_scores(query, train, **default).compute()[None]])
        return found

    @property
    def entries(self) -> int:
        """Entries of the layers that are explained."""
        named = self.model.named_parameters()
        return sum(each.numel() for name, each in named if "_proj" in name and each.requires_grad)

    def kronecker_sheet(self, method: str, train: Any, query: Any) -> Sheet:
        """Return the scores of stores under the curvature of their Kronecker basis."""
        scores, encoding = self.scores(query, train, [*DAMPINGS], curvature="kronecker"), train.layout.encoding
        return Sheet(method, encoding.name, encoding.row_bytes, [*DAMPINGS, -1.0], len(DAMPINGS), scores)

    def sheet(self, method: str, train: Any, query: Any, curvature: Any, dampings: Sequence[float]) -> Sheet:
        """Return the scores of stores at dampings relative to tr(F)/min(rows, columns), and at the default."""
        asked = [damping * curvature.trace / min(curvature.rows, curvature.d) for damping in dampings]
        scores = self.scores(query, train, asked, curvature=curvature, damping_mode="absolute")
        encoding = train.layout.encoding
        size = encoding.row_bytes
        return Sheet(method, encoding.name, size, [*dampings, -1.0], len(dampings), scores)


def keep(study: Study, folder: Path, sheets: Iterator[Sheet]) -> Result:
    """Write sheets to a folder; return their files' names."""
    folder.mkdir(parents=True, exist_ok=True)
    names = []
    for number, sheet in enumerate(sheets):
        sheet.save(folder / f"{number}.npz")
        names.append(sheet.method)
    return {"methods": names}


def run(task: FineTuning, make: Callable[[Study], Iterator[Sheet]], folder: Path) -> Result:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ooc.OocInfluenceWarning)
        study = Study.of(task)
        return keep(study, folder, make(study))


def whole_gradients(study: Study, factors: str, counts: Sequence[int]) -> Iterator[Sheet]:
    """Yield the methods of dense.py, half of the layers at a time."""
    task, model = study.task, study.model
    draws = -(-max(counts, default=1) // task.train_rows)
    drawn = [batch for seed in range(draws) for batch in task.split(sampled(task, model, task.train, seed))]
    drawn = drawn if counts else drawn[:1]
    batches = {"queries": task.split(task.test), "rows": task.split(task.train), "sampled": drawn}
    names = [name for name, each in model.named_modules()
             if type(each) is torch.nn.Linear and "layers" in name and each.weight.requires_grad]  # fmt: skip
    blocks = [names[: len(names) // 2], names[len(names) // 2 :]]
    entries = 4 * sum(dict(model.named_modules())[name].weight.numel() for name in names)
    own = factors == "rows"
    found = dense_scores(
        layers(model, task.loss, batches, blocks, factors), adam=task.explained()["moments"] if own else None,
        priors=(0.03,) if own else (), counts=counts, own_coordinates=own,
    )  # fmt: skip
    defaults = {"dot": None, "diagonal": 0.1, "adam": 0.1, "empirical": 0.1, "true": 0.1, "kfac": 0.03, "ekfac": 0.03}
    groups: dict[str, dict[float | None, Scored]] = {}
    for (method, damping), scored in found.items():
        groups.setdefault(method, {})[damping] = scored
    for method, scored_by in groups.items():
        default = 20.0 if method.startswith("shrunk") else defaults[method.split()[0]]
        name = f"whole gradients, {method}" + ("" if own else f", factors from {factors} labels")
        yield Sheet.dense(name, "float32", entries, default, scored_by)


def low_rank_grid() -> list[float]:
    return [*DAMPINGS, 3.0, 10.0]


def entries_kept(study: Study, k: int, dtype: str, seed: int, sampling: str = "importance") -> Iterator[Sheet]:
    """Yield dropout in the parameters' own coordinates with the exact empirical Fisher matrix of the rows."""
    with tempfile.TemporaryDirectory() as place:
        mask = ooc.Dropout(k=k, sampling=sampling, seed=seed)
        train = study.extract(study.task.train, f"{place}/train", compressor=mask, dtype=dtype)
        query = study.extract(study.task.test, f"{place}/query", like=train)
        curvature = ooc.fit_curvature(train)
        yield study.sheet(f"{sampling} entries, {k}", train, query, curvature, low_rank_grid())


def entries_reduced(study: Study, seed: int) -> Iterator[Sheet]:
    """Yield what the library did by default before the Kronecker basis: 65,536 entries in F's eigenbasis."""
    with tempfile.TemporaryDirectory() as place:
        k = min(65536, sum(each.numel() for each in study.model.parameters()) // 2)
        mask = ooc.Dropout(k=k, sampling="importance", seed=seed)
        wide = study.extract(study.task.train, f"{place}/wide", compressor=mask)
        queries = study.extract(study.task.test, f"{place}/wide-query", like=wide)
        for r in (256, 512, 1023):
            if r >= study.task.train_rows:
                continue
            for dtype in ("float16", "int8"):
                train = ooc.reduce_store(wide, f"{place}/{r}{dtype}", r, dtype=dtype)
                query = ooc.reduce_store(queries, f"{place}/{r}{dtype}-query", like=train)
                curvature = ooc.fit_fisher(train)
                yield study.sheet(f"importance entries, 65536 reduced to {r}", train, query, curvature, low_rank_grid())


def kronecker(
    study: Study, k: int | None, dtype: str, seed: int, sampling: str = "grid", rows: Sequence[int] = (),
    ranks: Sequence[int] = (), averaged: bool = False,
) -> Iterator[Sheet]:  # fmt: skip
    """Yield dropout in the Kronecker basis: the prior alone, with rows of sampled labels, and reduced.

    With ``averaged``, rows and queries are means over four checkpoints of the training.
    """
    task = study.task
    earlier = {"checkpoints": task.quarters()[:-1]} if averaged else {}
    k = study.entries if k is None else k
    mask = ooc.Dropout(k=k, sampling=sampling, seed=seed, basis="kronecker")
    name = f"Kronecker {'grid' if sampling == 'grid' else 'entries'}, {k}" + (", averaged" if averaged else "")
    with tempfile.TemporaryDirectory(dir=task.folder) as place:
        train = study.extract(task.train, f"{place}/train", compressor=mask, dtype=dtype, **earlier)
        query = study.extract(task.test, f"{place}/query", like=train, dtype="float32", **earlier)
        encoding = train.layout.encoding
        yield study.kronecker_sheet(name, train, query)
        for count in rows:
            how: dict[str, Any] = {"labels": "sampled", "draws": -(-count // task.train_rows)}
            sampled_rows = study.extract(task.train, f"{place}/sampled{count}", like=train, dtype="float16", **how)
            fit = ooc.fit_curvature(sampled_rows, prior="kronecker")
            scores = study.scores(query, train, SHRINKAGES, curvature=fit)
            label = f"{name}, with {count} sampled rows"
            yield Sheet(label, encoding.name, encoding.row_bytes, [*SHRINKAGES, -1.0], len(SHRINKAGES), scores)
        for r in ranks:
            reduced = ooc.reduce_store(train, f"{place}/{r}", r, dtype="int8")
            answers = ooc.reduce_store(query, f"{place}/{r}-query", like=reduced)
            scores = study.scores(answers, reduced, (), curvature="kronecker")
            encoding = reduced.layout.encoding
            yield Sheet(f"{name} reduced to {r}", encoding.name, encoding.row_bytes, [-1.0], 0, scores)


def every_entry(study: Study) -> Iterator[Sheet]:
    """Yield rows of all entries, as float16 and as their signs, under the curvature of the Kronecker basis."""
    task, k = study.task, study.entries
    mask = ooc.Dropout(k=k, sampling="grid", basis="kronecker")
    with tempfile.TemporaryDirectory(dir=task.folder) as place:
        train = study.extract(task.train, f"{place}/train", compressor=mask, dtype="float16")
        query = study.extract(task.test, f"{place}/query", like=train, dtype="float32")
        for rows in (train, ooc.rewrite_store(train, f"{place}/signs", dtype="sign")):
            yield study.kronecker_sheet(f"Kronecker grid, all {k}", rows, query)


def of_checkpoints(study: Study, k: int, dtype: str, seed: int) -> Iterator[Sheet]:
    """Yield the sums of scores of four checkpoints, each with a store in its own Kronecker basis."""
    task, trains, queries = study.task, [], []
    mask = ooc.Dropout(k=k, sampling="grid", seed=seed, basis="kronecker")
    with tempfile.TemporaryDirectory(dir=task.folder) as place:
        for number, weights in enumerate(task.quarters()):
            study.model.load_state_dict(weights)
            trains.append(study.extract(task.train, f"{place}/t{number}", compressor=mask, dtype=dtype))
            queries.append(study.extract(task.test, f"{place}/q{number}", like=trains[-1], dtype="float32"))
        scores = study.scores(queries, trains, [*DAMPINGS], curvature="kronecker")
    encoding = trains[0].layout.encoding
    name = f"Kronecker grid, {k}, stores of four checkpoints"
    yield Sheet(name, encoding.name, 4 * encoding.row_bytes, [*DAMPINGS, -1.0], len(DAMPINGS), scores)


def projected(study: Study, way: str, seed: int) -> Iterator[Sheet]:
    """Yield LoGra with the whole curvature; TRAK's recipe with one model."""
    compressors = {
        "LoGra 14 x 14": ooc.LoGra(14, 14, seed), "LoGra 40 x 40": ooc.LoGra(40, 40, seed),
        "TRAK's recipe, one model, 512": ooc.Sjlt(512, seed, 4),
    }  # fmt: skip
    how: dict[str, Any] = {"dtype": "float32"} if way.startswith("TRAK") else {}
    with tempfile.TemporaryDirectory() as place:
        train = study.extract(study.task.train, f"{place}/train", compressor=compressors[way], **how)
        query = study.extract(study.task.test, f"{place}/query", like=train)
        grid = [1e-4, *low_rank_grid()] if way.startswith("TRAK") else low_rank_grid()
        sheet = study.sheet(way, train, query, ooc.fit_curvature(train), grid)
        if way.startswith("TRAK"):
            sheet = sheet._replace(default=0)  # TRAK does not damp
        yield sheet


def texts(study: Study) -> Iterator[Sheet]:
    """Yield baselines without gradients."""
    task, whole = study.task, study.task.texts
    rows, queries = whole[: task.train_rows], whole[task.train_rows :]

    def states(part: Any) -> torch.Tensor:
        with torch.no_grad():
            held = [study.model.model(input_ids=batch[0]).last_hidden_state.mean(1) for batch in task.split(part)]
        return torch.cat(held)

    found = {
        "BM25": (bm25(queries, rows), "text", 0),
        "TF-IDF": (tfidf(queries, rows), "text", 0),
        "hidden states, cosine": (state_cosine(states(task.test), states(task.train)), "float32", 512),
    }
    for name, (scores, stored, size) in found.items():
        yield Sheet(name, stored, size, [0.0], 0, {"none": scores[None]})


Runner = Callable[[Study], Iterator[Sheet]]


def methods(quick: bool, seeds: int) -> dict[str, Runner]:
    """Return what is to be run, by name."""
    counts = (16,) if quick else (1024, 4096)
    found: dict[str, Runner] = {
        "texts": texts,
        "whole gradients": partial(whole_gradients, factors="rows", counts=counts),
        "whole gradients, sampled factors": partial(whole_gradients, factors="sampled", counts=()),
    }
    wide, middle, small = (128, 64, 32) if quick else (65536, 16384, 4096)
    for seed in range(seeds):
        found[f"Kronecker {wide} int8 / {seed}"] = partial(
            kronecker, k=wide, dtype="int8", seed=seed, rows=counts, ranks=(16,) if quick else (512, 256)
        )
        for k in (wide, 4 * wide):
            sign = partial(kronecker, k=k, dtype="sign", seed=seed, rows=counts[-1:])
            found[f"Kronecker {k} sign / {seed}"] = sign
            found[f"Kronecker {k} sign averaged / {seed}"] = partial(sign, averaged=True)
        for k in (middle, wide // 2):
            found[f"Kronecker {k} sign / {seed}"] = partial(kronecker, k=k, dtype="sign", seed=seed)
        found[f"Kronecker {wide} int8 reduced to many / {seed}"] = partial(
            kronecker, k=wide, dtype="int8", seed=seed, ranks=(24,) if quick else (1000,)
        )
        found[f"Kronecker {wide} int8 averaged / {seed}"] = partial(
            kronecker, k=wide, dtype="int8", seed=seed, rows=counts[-1:], averaged=True
        )
        found[f"Kronecker {wide} int8 of four checkpoints / {seed}"] = partial(
            of_checkpoints, k=wide, dtype="int8", seed=seed
        )
        found[f"Kronecker {wide} float16 / {seed}"] = partial(kronecker, k=wide, dtype="float16", seed=seed)
        for k in (middle, small):
            found[f"Kronecker {k} int8 / {seed}"] = partial(kronecker, k=k, dtype="int8", seed=seed)
        for k in (wide, middle, small):
            found[f"Kronecker entries {k} int8 / {seed}"] = partial(
                kronecker, k=k, dtype="int8", seed=seed, sampling="importance"
            )
        for k in (small, middle, wide):
            for dtype in ("float16", "int8") if k == wide else ("float16",):
                found[f"importance {k} {dtype} / {seed}"] = partial(entries_kept, k=k, dtype=dtype, seed=seed)
        found[f"uniform {wide} / {seed}"] = partial(
            entries_kept, k=wide, dtype="float16", seed=seed, sampling="uniform"
        )
        found[f"reduced / {seed}"] = partial(entries_reduced, seed=seed)
        for way in ("LoGra 14 x 14", "LoGra 40 x 40", "TRAK's recipe, one model, 512"):
            found[f"{way} / {seed}"] = partial(projected, way=way, seed=seed)
    found["Kronecker all, and signs"] = every_entry
    found["Kronecker all"] = partial(kronecker, k=None, dtype="float16", seed=0, rows=counts)
    return found


def evaluated(sheet: Sheet, subsets: np.ndarray, outcomes: np.ndarray) -> dict[str, Any]:
    """Return the LDS of every normalisation and damping."""
    values = {how: [lds(one, subsets, outcomes).mean for one in many] for how, many in sheet.scores.items()}
    return {"method": sheet.method, "stored": sheet.stored, "bytes": sheet.row_bytes, "dampings": sheet.dampings,
            "default": sheet.default, "lds": values}  # fmt: skip


def lines(evaluations: Sequence[dict[str, Any]], models: int) -> Iterator[Result]:
    """Yield a table line a method: medians over seeds of masks of the values at each damping."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for each in evaluations:
        groups.setdefault((each["method"], each["stored"]), []).append(each)
    for (method, stored), own in groups.items():
        swept = {how: np.median([each["lds"][how] for each in own], axis=0) for how in own[0]["lds"]}
        dampings, default = own[0]["dampings"], own[0]["default"]
        best = {how: int(values.argmax()) for how, values in swept.items()}
        cells: dict[str, Any] = {
            "method": method, "stored": stored, "bytes a row": int(np.median([each["bytes"] for each in own])),
            "LDS": float(swept["none"][best["none"]]),
            "at damping": "" if len(dampings) == 1 else _damping(dampings[best["none"]]),
            "default LDS": float(swept["none"][default]),
        }  # fmt: skip
        if "train" in swept:
            cells["by train norm"] = float(swept["train"][best["train"]])
        sweep = {how: dict(zip(map(str, dampings), values.tolist(), strict=True)) for how, values in swept.items()}
        yield cells | {"models": models, "sweep": sweep, "masks": len(own) if method.startswith(MASKED) else ""}


def ordered(found: Sequence[Result]) -> list[Result]:
    """Return the lines, the highest LDS first, with the share of exact EK-FAC's."""
    exact = next((line["LDS"] for line in found if line["method"] == EXACT), None)
    shares = [line if exact is None else line | {"of EK-FAC's": line["LDS"] / exact} for line in found]
    return sorted(shares, key=lambda line: -line["LDS"])


def label(method: str) -> str:
    """Return a method's name as the table has it."""
    for name, shown in LABELS.items():
        method = method.replace(name, shown)
    return method


def _damping(value: float) -> str:
    return "default" if value < 0 else f"{value:g}"


def hand_over(task: FineTuning, folder: Path) -> None:
    """Write the model, rows and queries for rivals.py."""
    folder.mkdir(parents=True, exist_ok=True)
    model = task.explained_model()
    model.config.max_position_embeddings = (
        4096  # bergson's batches are no longer than this; rotary embeddings ignore it
    )
    model.save_pretrained(folder / "model")
    PreTrainedTokenizerFast(tokenizer_object=task.tokenizer._tokenizer, pad_token="!").save_pretrained(folder / "model")
    tokens = [torch.cat([part[0], part[1][:, -1:]], 1).numpy() for part in (task.train, task.test)]
    np.savez(folder / "rows.npz", train=tokens[0], query=tokens[1])


def query_loss_difference(
    task: FineTuning, sheets: dict[str, Sheet], best: dict[str, int], folder: Path, queries: int
) -> list[Result]:
    """Return by how much each method's highest rows raise a query's loss when they are removed, over random ones.

    ``best`` is the index of each method's best damping.
    """
    targets = np.linspace(0, task.test_rows - 1, queries).round().astype(np.int64)
    counts = [max(1, round(share * task.train_rows)) for share in QLD_SHARES]
    generator = np.random.default_rng(0)
    rankings = {"random": np.stack([generator.permutation(task.train_rows) for _ in targets])}
    for name, sheet in sheets.items():
        scores = sheet.scores["none"][best[name]]
        rankings[name] = np.argsort(-scores[targets], axis=1, kind="stable")
    found: dict[str, np.ndarray] = {}
    for name, ranking in rankings.items():
        where = folder / "".join(letter if letter.isalnum() else "-" for letter in name)
        print(f"removing the rows that rank highest by {name}", file=sys.stderr)
        curve = removal_curve(task.fit, task.measure, task.train_rows, ranking[:, : counts[-1]], counts, where,
                              targets=targets, settings=task.settings)  # fmt: skip
        found[name] = curve.effects
    return [
        {"method": name, **{f"{share:.0%}": float((gain - found["random"])[:, number].mean())
                            for number, share in enumerate(QLD_SHARES)}, "queries": len(targets)}
        for name, gain in found.items()
    ]  # fmt: skip


QLD_METHODS = {
    "BM25": "text", "whole gradients, dot": "float32", "whole gradients, empirical": "float32",
    "whole gradients, ekfac": "float32", "importance entries, 65536 reduced to 512": "int8", "LoGra 40 x 40": "float16",
    "Kronecker grid, 65536": "int8", "Kronecker grid, 65536, with 4096 sampled rows": "int8",
    "Kronecker grid, 65536, averaged, with 4096 sampled rows": "sign",
}  # fmt: skip


def main() -> None:
    parser = arguments(__doc__, "finetuned-output")
    parser.add_argument("--data", type=Path, required=True, help="a folder with agnews/ and shakespeare/")
    parser.add_argument("--models", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=3, help="of masks")
    parser.add_argument("--only", default="", help="methods whose names contain this")
    parser.add_argument("--hand-over", action="store_true", help="write what rivals.py needs, and stop")
    parser.add_argument(
        "--qld", type=int, default=0, metavar="N", help="also train without each main method's rows, those of N queries"
    )
    parser.add_argument("--table", action="store_true", help="compute nothing more: the table of what is there")
    parser.add_argument("--kind", choices=list(KINDS), default="fine-tuned", help="of training")
    options = parser.parse_args()
    task = make_finetuning(options.data, options.folder, options.quick, options.kind)
    results = options.folder if options.kind == "fine-tuned" else options.folder / options.kind
    if options.hand_over:
        hand_over(task, results / "handed-over")
        return
    chosen = {name: make for name, make in methods(options.quick, options.seeds).items() if options.only in name}
    runs, folders = Runs(results / "runs"), []
    for name, make in chosen.items():
        folders.append(results / "scores" / "".join(each if each.isalnum() else "-" for each in name))
        runs.add(name, task.settings, partial(run, task, make, folders[-1]))
    models = 4 if options.quick else options.models
    truth = task.truth(models, train=False)
    missing = [*runs.missing(), *(f"model {number}" for number in truth.missing)]
    if options.status:
        print("\n".join(missing) or "nothing is missing")
        return
    print(f"{len(runs.missing())} runs to do", file=sys.stderr)
    if not options.table:
        runs.finish()
    if options.quick:
        truth = task.truth(models)
    finished = np.setdiff1d(np.arange(models), truth.missing)
    subsets, outcomes = np.asarray(truth.subsets)[finished], truth.outcomes[finished]
    files = [path for folder in [*folders, results / "rivals"] for path in sorted(folder.glob("*.npz"))]
    evaluations = [evaluated_once(path, subsets, outcomes) for path in files]
    found = ordered(list(lines(evaluations, len(finished))))
    if options.qld:
        differences(task, files, found, results, options.qld)
    missing = [*runs.missing(), *(f"model {number}" for number in truth.missing)]
    if missing:
        found.append({"method": f"missing: {', '.join(missing)}"})

    shown = [line | {"method": label(line["method"])} for line in found]
    report("finetuned", results, shown, COLUMNS, partial(plot, found))


def evaluated_once(path: Path, subsets: np.ndarray, outcomes: np.ndarray) -> dict[str, Any]:
    """Return an evaluation, kept beside the scores for as long as it is of the same models."""
    kept = path.with_suffix(".json")
    if kept.exists() and kept.stat().st_mtime >= path.stat().st_mtime:
        held: dict[str, Any] = json.loads(kept.read_text())
        if held["models"] == len(subsets):
            return held
    held = evaluated(Sheet.load(path), subsets, outcomes) | {"models": len(subsets)}
    kept.write_text(json.dumps(held))
    return held


def differences(task: FineTuning, files: Sequence[Path], found: Sequence[Result], folder: Path, queries: int) -> None:
    """Write and print the query-loss difference of the first mask of each main method."""
    sheets: dict[str, Sheet] = {}
    for path in files:
        sheet = Sheet.load(path)
        if QLD_METHODS.get(sheet.method) == sheet.stored:
            sheets.setdefault(sheet.method, sheet)
    best = {}
    for name in sheets:
        own = (line for line in found if (line["method"], line.get("stored")) == (name, QLD_METHODS[name]))
        sweep = next(own)["sweep"]["none"]
        best[name] = int(np.argmax(list(sweep.values())))
    results = query_loss_difference(task, sheets, best, folder / "qld", queries)
    (folder / "qld.json").write_text(json.dumps(results, indent=1))
    print(table(results, ("method", *(f"{share:.0%}" for share in QLD_SHARES), "queries")))


FAMILIES = {
    "Kronecker basis, grid, signs": ("Kronecker grid", "sign"),
    "Kronecker basis, averaged, signs": ("Kronecker grid", "sign"),
    "Kronecker basis, grid, int8": ("Kronecker grid", "int8"),
    "Kronecker basis, entries, int8": ("Kronecker entries", "int8"),
    "Kronecker basis, grid, float16": ("Kronecker grid", "float16"),
    "parameters' basis, float16": ("importance entries", "float16"),
    "parameters' basis, int8": ("importance entries", "int8"),
    "Kronecker basis, reduced, int8": ("Kronecker grid", "int8"),
    "parameters' basis, reduced, int8": ("importance entries", "int8"),
    "LoGra": ("LoGra", ""),
    "TRAK's recipe, one model": ("TRAK", ""),
    "TrackStar (bergson)": ("bergson TrackStar", ""),
    "LoGra (dattri-LLM), EK-FAC": ("dattri-LLM LoGra, EK-FAC", ""),
    "LoGra (dattri-LLM), dense Fisher": ("dattri-LLM LoGra, dense", ""),
    "whole gradients, EK-FAC (dattri-LLM)": ("dattri-LLM EK-FAC", ""),
    "whole gradients, dot product": ("whole gradients, dot", ""),
    "whole gradients, empirical Fisher": ("whole gradients, empirical", ""),
    "whole gradients, EK-FAC": ("whole gradients, ekfac", ""),
    "whole gradients, EK-FAC + sampled rows": ("whole gradients, shrunk", ""),
}  # of the plot: how methods begin, and how their rows are stored


def plot(found: Sequence[Result], axes: Any) -> None:
    """Draw LDS over bytes a row; what only adds sampled rows to a curvature is drawn dashed."""
    for number, (label, (start, stored)) in enumerate(FAMILIES.items()):
        own = [line for line in found if line["method"].startswith(start) and line.get("stored", "").startswith(stored)]
        own = [line for line in own if "factors from" not in line["method"]]
        own = [line for line in own
               if all((word in line["method"]) == (word in label) for word in ("reduced", "averaged"))]  # fmt: skip
        for style, chosen in (("-", [line for line in own if "sampled rows" not in line["method"]]),
                              ("--", [line for line in own if "sampled rows" in line["method"]])):  # fmt: skip
            points = sorted((line["bytes a row"], line["LDS"]) for line in chosen)
            if points:
                name = label if style == "-" else f"{label}, + sampled rows"
                axes.semilogx(*zip(*points, strict=True), style, marker="osd^vPX*<"[number % 9], markersize=4,
                              color=f"C{number % 10}", label=name)  # fmt: skip
    levels: dict[float, list[Result]] = {}
    for line in found:
        if line.get("bytes a row") == 0:
            levels.setdefault(round(line["LDS"], 2), []).append(line)
    for alike in levels.values():
        names = ", ".join(line["method"].removesuffix(", factors from dataset labels") for line in alike)
        axes.axhline(alike[0]["LDS"], color="grey", linewidth=0.5)
        axes.annotate(f"{names} (no rows)", (2e2, alike[0]["LDS"] + 0.003), fontsize=5, color="grey")
    axes.set(xlabel="bytes a row", ylabel="LDS, best damping")
    axes.legend(fontsize=5, loc="center left", bbox_to_anchor=(1.01, 0.5))


if __name__ == "__main__":
    main()
