"""The Triton kernel against float64, in Triton's interpreter, or on a GPU."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch.testing import assert_close

from ooc_influence.extract.entries import linear

SHAPES = [(1, 1, 3, 4, 1), (3, 37, 20, 11, 300), (2, 70, 130, 5, 129), (4, 32, 8, 8, 128)]


def case(b, t, inputs, outputs, m, dtype, device):
    generator = torch.Generator().manual_seed(b * t + m)
    x = torch.randn(inputs, b, t, generator=generator).to(device, dtype).permute(1, 2, 0)  # strided
    delta = torch.randn(1, t, outputs, generator=generator).to(device, dtype).expand(b, t, outputs)
    rows = torch.randint(0, outputs, (m,), generator=generator, dtype=torch.int32).to(device)
    cols = torch.randint(0, inputs + 1, (m,), generator=generator, dtype=torch.int32).to(device)
    return x, delta, rows, cols


def expected(x, delta, rows, cols):
    ones = torch.cat([x, torch.ones_like(x[..., :1])], 2).double()
    return (delta.double()[..., rows.long()] * ones[..., cols.long()]).sum(1)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="runs inside test_in_the_interpreter")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_kernel(shape, dtype):
    given = case(*shape, dtype, "cpu")
    assert linear.usable(given[0])
    assert_close(linear.sampled_outer(*given).double(), expected(*given), rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="is the interpreter")
def test_in_the_interpreter():
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "test_the_kernel", __file__],
        env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert "12 passed" in done.stdout


def test_without_triton_or_gpu_torch_does_it():
    if os.environ.get("TRITON_INTERPRET") != "1":
        assert not linear.usable(torch.zeros(1))
    assert not linear.usable(torch.zeros(1, dtype=torch.float64))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [*SHAPES, (4, 2048, 4096, 4096, 4000), (1, 2048, 2048, 8192, 65536)])
def test_on_a_gpu(shape, dtype):
    given = case(*shape, dtype, "cuda")
    assert linear.usable(given[0])
    assert_close(linear.sampled_outer(*given).double(), expected(*given), rtol=1e-3, atol=1e-2)
