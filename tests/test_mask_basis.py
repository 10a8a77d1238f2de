"""Masks in a Kronecker basis: written, read back, told apart by their digests."""

from dataclasses import replace

import numpy as np
import pytest

from ooc_influence.store import GradientStore, LayerShape, Mask, ModuleBasis, ModuleMask


def module(seed: int = 0, *, left: bool = True) -> ModuleMask:
    rng = np.random.default_rng(seed)
    layer = LayerShape("fc", "linear", (6, 5), True)
    rows, cols = np.array([0, 0, 3, 5], np.int32), np.array([1, 4, 1, 2], np.int32)
    basis = ModuleBasis(
        rng.standard_normal((6, 3)).astype(np.float32) if left else None,
        rng.standard_normal((5, 3)).astype(np.float32),
        rng.random(4),
        0.25,
    )
    return ModuleMask(layer, rows, cols, np.ones(4, np.float32), basis)


@pytest.mark.parametrize("left", [True, False])
def test_a_basis_is_read_back(tmp_path, left):
    mask = Mask((module(left=left),))
    GradientStore.create(tmp_path / "s.zarr", mask).close()
    read = GradientStore.open(tmp_path / "s.zarr").mask
    assert read.digest == mask.digest
    assert read.has_basis
    basis, expected = read.modules[0].basis, mask.modules[0].basis
    for name in ("left", "right", "second_moment"):
        np.testing.assert_array_equal(getattr(basis, name), getattr(expected, name))
    assert basis.mean_moment == expected.mean_moment
    assert read.basis_bytes == 4 * (18 * left + 15) + 32


def test_the_digest_tells_bases_apart():
    kept = module()
    changes = {
        "left": kept.basis.left + 1, "right": kept.basis.right + 1, "second_moment": kept.basis.second_moment + 1,
        "mean_moment": 0.5,
    }  # fmt: skip
    others = [replace(kept, basis=replace(kept.basis, **{name: value})) for name, value in changes.items()]
    digests = {Mask((each,)).digest for each in [kept, replace(kept, basis=None), *others]}
    assert len(digests) == 6
