"""Gradients of linear layers, summed over subsets of the rows: at a snapshot, and along a training.

What a linear method predicts for a subset S and a query q is Σ_{i in S} score(q, i), the score of one vector::

    b_S = Σ_i (1[i in S] - 1/2) g_i          (-1/2 moves all subsets of a query alike, and keeps the sums small)

so that the linear datamodeling score needs p numbers for each of some subsets, not for each row, and nothing is
approximated. Written to be obviously right, with hooks of its own: what stored rows are compared with.

Along a training, gradients g_i(t) are those of its own backward passes, in its own mode. For each stretch of epochs::

    plain   Σ_t g_i(t)                                         lr    Σ_t lr_t g_i(t)

and, until the end, the first epoch alone and all epochs, with v̂_t, m_t and β1 of AdamW, c_t = 1 - β1^t::

    adam    Σ_t lr_t g_i(t) / (√v̂_t + ε)
    carried e_T of   m_t = β1 m_{t-1} + (1 - β1) g_i(t)
                     e_t = (1 - lr_t · decay) e_{t-1} + lr_t m_t / (c_t (√v̂_t + ε))

which is A_t g_i(t) summed over t with A_t = (1 - β1) R_t, R_t = lr_t D_t / (c_t (√v̂_t + ε)) + β1 R_{t+1} and
D_t = Π_{u>t} (1 - lr_u · decay): minus the first-order change of the last weights, per unit of the row's weight, v̂ held
fixed. For SGD with momentum μ: m_t = μ m_{t-1} + g_i(t), e_t = e_{t-1} + lr_t m_t, and no ``adam``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Loss = Callable[[nn.Module, Any], Tensor]
Parts = list[Tensor]  # a layer each: (m, out, in), with a last column for a bias
Taps = dict[str, tuple[Tensor, Tensor]]  # a layer's inputs (b, t, in) and output gradients (b, t, out)


@dataclass(frozen=True)
class Layers:
    """Linear layers of a model, and the place of each in a vector of all their entries."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, model: nn.Module, names: Sequence[str]) -> Layers:
        modules = dict(model.named_modules())
        shapes = [(each.out_features, each.in_features + (each.bias is not None)) for each in map(modules.get, names)]
        return cls(tuple(names), tuple(shapes))

    @property
    def p(self) -> int:
        return sum(out * entries for out, entries in self.shapes)

    def split(self, flat: Tensor) -> Parts:
        """Return views of vectors (m, p)."""
        parts = flat.split([out * entries for out, entries in self.shapes], dim=1)
        return [part.unflatten(1, shape) for part, shape in zip(parts, self.shapes, strict=True)]

    def zeros(self, count: int) -> Tensor:
        return torch.zeros(count, self.p)


@contextmanager
def tapping(model: nn.Module, names: Sequence[str]) -> Iterator[Taps]:
    """Keep the inputs of layers and the gradients of their outputs in each forward and backward pass."""
    found: Taps = {}
    modules = dict(model.named_modules())

    def listen(name: str) -> Callable[..., None]:
        def hook(module: Any, inputs: Any, output: Tensor) -> None:
            x = inputs[0].detach()
            x = x if module.bias is None else torch.cat([x, x.new_ones(*x.shape[:-1], 1)], -1)

            def receive(delta: Tensor) -> None:
                found[name] = x.reshape(len(x), -1, x.shape[-1]), delta.reshape(len(x), -1, delta.shape[-1])

            output.register_hook(receive)

        return hook

    with ExitStack() as stack:
        for name in names:
            stack.callback(modules[name].register_forward_hook(listen(name)).remove)
        yield found


def gradients(x: Tensor, delta: Tensor) -> Tensor:
    """Return (b, out, in) of samples' inputs and output gradients."""
    return torch.einsum("bto,bti->boi", delta, x)


def passes(model: nn.Module, loss: Loss, batches: Sequence[Any], layers: Layers) -> Iterator[list[tuple[Tensor, ...]]]:
    """Yield inputs and output gradients of each layer, batch by batch, for the sum of the samples' losses."""
    with tapping(model, layers.names) as found:
        for batch in batches:
            model.zero_grad()
            loss(model, batch).sum().backward()
            yield [found[name] for name in layers.names]


def each_row(model: nn.Module, loss: Loss, batches: Sequence[Any], layers: Layers) -> Parts:
    """Return the gradients of all samples."""
    found = [[gradients(*each) for each in taps] for taps in passes(model, loss, batches, layers)]
    return [torch.cat(parts) for parts in zip(*found, strict=True)]


