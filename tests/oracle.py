"""The dense float64 oracle: written to be obviously right, slow, and independent of the package's own arithmetic."""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch.func import functional_call, grad
from torch.utils import _pytree as pytree

from ooc_influence.extract.layers import find_uses


def per_sample_gradients(model, loss_of_sample, samples, layers):
    """Full float64 gradients of the given layers (``LayerShape``), (n, p): their entry matrices, row by row.

    ``loss_of_sample(model_function, sample)`` returns the scalar loss of one sample.
    """
    double = copy.deepcopy(model).double().eval()
    parameters = {name: value.detach() for name, value in double.named_parameters()}

    def loss(values, sample):
        return loss_of_sample(lambda *inputs: functional_call(double, values, inputs), sample)

    rows = []
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        for sample in samples:
            found = grad(loss)(parameters, sample)
            parts = [entry_matrix(layer, found).flatten() for layer in layers]
            rows.append(torch.cat(parts).numpy())
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    return np.stack(rows)


def entry_matrix(layer, gradients):
    """The entry matrix of a layer, from the gradients of all parameters by name."""
    prefix = f"{layer.name}." if layer.name else ""
    own = {name.removeprefix(prefix): value for name, value in gradients.items() if name.startswith(prefix)}
    if layer.kind == "func":  # its matrix is one row
        flat = torch.cat([value.flatten() for value in own.values()])
        return flat[: layer.entries][None]
    if layer.kind == "bias":
        return own["bias"].flatten()[:, None]
    weight = own["weight"]
    if layer.kind == "transposed_linear":
        weight = weight.T
    elif layer.kind == "conv":
        weight = weight.flatten(1)
    elif layer.kind.endswith("_norm"):
        weight = weight.flatten()[:, None]
    return torch.cat([weight, own["bias"].flatten()[:, None]], dim=1) if layer.bias else weight


def keep(gradients, mask):
    """The masked, weighted columns of full gradients, (n, k)."""
    parts, first = [], 0
    for module in mask.modules:
        height, width = module.layer.shape
        block = gradients[:, first : first + height * width].reshape(len(gradients), height, width)
        parts.append(block[:, module.rows, module.cols] * module.weight.astype(np.float64))
        first += height * width
    return np.concatenate(parts, axis=1)


def fisher(gradients):
    gradients = np.asarray(gradients, np.float64)
    return gradients.T @ gradients / len(gradients)


def damping(matrix, factor=0.1, rows=None):
    """λ, relative to what ``rows`` rows (by default as many as there are columns, or more) can span."""
    return factor * np.trace(matrix) / min(len(matrix), len(matrix) if rows is None else rows)


def scores(queries, gradients, value, matrix=None):
    matrix = fisher(gradients) if matrix is None else matrix
    damped = matrix + value * np.eye(len(matrix))
    return np.asarray(queries, np.float64) @ np.linalg.solve(damped, np.asarray(gradients, np.float64).T)


def self_influence(gradients, value, matrix=None):
    return np.diag(scores(gradients, gradients, value, matrix))


def located_gradients(model, loss, samples, mask):
    """The kept, weighted entries of ``torch.autograd``'s float64 gradients, one sample at a time, (n, k).

    ``loss(model, batch)`` returns (1,) losses for a sample, which is a batch of one. Entries are found in the
    parameters by the layer kinds' ``locate``.
    """
    double = copy.deepcopy(model).double().eval()
    for parameter in double.parameters():
        parameter.requires_grad_(True)
    places = []
    own = [use for use in find_uses(double, [m.layer for m in mask.modules]) if use.own]  # not what is tied to them
    for kept, use in zip(mask.modules, own, strict=True):
        found = use.kind.locate(kept.layer, use.module, kept.rows, kept.cols)
        named = dict(use.module.named_parameters(remove_duplicate=False))
        places.append([(named[place.parameter], place) for place in found])
        assert sum(len(located.entries) for located in found) == len(kept.rows)
    rows = []
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        for sample in samples:
            double.zero_grad()
            sample = pytree.tree_map_only(torch.Tensor, lambda v: v.double() if v.is_floating_point() else v, sample)
            loss(double, sample).sum().backward()
            row = []
            for kept, found in zip(mask.modules, places, strict=True):
                values = np.zeros(len(kept.rows))
                for parameter, place in found:
                    if parameter.grad is not None:
                        values[place.entries] = parameter.grad.flatten()[torch.from_numpy(place.positions)].numpy()
                row.append(values * kept.weight)
            rows.append(np.concatenate(row))
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    return np.stack(rows)


def assert_rows_are_located(store, model, loss, samples, *, tolerance=2e-5):
    """Compare a store's rows with :func:`located_gradients`, layer by layer; every layer has some."""
    expected, first = located_gradients(model, loss, samples, store.mask), 0
    rows = store.rows()
    for kept in store.mask.modules:
        part = slice(first, first + len(kept.rows))
        scale = np.abs(expected[:, part]).max()
        assert scale > 0, kept.layer.name
        np.testing.assert_allclose(
            rows[:, part], expected[:, part], rtol=0, atol=tolerance * scale, err_msg=kept.layer.name
        )
        first = part.stop
