"""Influence with whole gradients of linear layers, written to be obviously right: what stored rows are compared with.

Gradients are made and used a group of layers at a time, so that p entries a row never are in memory together. Every
curvature gives, for each of a list of dampings d, three arrays that normalised scores are made from as well::

    Scored.scores (q, n) = g_qᵀ C⁻¹ g_i        Scored.rows (n,) = g_iᵀ C⁻¹ g_i        Scored.queries (q,) = g_qᵀ C⁻¹ g_q

    dot         C = I                                  diagonal    C = Λ + d · mean Λ of the layer, Λ = mean g²
    adam        C = √v + d · mean √v, v AdamW's second moments
    empirical   C = F + d · tr(F)/m, F of the rows     true        the same, of rows with labels sampled from the model
    kfac, ekfac C = U (Λ + d · mean Λ of the layer) Uᵀ, U = U_S ⊗ U_A, eigenvectors of S = E[δδᵀ] and A = E[xxᵀ] over
                tokens; Λ of K-FAC = tokens · eigenvalues of S and A, of EK-FAC = mean square in the basis
    ekfac, one λ    the same with λ = d · tr(Λ)/m in every layer, m the rows and tr(Λ) = E‖g‖² of all layers
    shrunk      in EK-FAC's whitened coordinates, C = R̃ᵀR̃/m + d · τ, R̃ whitened rows with sampled labels, τ their mean
                square; d is the shrinkage, 20 by default

(Martens and Grosse 2015, arXiv 1503.05671; George et al. 2018, arXiv 1806.03884; Grosse et al. 2023, arXiv 2308.03296.)
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from scipy.linalg import solve_triangular
from torch import Tensor, nn

Loss = Callable[[nn.Module, Any], Tensor]
Floats = np.ndarray[Any, np.dtype[np.floating[Any]]]
DAMPINGS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
ONE_LAMBDA = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
SHRINKAGES = (2.0, 5.0, 10.0, 20.0, 40.0, 100.0)  # of τ


@dataclass
class Scored:
    """Scores and squared norms under one curvature and damping; sums over layers are made by ``+=``."""

    scores: Floats
    rows: Floats
    queries: Floats

    @classmethod
    def of(cls, queries: Tensor, rows: Tensor, left: Tensor | None = None) -> Scored:
        """Return those of gradients (q, e) and (n, e), the inverse diagonal ``left`` (e,) between them."""
        weighted = (queries, rows) if left is None else (queries * left, rows * left)
        return cls(
            (weighted[0] @ rows.T).double().numpy(),
            torch.linalg.vecdot(weighted[1], rows).double().numpy(),
            torch.linalg.vecdot(weighted[0], queries).double().numpy(),
        )

    def __iadd__(self, other: Scored) -> Scored:
        self.scores += other.scores
        self.rows += other.rows
        self.queries += other.queries
        return self

    def normalized(self, how: str) -> Floats:
        """Return scores as they are (``"none"``), by the row's norm (``"train"``) or both (``"cosine"``)."""
        if how == "none":
            return self.scores
        train = np.sqrt(np.maximum(self.rows, 1e-300))
        return self.scores / (train if how == "train" else train * np.sqrt(np.maximum(self.queries, 1e-300))[:, None])


@dataclass
class Tapped:
    """What one linear layer received and gave back: inputs (n, t, in), output gradients (n, t, out)."""

    inputs: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)

    def moments(self) -> tuple[Tensor, Tensor]:
        """Return A (in, in) and S (out, out), means over tokens, float64."""
        return tuple(_second_moment(parts) for parts in (self.inputs, self.outputs))  # type: ignore[return-value]

    def gradients(self) -> Tensor:
        """Return (n, out · in) float32."""
        parts = [torch.einsum("nto,nti->noi", d, x) for x, d in zip(self.inputs, self.outputs, strict=True)]
        return torch.cat(parts).flatten(1)


def _second_moment(parts: Sequence[Tensor]) -> Tensor:
    flat = [part.flatten(0, 1).float() for part in parts]
    total = sum((part.T @ part).double() for part in flat)
    return torch.as_tensor(total) / sum(len(part) for part in flat)


