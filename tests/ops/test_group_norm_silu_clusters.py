# SPDX-License-Identifier: Apache-2.0
"""group_norm_silu on clusters of blocks (channels_last): every dtype, option and cluster size, compared with float64,
and which calls are refused."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from fastdistill.errors import KernelError
from fastdistill.ops import group_norm_silu, use
from fastdistill.ops.group_norm_silu import cuda
from tests.harness import Case, check_op, crossed, emulated, evaluate, partial_kernels_of
from tests.ops.test_group_norm_silu import FLOATS, call, eager, make

CLUSTERED = partial_kernels_of("group_norm_silu")
SLICED = {
    "resnet": ((2, 32, 4, 4), 8),
    "odd": ((3, 48, 5, 7), 4),
    "3d": ((2, 24, 37), 3),
    "5d": ((1, 24, 2, 3, 5), 3),
    "no positions but one": ((3, 16, 1, 2), 2),
    "one group": ((2, 24, 5, 3), 1),
    "group a channel": ((2, 16, 7, 10), 16),
    "many channels": ((1, 320, 5, 6), 8),
    "groups of an odd number": ((2, 96, 5, 5), 32),
}


def last_of(case: Case) -> Case:
    """The case in channels_last."""
    x, *rest = case.inputs
    moved = x.detach().movedim(1, -1).contiguous().movedim(-1, 1).requires_grad_(x.requires_grad)
    return Case(case.op, (moved, *rest), call, eager, eager)


@pytest.fixture(params=[1, 2, 4])
def cluster(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """The number of blocks per slice, independent of its size."""
    monkeypatch.setattr(cuda, "CLUSTERS", (request.param,))
    cuda._cut.cache_clear()
    yield request.param
    cuda._cut.cache_clear()


@pytest.mark.parametrize("kernel", CLUSTERED)
@crossed("dtype, shape", FLOATS, SLICED)
def test_values_and_contract(kernel: str, cluster: int, dtype: torch.dtype, shape: str) -> None:
    thorough = dtype == torch.float32 and shape == "odd" and cluster == 2
    case = last_of(make(*SLICED[shape], dtype))
    check_op(case, kernel, compiled=("aot_eager",) if thorough else (), registration=thorough)


@pytest.mark.parametrize("kernel", CLUSTERED)
@pytest.mark.parametrize(
    ("names", "silu"),
    [((), True), (("weight", "bias"), False), (("weight", "bias", "time_bias"), True), (("bias", "shift"), True)],
)
def test_options(kernel: str, cluster: int, names: tuple[str, ...], silu: bool) -> None:
    case = last_of(make((2, 16, 5, 3), 4, names=names, silu=silu))
    check_op(case, kernel, compiled=(), registration=False)


@pytest.mark.parametrize("kernel", CLUSTERED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float32_weights_beside_half_precision(kernel: str, dtype: torch.dtype) -> None:
    case = last_of(make((2, 16, 5, 3), 2, dtype, small=torch.float32))
    check_op(case, kernel, compiled=(), registration=False)


@pytest.mark.parametrize("kernel", CLUSTERED)
def test_far_from_zero(kernel: str, cluster: int) -> None:
    check_op(last_of(make((2, 16, 9, 11), 4, mean=3000.0)), kernel, compiled=(), registration=False)


@pytest.mark.parametrize("kernel", CLUSTERED)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_blocks_that_differ(kernel: str, cluster: int, dtype: torch.dtype) -> None:
    """Very different means at the ends of an image, and a first position unlike all others."""
    x, *rest = make((2, 16, 31, 27), 2, dtype).inputs
    ramp = torch.linspace(-50.0, 50.0, 31)[:, None].expand(31, 27).round()
    outlier = torch.zeros(31, 27)
    outlier[0, 0] = 1000.0
    for added in (ramp, outlier):
        case = Case("group_norm_silu", ((x.detach() + added.to(dtype)).requires_grad_(), *rest), call, eager, eager)
        check_op(last_of(case), kernel, compiled=(), registration=False)


@pytest.mark.parametrize("kernel", CLUSTERED)
def test_clusters_that_take_several_slices(kernel: str, cluster: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bits however many clusters share the slices, here 9 or more."""
    found, cut = [], cuda._cut
    for clusters in (100, 1, 2, 4):
        with monkeypatch.context() as patch, use(kernel):
            patch.setattr(cuda, "_cut", lambda *args, clusters=clusters: (*cut(*args)[:2], clusters))
            y, gradients = evaluate(call, last_of(make((3, 48, 21, 13), 6)).inputs, 1.0)
        found.append([*y, *gradients])
    for some in found[1:]:
        assert all(map(torch.equal, some, found[0]))