def summed(model: nn.Module, loss: Loss, batches: Sequence[Any], layers: Layers, credit: Tensor) -> Tensor:
    """Return credit (m, n) times the gradients of n samples, (m, p)."""
    total, start = layers.zeros(len(credit)), 0
    for taps in passes(model, loss, batches, layers):
        stop = start + len(taps[0][0])
        for part, each in zip(layers.split(total), taps, strict=True):
            part += torch.einsum("mb,boi->moi", credit[:, start:stop], gradients(*each))
        start = stop
    return total


@dataclass(frozen=True)
class Basis:
    """The Kronecker basis of each layer, and Λ, the mean square of the rows' gradients in it."""

    left: Parts
    right: Parts
    squares: Parts = field(default_factory=list)

    @classmethod
    def of(cls, factors: Sequence[tuple[Tensor, Tensor]]) -> Basis:
        """Return the eigenvectors of A and S, without Λ."""
        return cls([torch.linalg.eigh(s)[1].float() for _, s in factors],
                   [torch.linalg.eigh(a)[1].float() for a, _ in factors])  # fmt: skip

    def turn(self, parts: Sequence[Tensor]) -> Parts:
        """Return vectors in the basis."""
        return [u.T @ part @ v for part, u, v in zip(parts, self.left, self.right, strict=True)]

    def turn_back(self, parts: Sequence[Tensor]) -> Parts:
        return [u @ part @ v.T for part, u, v in zip(parts, self.left, self.right, strict=True)]

    def scores(self, queries: Parts, sums: Parts, dampings: Sequence[float]) -> np.ndarray:
        """Return EK-FAC's scores (L, m, q): damping is relative to a layer's mean Λ."""
        found: Any = [0.0] * len(dampings)
        for q, b, values in zip(self.turn(queries), self.turn(sums), self.squares, strict=True):
            for number, damping in enumerate(dampings):
                weighted = q / (values + damping * values.mean())
                found[number] = found[number] + (b.flatten(1) @ weighted.flatten(1).T).double().numpy()
        return np.stack(found)


def factors(model: nn.Module, loss: Loss, batches: Sequence[Any], layers: Layers) -> list[tuple[Tensor, Tensor]]:
    """Return A (in, in) and S (out, out) of each layer, means over tokens."""
    totals: Any = [(0.0, 0.0)] * len(layers.names)
    tokens = 0
    for taps in passes(model, loss, batches, layers):
        flat = [tuple(part.flatten(0, 1) for part in each) for each in taps]
        totals = [tuple(total + (part.T @ part).double() for total, part in zip(both, parts, strict=True))
                  for both, parts in zip(totals, flat, strict=True)]  # fmt: skip
        tokens += len(flat[0][0])
    return [(a / tokens, s / tokens) for a, s in totals]


def with_squares(
    bases: Sequence[Basis], model: nn.Module, loss: Loss, batches: Sequence[Any], layers: Layers
) -> list[Parts]:
    """Return Λ in each of some bases, of one model's rows."""
    found = [layers.split(layers.zeros(1)) for _ in bases]
    rows = 0
    for taps in passes(model, loss, batches, layers):
        rows += len(taps[0][0])
        for basis, totals in zip(bases, found, strict=True):
            for (x, delta), u, v, total in zip(taps, basis.left, basis.right, totals, strict=True):
                total += gradients(x @ v, delta @ u).square_().sum(0)
    return [[total[0] / rows for total in totals] for totals in found]


