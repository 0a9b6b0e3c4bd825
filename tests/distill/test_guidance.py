# SPDX-License-Identifier: Apache-2.0
"""Guidance distillation compared with a simple version in plain torch: one batch for both predictions."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastdistill import FlowSchedule, Grid, Guidance, make_student
from fastdistill.distill import GuidanceDistillation, RandomConditioning, Setting, Weights
from fastdistill.errors import InputError
from fastdistill.models import families
from fastdistill.ops import philox
from tests import small, tiny
from tests.distill.test_random_conditioning import outputs_of
from tests.harness import EPS, assert_alike, assert_close, nudged
from tests.models import tiny_families

UNET = families.family_named("unet")
COUNTER = torch.tensor([5, 3])
WINDOW = "8@2,-1@0.5,0"
SCALE = {"schedule": "1@2,-1@0.5,0", "scale": (0.0, 8.0)}


def setting(reads: bool = False, batch: int = 12) -> tuple[Setting, Any]:
    own = small.teacher().eval().requires_grad_(False)
    made = make_student(own, "bk_base", guidance_embedding=reads)
    if reads:  # if they were zero, the input would have no effect
        nn.init.normal_(made.model.time_embedding.cond_proj.weight, generator=torch.Generator().manual_seed(4))
    cache = small.cache()
    models = own, made.model.train()
    return Setting(*models, small.SCHEDULE, cache.latents, cache.prompt_index, small.bank().embeddings, batch), made


def objective(made: Any, schedule: Any = WINDOW, **changes: Any) -> GuidanceDistillation:
    taps = tuple(zip(made.teacher_taps, made.student_taps, strict=True))
    return GuidanceDistillation(schedule, **({"taps": taps} | changes))


def weights_of(config: GuidanceDistillation, draw: Any, levels: Tensor) -> tuple[Tensor, Tensor]:
    """v and w of each sample in float64; ``levels``: sigma of each timestep."""
    word = philox.words(COUNTER[0], COUNTER[1], torch.arange(len(draw.timestep)), torch.tensor(0), 6)[0]
    low, high = config.scale or (1.0, 1.0)
    v = low + (high - low) * ((word >> 9).double() + 0.5) / 2**23
    schedule = config._checked().schedule
    if schedule == Guidance.power_law(0.1, 0.5):  # the factor of |Delta_eps / sigma|^0.5
        h = 0.1 * levels[draw.timestep] ** -0.5
    else:
        h = schedule.weights_at(levels)[draw.timestep]
    return v, torch.where(draw.prompt_index == 8, 0.0, h.clamp(min=0) * v + h.clamp(max=0))


CASES: dict[str, dict[str, Any]] = {
    "a window": {},
    "one that the student reads, under random conditioning": SCALE | {"probability": "exp"},
    "on a grid": {"grid": "karras:12@30..0.09"},
    "a weight for each sample": {"schedule": "power:0.1^0.5"},
    "a task, weights that are named": {"weights": Weights(0.5, 2.0, 0.3), "loss_weighting": "min_snr"},
}


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradients_are_the_literal_recipe(name: str) -> None:
    where, made = setting(reads="scale" in CASES[name])
    config = objective(made, **({"null_probability": 0.3} | CASES[name]))
    bound = config.bind(where)
    loss, metrics = bound(COUNTER)
    loss.backward()
    ours = [p.grad.clone() for p in where.student.parameters()]
    draw, drawn = bound.draw(COUNTER)
    grid = None if config.grid is None else Grid.parse(config.grid, small.SCHEDULE)
    abar = small.SCHEDULE.alphas_cumprod if grid is None else grid.signal[:-1] ** 2
    sigma = ((1 - abar) / abar).sqrt()
    time = draw.timestep if grid is None else grid.times[draw.timestep].long()
    v, w = weights_of(config, draw, sigma)
    assert (v - drawn).abs().max() <= 2 * EPS * 8
    told = UNET.guidance_rows({"time_cond_proj_dim": 256}, drawn)  # in float32, like diffusers
    assert (draw.prompt_index == 8).any() and len(set(w.tolist())) > 2

    def literal(
        dtype: torch.dtype, near: Callable[[Tensor], Tensor] = lambda x: x
    ) -> tuple[list[Tensor], list[Tensor]]:
        teacher, twin = (small.copied(model, dtype, near) for model in (where.teacher, where.student))
        own_draw = draw._replace(x_t=near(draw.x_t.to(dtype)), prompt=near(draw.prompt.to(dtype)), timestep=time)
        with torch.no_grad():
            null = near(where.prompts[8:].to(dtype)).expand(12, -1, -1)
            both = own_draw._replace(
                x_t=torch.cat([own_draw.x_t] * 2),
                timestep=torch.cat([time] * 2),
                prompt=torch.cat([null, own_draw.prompt]),
            )
            found, features = outputs_of(teacher, list(made.teacher_taps), both)
            (u, c), theirs = found.chunk(2), [feature.chunk(2)[1] for feature in features]
        if config.scale:
            twin.time_embedding.register_forward_pre_hook(lambda _, args: (args[0], told.to(dtype)))
        output, own = outputs_of(twin, list(made.student_taps), own_draw)
        mse, weights = nn.functional.mse_loss, config.weights
        snr = abar / (1 - abar)
        table = snr.clamp(max=5) / snr if config.loss_weighting else (1 / abar).clamp(max=5)
        weight = table[draw.timestep].to(dtype)
        norms = (c - u).square().sum((1, 2, 3)).sqrt() ** 0.5 if name == "a weight for each sample" else 1.0
        target = c + (w.to(dtype) * norms).view(-1, 1, 1, 1) * (c - u)
        taps = [mse(s, t) for s, t in zip(own, theirs, strict=True)]
        task = output.new_zeros(())
        if weights.task:
            eps = philox.normal(COUNTER[0], COUNTER[1], torch.arange(12), (3, 8, 8)).to(dtype)
            task = ((output - eps).square().mean((1, 2, 3)) * weight).mean()
        apart = [[(f[0] - f[1]).square().mean() for f in features] for features in (own, theirs)]
        spread = [s / t for s, t in zip(*apart, strict=True)]
        parts = [((output - target).square().mean((1, 2, 3)) * weight).mean(), sum(taps), task, *taps, *spread]
        expected = weights.output * parts[0] + weights.feature * parts[1] + weights.task * parts[2]
        expected.backward()
        return [expected.detach(), *(p.detach() for p in parts)], [p.grad for p in twin.parameters()]

    (eager, gradients), (exact, exact_gradients) = literal(torch.float32), literal(torch.float64)
    count = 12 * 3 * 8 * 8
    for one, truth, other in zip(metrics, exact, eager, strict=True):
        assert_close("metric", one.detach(), truth, other, 2.0, terms=(count, float(truth)))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        moved = literal(torch.float64, nudged)[1]
    assert_alike(ours, gradients, exact_gradients, factor=3.0, moved=moved)


def test_the_teacher_is_asked_once() -> None:
    where, made = setting(batch=4)
    seen: list[int] = []
    where.teacher.register_forward_hook(lambda _m, args, _o: seen.append(len(args[0])))
    bound = objective(made).bind(where)
    seen.clear()
    bound(COUNTER)
    assert seen == [8]


def test_the_drawn_weights_are_uniform_and_the_same_in_any_split() -> None:
    where, made = setting(reads=True, batch=64)
    config = objective(made, 1.0, scale=(-0.5, 7.5), weights=Weights(1, 0, 0), taps=())
    bound = config.bind(where)
    drawn = [bound.draw(torch.tensor([1, step])) for step in range(60)]
    v = torch.cat([d.scale for d in drawn]).sort().values
    n, ranks = len(v), torch.arange(1, len(v) + 1) / len(v)
    distance = ((v + 0.5) / 8 - ranks).abs().max()
    assert v[0] > -0.5 and v[-1] < 7.5 and distance < 1.95 / math.sqrt(n)  # p = 1e-3 of Kolmogorov and Smirnov
    half = dataclasses.replace(where, batch=32, first_sample=32, global_batch=64)
    part = config.bind(half).draw(torch.tensor([1, 7]))
    assert torch.equal(part.scale, drawn[7].scale[32:])
    assert torch.equal(bound.draw(torch.tensor([1, 7])).part(8, 24).scale, drawn[7].scale[8:24])


def test_a_share_of_the_samples_has_the_lowest_weight_itself() -> None:
    where, made = setting(reads=True, batch=64)
    config = objective(made, 1.0, scale=(0.0, 4.0), lowest=0.25, weights=Weights(1, 0, 0), taps=())
    bound = config.bind(where)
    v = torch.cat([bound.draw(torch.tensor([1, step])).scale for step in range(60)])
    lowest, others = int((v == 0).sum()), v[v > 0].sort().values
    n, p = len(v), 0.25
    assert abs(lowest - n * p) < 3.3 * math.sqrt(n * p * (1 - p))  # p = 1e-3 of the normal distribution
    ranks = torch.arange(1, len(others) + 1) / len(others)
    assert (others / 4 - ranks).abs().max() < 1.95 / math.sqrt(len(others))
    with pytest.raises(InputError, match=r"lowest: expected 0 without a scale, got 0\.25"):
        objective(made, 1.0, lowest=0.25, weights=Weights(1, 0, 0), taps=()).bind(where)


def test_samples_of_a_grid_are_its_levels() -> None:
    where, made = setting(batch=64)
    grid = Grid.karras(small.SCHEDULE, 8, 30, 0.1)
    seen: list[Tensor] = []
    where.student.register_forward_pre_hook(lambda _m, args: seen.append(args[1]))
    bound = objective(made, "6.5@50%,-1", grid=grid, weights=Weights(1, 0, 0), taps=()).bind(where)
    seen.clear()
    bound(COUNTER)
    assert set(seen[0].tolist()) == set(grid.times.tolist())
    assert bound._guiding.positive.tolist() == [6.5] * 4 + [0] * 4
    assert bound._guiding.negative.tolist() == [0] * 4 + [-1] * 4


def test_a_model_that_reads_the_guidance_scale_is_given_the_drawn_one() -> None:
    """Flux: the teacher gets the scale of the bank, the student g = 1 + v instead."""
    teacher, student = tiny_families.model("flux"), tiny_families.model("flux", 1)
    cache, banks = tiny_families.cache("flux"), tiny_families.banks(tiny_families.model("flux"))
    where = Setting(
        teacher.eval(), student, FlowSchedule(50), cache.latents, cache.prompt_index, banks, 4, "flow_prediction"
    )
    seen: dict[str, Tensor] = {}
    for name, model in {"teacher": teacher, "student": student}.items():
        model.register_forward_pre_hook(
            lambda _m, _a, k, name=name: seen.update({name: k["guidance"]}), with_kwargs=True
        )
    bound = GuidanceDistillation(1, scale=(0, 4), weights=Weights(1, 0, 0)).bind(where)
    loss, _ = bound(COUNTER)
    drawn = bound.draw(COUNTER)
    rows = banks["guidance"][torch.cat([torch.full((4,), 3), drawn.batch.prompt_index])]
    assert torch.equal(seen["student"], 1 + drawn.scale) and torch.equal(seen["teacher"], rows) and loss.isfinite()


@pytest.mark.parametrize("name", ["sd", "sdxl", "flux schnell"])
def test_a_new_guidance_input_changes_nothing_at_first(name: str) -> None:
    family, config = tiny_families.TINY[name.split()[0]]
    kind = families.family_named(family).kind
    teacher = kind(**config | ({"guidance_embeds": False} if family == "flux" else {}))
    spec = "half_depth" if family == "flux" else {"width": 0.5}
    plain, made = (make_student(teacher, spec, guidance_embedding=reads) for reads in (False, True))
    assert families.find(made.model).reads_guidance(made.model.config)  # type: ignore[union-attr]
    own = families.find(teacher)
    rows = {k: v[:2] for k, v in tiny_families.banks(teacher).items()}
    assert own is not None
    own.check("student", made.model, (1, own.channels(teacher.config), 8, 8), tiny_families.banks(made.model))
    x, t = torch.randn(2, own.channels(teacher.config), 8, 8), torch.tensor([3, 40])
    told = {own.guidance_bank(made.model.config): own.guidance_rows(made.model.config, torch.tensor([0.0, 7.0]))}
    outputs = [own.call(plain.model, x, t, rows), own.call(made.model, x, t, rows | told)]
    tensors = [o if isinstance(o, Tensor) else o.sample for o in outputs]
    assert torch.equal(*tensors)
    tensors[1].square().mean().backward()
    *_, last = made.model.get_submodule(own.guidance[2]).parameters()
    assert last.grad.abs().max() > 0


def test_the_embedding_is_that_of_diffusers() -> None:
    pipelines = pytest.importorskip("diffusers").StableDiffusionPipeline
    w = torch.tensor([-0.9, 0.0, 3.25, 7.5])
    for dim in (256, 7):
        wanted = pipelines.get_guidance_scale_embedding(None, w, dim)
        assert torch.equal(UNET.guidance_rows({"time_cond_proj_dim": dim}, w), wanted)


def test_fingerprints_hold_the_schedule() -> None:
    given = {
        "window": GuidanceDistillation(Guidance.window(8, -1, 2, 0.5)),
        "text": GuidanceDistillation(WINDOW),
        "grid": GuidanceDistillation(WINDOW, grid="karras:12"),
        "levels": GuidanceDistillation(WINDOW, grid=Grid.karras(small.SCHEDULE, 4, rho=3)),
        "square": GuidanceDistillation(Guidance.function(lambda s: s * s)),
        "cube": GuidanceDistillation(Guidance.function(lambda s: s**3)),
    }
    told = {name: one.describe() for name, one in given.items()}
    assert told["window"]["schedule"] == WINDOW and told["window"] == told["text"]
    assert told["grid"]["grid"] == "karras:12" and told["levels"]["grid"] != told["grid"]["grid"]
    assert told["square"]["schedule"] != told["cube"]["schedule"]
    assert told["text"].items() > {"scale": None, "null_probability": 0.1, "probability": "const"}.items()


def test_bad_input() -> None:
    where, _ = setting(batch=2)
    plain = {"weights": Weights(1, 0, 0), "taps": ()}
    for schedule, options, message in (
        ("2@", {}, r"guidance: .* got '2@', where column 3 should be a number"),
        ("2@50%,0", {}, "guidance: expected thresholds as sigma or t"),
        (1, {"scale": (0, 4)}, r"scale: expected None, or a student that reads it .* UNet2DConditionModel without"),
        (1, {"scale": (4, 4)}, r"scale: expected \(lowest, highest\)"),
        ("-1@2,0", {"scale": (0, 4)}, "scale: expected None for a schedule without positive weights"),
        (1, {"scale": (0, math.nan)}, "scale"),
        (1, {"grid": 20}, "grid: expected a Grid, its text or None, got 20"),
        (1, {"grid": "flow:4"}, r"grid: expected levels with signal\^2 \+ noise\^2 = 1"),
        (1, {"weight_limit": 0}, "weight_limit"),
        ("cads:0.6..0.9,0.25,1:2", {"grid": "karras:8"}, "schedule: expected a schedule without cads"),
    ):
        with pytest.raises(InputError, match=message):
            GuidanceDistillation(schedule, **plain | options).bind(where)  # type: ignore[arg-type]
    for kind in ("dit", "pixart_sigma", "sd3", "sana"):
        teacher = tiny_families.model(kind)
        with pytest.raises(InputError, match=f"guidance_embedding: expected False for a {families.find(teacher)}"):
            make_student(teacher, "half_depth", guidance_embedding=True)
    model = tiny.Net()
    own = Setting(
        model, model, tiny.SCHEDULE, tiny.cache().latents, tiny.cache().prompt_index, tiny.bank().embeddings, 2
    )
    with pytest.raises(InputError, match=r"scale: expected None, or a student that reads it .* a Net without"):
        GuidanceDistillation(1, scale=(0, 1), weights=Weights(1, 0, 0)).bind(own)
    assert isinstance(GuidanceDistillation(1), RandomConditioning)
