"""Directions in parameter space: the adjoint of extraction, and derivatives of losses along them.

A row of a store is linear in the gradient, row = C ∇ℓ: kept entries, weighted, and possibly reduced. So the product of
a row with a vector v is the derivative of the loss along Cᵀ v, a change of the parameters. Derivatives of many losses
along one direction, such as those of a document's tokens, take a single pass in forward mode (Griewank and Walther
2008, "Evaluating Derivatives", chapter 3), where their gradients would take one backward pass each.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from ooc_influence.errors import InputError, UnsupportedModelError, listed
from ooc_influence.extract.entries import Entries, is_coded
from ooc_influence.extract.layers import find_uses, layer_parameters
from ooc_influence.store import GradientStore, LograReduction, ModuleMask

Floats = npt.NDArray[np.float32]
Direction = Mapping[str, Tensor]
PartLosses = Callable[[Any, Any], Tensor]


def entry_direction(store: GradientStore, vector: Floats) -> Floats:
    """Return what a vector of a store's columns is along the kept entries, (k,): the reduction's transpose times it.

    Raises
    ------
    InputError
        For a store of LoGra's projections, which keeps no entries.
    """
    reduction = store.reduction
    if reduction is None:
        return vector
    if isinstance(reduction, LograReduction):
        raise InputError(
            f"expected a store of kept entries, or of a reduction of these; received {store.path}, of LoGra's "
            "projections: extract with another compressor"
        )
    out = np.empty(reduction.rows, np.float32)
    for first, block in reduction.blocks(reduction.rows):
        np.dot(block, vector, out=out[first : first + len(block)])
    return out


def parameter_direction(model: nn.Module, store: GradientStore, vector: Floats) -> Direction:
    """Return the direction along which a loss's derivative is its row's product with a vector.

    Parameters
    ----------
    model : nn.Module
        The model that the store was extracted with.
    store : GradientStore
        (n, d).
    vector : (d,) float32
        Such as a preconditioned query.

    Returns
    -------
    mapping of str to Tensor
        A change of some parameters, by their names in the model: float32, on the parameters' devices.

    Raises
    ------
    InputError
        For a store of LoGra's projections.
    UnsupportedModelError
        If entries are kept of a quantised weight, which has no direction.
    MismatchError
        If the model lacks a layer of the store.
    """
    values, first = entry_direction(store, vector), 0
    modules = store.mask.modules
    uses = {use.layer: use for use in find_uses(model, [kept.layer for kept in modules]) if use.own}
    names = {parameter: name for name, parameter in model.named_parameters()}
    direction: dict[str, Tensor] = {}
    coded: list[str] = []
    for number, kept in enumerate(modules):
        weighted = torch.from_numpy(values[first : first + len(kept.rows)] * kept.weight)
        first += len(kept.rows)
        if not len(kept.rows):
            continue
        use = uses[number]
        parameters = layer_parameters(*use.first)
        weightless = "weight" not in parameters and kept.layer.shape[1] > kept.layer.bias and not use.kind.whole_call
        if weightless or any(map(is_coded, parameters.values())):
            coded.append(use.name)
            continue
        for name, tangent in _of_layer(kept, use.kind, use.first[1], parameters, weighted):
            place = names[parameters[name]]
            direction[place] = tangent if place not in direction else direction[place] + tangent
    if coded:
        raise UnsupportedModelError(
            f"expected weights that have a derivative; received quantised ones: {listed(coded, 4)}: load the model in "
            "float32 or bfloat16, with other_model allowed, or extract an adapter's entries only"
        )
    return direction


def _of_layer(
    kept: ModuleMask, kind: type[Entries], module: nn.Module, parameters: Mapping[str, nn.Parameter], weighted: Tensor
) -> Iterator[tuple[str, Tensor]]:
    """Yield the directions of a layer's parameters, by their names in its module."""
    if kept.basis is None or not kept.basis.rotates:
        for located in kind.locate(kept.layer, module, kept.rows, kept.cols):
            parameter = parameters[located.parameter]
            flat = torch.zeros(parameter.numel())
            flat[torch.from_numpy(located.positions)] = weighted[torch.from_numpy(located.entries)]
            yield located.parameter, flat.view(parameter.shape).to(parameter.device)
        return
    matrix, bias = _unrotated(kept, weighted), kept.layer.bias
    if bias and "bias" in parameters:
        yield "bias", matrix[:, -1].reshape(parameters["bias"].shape).to(parameters["bias"].device)
    if "weight" in parameters:
        weight = parameters["weight"]
        zeros = torch.zeros(weight.shape, requires_grad=True)
        with torch.enable_grad():  # weight_matrix is a permutation: its derivative is its inverse
            (tangent,) = torch.autograd.grad(
                kind.weight_matrix(zeros), zeros, matrix[:, : matrix.shape[1] - bias].contiguous()
            )
        yield "weight", tangent.to(weight.device)


