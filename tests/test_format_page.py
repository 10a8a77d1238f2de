"""docs/store-format.md is enough to check a store's digests, and to write a store that the package accepts.

What is computed here follows the page's words, with zarr, NumPy, hashlib and crc32c alone.
"""

from __future__ import annotations

import hashlib
import json

import crc32c
import numpy as np
import pytest
import zarr
from conftest import random_rows
from numpy.testing import assert_array_equal
from zarr.codecs import Crc32cCodec

from ooc_influence import Dropout, GradientStore, Storage, fit_fisher, reduce_store, self_influence
from ooc_influence.errors import StoreDamagedError
from ooc_influence.store import LayerShape, Mask, ModuleBasis, ModuleMask
from ooc_influence.store.reduction import SjltReduction

ROWS = random_rows(23, 6)
LAYERS = [
    LayerShape("block.first", "linear", (3, 5), True, ("block.second", "it's")),
    LayerShape('a\\b "q"', "embedding", (4, 2), False, ("head",)),
    LayerShape("last\n\x07é\u200b\U000e0001", "linear", (2, 3), False),
]


def sha256(*parts: bytes) -> str:
    return hashlib.sha256(b"".join(parts)).hexdigest()


def quoted(text: str) -> str:
    """A string in the text of `mask_digest`."""
    mark = '"' if "'" in text and '"' not in text else "'"
    escapes = {"\\": "\\\\", mark: "\\" + mark, "\n": "\\n", "\r": "\\r", "\t": "\\t"}
    written = ""
    for letter in text:
        code = ord(letter)
        if letter in escapes:
            written += escapes[letter]
        elif letter.isprintable():
            written += letter
        else:
            written += f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}" if code < 65536 else f"\\U{code:08x}"
    return mark + written + mark


def mask_digest(group: zarr.Group) -> str:
    parts = []
    for number in range(len(list(group["mask"].group_keys()))):
        entries = group[f"mask/{number:05d}"]
        about = dict(entries.attrs)
        height, width = about["shape"]
        fields = [quoted(about["module"]), quoted(about["kind"]), f"({height}, {width})", str(about["bias"])]
        fields.append(str(entries["rows"].shape[0]))
        names = [quoted(name) for name in about["tied"]]
        if names:
            fields.append(f"({names[0]},)" if len(names) == 1 else f"({', '.join(names)})")
        parts.append(f"({', '.join(fields)})".encode())
        parts += [entries[name][:].astype(kind).tobytes() for name, kind in
                  (("rows", "<i4"), ("cols", "<i4"), ("weight", "<f4"))]  # fmt: skip
        if "mean_moment" in about:
            parts.append(repr(about["mean_moment"]).encode())
            shapes = {"left": (height, -1), "right": (width, -1), "second_moment": (-1,)}
            for name in [name for name in shapes if name in set(entries.array_keys())]:
                values = entries[name][:].reshape(shapes[name])
                parts += [f"('{name}', {values.shape})".encode(), values.tobytes()]
    return sha256(*parts)


