# SPDX-License-Identifier: Apache-2.0
"""output_match under ``check_op``, compared with a float64 oracle that uses NumPy's Philox for the noise."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastdistill.diffusion.flow import flow_coefficients
from fastdistill.diffusion.matching import match_table
from fastdistill.diffusion.schedule import NoiseSchedule
from fastdistill.errors import InputError
from fastdistill.ops import Task, noise_gather, output_match, use
from fastdistill.ops.noise_gather import RANDOM
from tests.harness import (
    EPS,
    Case,
    check_fake,
    check_op,
    crossed,
    detached,
    emulated,
    evaluate,
    generator,
    kernels_of,
    large,
    layouts,
)
from tests.ops import oracle
from tests.ops.test_noise_gather import banks

KERNELS = kernels_of("output_match")
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
T = 50
SEED, STEP, FIRST = 2**40 + 5, 7, 3
DELTA = 0.7


def coefficients(kind: str) -> Tensor:
    table = flow_coefficients(T) if kind == "flow" else NoiseSchedule.cosine(T).coefficients(kind)  # type: ignore[arg-type]
    return table.to(torch.get_default_device())


def table_of(*given: Any, **options: Any) -> Tensor:
    """``match_table`` on the device of the test."""
    return match_table(*given, **options).to(torch.get_default_device())


@dataclasses.dataclass(frozen=True)
class Setting:
    """One call: which tensors are given, with which channels and dtypes."""

    batch: int = 3
    size: tuple[int, ...] = (4, 5, 7)
    guided: bool = True
    task: bool = True
    teacher: bool = True
    student_kind: str = "epsilon"
    teacher_kind: str = "epsilon"
    student_sigma: bool = False
    teacher_sigma: bool = False
    weights: str = "uniform"
    per_sample: bool = True
    distance: str = "mse"
    dtypes: tuple[torch.dtype, ...] = (torch.float32,) * 4  # student, teacher, x_t, latents


def case_of(setting: Setting) -> Case:
    g = generator(setting.batch + len(setting.size))
    channels, *size = setting.size

    def rows(count: int, dtype: torch.dtype, sigma: bool = False) -> Tensor:
        return torch.randn((count, channels * (1 + sigma), *size), generator=g).to(dtype)

    batch, (of_student, of_teacher, of_x_t, of_latents) = setting.batch, setting.dtypes
    own, theirs = coefficients(setting.student_kind), coefficients(setting.teacher_kind)
    converted = setting.student_kind != setting.teacher_kind
    table = table_of(
        own, teacher=theirs if converted else None, guidance=lambda u: 2.0 - 3.0 * u, weights=setting.weights
    )  # type: ignore[arg-type]
    task = None
    if setting.task:
        choice = torch.arange(batch) % 3
        task = Task(rows(9, of_latents), torch.arange(batch) * 2 % 9, choice, own, torch.tensor([SEED, STEP]), FIRST)
    inputs = (
        rows(batch, of_student, setting.student_sigma).requires_grad_(),
        rows(batch, of_teacher, setting.teacher_sigma) if setting.teacher else None,
        torch.arange(batch) * 17 % 40,  # without the last timesteps, where some conversions amplify errors extremely
        table,
        rows(batch, of_teacher, setting.teacher_sigma) if setting.teacher and setting.guided else None,
        torch.rand(batch, generator=g) if setting.per_sample and setting.teacher and setting.guided else None,
        torch.rand(batch, generator=g) + 0.5 if setting.per_sample else None,
        rows(batch, of_x_t) if converted else None,
        task,
    )
    huber = setting.distance == "huber"

    def call(
        student: Tensor, teacher: Any, timestep: Any, table: Any, u: Any, w: Any, own: Any, x_t: Any, task: Any
    ) -> Any:
        return tuple(
            output_match(
                student, teacher, timestep, table, unconditional=u, guidance=w, weights=own, x_t=x_t, task=task,
                channels=channels, output_weight=0.5, task_weight=2.0, distance=setting.distance, delta=DELTA,
            )
        )  # fmt: skip

    def formula(dtype: type) -> Any:
        """The definition in this precision, sample by sample."""
        real = torch.float64 if dtype is np.float64 else torch.float32

        def distance(d: Tensor) -> Tensor:
            return torch.nn.functional.huber_loss(d, torch.zeros_like(d), delta=DELTA) if huber else d.square().mean()

        def evaluate(
            student: Tensor, teacher: Any, timestep: Any, table: Any, u: Any, w: Any, own: Any, x_t: Any, task: Any
        ) -> Any:
            parts, samples = torch.zeros(2, dtype=real), []
            for b, t in enumerate(timestep.tolist()):
                h, from_x_t, from_teacher, *weight = table[t].to(real)
                s = student[b, :channels].to(real)
                each = [torch.zeros((), dtype=real), torch.zeros((), dtype=real)]
                if teacher is not None:
                    target = teacher[b, :channels].to(real)
                    if u is not None:
                        target = target + h * (1 if w is None else w[b]) * (target - u[b, :channels].to(real))
                    target = from_teacher * target + (0 if x_t is None else from_x_t * x_t[b].to(real))
                    each[0] = distance(s - target)
                if task is not None:
                    z = oracle.normals(oracle.words(SEED, STEP, FIRST + b, (s.numel() + 3) // 4, 1), s.numel(), dtype)
                    x = task.latents[task.latent_index[b]].to(real)
                    c = task.coefficients[t].to(real)
                    each[1] = distance(s - (c[2] * x + c[3] * torch.from_numpy(z).to(s.device).view_as(s)))
                    weight[1] = weight[1] * int(task.choice[b] != RANDOM)
                row = torch.stack(each)
                samples.append(row)
                parts = parts + torch.stack(weight) * row * (1 if own is None else own[b]) / len(student)
            return 0.5 * parts[0] + 2.0 * parts[1], parts.detach(), torch.stack(samples).detach()

        return evaluate

    truth = formula(np.float64)
    with torch.no_grad():
        values = truth(*detached(inputs, torch.float64))
    n = inputs[0][0].numel()  # type: ignore[index,union-attr]
    sums = {i: (n, v.abs().max().item()) for i, v in enumerate(values)}
    return Case("output_match", inputs, call, truth, formula(np.float32), sums)


@pytest.mark.parametrize("kernel", KERNELS)
@crossed("dtype, distance", FLOATS, ["mse", "huber"])
def test_values_and_contract(kernel: str, dtype: torch.dtype, distance: str) -> None:
    thorough = dtype == torch.float32 and distance == "mse"
    backends = ("aot_eager", "inductor") if thorough else ()
    setting = Setting(dtypes=(dtype,) * 4, distance=distance)
    check_op(case_of(setting), kernel, compiled=backends, registration=thorough)


VARIANTS = {
    "no guidance": Setting(guided=False),
    "no task": Setting(task=False),
    "task alone": Setting(teacher=False, guided=False, student_kind="v_prediction"),
    "the table's guidance and weights": Setting(per_sample=False),
    "epsilon to v": Setting(student_kind="v_prediction", weights="min_snr"),
    "v to epsilon": Setting(teacher_kind="v_prediction", weights="truncated_snr"),
    "epsilon to x0": Setting(student_kind="sample", weights="snr"),
    "flow": Setting(student_kind="flow", teacher_kind="flow", distance="huber"),
    "both learn their variance": Setting(student_sigma=True, teacher_sigma=True),
    "the teacher learns its variance": Setting(teacher_sigma=True, guided=False),
    "the student learns its variance": Setting(student_sigma=True, size=(3, 5)),
    "more than a chunk": Setting(batch=2, size=(4, 32, 33), student_sigma=True),
    "whole groups": Setting(batch=2, size=(4, 8, 8)),
    "one element": Setting(batch=1, size=(1,)),
    "five dimensions": Setting(size=(2, 3, 1, 5, 2)),
}


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants(kernel: str, variant: str) -> None:
    check_op(case_of(VARIANTS[variant]), kernel, compiled=(), registration=False)


@pytest.mark.parametrize("kernel", large(KERNELS))
def test_many_samples(kernel: str) -> None:
    check_op(case_of(Setting(batch=300, size=(2,))), kernel, compiled=(), registration=False)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("at", range(4))
def test_dtypes_are_independent(kernel: str, at: int) -> None:
    for shift in (1, 2):
        dtypes = tuple(FLOATS[shift if i == at else 0] for i in range(4))
        setting = Setting(batch=2, size=(4, 7), student_kind="v_prediction", dtypes=dtypes)
        check_op(case_of(setting), kernel, compiled=(), registration=False)


@pytest.mark.parametrize("kernel", KERNELS)
def test_any_layout(kernel: str) -> None:
    case = case_of(Setting())
    with use(kernel):
        expected = evaluate(case.call, detached(case.inputs), 1.0)
        for (_, s), (_, t) in zip(layouts(case.inputs[0]), layouts(case.inputs[1]), strict=True):
            got = evaluate(case.call, detached((s, t, *case.inputs[2:])), 1.0)
            for one, two in zip([*got[0], *got[1]], [*expected[0], *expected[1]], strict=True):
                assert torch.equal(one, two)


@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")  # from NumPy, for a mean over nothing
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("shape", [(2, 0, 3), (2, 4, 0)])
def test_samples_without_elements(kernel: str, shape: tuple[int, ...]) -> None:
    s, t, time = torch.empty(shape, requires_grad=True), torch.empty(shape), torch.tensor([0, 1])
    with use(kernel):
        loss, _, samples = output_match(s, t, time, table_of(coefficients("epsilon")))
        loss.backward()
    assert loss == 0 and samples.eq(0).all() and s.grad is not None


@pytest.mark.parametrize("kernel", KERNELS)
def test_what_is_not_finite_spreads_no_further_than_its_use(kernel: str) -> None:
    """An infinite teacher without guidance is an infinite difference; latents that no target uses are not read."""
    s, t, time = torch.zeros(2, 4, 5, requires_grad=True), torch.zeros(2, 4, 5), torch.tensor([0, 1])
    t[0, 0, 0] = math.inf
    table = table_of(coefficients("epsilon"), guidance=2.0)
    task = Task(torch.full((3, 4, 5), math.nan), time, time * 0, coefficients("epsilon"), torch.tensor([SEED, STEP]))
    with use(kernel):
        loss = output_match(s, t, time, table, distance="huber").loss
        loss.backward()
        assert output_match(s, None, time, table, task=task).loss.isfinite()
        nan = torch.full_like(t, math.nan).requires_grad_()
        for distance in ("mse", "huber"):
            (gradient,) = torch.autograd.grad(output_match(nan, t, time, table, distance=distance).loss, nan)
            assert gradient.isnan().all()
    assert loss == math.inf and s.grad is not None and s.grad.isfinite().all()


@pytest.mark.parametrize("kernel", KERNELS)
def test_no_samples(kernel: str) -> None:
    empty = torch.empty(0, 4, 5, requires_grad=True)
    with use(kernel):
        table = table_of(coefficients("epsilon"))
        loss, parts, samples = output_match(empty, empty.detach(), torch.empty(0, dtype=torch.int64), table)
        loss.backward()
    assert loss == 0 and parts.tolist() == [0, 0] and samples.shape == (0, 2) and empty.grad is not None


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "flow"])
def test_the_noise_made_again_is_the_draws(kernel: str, kind: str) -> None:
    """The task loss needs no stored target: it uses the target that noise_gather would write."""
    latents, own, prompts, _, replace, counter = banks((4, 6, 6))
    table = coefficients(kind)
    with use(kernel):
        draw = noise_gather(
            latents, own, prompts, table, replace, counter, batch=5, first_sample=2, global_batch=9, null_index=8,
            target=True,
        )  # fmt: skip
        task = Task.of(draw, latents, table, counter, first_sample=2)
        loss, parts, samples = output_match(draw.x_t, None, draw.timestep, table_of(table), task=task)
    each = (draw.x_t - draw.target).square().flatten(1).mean(1)
    # The stored target has one more rounding than the recomputed one, at most EPS |target|.
    bound = 8 * EPS * float((draw.x_t - draw.target).abs().max() * draw.target.abs().max())
    torch.testing.assert_close(samples[:, 1], each, rtol=4 * EPS, atol=bound)
    torch.testing.assert_close(loss, (each * (draw.choice != RANDOM)).mean(), rtol=4 * EPS, atol=bound)
    assert samples[:, 0].eq(0).all() and parts[0] == 0


@pytest.mark.parametrize("kernel", KERNELS)
def test_guidance_of_the_conditional_and_the_unconditional_model(kernel: str) -> None:
    """w = 0 is the conditional model, w = -1 the unconditional one; diffusers' guidance_scale is 1 + w."""
    c, u = torch.randn(2, 2, 4, 6).unbind()
    time = torch.tensor([0, 9])
    with use(kernel):
        for w, output in ((0.0, c), (-1.0, u), (6.5, u + 7.5 * (c - u))):
            table = table_of(coefficients("epsilon"), guidance=w)
            rounding = 4 * EPS * float((1 + abs(w)) * (c.abs() + u.abs()).max())
            assert output_match(output, c, time, table, unconditional=u).loss <= rounding**2