def linear_layers(model: nn.Module, part: str = "") -> dict[str, nn.Linear]:
    """Return a model's linear layers by name, those whose name contains ``part``."""
    return {name: each for name, each in model.named_modules() if type(each) is nn.Linear and part in name}


def tap(model: nn.Module, loss: Loss, batches: Sequence[Any], names: Sequence[str]) -> dict[str, Tapped]:
    """Return the inputs and output gradients of layers over batches, for the sum of the samples' losses."""
    held = {name: Tapped() for name in names}
    modules = dict(model.named_modules())

    def listen(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            held[name].inputs.append(inputs[0].detach())
            output.register_hook(lambda gradient: held[name].outputs.append(gradient.detach()))

        return hook

    with ExitStack() as stack:
        for name in names:
            stack.callback(modules[name].register_forward_hook(listen(name)).remove)
        for batch in batches:
            with torch.enable_grad():
                loss(model, batch).sum().backward()
            model.zero_grad()
    return held


@dataclass
class Layer:
    """One layer's gradients: of queries (q, e), train rows (n, e) and rows with sampled labels (m, e)."""

    name: str
    shape: tuple[int, int]
    queries: Tensor
    rows: Tensor
    sampled: Tensor
    moments: tuple[Tensor, Tensor]
    tokens: int

    def rotated(self) -> tuple[Layer, Tensor]:
        """Return the layer in its Kronecker basis, and K-FAC's Λ (e,)."""
        (a, ua), (s, us) = (torch.linalg.eigh(moment) for moment in self.moments)
        turn = lambda rows: torch.einsum(  # noqa: E731
            "noi,op,ij->npj", rows.view(-1, *self.shape), us.float(), ua.float()
        ).flatten(1)
        product = (self.tokens * s.clamp(min=0)[:, None] * a.clamp(min=0)).flatten().float()
        queries, rows, sampled = (turn(part) for part in (self.queries, self.rows, self.sampled))
        return Layer(self.name, self.shape, queries, rows, sampled, self.moments, self.tokens), product


def layers(
    model: nn.Module, loss: Loss, batches: Mapping[str, Sequence[Any]], groups: Sequence[Sequence[str]],
    factors: str = "rows",
) -> Iterator[Layer]:  # fmt: skip
    """Yield layers with gradients of the batches ``queries``, ``rows`` and ``sampled``; factors of one of these."""
    for names in groups:
        taps = {kind: tap(model, loss, parts, names) for kind, parts in batches.items()}
        for name in names:
            own = {kind: taps[kind].pop(name) for kind in taps}
            weight = dict(model.named_modules())[name].weight
            tokens = own[factors].inputs[0].shape[1]
            moments = own[factors].moments()
            yield Layer(name, tuple(weight.shape), *(own[kind].gradients() for kind in ("queries", "rows", "sampled")),
                        moments, tokens)  # fmt: skip


def _square(rows: Tensor, step: int = 1024) -> Tensor:
    """Return rows @ rows.T from its lower triangle."""
    found = rows.new_empty(len(rows), len(rows))
    for low in range(0, len(rows), step):
        part = rows[low : low + step] @ rows[: low + step].T
        found[low : low + step, : low + step] = part
        found[: low + step, low : low + step] = part.T
    return found


class Grams:
    """Products of rows with rows, for curvatures of rows: C = RᵀR/m + λ, solved with m x m matrices."""

    def __init__(self) -> None:
        self.parts: dict[str, Floats] = {}

    def add(self, sampled: Tensor, queries: Tensor, rows: Tensor) -> None:
        products = {"rr": _square(sampled), "rq": sampled @ queries.T, "ri": sampled @ rows.T}
        for name, product in products.items():
            self.parts[name] = self.parts.get(name, 0.0) + product.double().numpy()

    def scored(self, plain: Scored, lam: float | None, damping: float = 0.0, count: int | None = None) -> Scored:
        """Return scores with the first ``count`` rows at λ; without one, at damping · tr(F)/m."""
        square = self.parts["rr"][:count, :count]
        m = len(square)
        lam = damping * np.trace(square) / m / m if lam is None else lam
        factor = np.linalg.cholesky(square + m * lam * np.eye(m))
        solved = [solve_triangular(factor, self.parts[name][:count], lower=True) for name in ("rq", "ri")]
        return Scored(
            (plain.scores - solved[0].T @ solved[1]) / lam,
            (plain.rows - np.square(solved[1]).sum(0)) / lam,
            (plain.queries - np.square(solved[0]).sum(0)) / lam,
        )


Method = tuple[str, float | None]  # its name, and a damping


def dense_scores(
    parts: Iterator[Layer], *, adam: Mapping[str, Tensor] | None = None, priors: Sequence[float] = (0.03,),
    counts: Sequence[int] = (), own_coordinates: bool = True, energy_of_rows: float | None = None,
) -> dict[Method, Scored]:  # fmt: skip
    """Return the scores of every method of this file.

    Parameters
    ----------
    parts
        Layers, from :func:`layers`.
    adam
        AdamW's second moments by parameter's name.
    priors, counts
        Dampings of the prior, and numbers of sampled rows (ascending), of ``shrunk`` and ``true``.
    own_coordinates
        Also the methods that need no basis.
    energy_of_rows
        E‖g‖² over rows, of all layers together; None leaves out ``ekfac, one λ``.
    """
    found: dict[Method, Scored] = {}
    empirical, true, shrunk = Grams(), Grams(), {prior: Grams() for prior in priors}
    energy, entries = dict.fromkeys(priors, 0.0), 0

    def put(name: str, damping: float | None, part: Scored) -> None:
        if (name, damping) in found:
            found[name, damping] += part
        else:
            found[name, damping] = part

    for layer in parts:
        if own_coordinates:
            put("dot", None, Scored.of(layer.queries, layer.rows))
            metrics = {"diagonal": layer.rows.square().mean(0)}
            if adam is not None:
                metrics["adam"] = adam[f"{layer.name}.weight"].sqrt().flatten()
            for name, values in metrics.items():
                for damping in DAMPINGS:
                    put(name, damping, Scored.of(layer.queries, layer.rows, 1 / (values + damping * values.mean())))
            empirical.add(layer.rows, layer.queries, layer.rows)
            if counts:  # the first of them: the others only follow the prior
                true.add(layer.sampled[: counts[0]], layer.queries, layer.rows)
        turned, product = layer.rotated()
        exact = turned.rows.square().mean(0)
        for name, values in (("kfac", product), ("ekfac", exact)):
            for damping in DAMPINGS:
                put(name, damping, Scored.of(turned.queries, turned.rows, 1 / (values + damping * values.mean())))
        for damping in ONE_LAMBDA if energy_of_rows is not None else ():
            lam = damping * energy_of_rows / len(turned.rows)
            put("ekfac, one λ", damping, Scored.of(turned.queries, turned.rows, 1 / (exact + lam)))
        entries += len(exact)
        for prior in priors if counts else ():
            whitening = (exact + prior * exact.mean()).rsqrt()
            white = turned.sampled * whitening
            energy[prior] += float(white.square().mean(0).double().sum())
            shrunk[prior].add(white, turned.queries * whitening, turned.rows * whitening)
        print(f"{layer.name}: done", file=sys.stderr, flush=True)
    for damping in (*DAMPINGS, 3.0, 10.0) if own_coordinates else ():
        found["empirical", damping] = empirical.scored(found["dot", None], None, damping)
        for count in counts[:1]:
            found[f"true {count}", damping] = true.scored(found["dot", None], None, damping)
    for prior, grams in shrunk.items() if counts else ():
        for count in counts:
            for shrinkage in SHRINKAGES:
                lam, plain = shrinkage * energy[prior] / entries, found["ekfac", prior]
                found[f"shrunk {count}, prior {prior}", shrinkage] = grams.scored(plain, lam, count=count)
    return found