class Along:
    """Watches a training: sums of its rows over subsets, and its weights at the ends of stretches of epochs.

    Parameters
    ----------
    layers, credit
        The layers; (m, n), what each row counts in each subset.
    ends
        The last epoch of each stretch; the first stretch is the first epoch.
    folder
        Where the sums are written, (m, p) float32 each.
    carries
        Whether momentum and decay are carried; with a constant rate and no decay, it is plain sums that they give, but
        for the last steps.
    """

    def __init__(self, layers: Layers, credit: Tensor, ends: Sequence[int], folder: Path, carries: bool = True) -> None:
        self.layers, self.credit, self.ends, self.folder = layers, credit, ends, folder
        self.weights: list[dict[str, Tensor]] = []
        self.rates: list[list[float]] = []  # of each stretch and layer: Σ lr / mean (√v̂ + ε), or Σ lr / (1 - μ)
        self.roots: Tensor | None = None  # √v̂ + ε at the end, (1, p)
        sizes = [out * entries for out, entries in layers.shapes]
        self._columns = [slice(sum(sizes[:number]), sum(sizes[: number + 1])) for number in range(len(sizes))]
        self._seen = 0
        self._plain = layers.zeros(len(credit))
        self._lr = 0.0
        self._weighted: Tensor | None = None  # sums with the rate, once that has changed in a stretch
        self._rate = [0.0] * len(layers.names)
        self._adam: Tensor | None = None
        self._carried = {
            name: (layers.zeros(len(credit)), layers.zeros(len(credit))) for name in ("first", "all") if carries
        }
        folder.mkdir(parents=True, exist_ok=True)

    @contextmanager
    def __call__(self, model: nn.Module, optimizer: Any, rows: Tensor, epoch: int) -> Iterator[None]:
        with tapping(model, self.layers.names) as found:
            yield
        adam = isinstance(optimizer, torch.optim.AdamW)
        if adam and self._adam is None:
            self._adam, self.roots = self.layers.zeros(len(self.credit)), self.layers.zeros(1)
        lr = optimizer.param_groups[0]["lr"]
        if self._weighted is None and self._lr not in (0.0, lr):
            self._weighted = self._plain * self._lr
        self._lr = lr
        credit = self.credit[:, rows] * len(rows)  # the loss is the mean over the batch
        with torch.no_grad():
            for number, name in enumerate(self.layers.names):
                own = gradients(*found[name]).flatten(1)
                self._place(self._plain, number).addmm_(credit, own)
                if self._weighted is not None:
                    self._place(self._weighted, number).addmm_(credit, own, alpha=lr)
                (self._add_adam if adam else self._add_sgd)(number, credit, own, optimizer, model, epoch)
        self._seen += len(rows)
        if self._seen == self.credit.shape[1]:
            self._seen = 0
            self._epoch_ends(epoch, model)

    def _place(self, held: Tensor, number: int) -> Tensor:
        """Return a layer's columns of vectors (m, p)."""
        return held[:, self._columns[number]]

    def _add_adam(self, number: int, credit: Tensor, own: Tensor, optimizer: Any, model: nn.Module, epoch: int) -> None:
        assert self._adam is not None
        assert self.roots is not None
        group, name = optimizer.param_groups[0], f"{self.layers.names[number]}.weight"
        state, lr, (beta, beta2) = optimizer.state[model.get_parameter(name)], group["lr"], group["betas"]
        t = float(state["step"])
        roots = (state["exp_avg_sq"] / (1 - beta2**t)).sqrt_().add_(group["eps"]).flatten()
        sums = credit @ own
        self._place(self._adam, number).addcdiv_(sums, roots, value=lr)
        self._place(self.roots, number).copy_(roots[None])
        self._rate[number] += lr / float(roots.mean())
        for which, (momentum, effect) in self._carried.items():
            m, e = self._place(momentum, number).mul_(beta), self._place(effect, number)
            if which == "all" or epoch == 0:
                m.add_(sums, alpha=1 - beta)
            e.mul_(1 - lr * group["weight_decay"]).addcdiv_(m, roots, value=lr / (1 - beta**t))

    def _add_sgd(self, number: int, credit: Tensor, own: Tensor, optimizer: Any, model: nn.Module, epoch: int) -> None:
        group = optimizer.param_groups[0]
        self._rate[number] += group["lr"] / (1 - group["momentum"])
        for which, (momentum, effect) in self._carried.items():
            m = self._place(momentum, number)
            m.addmm_(credit, own, beta=group["momentum"], alpha=float(which == "all" or epoch == 0))
            self._place(effect, number).add_(m, alpha=group["lr"])

    def _epoch_ends(self, epoch: int, model: nn.Module) -> None:
        if epoch == 0 and self._adam is not None:
            self._write("adam first", self._adam)
        if epoch not in self.ends:
            return
        stretch = len(self.weights)
        self._write(f"plain {stretch}", self._plain)
        self._write(f"lr {stretch}", self._plain * self._lr if self._weighted is None else self._weighted)
        self._plain.zero_()
        self._lr, self._weighted = 0.0, None
        self.weights.append({name: values.clone() for name, values in model.state_dict().items()})
        self.rates.append(self._rate)
        self._rate = [0.0] * len(self._rate)
        if epoch == self.ends[-1]:
            for name, (_, effect) in self._carried.items():
                self._write(f"carried {name}", effect)
            if self._adam is not None:
                self._write("adam all", self._adam)

    def _write(self, name: str, held: Tensor) -> None:
        np.save(self.folder / f"{name}.npy", held.numpy())