@pytest.mark.parametrize("kernel", KERNELS)
def test_float16_gradients_survive_under_a_loss_scale(kernel: str) -> None:
    s = torch.full((1, 4, 2**12), 2.0**-12, dtype=torch.float16, requires_grad=True)
    t, time, table = torch.zeros(1, 4, 2**12), torch.tensor([0]), table_of(coefficients("epsilon"))
    scale = torch.tensor(2.0**12)
    with use(kernel):
        (plain,) = torch.autograd.grad(output_match(s, t, time, table).loss, s)
        loss = output_match(s, t, time, table, grad_scale=scale).loss * scale
        (scaled,) = torch.autograd.grad(loss, s)
    assert plain.abs().max() == 0  # 2^-25 is below half the smallest subnormal
    assert torch.equal(scaled, torch.full_like(scaled, 2.0**-13))


@pytest.mark.parametrize("kernel", KERNELS)
def test_backward_again_and_buffers(kernel: str) -> None:
    s, t = torch.randn(2, 4, 5, requires_grad=True), torch.randn(2, 4, 5)
    arguments = (t, torch.tensor([0, 1]), table_of(coefficients("epsilon")))
    buffer = torch.empty(2, 4, 5)
    with use(kernel):
        loss = output_match(s, *arguments).loss
        (first,) = torch.autograd.grad(3 * loss, s, retain_graph=True)
        (second,) = torch.autograd.grad(loss, s)
        with pytest.raises(RuntimeError, match="output_match: backward ran a second time"):
            torch.autograd.grad(loss, s)
        (third,) = torch.autograd.grad(output_match(s, *arguments, grad=buffer).loss, s)
    assert torch.equal(second, third) and third.data_ptr() == buffer.data_ptr()
    torch.testing.assert_close(first, 3 * third, rtol=2 * EPS, atol=0)


