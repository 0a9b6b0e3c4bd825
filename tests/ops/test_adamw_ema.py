# SPDX-License-Identifier: Apache-2.0
"""grad_square_sum and adamw_ema under ``check_op``, against torch's AdamW, clipping and averaging in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdistill.errors import InputError
from fastdistill.ops import OPS, AdamWGroup, adamw_ema, grad_square_sum, use
from tests.harness import Case, check_fake, check_op, crossed, detached, emulated, generator, kernels_of

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")  # NumPy's, for gradients that are not finite
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = {
    "odd": [(3, 5, 7), (1,), (), (16,), (2, 3, 1, 5, 3)],
    "empty": [(0, 4), (33,), (0,)],
    "large": [(3, 33, 37, 41), (7,)],  # more than one chunk, not a multiple of a vector
    "two chunks": [(3, 5, 7, 107), (7,)],
}
KERNELS = kernels_of("adamw_ema")
STEPS = 3
ROUNDING = torch.finfo(torch.float32).eps
BETAS, EPS, DECAY, CLIP, EMA = ((0.9, 0.999), (0.8, 0.95)), 1e-8, (1e-2, 0.1), 0.5, 0.9


def make(
    shapes: Sequence[tuple[int, ...]],
    dtype: torch.dtype = torch.float32,
    clip: float = CLIP,
    warmup: bool = True,
    steps: int = STEPS,
) -> Case:
    """Several steps with two groups that have different hyper-parameters; averages for all but the last parameter."""
    g = generator(len(shapes))
    params = [torch.randn(s, generator=g) for s in shapes]
    grads = [[torch.randn(s, generator=g).to(dtype) for s in shapes] for _ in range(steps)]
    return Case(
        "adamw_ema",
        (params, grads, [torch.tensor(1e-2), torch.tensor(3e-3)], clip, warmup),
        call,
        by_torch,
        by_torch,
        cotangent=1.0,
    )


def state_of(params: Sequence[Tensor]) -> tuple[list[Tensor], ...]:
    twin = [p.clone() for p in params]
    averages = [p.clone() for p in params[:-1]] + [params[-1].new_empty(0)]
    zeros = [[torch.zeros_like(p) for p in params] for _ in range(2)]
    return twin, *zeros, averages, [p.new_zeros(()) for p in params]


def call(
    params: list[Tensor], grads: list[list[Tensor]], lr: list[Tensor], clip: float, warmup: bool
) -> tuple[Tensor, ...]:
    twin, exp_avgs, exp_avg_sqs, averages, steps = state_of(params)
    groups = [AdamWGroup(lr[i], BETAS[i], EPS, DECAY[i]) for i in range(2)]
    skipped = torch.zeros((), dtype=torch.int64, device=lr[0].device)
    weight = torch.full((), 1 - EMA, device=lr[0].device)
    copies = [p.to(torch.bfloat16) for p in twin]
    for given in grads:
        given = [x.clone() for x in given]
        total = grad_square_sum(given)
        adamw_ema(
            twin, given, exp_avgs, exp_avg_sqs, steps, groups=groups, group=[i % 2 for i in range(len(twin))],
            square_sum=total, skipped=skipped, averages=averages, copies=copies, max_norm=clip, ema_weight=weight,
            ema_warmup=warmup,
        )  # fmt: skip
    return (*twin, *exp_avgs, *exp_avg_sqs, *averages[:-1], *steps, total.sqrt().float(), skipped, *copies)


def by_torch(
    params: list[Tensor], grads: list[list[Tensor]], lr: list[Tensor], clip: float, warmup: bool
) -> tuple[Tensor, ...]:
    """The code of a user: ``clip_grad_norm_``, fused AdamW, then the average; in the dtype of the parameters."""
    twin = [p.clone() for p in params]
    averages = [p.clone() for p in twin]
    groups = [
        {"params": twin[i::2], "lr": lr[i].item(), "betas": BETAS[i], "eps": EPS, "weight_decay": DECAY[i]}
        for i in range(2)
        if twin[i::2]
    ]
    optimizer = torch.optim.AdamW(groups, fused=True)
    for k, given in enumerate(grads):
        for p, x in zip(twin, given, strict=True):
            p.grad = x.to(p.dtype)
        norm = torch.nn.utils.clip_grad_norm_(twin, clip)
        optimizer.step()
        decay = min(EMA, (1 + k) / (10 + k)) if warmup else EMA
        for average, p in zip(averages, twin, strict=True):
            average.lerp_(p, 1 - decay)
    state = [optimizer.state[p] for p in twin]
    moments = [s[name].clone() for name in ("exp_avg", "exp_avg_sq") for s in state]
    copies = [p.to(torch.bfloat16) if p.dtype == torch.float32 else p.clone() for p in twin]
    skipped = torch.zeros((), dtype=torch.int64)
    return (*twin, *moments, *averages[:-1], *[s["step"] for s in state], norm, skipped, *copies)


@pytest.mark.parametrize("kernel", KERNELS)
@crossed("dtype, shapes", FLOATS, SHAPES)
def test_values(kernel: str, dtype: torch.dtype, shapes: str) -> None:
    if shapes == "large" and emulated(kernel) and kernel == "triton":
        pytest.skip("two chunks will do")
    check_op(make(SHAPES[shapes], dtype), kernel, compiled=(), registration=False)


@pytest.mark.parametrize("kernel", KERNELS)
def test_contract(kernel: str) -> None:
    check_op(make(SHAPES["odd"], steps=1), kernel, compiled=("aot_eager", "inductor"))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("clip", "warmup"), [(math.inf, True), (1e9, False), (1e-3, False)])
def test_clip_and_warm_up(kernel: str, clip: float, warmup: bool) -> None:
    check_op(make(SHAPES["odd"], clip=clip, warmup=warmup), kernel, compiled=(), registration=False)


def update(kernel: str, **options: Any) -> dict[str, list[Tensor]]:
    """One step with two small parameters and all options; returns everything that it may write."""
    params = [torch.linspace(-1, 1, 37), torch.ones(5)]
    grads = options.pop("grads", [torch.linspace(-2, 2, 37), torch.full((5,), 0.5)])
    twin, exp_avgs, exp_avg_sqs, _, steps = state_of(params)
    averages = [p.clone() for p in params]
    copies = [p.to(options.pop("copy", torch.bfloat16)) for p in params[:1]] + [torch.empty(0, dtype=torch.float16)]
    skipped = torch.tensor(4)
    with use(kernel):
        total = grad_square_sum(grads)
        adamw_ema(
            twin, grads, exp_avgs, exp_avg_sqs, steps, groups=[AdamWGroup(torch.tensor(0.1))], square_sum=total,
            skipped=skipped, averages=averages, copies=copies, ema_weight=torch.tensor(0.5), **options,
        )  # fmt: skip
    return {
        "params": twin, "grads": grads, "moments": [*exp_avgs, *exp_avg_sqs], "averages": averages, "copies": copies,
        "steps": steps, "skipped": [skipped],
    }  # fmt: skip


@pytest.mark.parametrize("kernel", KERNELS)
@crossed("zero, bad", [False, True], [math.inf, -math.inf, math.nan, 1e30, "found_inf"])
def test_gradients_that_are_not_finite_skip_the_step_and_are_counted(kernel: str, bad: Any, zero: bool) -> None:
    grads = [torch.linspace(-2, 2, 37), torch.full((5,), 0.5)]
    options: dict[str, Any] = {"zero_grads": zero}
    if bad == "found_inf":
        options["found_inf"] = torch.ones(())
    else:
        grads[1][3] = bad
    after = update(kernel, grads=[x.clone() for x in grads], **options)
    assert after["skipped"][0] == 5
    for got, kept in zip(
        after["params"] + after["averages"], [torch.linspace(-1, 1, 37), torch.ones(5)] * 2, strict=True
    ):
        assert torch.equal(got, kept)
    assert torch.equal(after["copies"][0], torch.linspace(-1, 1, 37).bfloat16())
    assert not any(t.any() for t in after["moments"] + after["steps"])
    for got, given in zip(after["grads"], grads, strict=True):
        assert not got.any() if zero else torch.equal(got.nan_to_num(), given.nan_to_num())


@pytest.mark.parametrize("kernel", KERNELS)
def test_zeroed_gradients_and_found_inf_of_zero(kernel: str) -> None:
    plain = update(kernel)
    after = update(kernel, zero_grads=True, found_inf=torch.zeros(()))
    assert plain["skipped"][0] == after["skipped"][0] == 4
    assert all(x.any() for x in plain["grads"]) and not any(x.any() for x in after["grads"])
    for name in ("params", "moments", "averages", "steps"):
        assert all(map(torch.equal, plain[name], after[name]))
        assert all(x.any() for x in plain[name])


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_copies_are_the_weights_rounded_once(kernel: str, dtype: torch.dtype) -> None:
    after = update(kernel, copy=dtype)
    weights = after["params"][0]
    if (
        emulated(kernel) and kernel == "triton" and dtype == torch.bfloat16
    ):  # Triton's interpreter truncates instead of rounding
        weights = (weights.view(torch.int32) & -(2**16)).view(torch.float32)
    assert torch.equal(after["copies"][0], weights.to(dtype)) and after["copies"][1].numel() == 0


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("max_norm", [math.inf, 0.25])
def test_the_loss_scale_is_taken_out_before_clipping(kernel: str, max_norm: float) -> None:
    plain = update(kernel, max_norm=max_norm)
    grads = [1024 * torch.linspace(-2, 2, 37), torch.full((5,), 512.0)]
    scaled = update(kernel, grads=grads, grad_scale=torch.tensor(1024.0), max_norm=max_norm)
    for name in ("params", "moments", "averages"):
        for one, two in zip(plain[name], scaled[name], strict=True):
            assert torch.equal(one, two)  # a power of two


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_square_sum(kernel: str, dtype: torch.dtype) -> None:
    grads = [torch.randn(s, generator=generator(1)).to(dtype) for s in SHAPES["large"]]
    grads += [grads[0].permute(3, 1, 0, 2), grads[0][:, ::2]]
    if emulated(kernel) and kernel == "triton":
        grads[0] = grads[0][0]
    for some in (grads[:2], grads[:3], grads, []):
        expected = sum(x.double().square().sum() for x in some)
        with use(kernel if len(some) < 4 else "reference"):
            total = grad_square_sum(some, out=torch.empty((), dtype=torch.float64))
        torch.testing.assert_close(
            total, torch.as_tensor(expected).double(), rtol=2 * ROUNDING, atol=0
        )  # parts are float32


@pytest.mark.parametrize("kernel", KERNELS)
def test_kinds_may_be_mixed(kernel: str) -> None:
    """Gradients and copies of several dtypes, with and without average, at addresses without alignment."""

    def run(kernel: str) -> list[Tensor]:
        g = generator(5)
        params = [torch.randn(41 + i, generator=g)[i % 3 :] for i in range(9)]
        grads = [torch.randn(p.shape, generator=g).to(FLOATS[i % 3]) for i, p in enumerate(params)]
        twin, exp_avgs, exp_avg_sqs, _, steps = state_of(params)
        averages = [p.clone() if i % 2 else torch.empty(0) for i, p in enumerate(params)]
        copies = [torch.empty(p.numel() if i % 4 else 0, dtype=FLOATS[1 + i // 5]) for i, p in enumerate(params)]
        with use(kernel):
            adamw_ema(
                params, grads, exp_avgs, exp_avg_sqs, steps, groups=[AdamWGroup(torch.tensor(0.1))], averages=averages,
                square_sum=grad_square_sum(grads), skipped=torch.tensor(0), copies=copies, max_norm=1.0,
                ema_weight=torch.tensor(0.5), zero_grads=True,
            )  # fmt: skip
        assert not any(x.any() for x in grads) and not any(map(torch.equal, params, twin))
        for copy, p in zip(copies, params, strict=True):
            wanted = p[: copy.numel()]  # rounded, or cut off after bfloat16's 7 bits; below 2^-14 float16 has fewer
            torch.testing.assert_close(copy.float(), wanted, rtol=2**-7, atol=2**-24)
        return [*params, *exp_avgs, *exp_avg_sqs, *steps, *averages]

    for got, expected in zip(run(kernel), run("reference"), strict=True):
        # About ten operations in another order; an update is at most the rate 0.1.
        torch.testing.assert_close(got, expected, rtol=8 * ROUNDING, atol=8 * ROUNDING * 0.1)


@pytest.mark.parametrize("kernel", [k for k in KERNELS if k != "reference"])
def test_more_parameters_than_a_launch_takes(kernel: str) -> None:
    results = []
    for name in (kernel, "reference"):
        params = [torch.full((i % 3,), 1.0 + i) for i in range(260)]
        grads = [torch.full_like(p, 0.1) for p in params * 5][: 260 if kernel == "triton" else 1300]
        twin, exp_avgs, exp_avg_sqs, _, steps = state_of(params)
        skipped = torch.tensor(0)
        with use(name):
            total = grad_square_sum(grads)
            for bad in (0.0, 1.0):
                adamw_ema(
                    twin, grads[:260], exp_avgs, exp_avg_sqs, steps, groups=[AdamWGroup(torch.tensor(0.1))],
                    square_sum=total, skipped=skipped, found_inf=torch.tensor(bad),
                )  # fmt: skip
        assert skipped == 1 and all(step == 1 for step in steps)
        results.append([total, *twin])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=8 * ROUNDING, atol=0)


@pytest.mark.parametrize("kernel", [k for k in KERNELS if k != "reference" and not emulated(k)])
def test_same_bits_for_any_number_of_threads(kernel: str) -> None:
    case = make(SHAPES["large"])
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 3, 8):
            torch.set_num_threads(threads)
            with use(kernel):
                results.append(call(*detached(case.inputs)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_layouts_that_differ_run_on_the_reference() -> None:
    """If a gradient has another memory order than its parameter, the reference runs and gives the same values."""
    p = torch.randn(2, 8, 4, 6)
    results = []
    for memory in (torch.contiguous_format, torch.channels_last):
        grad = torch.randn(p.shape, generator=generator(3)).contiguous(memory_format=memory)
        results.append(call([p], [[grad]], [torch.tensor(1e-2), torch.tensor(0.0)], 1.0, False)[0])
    torch.testing.assert_close(*results, rtol=8 * ROUNDING, atol=8 * ROUNDING * 1e-2)  # of the rate
    refusals = [k.refuse([p], [grad], [p], [p], [], []) for k in OPS["adamw_ema"].kernels if k.name == "cpp"]
    assert all("other strides" in (refusal or "") for refusal in refusals)


def test_fake_cuda_tensors() -> None:
    check_fake(make(SHAPES["odd"]), "cuda")


BAD: list[tuple[dict[str, Any], str]] = [
    ({"grads": []}, r"grads: expected as many tensors as params \(1\), got 0"),
    ({"grads": [torch.ones(3)]}, r"grads\[0\]: expected the shape of params\[0\] \(2,\), got \(3,\)"),
    ({"params": [torch.ones(2).bfloat16()]}, r"params\[0\]: expected dtype float32, got bfloat16"),
    ({"grads": [torch.ones(2).double()]}, r"grads\[0\]: expected dtype float32 or bfloat16 or float16, got float64"),
    (
        {"exp_avgs": [torch.ones(2, device="meta")]},
        r"exp_avgs\[0\]: expected the device of square_sum \(cpu\), got meta",
    ),
    ({"steps": [torch.ones(1)]}, r"steps\[0\]: expected a 0-dim tensor, got \(1,\)"),
    ({"copies": [torch.ones(2)]}, r"copies\[0\]: expected dtype bfloat16 or float16, got float32"),
    ({"averages": [torch.ones(2)]}, "ema_weight: expected a tensor, as averages are given, got None"),
    ({"averages": [torch.ones(3)]}, r"averages\[0\]: expected the shape of params\[0\] \(2,\), got \(3,\)"),
    ({"max_norm": math.nan}, "max_norm: expected a number >= 0, got nan"),
    ({"square_sum": torch.ones(())}, "square_sum: expected dtype float64, got float32"),
    ({"skipped": torch.ones(())}, "skipped: expected dtype int64, got float32"),
    ({"groups": [AdamWGroup(torch.ones(1))]}, r"groups\[0\].lr: expected a 0-dim tensor, got \(1,\)"),
    ({"groups": []}, r"group\[0\]: expected at least 0, below 0 \(groups\), got 0"),
    ({"group": []}, r"group: expected as many numbers as params \(1\), got 0"),
]


@pytest.mark.parametrize(("changes", "message"), BAD)
def test_bad_input(changes: dict[str, Any], message: str) -> None:
    names = ("params", "grads", "exp_avgs", "exp_avg_sqs")
    arguments: dict[str, Any] = {name: [torch.ones(2)] for name in names} | {
        "steps": [torch.zeros(())],
        "groups": [AdamWGroup(torch.ones(()))],
        "square_sum": torch.ones((), dtype=torch.float64),
        "skipped": torch.zeros((), dtype=torch.int64),
    }
    adamw_ema(**arguments)
    with pytest.raises(InputError, match=message):
        adamw_ema(**(arguments | changes))


def test_bad_gradients() -> None:
    with pytest.raises(InputError, match=r"grads\[0\]: expected dtype float32 or bfloat16 or float16, got int64"):
        grad_square_sum([torch.ones(2, dtype=torch.int64)])
    with pytest.raises(InputError, match=r"grads\[1\]: expected the device of grads\[0\] \(cpu\), got meta"):
        grad_square_sum([torch.ones(2), torch.ones(2, device="meta")])
    with pytest.raises(InputError, match="out: expected dtype float64, got float32"):
        grad_square_sum([torch.ones(2)], out=torch.empty(()))
