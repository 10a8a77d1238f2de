"""A small language model fine-tuned on Shakespeare, and the models fine-tuned on random halves of the same passages.

A Llama (4 layers, width 128, 729,088 entries in the linear layers of its blocks, byte-level BPE of 1024 tokens) is
pretrained on AG News headlines, then fine-tuned with AdamW for 4 epochs on 1024 passages of Shakespeare of 64 tokens.
Queries are 128 passages between them. All fine-tuning starts from the same weights and goes through the same batches
in the same order; a passage that is left out has weight zero, so that the data are the only difference.

There are two more kinds of it: ``from-scratch``, 25 epochs from random weights; and ``adapter``, LoRA (rank 8 on the
same layers, 74,240 entries) instead of all weights.

Run: python tools/experiments/finetuning.py --data DIR [--kind KIND] [--folder finetuned-output] [--models 100]: trains
what is missing of the models, and says what is done.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import arguments
from tasks import Rows, Task, news
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import ooc_influence as ooc
from ooc_influence.evaluate import Runs, finished_runs, random_subsets, retrain
from ooc_influence.evaluate.retrain import seeded

VOCABULARY, PASSAGE = 1024, 64
LAYERS = "model.layers.*"  # the tapped ones: embeddings and the tied unembedding are left out by every method
PRETRAINING_LR = 2e-3
# the model, its optimizer, the batch's rows and the epoch -> a context around a step of the training
Watch = Callable[[nn.Module, torch.optim.Optimizer, Tensor, int], AbstractContextManager[Any]]
KINDS = {"fine-tuned": (4, 1e-3), "from-scratch": (25, 2e-3), "adapter": (4, 2e-3)}  # epochs, learning rate


@dataclass(frozen=True)
class FineTuning(Task):
    """The passages, the pretrained model, its fine-tuning and its measurement."""

    folder: Path = Path("finetuned-output")
    pretraining_rows: int = 12_000
    kind: str = "fine-tuned"

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)

    @cached_property
    def tokenizer(self) -> ByteLevelBPETokenizer:
        path = self.folder / "tokenizer"
        if not (path / "vocab.json").exists():
            path.mkdir(exist_ok=True)
            learned = ByteLevelBPETokenizer()
            learned.train_from_iterator([self._headlines, self._play], VOCABULARY, show_progress=False)
            learned.save_model(str(path))
        return ByteLevelBPETokenizer(str(path / "vocab.json"), str(path / "merges.txt"))

    @property
    def _headlines(self) -> str:
        return "\n".join(news(self.data)[0])

    @property
    def _play(self) -> str:
        return (self.data / "shakespeare/input.txt").read_text("utf-8")

    def passages(self, text: str) -> Tensor:
        """Return a text's tokens in passages, (rows, 65)."""
        tokens = torch.tensor(self.tokenizer.encode(text).ids)
        return tokens[: len(tokens) // (PASSAGE + 1) * (PASSAGE + 1)].view(-1, PASSAGE + 1)

    @cached_property
    def rows(self) -> Rows:
        """All train rows, then all queries; these are spread evenly over a stretch of the text."""
        total = self.train_rows + self.test_rows
        stretch = self.passages(self._play)[:total]
        queries = torch.zeros(total, dtype=torch.bool)
        queries[np.linspace(0, total - 1, self.test_rows).round().astype(np.int64)] = True
        ordered = torch.cat([stretch[~queries], stretch[queries]])
        return ordered[:, :-1], ordered[:, 1:]

    @property
    def texts(self) -> list[str]:
        whole = torch.cat([self.rows[0], self.rows[1][:, -1:]], 1)
        return self.tokenizer.decode_batch(whole.tolist())

    @property
    def settings(self) -> dict[str, Any]:
        return {**super().settings, "pretraining": 0 if self.kind == "from-scratch" else self.pretraining_rows}

    def model(self) -> nn.Module:
        """Return the model that fine-tuning starts from."""
        with seeded(0):
            config = LlamaConfig(
                vocab_size=VOCABULARY, hidden_size=128, intermediate_size=304, num_hidden_layers=4,
                num_attention_heads=4, max_position_embeddings=PASSAGE + 1, tie_word_embeddings=True,
                bos_token_id=None, eos_token_id=None,
            )  # fmt: skip
            model = LlamaForCausalLM(config)
        if self.kind != "from-scratch":
            model.load_state_dict(self.kept("pretrained", lambda: self._pretrain(model)))
        if self.kind == "adapter":
            with seeded(0):
                _add_adapter(model)
        return model.eval()

    def kept(self, name: str, make: Any) -> Any:
        """Return what a file of the folder holds, or what ``make`` returns, written there."""
        path = self.folder / f"{name}.pt"
        if not path.exists():
            torch.save(make(), path.with_suffix(".partial"))
            path.with_suffix(".partial").replace(path)
        return torch.load(path, weights_only=True)

    def _pretrain(self, model: nn.Module) -> dict[str, Tensor]:
        passages = self.passages(self._headlines)
        print(f"pretraining on {len(passages)} passages", file=sys.stderr)
        with seeded(0):
            order = torch.cat([torch.randperm(len(passages)) for _ in range(3)])[: self.pretraining_rows]
            optimizer = torch.optim.AdamW(model.parameters(), lr=PRETRAINING_LR, weight_decay=0.01, fused=True)
            for step, chosen in enumerate(steps := order.split(self.batch)):
                for group in optimizer.param_groups:
                    group["lr"] = PRETRAINING_LR * min(1, (step + 1) / 50) * (1 - step / len(steps))
                rows = passages[chosen]
                value = self._step(model, optimizer, (rows[:, :-1], rows[:, 1:]), len(rows))
                if step % 100 == 0:
                    print(f"step {step} of {len(steps)}: {value:.3f}", file=sys.stderr)
        return model.state_dict()

    def _step(self, model: nn.Module, optimizer: Any, rows: Rows, batch: int) -> float:
        optimizer.zero_grad()
        total = self.loss(model, rows).sum() / batch
        total.backward()
        optimizer.step()
        return float(total.detach())

    def fit(self, indices: np.ndarray) -> nn.Module:
        """Fine-tune on rows ``indices`` from the global generator's state, which orders all rows."""
        return self.fine_tune(indices)[0]

    def fine_tune(
        self, indices: np.ndarray, watch: Watch | None = None
    ) -> tuple[nn.Module, list[dict[str, Tensor]], dict[str, Tensor]]:
        """Return the model, its weights at the epochs' ends, and AdamW's second moments at the end."""
        model, ends = self.model().train(), []
        trained = {name: values for name, values in model.named_parameters() if values.requires_grad}
        optimizer = torch.optim.AdamW(trained.values(), lr=self.lr, weight_decay=0.01, fused=True)
        included = torch.zeros(self.train_rows, dtype=torch.bool)
        included[torch.from_numpy(indices)] = True
        for epoch in range(self.epochs):
            batches = torch.randperm(self.train_rows).split(self.batch)
            for step, chosen in enumerate(batches):
                for group in optimizer.param_groups:
                    group["lr"] = self.lr * (1 - (epoch + step / len(batches)) / self.epochs)
                rows = chosen[included[chosen]]
                with nullcontext() if watch is None else watch(model, optimizer, rows, epoch):
                    self._step(model, optimizer, tuple(part[rows] for part in self.train), self.batch)
            ends.append({name: values.clone() for name, values in model.state_dict().items()})
        moments = {name: optimizer.state[values]["exp_avg_sq"] for name, values in trained.items()}
        return model.eval(), ends, moments

    def logits(self, model: nn.Module, inputs: Tensor) -> Tensor:
        return model(input_ids=inputs).logits

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        return ooc.token_cross_entropy(self.logits(model, batch[0]), batch[1])

    def measure(self, model: nn.Module) -> np.ndarray:
        with torch.no_grad():
            return -torch.cat([self.loss(model, rows) for rows in self.split(self.test)]).double().numpy()

    @staticmethod
    def split(rows: Rows, size: int = 64) -> list[Rows]:
        return list(zip(*(part.split(size) for part in rows), strict=True))

    def explained(self) -> dict[str, Any]:
        """Return the model of all rows: ``model`` (weights), ``ends`` (of epochs), ``moments`` (AdamW's second)."""

        def make() -> dict[str, Any]:
            with seeded(0):
                model, ends, moments = self.fine_tune(np.arange(self.train_rows))
            return {"model": model.state_dict(), "ends": ends, "moments": moments}

        return self.kept("explained" if self.kind == "fine-tuned" else self.kind, make)

    def explained_model(self, epoch: int | None = None) -> nn.Module:
        """Return the model of all rows, at the end or after an epoch."""
        model, held = self.model(), self.explained()
        model.load_state_dict(held["model"] if epoch is None else held["ends"][epoch])
        return model.eval()

    def quarters(self) -> list[dict[str, Tensor]]:
        """Return the weights of the model of all rows after each quarter of the training."""
        ends = self.explained()["ends"]
        return [ends[max(0, round(len(ends) * part / 4) - 1)] for part in (1, 2, 3, 4)]

    def truth(self, models: int, *, train: bool = True, workers: int = 1) -> Runs:
        """Return the models of random halves, all with the same seed; without ``train``, those that are there."""
        subsets, seeds = random_subsets(self.train_rows, models), [0] * models
        folder = self.folder / ("truth" if self.kind == "fine-tuned" else f"truth-{self.kind}")
        if not train:
            return finished_runs(subsets, folder, settings=self.settings, seeds=seeds)
        return retrain(
            self.fit, self.measure, subsets, folder,
            settings=self.settings, seeds=seeds, workers=workers, progress=True,
        )  # fmt: skip


def _add_adapter(model: nn.Module) -> None:
    import peft

    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", exclude_modules=["lm_head"])
    peft.inject_adapter_in_model(config, model)


def make_finetuning(data: Path, folder: Path, quick: bool = False, kind: str = "fine-tuned") -> FineTuning:
    n, q, pretraining = (64, 8, 320) if quick else (1024, 128, 12_000)
    epochs, lr = KINDS[kind]
    return FineTuning(kind, n, q, 1 if quick else epochs, data, lr, 32, True, folder, pretraining, kind)


def main() -> None:
    parser = arguments(__doc__, "finetuned-output")
    parser.add_argument("--data", type=Path, required=True, help="a folder with agnews/ and shakespeare/")
    parser.add_argument("--models", type=int, default=100)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--workers", type=int, default=1, help="models trained at once, each with its share of cores")
    parser.add_argument("--kind", choices=list(KINDS), default="fine-tuned")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    task = make_finetuning(options.data, options.folder, options.quick, options.kind)
    if not options.status:
        for name, model in (("before", task.model()), ("after", task.explained_model())):
            with torch.no_grad():
                trained = torch.cat([task.loss(model, rows) for rows in task.split(task.train)]).mean()
            print(f"{name} fine-tuning: loss {trained:.3f} on train rows, {-task.measure(model).mean():.3f} on queries")
    models = 4 if options.quick else options.models
    held = task.truth(models, train=not options.status, workers=options.workers)
    print(held)


if __name__ == "__main__":
    main()