@pytest.mark.parametrize("kernel", [k for k in KERNELS if k in ("triton", "cuda")])
@pytest.mark.parametrize("place", ["timestep", "latent_index"])
def test_where_an_error_cannot_be_raised_the_loss_is_nan(kernel: str, place: str) -> None:
    """A kernel on a GPU reads nothing outside of a table; the loss becomes NaN."""
    case = case_of(Setting(student_kind="v_prediction", teacher_kind="v_prediction"))
    inputs = list(detached(case.inputs))
    if place == "timestep":
        inputs[2] = torch.tensor([0, T, 1])
    else:
        inputs[8] = inputs[8]._replace(latent_index=torch.tensor([0, -1, 2**40]))
    with use(kernel):
        (loss, *_), (gradient,) = evaluate(case.call, tuple(inputs), 1.0)
    bad = [1] if place == "timestep" else [1, 2]
    assert loss.isnan() and gradient[bad].isnan().all() and gradient[0].isfinite().all()


@pytest.mark.parametrize("kernel", [k for k in kernels_of("output_match", ["cpu"]) if not emulated(k)])
def test_a_timestep_or_latent_that_is_not_there(kernel: str) -> None:
    case = case_of(Setting())
    inputs = list(detached(case.inputs))
    with use(kernel):
        with pytest.raises(InputError, match=r"timestep\[0\]: expected a row of table, 0 to 49, got -1"):
            case.call(*inputs[:2], torch.tensor([-1, T, 1]), *inputs[3:])
        with pytest.raises(InputError, match=r"timestep\[1\]: expected a row of table, 0 to 49, got 50"):
            case.call(*inputs[:2], torch.tensor([0, T, 1]), *inputs[3:])
        inputs[8] = inputs[8]._replace(latent_index=torch.tensor([0, 1, 9]))
        with pytest.raises(InputError, match=r"task.latent_index\[2\]: expected a row of task.latents, 0 to 8, got 9"):
            case.call(*inputs)


@pytest.mark.parametrize("kernel", [k for k in KERNELS if k != "reference" and not emulated(k)])
def test_same_bits_for_any_number_of_threads(kernel: str) -> None:
    case = case_of(Setting(size=(4, 33, 37)))
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 3, 8):
            torch.set_num_threads(threads)
            with use(kernel):
                results.append(evaluate(case.call, detached(case.inputs), 1.0))
    finally:
        torch.set_num_threads(before)
    for outputs, gradients in results[1:]:
        for one, two in zip([*outputs, *gradients], [*results[0][0], *results[0][1]], strict=True):
            assert torch.equal(one, two)


def test_fake_cuda_tensors() -> None:
    check_fake(case_of(Setting(dtypes=(torch.bfloat16,) * 4)), "cuda")
