# SPDX-License-Identifier: Apache-2.0
"""noise_gather under ``check_op``, and the contract of its random draws."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from fastdistill.diffusion.flow import flow_coefficients
from fastdistill.diffusion.schedule import NoiseSchedule
from fastdistill.errors import InputError, KernelError
from fastdistill.ops import OPS, empty_draw, noise_gather, use
from fastdistill.ops.noise_gather import NULL, PAIRED, RANDOM, Draw, NoiseGather
from tests.harness import Case, check_fake, check_op, crossed, emulated, generator, kernels_of, layouts
from tests.ops import oracle

KERNELS = kernels_of("noise_gather")
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
T = 50


def banks(
    shape: tuple[int, ...] = (3, 5, 7), rows: int = 11, latent_dtype: Any = torch.float32, prompt_dtype: Any = None
) -> tuple[Tensor, ...]:
    g = generator(rows + len(shape))
    latents = torch.randn((rows, *shape), generator=g).to(latent_dtype)
    prompts = torch.randn((9, 4, 6), generator=g).to(prompt_dtype or latent_dtype)
    alpha = torch.linspace(0.99, 0.05, T)
    coefficients = torch.stack([alpha, (1 - alpha**2).sqrt(), -(1 - alpha**2).sqrt(), alpha], 1)
    replace = (torch.linspace(0, 1, T, dtype=torch.float64) * 2**32).floor().long()
    return latents, torch.arange(rows) % 6, prompts, coefficients, replace, torch.tensor([2**40 + 5, 7])


def flat(draw: Draw[Any]) -> tuple[Tensor, ...]:
    return tuple(tree_leaves(tuple(draw)))


def case_of(inputs: tuple[Any, ...], batch: int, **options: Any) -> Case:
    settings = {"null_index": 8, "null_probability": 0.25, "pool": 8, "target": True} | options

    def call(*tensors: Any) -> tuple[Tensor, ...]:
        return flat(noise_gather(*tensors, batch=batch, **settings))

    def exact(dtype: type) -> Any:
        def evaluate(*tensors: Any) -> tuple[Tensor, ...]:
            latents, own, prompts, *tables, counter = tensors
            arrays = [t.double().numpy() if t.is_floating_point() else t.numpy() for t in (latents, own, *tables)]
            columns = oracle.draw(
                *arrays[:2], np.zeros((9, 1)), *arrays[2:], int(counter[0]) % 2**64, int(counter[1]),
                first=settings.get("first_sample", 0), batch=batch, total=settings.get("global_batch", batch),
                pool=settings["pool"], null=settings["null_index"],
                null_threshold=int(settings["null_probability"] * 2**32),
                with_replacement=settings.get("with_replacement", False), dtype=dtype,
            )  # fmt: skip
            x_t, t, _, target, latent, row, choice = map(torch.from_numpy, columns)
            if dtype is np.float32:
                x_t, target = x_t.to(latents.dtype), target.to(latents.dtype)
            return flat(Draw(x_t, t, tree_map(lambda bank: bank[row], prompts), target, latent, row, choice))

        return evaluate

    return Case("noise_gather", inputs, call, exact(np.float64), exact(np.float32))


@pytest.mark.parametrize("kernel", KERNELS)
@crossed("dtype, shape", FLOATS, [(3, 5, 7), (4, 8, 8), (1,), (130,)])
def test_values_and_contract(kernel: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    thorough = dtype == torch.float32 and shape == (3, 5, 7)
    backends = ("aot_eager", "inductor") if thorough else ()
    check_op(case_of(banks(shape, latent_dtype=dtype), 6), kernel, compiled=backends, registration=thorough)


@pytest.mark.parametrize("kernel", KERNELS)
def test_latents_of_several_pieces(kernel: str) -> None:
    """However a kernel divides a latent into pieces, the noise of a piece continues where the previous piece ended."""
    shape = (4, 23, 25) if emulated(kernel) else (4, 47, 53)
    check_op(case_of(banks(shape), 2), kernel, compiled=(), registration=False)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    "options",
    [
        {"with_replacement": True},
        {"first_sample": 3, "global_batch": 20},
        {"null_probability": 0.0},
        {"null_probability": 1.0},
        {"pool": 1},
        {"null_index": 0, "pool": 9},
    ],
    ids=str,
)
def test_options(kernel: str, options: dict[str, Any]) -> None:
    check_op(case_of(banks(), 6, **options), kernel, compiled=(), registration=False)


@pytest.mark.parametrize("kernel", KERNELS)
def test_dtypes_of_the_banks_are_independent(kernel: str) -> None:
    for latent_dtype in FLOATS:
        for prompt_dtype in FLOATS:
            inputs = banks((4, 4), latent_dtype=latent_dtype, prompt_dtype=prompt_dtype)
            check_op(case_of(inputs, 3), kernel, compiled=(), registration=False)


@pytest.mark.parametrize("kernel", KERNELS)
def test_targets_by_table(kernel: str) -> None:
    """epsilon, sample, v (x_0 = signal x_t - noise v) and flow (x_0 = x_t - s target) differ only in the table."""
    latents, own, prompts, _, replace, counter = banks((3, 5))
    schedule = NoiseSchedule.cosine(T)
    tables = {t: schedule.coefficients(t) for t in schedule.prediction_types} | {"flow": flow_coefficients(T, 3.0)}
    for name, table in tables.items():
        table = table.to(latents.device)
        with use(kernel):
            draw = noise_gather(latents, own, prompts, table, replace, counter, batch=4, null_index=8, target=True)
        x, signal, noise = latents[draw.latent_index], *table[draw.timestep, :2].view(4, 2, 1, 1).unbind(1)
        found = {
            "epsilon": draw.x_t - noise * draw.target,
            "sample": signal * draw.target,
            "v_prediction": signal * (signal * draw.x_t - noise * draw.target),
            "flow": signal * (draw.x_t - noise * draw.target),
        }[name]
        torch.testing.assert_close(found, signal * x, rtol=0, atol=2e-6, msg=name)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("rows", "batch"), [(1, 5), (2, 7), (11, 1), (11, 0), (7, 40)])
def test_sizes(kernel: str, rows: int, batch: int) -> None:
    if batch == 0:
        with use(kernel):
            draw = noise_gather(*banks(rows=rows), batch=0, null_index=8, target=True)
        assert draw.x_t.shape == draw.target.shape == (0, 3, 5, 7) and draw.prompt.shape == (0, 4, 6)
        return
    check_op(case_of(banks(rows=rows), batch), kernel, compiled=(), registration=False)


@pytest.mark.parametrize("kernel", KERNELS)
def test_banks_in_any_layout(kernel: str) -> None:
    """A kernel either supports a bank with gaps or permuted rows, or it refuses it with a reason and the reference
    runs: the draw is the same."""
    latents, own, prompts, *rest = banks((4, 6, 8))
    with use("reference"):
        expected = noise_gather(latents, own, prompts, *rest, batch=5, null_index=8)
    for (_, moved_latents), (_, moved_prompts) in zip(layouts(latents), layouts(prompts), strict=False):
        draw = noise_gather(moved_latents, own, moved_prompts, *rest, batch=5, null_index=8)
        for one, two in zip(draw, expected, strict=True):
            torch.testing.assert_close(one, two, rtol=0, atol=8e-6)


@pytest.mark.skipif("cpp" not in KERNELS, reason="the C++ kernels are not built")
def test_a_refusal_names_the_bank() -> None:
    latents, own, prompts, *rest = banks((4, 6, 8))
    with use("cpp"), pytest.raises(KernelError, match=r"'cpp' cannot run this call on cpu: prompts is not contiguous"):
        noise_gather(latents, own, prompts.transpose(1, 2), *rest, batch=5, null_index=8)


@pytest.mark.parametrize("kernel", [k for k in kernels_of("noise_gather", ["cpu"]) if not emulated(k)])
@pytest.mark.parametrize("row", [-1, 9])
def test_a_latent_of_a_prompt_that_is_not_there(kernel: str, row: int) -> None:
    latents, own, *rest = banks()
    with (
        use(kernel),
        pytest.raises(InputError, match=rf"latent_prompts\[\d+\]: expected a row of prompts, 0 to 8, got {row}"),
    ):
        noise_gather(latents, torch.full_like(own, row), *rest, batch=50, null_index=8)


@pytest.mark.parametrize("kernel", [k for k in KERNELS if k in ("triton", "cuda")])
def test_where_an_error_cannot_be_raised_all_bits_are_set(kernel: str) -> None:
    """A kernel on a GPU reads nothing outside of the bank; the rows get all bits set."""
    latents, own, *rest = banks()
    with use(kernel):
        draw = noise_gather(latents, torch.full_like(own, 9), *rest, batch=6, null_index=8, null_probability=0.0)
        labels = noise_gather(latents, torch.full_like(own, -1), torch.arange(9), *rest[1:], batch=6, null_index=8)
    paired = draw.choice == PAIRED
    assert paired.any() and draw.prompt[paired].isnan().all() and draw.prompt[~paired].isfinite().all()
    outside = labels.choice == PAIRED
    assert (labels.prompt[outside] == -1).all() and (labels.prompt[~outside] >= 0).all()


@pytest.mark.parametrize("kernel", KERNELS)
def test_any_split_of_the_batch_draws_the_same(kernel: str) -> None:
    inputs = banks(rows=29)
    with use(kernel):
        whole = noise_gather(*inputs, batch=12, null_index=8, target=True)
        for parts in ((6, 6), (5, 7), (1, 11)):
            first, drawn = 0, []
            for part in parts:
                drawn.append(
                    noise_gather(*inputs, batch=part, first_sample=first, global_batch=12, null_index=8, target=True)
                )
                first += part
            for field in Draw._fields:
                assert torch.equal(torch.cat([getattr(d, field) for d in drawn]), getattr(whole, field))


@pytest.mark.parametrize("kernel", KERNELS)
def test_each_latent_once_an_epoch(kernel: str) -> None:
    *tables, _ = banks(rows=10)
    with use(kernel):
        seen = [noise_gather(*tables, torch.tensor([3, step]), batch=4, null_index=8).latent_index for step in range(5)]
    first, second = torch.cat(seen).split(10)
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(10)) and not torch.equal(first, second)


@pytest.mark.parametrize("kernel", [k for k in KERNELS if not emulated(k)])
def test_rates_of_random_and_null_prompts(kernel: str) -> None:
    """p(t) within 4 sigma in each tenth of the timesteps, the null rate over all of them, and uniform timesteps."""
    n = 40_000
    latents, own, prompts, coefficients, replace, counter = banks((1,), rows=7)
    with use(kernel):
        draw = noise_gather(
            latents, own, prompts, coefficients, replace, counter, batch=n, null_index=8, null_probability=0.1
        )
    null = (draw.choice == NULL).double().mean().item()
    assert abs(null - 0.1) < 4 * (0.1 * 0.9 / n) ** 0.5
    kept = draw.choice != NULL
    for bin in range(10):
        inside = kept & (draw.timestep // (T // 10) == bin)
        count = int(inside.sum())
        p = replace[bin * (T // 10) : (bin + 1) * (T // 10)].double().mean().item() / 2**32
        rate = (draw.choice[inside] == RANDOM).double().mean().item()
        assert abs(rate - p) <= 4 * (max(p * (1 - p), 1e-4) / count) ** 0.5
    frequencies = torch.bincount(draw.timestep, minlength=T).double()
    assert ((frequencies - n / T).abs() < 5 * (n / T) ** 0.5).all()
    rows = torch.bincount(draw.prompt_index[draw.choice == RANDOM], minlength=9).double()
    assert rows[8] == 0 and ((rows[:8] - rows.sum() / 8).abs() < 5 * (rows.sum() / 8) ** 0.5).all()
    paired = draw.choice == PAIRED
    assert torch.equal(draw.prompt_index[paired], own[draw.latent_index[paired]])


@pytest.mark.parametrize("kernel", KERNELS)
def test_same_integers_as_the_reference_at_scale(kernel: str) -> None:
    latents, own, prompts, coefficients, replace, _ = banks((4, 8, 8), rows=1000)
    batch = 20 if emulated(kernel) else 700
    for seed, step in ((0, 0), (2**62 + 3, 2**31 + 5), (-7, 123456), (5, -3)):
        counter = torch.tensor([seed, step])
        with use("reference"):
            expected = noise_gather(latents, own, prompts, coefficients, replace, counter, batch=batch, null_index=8)
        with use(kernel):
            draw = noise_gather(latents, own, prompts, coefficients, replace, counter, batch=batch, null_index=8)
        for field in ("timestep", "latent_index", "prompt_index", "choice", "prompt"):
            assert torch.equal(getattr(draw, field), getattr(expected, field)), field
        torch.testing.assert_close(draw.x_t, expected.x_t, rtol=0, atol=4e-6 + 2e-6)


@pytest.mark.parametrize("kernel", [k for k in KERNELS if k != "reference" and not emulated(k)])
def test_same_bits_for_any_number_of_threads(kernel: str) -> None:
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 3, 8):
            torch.set_num_threads(threads)
            with use(kernel):
                results.append(noise_gather(*banks((3, 33, 35)), batch=7, null_index=8, target=True))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("kernel", KERNELS)
def test_buffers_are_reused(kernel: str) -> None:
    inputs = banks()
    out = empty_draw(inputs[0], inputs[2], 5)
    with use(kernel):
        draw = noise_gather(*inputs, out=out, null_index=8)
        assert draw is out and draw.target.shape == (0,)
        assert torch.equal(draw.x_t, noise_gather(*inputs, batch=5, null_index=8).x_t)


@pytest.mark.skipif("cpp" not in KERNELS, reason="the C++ kernels are not built")
def test_a_prepared_draw_goes_past_the_dispatcher_where_nobody_listens_there() -> None:
    *tables, counter = banks()
    draw = NoiseGather(*tables, counter, batch=5, null_index=8)
    expected = [t.clone() for t in draw()]
    with _Listening() as mode:
        draw()
        assert mode.seen == ["noise_gather"]
    with torch.profiler.profile() as profile:
        draw()
    assert "fastdistill::noise_gather" in {event.name for event in profile.events() or []}
    before = Counter(OPS["noise_gather"].calls)
    with use("reference"):
        draw()
    draw()
    assert OPS["noise_gather"].calls - before == Counter({"reference": 1, "cpp": 1})
    assert all(map(torch.equal, draw(), expected))
    with FakeTensorMode(allow_non_fake_inputs=True):
        draw()


class _Listening(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func._schema.name.split("::")[1])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kernel", KERNELS)
def test_prepared_once_it_draws_the_step_that_the_counter_holds(kernel: str) -> None:
    *tables, counter = banks()
    with use(kernel):
        draw = NoiseGather(*tables, counter, batch=5, null_index=8, target=True)
        for _ in range(3):
            counter[1] += 1
            expected = noise_gather(*tables, counter, batch=5, null_index=8, target=True)
            got = draw()
            assert got is draw.out and all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    with pytest.raises(InputError, match="null_index: expected a row of prompts, 0 to 8, got 9"):
        NoiseGather(*tables, counter, batch=5, null_index=9)


def test_fake_cuda_tensors() -> None:
    check_fake(case_of(banks(), 4), "cuda")


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({0: torch.ones(0, 3)}, {}, r"latents: expected \[N, ...\] with 1 to 2\*\*32 rows, got \(0, 3\)"),
        ({0: torch.ones(11, 3).double()}, {}, "latents: expected dtype float32 or bfloat16 or float16, got float64"),
        (
            {1: torch.zeros(3, dtype=torch.int64)},
            {},
            r"latent_prompts: expected one row number a latent \(11,\), got \(3,\)",
        ),
        ({2: torch.ones(9, 4, device="meta")}, {}, r"prompts: expected the device of counter \(cpu\), got meta"),
        (
            {3: torch.ones(T, 2)},
            {},
            r"coefficients: expected one row of 4 a timestep of replace \(50, 4\), got \(50, 2\)",
        ),
        ({4: None}, {}, "replace: expected a tensor, got NoneType"),
        ({4: torch.ones(T)}, {}, "replace: expected dtype int64, got float32"),
        ({5: torch.ones(3, dtype=torch.int64)}, {}, r"counter: expected \(seed, step\), shape \(2,\), got \(3,\)"),
        ({}, {"null_index": 9}, "null_index: expected a row of prompts, 0 to 8, got 9"),
        ({}, {"pool": 10}, r"pool: expected 1 to the rows of prompts \(9\), got 10"),
        ({}, {"null_probability": 1.5}, "null_probability: expected a probability, 0 to 1, got 1.5"),
        (
            {},
            {"global_batch": 3},
            r"global_batch: expected at least first_sample \+ batch \(4\), at most 2\*\*32, got 3",
        ),
        ({}, {"batch": None}, r"batch: expected a number of samples >= 0 \(or out=\), got None"),
    ],
)
def test_bad_input(change: dict[int, Tensor], options: dict[str, Any], message: str) -> None:
    inputs = [change.get(i, t) for i, t in enumerate(banks())]
    with pytest.raises(InputError, match=message):
        noise_gather(*inputs, **({"batch": 4, "null_index": 8} | options))
