# SPDX-License-Identifier: Apache-2.0
"""The building blocks of the C++ kernels: Philox, dtype conversions, equal results on every instruction set."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from fastdistill.ops import _native, feature_match, noise_gather, use
from tests.ops import oracle
from tests.ops.test_feature_match import DISTANCES, make
from tests.ops.test_noise_gather import banks
from tests.ops.test_philox import VECTORS

pytestmark = pytest.mark.skipif(_native.cpu_reason() is not None, reason=str(_native.cpu_reason()))
ISAS = _native.cpu().isas() if _native.cpu_reason() is None else []


def test_published_vectors() -> None:
    for counter, key, expected in VECTORS:
        inputs = np.array(counter, np.uint32), np.array(key, np.uint32)
        words, normals = np.zeros(4, np.uint32), np.zeros(4, np.float32)
        _native.cpu().philox4x32(*(a.ctypes.data for a in (*inputs, words, normals)), 1)
        assert tuple(int(w) for w in words) == expected
        exact = oracle.normals(words[None].astype(np.uint64), 4, np.float64)
        assert np.abs(normals - exact).max() < 1.5e-6


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("dtype", "number"), [(torch.bfloat16, 1), (torch.float16, 2)], ids=str)
def test_conversions_are_torchs(isa: str, dtype: torch.dtype, number: int) -> None:
    cpu = _native.cpu()
    before = cpu.isa()
    cpu.use_isa(isa)
    try:
        every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
        wide = torch.empty(2**16)
        cpu.convert(every.data_ptr(), number, wide.data_ptr(), 0, 2**16)
        assert torch.equal(wide.view(torch.int32)[~wide.isnan()], every.float().view(torch.int32)[~wide.isnan()])
        assert torch.equal(wide.isnan(), every.isnan())
        g = torch.Generator().manual_seed(0)
        bits = torch.randint(-(2**31), 2**31, (2**18,), generator=g, dtype=torch.int64).to(torch.int32)
        values = torch.cat([bits.view(torch.float32), every.float(), every.float() * (1 + 2.0**-9)])
        narrow = torch.empty(len(values), dtype=dtype)
        cpu.convert(values.data_ptr(), 0, narrow.data_ptr(), number, len(values))
        expected = values.to(dtype)
        kept = ~values.isnan()
        assert torch.equal(narrow.view(torch.int16)[kept], expected.view(torch.int16)[kept])
        assert torch.equal(narrow.isnan(), expected.isnan())
    finally:
        cpu.use_isa(before)


def digest(*tensors: torch.Tensor) -> str:
    return hashlib.sha256(b"".join(t.detach().double().numpy().tobytes() for t in tensors)).hexdigest()


def results() -> list[tuple[str, str]]:
    """The results of the ops, by their kind."""
    found = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        (student, teacher, weights, _) = make([(3, 33, 37, 41), (5, 7)], dtype, "mse").inputs
        for distance in DISTANCES:
            loss = feature_match(student, teacher, weights=weights, distance=distance).loss
            found.append(("features", digest(loss, *torch.autograd.grad(loss, student))))
        draw = noise_gather(*banks((3, 33, 35), latent_dtype=dtype), batch=5, null_index=8, target=True)
        found.append(("integers", digest(*[t for t in draw if not t.is_floating_point()])))
        found.append(("noise", digest(draw.x_t)))
    return found


def test_every_instruction_set_gives_the_same_bits() -> None:
    """Results of feature_match and all integers on every instruction set; noise on those with FMA."""
    cpu = _native.cpu()
    before, found = cpu.isa(), {}
    try:
        for isa in ISAS:
            cpu.use_isa(isa)
            with use("cpp"):
                found[isa] = results()
    finally:
        cpu.use_isa(before)
    for isa, some in found.items():
        for (kind, one), (_, two) in zip(some, found[ISAS[-1]], strict=True):
            assert one == two or (kind == "noise" and isa == "baseline"), (isa, kind)


def test_the_environment_chooses_the_instruction_set() -> None:
    for isa in ISAS:
        code, environment = "from fastdistill import _cpu; print(_cpu.isa())", os.environ | {"FASTDISTILL_CPU_ISA": isa}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
        assert done.stdout.strip() == isa, done.stderr
