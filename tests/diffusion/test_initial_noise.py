# SPDX-License-Identifier: Apache-2.0
"""The initial noise of sampling depends on the seed and the row, not on the batch."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdistill.diffusion.sampler import initial_noise
from fastdistill.errors import InputError
from fastdistill.ops.philox import INITIAL_NOISE, normal


@settings(max_examples=20, deadline=None)
@given(st.integers(-(2**63), 2**63 - 1), st.lists(st.integers(0, 2**32 - 1), max_size=6), st.integers(1, 9))
def test_initial_noise_belongs_to_its_row(seed, rows, width):
    rows = torch.tensor(rows, dtype=torch.int64)
    together = initial_noise(seed, rows, (width, 2))
    assert together.shape == (len(rows), width, 2) and together.dtype == torch.float32
    for row, noise in zip(rows, together, strict=True):
        assert torch.equal(initial_noise(seed, row[None], (width, 2))[0], noise)


def test_initial_noise_is_normal_and_apart_from_training_noise():
    noise = initial_noise(7, torch.arange(64), (64, 64))
    n = noise.numel()
    assert abs(float(noise.mean())) < 4 / math.sqrt(n) and abs(float(noise.var()) - 1) < 4 * math.sqrt(2 / n)
    zero = torch.tensor(0)
    assert torch.equal(noise, normal(torch.tensor(7), zero, torch.arange(64), (64, 64), stream=INITIAL_NOISE))
    other = normal(torch.tensor(7), zero, torch.arange(64), (64, 64))
    assert abs(float((noise * other).mean())) < 4 / math.sqrt(n)
    with pytest.raises(InputError, match=r"rows: expected row numbers in \[0, 2\*\*32\), got -1 to 3"):
        initial_noise(0, torch.tensor([3, -1]), (2,))
    with pytest.raises(InputError, match="rows: expected int64 row numbers"):
        initial_noise(0, torch.arange(3).float(), (2,))
