"""Planted spans: which words of a document taught a fine-tuned chat model what it answers.

As in facts.py, SmolLM2-135M-Instruct is fine-tuned with LoRA on invented facts; here a document is a reply of six
sentences about six different things, and one of them states the fact that a query asks for, in another wording. Every
planted fact is in two of 200 documents; all other sentences state facts of the same kinds about things of their own,
so that only the right names and values tell the fact's sentence from its neighbours.

For every query, the tokens of its planted documents that are among its 10 proponents are ranked by their share of the
score (``token_influence``, everything by default). ``sentence`` is the share of the fact's sentence, ``name and value``
that of these words of it, which is among the top fifth of the document's tokens (chance: one fifth); ``first``
says how often the highest token is in the fact's sentence (chance: one sixth). ``words of the query`` is the same of
a ranking by whether a token's word occurs in the query, ties broken in the order of the text.

Run: python tools/experiments/spans.py --model smol [--folder spans-output] [--quick]. facts.py says where the model is
from.
"""

from __future__ import annotations

import random
import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import Result, Runs, arguments, report
from facts import KINDS, Corpus, Facts, Names, chat

import ooc_influence as ooc

SENTENCES, PLANTED, LISTED = 6, 2, 10
COLUMNS = ("ranking", "documents", "listed", "sentence", "name and value", "first")
ASKED = "Tell me six things you know."


class Spans(Facts):
    """The documents, the model, and where they are kept; ``spans`` are the sentences of each planted document."""

    EPOCHS = 4

    def make_corpus(self) -> Corpus:
        facts, documents = (4, 12) if self.quick else (20, 200)
        drawn = random.Random(1)
        names, pools = Names(drawn), [drawn.sample(list(values), len(values)) for _, values, _ in KINDS]
        spare = [list(values) for _, values, _ in KINDS]  # what no planted fact says, and what is left says it often
        planted: list[tuple[int, str, str, str]] = []
        query = []
        for number in range(facts):
            kind = number % len(KINDS)
            endings, _, wordings = KINDS[kind]
            e, v = names.new(endings), pools[kind].pop()
            spare[kind].remove(v)
            planted += [(number, wordings[each][1].format(e=e, v=v), e, v) for each in range(PLANTED)]
            question, answer = wordings[2]
            query.append(chat(question.format(e=e), answer.format(e=e, v=v)))
        self.spans: list[tuple[str, str, str]] = []
        train, fact = [], []
        for each in range(documents):
            sentences = []
            for _ in range(SENTENCES):
                kind = drawn.randrange(len(KINDS))
                endings, _, wordings = KINDS[kind]
                text = wordings[drawn.randrange(2)][1]
                sentences.append(text.format(e=names.new(endings), v=drawn.choice(spare[kind])))
            number, span = (-1, ("", "", "")) if each >= len(planted) else (planted[each][0], planted[each][1:])
            if number >= 0:
                sentences[drawn.randrange(SENTENCES)] = span[0]
            train.append(chat(ASKED, " ".join(sentences)))
            fact.append(number)
            self.spans.append(span)
        return Corpus(train, np.array(fact), query)


def inside(texts: Sequence[str], span: str) -> np.ndarray:
    """Return which tokens have a character of a span of their text; none where it is not there."""
    start = "".join(texts).find(span)
    edges = np.cumsum([0, *map(len, texts)])
    return (start >= 0) & (edges[:-1] < start + len(span)) & (edges[1:] > start)


def measured(texts: Sequence[str], shares: np.ndarray, targets: np.ndarray, span: tuple[str, str, str]) -> list[float]:
    """Return the three measures of one document."""
    live = np.flatnonzero(targets)
    order = live[np.argsort(-shares[live], kind="stable")]
    top = np.isin(np.arange(len(texts)), order[: round(len(live) / 5)])
    sentence = inside(texts, span[0]) & targets
    words = sentence & (inside(texts, span[1]) | inside(texts, span[2]))
    return [float(top[sentence].mean()), float(top[words].mean()), float(sentence[order[0]])]


def in_query(texts: Sequence[str], query: str) -> np.ndarray:
    """Return 1 for tokens of words that the query has, else 0."""
    text, asked = "".join(texts), {word.strip(".,:?'").lower() for word in query.split()}
    found = np.zeros(len(texts))
    at = 0
    for word in text.split():
        at = text.index(word, at)
        if word.strip(".,:?'").lower() in asked:
            edges = np.cumsum([0, *map(len, texts)])
            found[(edges[:-1] < at + len(word)) & (edges[1:] > at)] = 1
        at += len(word)
    return found


def ranked(spans: Spans) -> Result:
    """Return a line for each ranking."""
    stores = {name: spans.folder / f"{name}.zarr" for name in ("train", "query")}
    spans.extract("train", stores["train"])
    spans.extract("query", stores["query"], like=stores["train"])
    lists = ooc.top_influential(stores["query"], stores["train"], LISTED)
    lists = replace(lists, opponents=lists.opponents.first(0))  # which would be computed for nothing
    found = ooc.token_influence(stores["query"], stores["train"], spans.load(), lists=lists)
    lines: dict[str, list[list[float]]] = {"share of the score": [], "words of the query": []}
    fact = spans.corpus.fact
    for each in found:
        query = " ".join(turn["content"] for turn in spans.corpus.query[each.query])
        assert each.texts is not None
        for row, texts, shares in zip(each.rows.tolist(), each.texts, each.tokens, strict=True):
            if row < 0 or fact[row] != each.query:
                continue
            targets = inside(texts, spans.corpus.train[row][-1]["content"])
            lines["share of the score"].append(measured(texts, shares, targets, spans.spans[row]))
            lines["words of the query"].append(measured(texts, in_query(texts, query), targets, spans.spans[row]))
    planted = int((fact >= 0).sum())
    return {
        "lines": [
            {"ranking": name, "documents": planted, "listed": len(values),
             **dict(zip(COLUMNS[3:], np.mean(values, axis=0).tolist() if values else [0.0] * 3, strict=True))}
            for name, values in lines.items()
        ]
    }  # fmt: skip


def run(model: Path, folder: Path, quick: bool) -> Result:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ooc.OocInfluenceWarning)
        return ranked(Spans(model, folder, quick))


def main() -> None:
    parser = arguments(__doc__, "spans-output")
    parser.add_argument("--model", type=Path, required=True, help="SmolLM2's folder (facts.py --convert makes it)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    spans, runs = Spans(options.model, options.folder, options.quick), Runs(options.folder / "runs")
    runs.add("spans", spans.settings, partial(run, options.model, options.folder, options.quick))
    if options.status:
        print("\n".join(runs.missing()) or "nothing is missing")
        return
    print(f"{len(runs.missing())} runs to do", file=sys.stderr)
    lines = [line for result in runs.finish() for line in result["lines"]]

    def plot(axes: Any) -> None:
        axes.bar([line["ranking"] for line in lines], [line["name and value"] for line in lines])
        axes.set(ylabel="of the fact's name and value, among the top fifth")

    report("spans", options.folder, lines, COLUMNS, plot)


if __name__ == "__main__":
    main()