@pytest.mark.parametrize("kernel", CLUSTERED)
def test_only_what_is_wanted(kernel: str, cluster: int) -> None:
    x, given, *rest = last_of(make((3, 16, 3, 3), 2, grad=False)).inputs
    with use(kernel):
        full = evaluate(call, last_of(make((3, 16, 3, 3), 2)).inputs, 1.0)[1]
        for i in range(5):
            some = tuple(t.clone().requires_grad_(i == j) for j, t in enumerate(given))
            (y,) = call(x, some, *rest)
            assert torch.equal(torch.autograd.grad(y.sum(), some[i])[0], full[1 + i])


@pytest.mark.parametrize("kernel", CLUSTERED)
@pytest.mark.parametrize(
    ("shape", "groups", "reason"),
    [
        ((2, 16, 3, 3), 2, "channels must be side by side"),
        ((2, 6, 3, 3), 2, "no slice of whole groups of 16 bytes fits into the shared memory of a cluster"),
        ((1, 4, 1024, 1024), 1, "no slice of whole groups of 16 bytes fits into the shared memory of a cluster"),
    ],
)
def test_what_is_refused(kernel: str, shape: tuple[int, ...], groups: int, reason: str) -> None:
    x = torch.zeros(shape)
    if "side" not in reason:
        x = x.to(memory_format=torch.channels_last)
    with use(kernel), pytest.raises(KernelError, match=reason):
        group_norm_silu(x, None, None, groups)
    if groups == 2:
        assert not group_norm_silu(x, None, None, groups).any()


@pytest.mark.parametrize("kernel", CLUSTERED)
def test_what_starts_between_vectors(kernel: str) -> None:
    x = torch.zeros(1 + 2 * 9 * 16)[1:].view(2, 3, 3, 16).movedim(-1, 1)
    with use(kernel), pytest.raises(KernelError, match="x must start at a multiple of 16 bytes"):
        group_norm_silu(x, None, None, 2)


@pytest.mark.parametrize(
    ("shape", "dtype", "forward", "backward"),
    [
        ((32, 320, 4096), torch.bfloat16, (8, 8), (4, 8)),
        ((2, 320, 4096), torch.bfloat16, (4, 8), (4, 8)),
        ((32, 640, 1024), torch.bfloat16, (4, 2), (4, 4)),
        ((32, 1280, 256), torch.bfloat16, (2, 1), (2, 1)),
        ((32, 320, 4096), torch.float32, (4, 8), (2, 8)),
        ((32, 960, 4096), torch.bfloat16, (4, 8), None),
        ((1, 128, 512 * 512), torch.bfloat16, None, None),  # a size of an autoencoder
    ],
)
def test_how_models_are_cut(
    shape: tuple[int, int, int], dtype: torch.dtype, forward: tuple[int, int] | None, backward: tuple[int, int] | None
) -> None:
    if not CLUSTERED or not emulated(CLUSTERED[0]):
        pytest.skip("of an emulated GPU")
    cuda._cut.cache_clear()
    for back, expected in ((False, forward), (True, backward)):
        cut = cuda._cut(-1, dtype, (*shape, 32), True, back)
        assert isinstance(cut, str) if expected is None else cut[:2] == expected