def _unrotated(kept: ModuleMask, weighted: Tensor) -> Tensor:
    """Return U_S M U_Aᵀ, (R, C), of values at kept entries, M."""
    assert kept.basis is not None
    rows, at_rows = np.unique(kept.rows, return_inverse=True)
    cols, at_cols = np.unique(kept.cols, return_inverse=True)
    matrix = torch.zeros(len(rows), len(cols))
    matrix[torch.from_numpy(at_rows), torch.from_numpy(at_cols)] = weighted
    return _side(_side(matrix, rows, kept.basis.left, kept.layer.shape[0]).t(), cols, kept.basis.right,
                 kept.layer.shape[1]).t()  # fmt: skip


def _side(matrix: Tensor, indices: npt.NDArray[Any], vectors: Floats | None, size: int) -> Tensor:
    """Return kept coordinates (m, ·) of a side in the layer's own, (size, ·)."""
    if vectors is not None:
        return torch.from_numpy(np.ascontiguousarray(vectors)) @ matrix
    out = matrix.new_zeros((size, matrix.shape[1]))
    out[torch.from_numpy(indices).long()] = matrix
    return out


class _Losses(nn.Module):
    """A model with its losses as its output, for :func:`torch.func.functional_call`."""

    def __init__(self, model: nn.Module, losses: PartLosses) -> None:
        super().__init__()
        self.model, self._losses = model, losses

    def forward(self, batch: Any) -> Tensor:
        return self._losses(self.model, batch)


class Derivatives(NamedTuple):
    """Losses, and their derivatives along a direction, of one shape; float32 or wider."""

    losses: Tensor
    along: Tensor


def directional_derivatives(model: nn.Module, losses: PartLosses, batch: Any, direction: Direction) -> Derivatives:
    """Return losses, and the derivative of each along a direction.

    In one forward pass; where an operation has no forward-mode derivative, in one forward pass and two backward ones.

    Parameters
    ----------
    model : nn.Module
        In evaluation mode (:func:`ooc_influence.extract.taps.tapped`).
    losses : callable (model, batch) -> tensor
        Of any shape.
    batch : any
        On the model's device.
    direction : mapping of str to Tensor
        From :func:`parameter_direction`.

    Raises
    ------
    UnsupportedModelError
        If neither way can differentiate the model.
    """
    named = dict(model.named_parameters())
    size = max((float(tangent.abs().max()) for tangent in direction.values()), default=0.0) or 1.0
    tangents = {name: (tangent / size).to(named[name].dtype) for name, tangent in direction.items()}
    with torch.inference_mode(False), sdpa_kernel(SDPBackend.MATH):  # fused attention has no forward mode
        try:
            values, along = _forward(model, losses, batch, tangents)
        except (RuntimeError, NotImplementedError) as error:
            if "forward AD" not in str(error) and "jvp" not in str(error):
                raise
            values, along = _backward(model, losses, batch, tangents, error)
    wide = torch.promote_types(along.dtype, torch.float32)
    return Derivatives(values.to(wide), along.to(wide) * size)


def _forward(model: nn.Module, losses: PartLosses, batch: Any, tangents: Direction) -> tuple[Tensor, Tensor]:
    named = dict(model.named_parameters())
    with torch.no_grad(), forward_ad.dual_level(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit", DeprecationWarning)  # PyTorch's own use, for its decompositions
        duals = {f"model.{name}": forward_ad.make_dual(named[name], value) for name, value in tangents.items()}
        found = forward_ad.unpack_dual(functional_call(_Losses(model, losses), duals, (batch,)))
        along = torch.zeros_like(found.primal) if found.tangent is None else found.tangent
        return found.primal.detach().clone(), along.detach().clone()


def _backward(
    model: nn.Module, losses: PartLosses, batch: Any, tangents: Direction, error: Exception
) -> tuple[Tensor, Tensor]:
    """Return the same by differentiating the product of the gradient of Σ u ℓ with the direction, by u."""
    named = dict(model.named_parameters())
    chosen = [named[name] for name in tangents]
    flags = [parameter.requires_grad for parameter in chosen]
    try:
        for parameter in chosen:
            parameter.requires_grad_(True)
        with torch.enable_grad():
            values = losses(model, batch)
            weights = torch.ones_like(values, requires_grad=True)
            gradients = torch.autograd.grad((values * weights).sum(), chosen, create_graph=True, allow_unused=True)
            terms = [(g * t).sum() for g, t in zip(gradients, tangents.values(), strict=True) if g is not None]
            along = torch.zeros_like(values)
            if terms:
                (along,) = torch.autograd.grad(torch.stack(terms).sum(), weights)
            return values.detach(), along.detach()
    except (RuntimeError, NotImplementedError) as second:
        raise UnsupportedModelError(
            f"expected a model with derivatives along a direction; received {type(model).__name__}: {error}; and by "
            f"differentiating twice: {second}: load it with attn_implementation='eager', or without custom kernels"
        ) from second
    finally:
        for parameter, flag in zip(chosen, flags, strict=True):
            parameter.requires_grad_(flag)