def rows_digest(group: zarr.Group) -> str:
    layout = group.attrs["ooc_influence"]["layout"]
    size = layout["chunk_rows"]
    records = group["commits"][:]
    rows = 0
    for record in records.tolist():
        rows += record >> 32
        if record >> 32 < size:
            break
    parts = [str(rows).encode(), records[: -(-rows // size)].astype("<u8").tobytes()]
    if group["marks"].attrs["dropped"]:
        step = size * layout["group_chunks"]
        parts += [np.packbits(group["dropped"][low : min(rows, low + step)]).tobytes() for low in range(0, rows, step)]
    return sha256(*parts)


def attributes_digest(attributes: dict) -> str:
    rest = {name: value for name, value in attributes.items() if name != "digest"}
    return sha256(json.dumps(rest, sort_keys=True, separators=(", ", ": "), ensure_ascii=True).encode())


@pytest.fixture
def path(tmp_path):
    mask = Dropout(k=6, seed=3).draw(LAYERS)
    with GradientStore.create(
        tmp_path / "train.zarr", mask, storage=Storage(chunk_rows=3, group_chunks=1), attributes={"loss_kind": "é"}
    ) as store:
        store.append(ROWS, loss=np.arange(23))
    return store.path


def test_digests_are_what_the_page_says(path):
    group = zarr.open_group(path, mode="r")
    attributes = group.attrs["ooc_influence"]
    assert attributes["mask_digest"] == mask_digest(group)
    assert attributes["digest"] == attributes_digest(attributes)
    fit_fisher(path)
    before = rows_digest(group)
    assert group["curvature/default"].attrs["ooc_influence_curvature"]["rows_digest"] == before
    with GradientStore.open(path, mode="a") as store:
        store.drop([4, 17])
    fit_fisher(path)
    group = zarr.open_group(path, mode="r")
    assert group["curvature/default"].attrs["ooc_influence_curvature"]["rows_digest"] == rows_digest(group) != before


def test_sign_rows_are_what_the_page_says(tmp_path):
    k = 100
    with GradientStore.create(tmp_path / "s.zarr", Dropout(k=k).draw([LayerShape("fc", "linear", (10, 10), False)]),
                              dtype="sign") as store:  # fmt: skip
        store.append(random_rows(9, k), loss=np.ones(9))
    rows = GradientStore.open(tmp_path / "s.zarr").rows()
    group = zarr.open_group(tmp_path / "s.zarr", mode="r")
    a = max(2**m for m in range(11) if 2**m <= max(1, k / 8))
    c = -(-k // a)
    state, flips = 0, []
    for _ in range(k):
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        value = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        value = (value ^ value >> 27) * 0x94D049BB133111EB % 2**64
        flips.append(-1 if (value ^ value >> 31) >> 63 else 1)
    sylvester = np.ones((1, 1))
    while len(sylvester) < a:
        sylvester = np.block([[sylvester, sylvester], [sylvester, -sylvester]])
    R = np.zeros((a * c, k))
    for i in range(k):
        R[i % c :: c, i] = sylvester[:, i // c] * flips[i] / np.sqrt(a)
    bits = np.unpackbits(group["gradients"][:], axis=1)
    assert bits.shape[1] == -(-a * c // 8) * 8
    assert not bits[:, a * c :].any()
    represented = group["row_scale"][:][:, None] * ((2.0 * bits[:, : a * c] - 1) @ R)
    np.testing.assert_allclose(rows, represented, atol=1e-6)
    rotated = random_rows(9, k) @ R.T
    np.testing.assert_allclose(group["row_scale"][:], (rotated**2).sum(1) / np.abs(rotated).sum(1), rtol=1e-5)
    assert_array_equal(bits[:, : a * c], rotated >= 0)


def test_a_reduction_too(path, tmp_path):
    reduce_store(path, tmp_path / "basis.zarr", 3)
    group = zarr.open_group(tmp_path / "basis.zarr", mode="r")
    vectors = group["basis/vectors"][:].astype("<f4").tobytes()
    assert group.attrs["ooc_influence"]["reduction"]["digest"] == sha256(vectors)
    mask, drawn = GradientStore.open(path).mask, SjltReduction(6, 4, seed=2, nonzeros=3)
    GradientStore.create(tmp_path / "drawn.zarr", mask, reduction=drawn).close()
    facts = dict(zarr.open_group(tmp_path / "drawn.zarr", mode="r").attrs["ooc_influence"]["reduction"])
    digest = facts.pop("digest")
    assert digest == sha256(f"({quoted(facts.pop('name'))}, {', '.join(map(str, facts.values()))})".encode())


def array(group, name, values, chunks, *, check=False):
    filters = {"compressors": (Crc32cCodec(),) if check else None, "config": {"write_empty_chunks": True}}
    encoding = {"name": "default", "separator": "."}
    made = group.create_array(
        name, shape=values.shape, chunks=chunks, dtype=values.dtype, chunk_key_encoding=encoding, **filters
    )
    made[...] = values
    return made


def write_by_the_page(path) -> zarr.Group:
    """A store of 23 float32 rows in chunks of 4, two chunks a group, with nothing of the package's."""
    group = zarr.create_group(path)
    n, k, size, group_chunks = *ROWS.shape, 4, 2
    small = {"row_scale": np.ones(n, "<f4"), "loss": np.arange(n, dtype="<f4")}
    small["grad_norm"] = np.linalg.norm(ROWS, axis=1).astype("<f4")
    array(group, "gradients", ROWS, (size, k))
    for name, values in small.items():
        array(group, name, values, (size * group_chunks,))
    array(group, "dropped", np.zeros(n, bool), (size * group_chunks,), check=True)
    group.create_group("marks", attributes={"dropped": []})
    group.create_group("curvature")
    records = []
    for low in range(0, n, size):
        checksum = 0
        for values in (ROWS, *small.values()):
            checksum = crc32c.crc32c(values[low : low + size].tobytes(), checksum)
        records.append(len(ROWS[low : low + size]) << 32 | checksum)
    array(group, "commits", np.array(records, "<u8"), (group_chunks,), check=True)
    entries = group.create_group("mask/00000")
    entries.attrs.update({"module": "layer", "kind": "linear", "shape": [1, k], "bias": False, "tied": []})
    places = {"rows": np.zeros(k, "<i4"), "cols": np.arange(k, dtype="<i4"), "weight": np.ones(k, "<f4")}
    for name, values in places.items():
        array(entries, name, values, (k,), check=True)
    layout = {"k": k, "dtype": "float32", "chunk_rows": size, "group_chunks": group_chunks, "planned_rows": None,
              "ids": None, "columns": {}, "codec": None, "column_scale": False, "block": None}  # fmt: skip
    attributes = {"format": 3, "version": "other", "created": {"id": "5f"}, "p": k, "layout": layout}
    attributes["mask_digest"] = mask_digest(group)
    group.attrs["ooc_influence"] = attributes | {"digest": attributes_digest(attributes)}
    return group


def test_a_store_written_by_the_page_is_accepted(tmp_path):
    group = write_by_the_page(tmp_path / "own.zarr")
    store = GradientStore.open(tmp_path / "own.zarr")
    assert store.verify() == []
    assert_array_equal(store.rows(), ROWS)
    assert store.mask.p == 6
    assert store.rows_digest() == rows_digest(group)
    fit_fisher(tmp_path / "own.zarr")
    assert np.isfinite(self_influence(tmp_path / "own.zarr")).all()
    with GradientStore.open(tmp_path / "own.zarr", mode="a") as more:
        more.append(ROWS[:2], loss=np.zeros(2))
    assert GradientStore.open(tmp_path / "own.zarr").n == 25


def test_another_mask_is_not(tmp_path):
    group = write_by_the_page(tmp_path / "own.zarr")
    group["mask/00000"].attrs["tied"] = ["other"]
    with pytest.raises(StoreDamagedError, match="expected mask digest"):
        _ = GradientStore.open(tmp_path / "own.zarr").mask


@pytest.mark.parametrize("left", [True, False])
def test_a_kronecker_basis_too(tmp_path, left):
    layer = LAYERS[0]
    rows, cols = np.array([0, 0, 2], np.int32), np.array([1, 4, 1], np.int32)
    vectors = np.random.default_rng(0).random((8, 2)).astype(np.float32)
    basis = ModuleBasis(vectors[:3] if left else None, vectors[3:], np.array([1.0, 0.1, 1e-9]), 1 / 3)
    mask = Mask((ModuleMask(layer, rows, cols, np.ones(3, np.float32), basis),))
    GradientStore.create(tmp_path / "basis.zarr", mask).close()
    group = zarr.open_group(tmp_path / "basis.zarr", mode="r")
    assert group.attrs["ooc_influence"]["mask_digest"] == mask_digest(group) == mask.digest
