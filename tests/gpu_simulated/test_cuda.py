# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels for cross_attention, compiled for Hopper: right results, no forbidden operation."""

from __future__ import annotations

import shutil

import pytest
import torch

from fastdistill.ops.cross_attention import reference
from tests.gpu_simulated import block, memory
from tests.gpu_simulated.cuda import compiled, gradients, kernel, outputs
from tests.gpu_simulated.driver import missing

REASON = missing() or (None if shutil.which("nvcc") else "no nvcc")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(REASON is not None, reason=str(REASON))]
SHAPES = [
    (40, 77, False),
    (40, 77, True),
    (64, 80, False),
    (64, 80, True),
    (72, 120, False),
    (80, 77, False),
    (160, 77, False),
]
#: The instruction that is removed, and what is then detected.
PLANTED = {
    "bar.sync": {memory.READ_AFTER_WRITE, memory.NO_BARRIER},
    "fence.proxy.async": {memory.NO_FENCE},
    "wgmma.wait_group": {block.ACCUMULATOR_READ, memory.NOT_AWAITED},
    "cp.async.wait_group": {memory.COPY_UNDER_WAY, memory.NOT_AWAITED},
}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    return compiled(tmp_path_factory.mktemp("ptx"))


def inputs(dim: int, keys: int, tokens: int, dtype: torch.dtype) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(dim)
    return [torch.randn((2, n, 2, dim), generator=g).to(dtype) for n in (tokens, keys, keys, tokens)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("chunks", [1, 2])
@pytest.mark.parametrize(("dim", "keys", "swizzled"), SHAPES)
def test_gradients(text: str, dim: int, keys: int, swizzled: bool, chunks: int, dtype: torch.dtype) -> None:
    """Each gradient is within the rounding of the products' operands, and no forbidden operation is found."""
    q, k, v, g = inputs(dim, keys, 400, dtype)
    mask = torch.rand(2, keys, generator=torch.Generator().manual_seed(1)) < 0.7 if chunks == 2 else None
    got, report = gradients(kernel(text, dim, dtype, swizzled), q, k, v, mask, dim**-0.5, g, chunks)
    assert not report, list(report.items())[:8]
    exact = [torch.empty(t.shape, dtype=torch.float32) for t in (q, k, v)]
    reference.cross_attention_backward(q, k, v, mask, None, dim**-0.5, g, *exact)
    for one, two in zip(got, exact, strict=True):
        assert (one.float() - two).norm() <= torch.finfo(dtype).eps * two.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("chunks", [1, 2])
@pytest.mark.parametrize(("dim", "keys", "swizzled"), SHAPES)
def test_outputs(text: str, dim: int, keys: int, swizzled: bool, chunks: int, dtype: torch.dtype) -> None:
    q, k, v, _ = inputs(dim, keys, 300, dtype)
    mask = torch.rand(2, keys, generator=torch.Generator().manual_seed(1)) < 0.7 if chunks == 2 else None
    chosen = kernel(text, dim, dtype, swizzled, forward=True)
    got, report = outputs(chosen, q, k, v, mask, dim**-0.5, chunks)
    assert not report, list(report.items())[:8]
    exact = torch.empty(q.shape)
    reference.cross_attention(q, k, v, mask, None, dim**-0.5, exact)
    assert (got.float() - exact).norm() <= torch.finfo(dtype).eps * exact.norm()


@pytest.mark.parametrize("pattern", PLANTED)
def test_an_instruction_that_it_lacks_is_found(text: str, pattern: str) -> None:
    q, k, v, g = inputs(80, 77, 300, torch.bfloat16)
    found: set[str] = set()
    try:
        _, report = gradients(kernel(text, 80, torch.bfloat16).without(pattern), q, k, v, None, 0.1, g, 1)
        found |= {what for (what, _), _ in report.items()}
    except memory.Fault as fault:
        found.add(str(fault))
    assert PLANTED[pattern] <= found, found
