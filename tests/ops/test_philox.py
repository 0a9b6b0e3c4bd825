# SPDX-License-Identifier: Apache-2.0
"""The counter-based generator compared with published vectors, an oracle in NumPy and Triton's own, and statistics."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastdistill.ops import philox
from tests.ops import oracle

# Random123 (Salmon et al.), kat_vectors: philox4x32-10.
VECTORS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), VECTORS)
def test_published_vectors(counter: tuple[int, ...], key: tuple[int, int], expected: tuple[int, ...]) -> None:
    words = philox.philox4x32([torch.tensor(c) for c in counter], (torch.tensor(key[0]), torch.tensor(key[1])))
    assert tuple(int(w) for w in words) == expected
    assert tuple(int(w) for w in oracle.philox4x32(np.array(counter, np.uint64), key)) == expected


@pytest.mark.parametrize("seed", [0, 1, 2**40 + 7, 2**63 - 1, -1])
def test_words_against_the_oracle(seed: int) -> None:
    ours = philox.words(torch.tensor(seed), torch.tensor(12345), torch.tensor(6), torch.arange(500), philox.NOISE)
    assert np.array_equal(torch.stack(ours, -1).numpy().astype(np.uint64), oracle.words(seed % 2**64, 12345, 6, 500, 1))


def test_blocks_beyond_32_bits_reach_the_second_word() -> None:
    block = torch.tensor([5, 5 + 2**32])
    first, second = torch.stack(philox.words(torch.tensor(1), torch.tensor(2), torch.tensor(3), block, 1), -1)
    expected = oracle.philox4x32(np.array([5, (1 << 16) | 1, 3, 2], np.uint64), (1, 0))
    assert not torch.equal(first, second) and np.array_equal(second.numpy().astype(np.uint64), expected)


def test_same_words_as_triton() -> None:
    """``tl.philox`` is an independent implementation."""
    pytest.importorskip("triton")
    from tests.ops.philox_of_triton import words

    theirs = torch.zeros(64, 4, dtype=torch.int64, device="cuda" if torch.cuda.is_available() else "cpu")
    words[(1,)](theirs, 0x123456789ABCDEF, 64)
    seed = torch.tensor(0x123456789ABCDEF)
    ours = torch.stack(philox.words(seed, torch.tensor(77), torch.tensor(3), torch.arange(64), philox.NOISE), -1)
    assert torch.equal(ours.long(), theirs.cpu())


def test_integers_below() -> None:
    words = torch.tensor([0, 1, 2**31, 2**32 - 1, 123456789])
    for n in (1, 2, 3, 1000, 2**31 + 11, 2**32):
        assert philox.below(words, n).tolist() == [(int(w) * n) >> 32 for w in words]


def test_uniforms_are_exact_and_never_0_or_1() -> None:
    u = philox.uniform(torch.tensor([0, 2**32 - 1, 2**31]))
    assert u.tolist() == [2.0**-24, 1 - 2.0**-24, 0.5 + 2.0**-24]


def test_normals() -> None:
    stats = pytest.importorskip("scipy.stats")
    z = philox.normal(torch.tensor(11), torch.tensor(5), torch.arange(64), (16384,)).flatten().double().numpy()
    n = z.size
    assert n > 10**6 and np.abs(z).max() <= 5.77
    assert abs(z.mean()) < 4 / n**0.5
    assert abs(z.var() - 1) < 4 * (2 / n) ** 0.5
    assert abs(stats.kurtosis(z)) < 4 * (24 / n) ** 0.5
    assert stats.kstest(z, "norm").pvalue > 1e-4
    assert abs(np.corrcoef(z[:-1], z[1:])[0, 1]) < 4 / n**0.5


def test_normals_depend_on_the_sample_alone() -> None:
    seed, step = torch.tensor(3), torch.tensor(4)
    whole = philox.normal(seed, step, torch.arange(6), (3, 5))
    assert torch.equal(philox.normal(seed, step, torch.tensor([4, 1]), (3, 5)), whole[[4, 1]])
    exact = oracle.normals(oracle.words(3, 4, 2, 4, 1), 15, np.float64).reshape(3, 5)
    assert np.abs(whole[2].double().numpy() - exact).max() < 4e-6


@pytest.mark.parametrize("n", [1, 2, 3, 5, 64, 65, 1000])
def test_every_latent_once_an_epoch(n: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    seed = torch.tensor(9)
    first = philox.permute(torch.arange(n), n, seed, torch.tensor(0))
    assert sorted(first.tolist()) == list(range(n))
    assert [oracle.permute(i, n, 9, 0) for i in range(min(n, 50))] == first[:50].tolist()
    if n >= 64:
        second = philox.permute(torch.arange(n), n, seed, torch.tensor(2**33 + 1))
        assert sorted(second.tolist()) == list(range(n)) and (second == first).double().mean() < 0.2
        rank = stats.spearmanr(first.numpy(), np.arange(n)).statistic
        assert abs(rank) < 5 / n**0.5
