# SPDX-License-Identifier: Apache-2.0
"""DDIM compared with diffusers step by step, and with the exact distribution for a Gaussian under guidance."""

import copy
import itertools
import math
import re
from types import SimpleNamespace

import pytest
import torch
from diffusers import (
    DDIMParallelScheduler,
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
    UNet2DConditionModel,
)
from hypothesis import given
from hypothesis import strategies as st

from fastdistill.diffusion.grid import Grid, trailing_timesteps
from fastdistill.diffusion.guidance import Guidance
from fastdistill.diffusion.guided import sample
from fastdistill.diffusion.sampler import ddim, initial_noise
from fastdistill.diffusion.schedule import NoiseSchedule
from fastdistill.errors import InputError
from tests.harness import EPS64, assert_alike

PROMPTS = torch.linspace(-1, 1, 3 * 2 * 4).reshape(3, 2, 4)
NULL = torch.full((2, 4), 0.25)


def smooth(x, t, encoder_hidden_states):
    """Depends on all inputs, row by row."""
    shift = encoder_hidden_states.mean((1, 2)).reshape(-1, 1, 1, 1)
    return SimpleNamespace(sample=torch.tanh(0.7 * x + shift + t.reshape(-1, 1, 1, 1) / 1000))


def in_diffusers(model, x, prompts, null, scheduler, steps, g, clip, error=0.0):
    """Timesteps and states; ``error`` is added to each state, relative to its largest magnitude."""
    scheduler.set_timesteps(steps)
    states = []
    for t in scheduler.timesteps:
        x = x + error * x.abs().max()
        times = t.expand(len(x))
        conditional = model(x, times, encoder_hidden_states=prompts).sample
        unconditional = model(x, times, encoder_hidden_states=null.expand_as(prompts)).sample
        out = unconditional + g * (conditional - unconditional)
        x = scheduler.step(out, t, x, eta=0.0, use_clipped_model_output=clip is not None).prev_sample
        states.append(x)
    return scheduler.timesteps.tolist(), states


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("g", [1.0, 7.5, 0.0, -0.5])
@pytest.mark.parametrize(("spacing", "offset"), [("trailing", 0), ("leading", 1)])
def test_each_step_is_that_of_diffusers(prediction_type, clip, g, spacing, offset):
    schedule = NoiseSchedule.scaled_linear(1000)
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type=prediction_type,
        clip_sample=clip is not None,
        set_alpha_to_one=True,
        timestep_spacing=spacing,
        steps_offset=offset,
    )
    scheduler.alphas_cumprod, scheduler.final_alpha_cumprod = schedule.alphas_cumprod, torch.tensor(1.0).double()
    x_T = initial_noise(0, torch.arange(3), (2, 4, 4)).double()
    times, theirs = in_diffusers(smooth, x_T, PROMPTS.double(), NULL.double(), scheduler, 10, g, clip)
    ours = []
    end = ddim(
        smooth,
        x_T,
        PROMPTS.double(),
        NULL.double(),
        schedule,
        steps=10,
        guidance_scale=g,
        prediction_type=prediction_type,
        timesteps=None if spacing == "trailing" else times,
        clip_sample=clip,
        callback=lambda index, t, x: ours.append((index, t, x)),
    )
    assert [(index, t) for index, t, _ in ours] == list(enumerate(times))
    # The same formulas on the same float64 table: ten steps of rounding, which 1 / sqrt(abar_T) = 15 magnifies.
    for (_, _, a), b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=10 * 15 * 16 * EPS64)
    assert torch.equal(end, ours[-1][2])


STABLE_DIFFUSION = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
SETTINGS = {
    "SD-1.5": {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1},
    "SD-2.1-v": {
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
        "prediction_type": "v_prediction",
    },
    "zero SNR": {
        "clip_sample": False,
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
        "timestep_spacing": "trailing",
    },
    "clipped": {"clip_sample_range": 0.7, "timestep_spacing": "linspace"},
    "clipped sample": {"prediction_type": "sample", "timestep_spacing": "trailing", "set_alpha_to_one": False},
}


@pytest.mark.parametrize("steps", [20, 30])  # 1000 is a multiple of 20, not of 30
@pytest.mark.parametrize("settings", SETTINGS)
def test_a_scheduler_brings_its_settings(settings, steps):
    make = DDIMParallelScheduler if settings == "clipped" else DDIMScheduler
    given, theirs = (make(**STABLE_DIFFUSION, **SETTINGS[settings]) for _ in range(2))
    theirs.alphas_cumprod = theirs.alphas_cumprod.double()  # the same values, float64 from here on
    theirs.final_alpha_cumprod = theirs.final_alpha_cumprod.double()
    x_T = initial_noise(0, torch.arange(3), (2, 4, 4)).double()
    arguments = (smooth, x_T, PROMPTS.double(), NULL.double())
    times, states = in_diffusers(*arguments, theirs, steps, 7.5, None)
    _, moved = in_diffusers(*arguments, theirs, steps, 7.5, None, error=2.0**-30)
    ours = []
    ddim(*arguments, given, steps=steps, guidance_scale=7.5, callback=lambda index, t, x: ours.append((t, x)))
    assert [t for t, _ in ours] == times and given.num_inference_steps is None  # the given scheduler is unchanged
    for (_, a), b, c in zip(ours, states, moved, strict=True):
        # Each of about 16 roundings of a step moves the state by at most half of 2**-52, relative to the largest
        # magnitude: 8 * 2**-52 is 2**-19 of the error that moved c, doubled for the two sides.
        torch.testing.assert_close(a, b, rtol=0, atol=2 * 2.0**-19 * float((c - b).abs().max()))


@pytest.mark.parametrize(
    ("scheduler", "changes", "message"),
    [
        (EulerDiscreteScheduler(), {}, "schedule: expected a NoiseSchedule or a DDIMScheduler, got EulerDiscreteSched"),
        (PNDMScheduler(), {}, "got PNDMScheduler, whose algorithm ddim would ignore; DDIMScheduler.from_config"),
        (FlowMatchEulerDiscreteScheduler(), {}, "got FlowMatchEulerDiscreteScheduler for flow matching"),
        (DDIMScheduler(thresholding=True), {}, "a DDIMScheduler without thresholding, which ddim would ignore"),
        (DDIMScheduler(), {"clip_sample": 1.0}, "clip_sample: expected None with a DDIMScheduler, which has this set"),
        (DDIMScheduler(), {"timesteps": [9, 2]}, "timesteps: expected None with a DDIMScheduler"),
        (DDIMScheduler(), {"prediction_type": "sample"}, "prediction_type: expected None with a DDIMScheduler"),
        (DDIMScheduler(prediction_type="x"), {}, "prediction_type: expected one of epsilon, sample, v_prediction"),
        (DDIMScheduler(), {"steps": 1001}, "steps: expected 1 to 1000, the timesteps of the schedule, got 1001"),
        (
            DDIMScheduler(steps_offset=1),
            {"steps": 1000},
            "steps: expected timesteps from 999 to 0, got 1000 to 1 (1000",
        ),
        (
            DDIMScheduler(steps_offset=-1),
            {},
            "steps: expected timesteps from 999 to 0, got 499 to -1 (2 steps, leading",
        ),
        (
            DDIMScheduler(rescale_betas_zero_snr=True, timestep_spacing="trailing"),
            {},
            "prediction_type: expected sample or v_prediction where abar is 0 (timestep 999), got epsilon",
        ),
        ({"beta_schedule": "linear"}, {}, "schedule: expected a diffusers scheduler with alphas_cumprod, got a dict"),
    ],
)
def test_what_ddim_would_ignore_of_a_scheduler_is_refused(scheduler, changes, message):
    def never(*_, **__):
        raise AssertionError("called the model")

    arguments = {"steps": 2, "guidance_scale": 1.0} | changes
    with pytest.raises(InputError, match=re.escape(message)):
        ddim(never, torch.ones(3, 1, 2, 2), PROMPTS, NULL, scheduler, **arguments)


@pytest.mark.parametrize("T", [1000, 100])
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 25, 30, 50, 99, 100])
def test_trailing_timesteps_are_those_of_diffusers(T, steps):
    scheduler = DDIMScheduler(num_train_timesteps=T, timestep_spacing="trailing")
    scheduler.set_timesteps(steps)
    assert trailing_timesteps(T, steps) == scheduler.timesteps.tolist()


@given(st.integers(1, 1200), st.data())
def test_trailing_timesteps_fall_from_the_last(T, data):
    times = trailing_timesteps(T, data.draw(st.integers(1, T)))
    assert times[0] == T - 1 and times[-1] >= 0 and all(a > b for a, b in itertools.pairwise(times))


@pytest.mark.parametrize("g", [1.0, 3.0, 0.0, 0.4])
@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("steps", [18, 30])
def test_the_law_sampled_for_a_gaussian_is_the_exact_recursion(g, prediction_type, steps):
    """p(x|c) = N(mu, c), p(x) = N(0, u): DDIM is affine in x_T, so its mean and variance are exact from two points.

    In units x / sqrt(abar), sigma^2 = (1 - abar) / abar, DDIM is Euler in sigma, for which with w = g - 1,
    k = (1+w) c/(c+sigma^2) - w u/(u+sigma^2), o = (1+w) mu sigma^2/(c+sigma^2), rho = sigma_next / sigma:
    m <- (rho + (1-rho) k) m + (1-rho) o,  V <- (rho + (1-rho) k)^2 V, from (0, 1 / abar_T) for x_T ~ N(0, 1).
    """
    mu, c, u, w = 1.3, 0.4, 2.0, g - 1
    schedule = NoiseSchedule.cosine(1000)

    def exact(x, t, encoder_hidden_states):
        abar = schedule.alphas_cumprod[t].reshape(-1, 1)
        chosen = encoder_hidden_states[:, 0, :1]  # 1 for the prompt, 0 for the null prompt
        mean, variance = mu * chosen, c * chosen + u * (1 - chosen)
        score = -(x - abar.sqrt() * mean) / (abar * variance + 1 - abar)
        eps = -(1 - abar).sqrt() * score
        x0 = (x - (1 - abar).sqrt() * eps) / abar.sqrt()
        return {"epsilon": eps, "sample": x0, "v_prediction": abar.sqrt() * eps - (1 - abar).sqrt() * x0}[
            prediction_type
        ]

    x_T = torch.tensor([[0.0], [1.0], [-2.0]], dtype=torch.float64)
    prompts, null = torch.ones(3, 1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    at = ddim(exact, x_T, prompts, null, schedule, steps=steps, guidance_scale=g, prediction_type=prediction_type)[
        :, 0
    ].tolist()
    mean, slope = at[0], at[1] - at[0]
    # sqrt(1 / abar_T) = 2e4 for the cosine schedule: float64 loses 4 to 5 of its 16 digits to cancellation.
    lost = steps / math.sqrt(float(schedule.alphas_cumprod[-1]))
    assert at[2] == pytest.approx(mean - 2 * slope, rel=8 * EPS64 * lost)

    abars = [float(schedule.alphas_cumprod[t]) for t in trailing_timesteps(1000, steps)]
    sigmas = [math.sqrt((1 - abar) / abar) for abar in abars] + [0.0]
    m, V = 0.0, 1 / abars[0]
    for sigma, following in itertools.pairwise(sigmas):
        rho = following / sigma
        k = (1 + w) * c / (c + sigma**2) - w * u / (u + sigma**2)
        o = (1 + w) * mu * sigma**2 / (c + sigma**2)
        m, V = (rho + (1 - rho) * k) * m + (1 - rho) * o, (rho + (1 - rho) * k) ** 2 * V
    assert mean == pytest.approx(m, rel=8 * EPS64 * lost)
    assert slope**2 == pytest.approx(V, rel=8 * EPS64 * lost)


def counting(model):
    def wrapped(x, t, encoder_hidden_states):
        wrapped.rows.append(len(x))
        return model(x, t, encoder_hidden_states)

    wrapped.rows = []
    return wrapped


@pytest.mark.parametrize(("g", "rows"), [(1.0, 3), (0.0, 3), (2.0, 6)])
def test_guidance_runs_only_the_passes_it_needs(g, rows):
    model = counting(smooth)
    ddim(model, torch.ones(3, 1, 2, 2), PROMPTS, NULL, NoiseSchedule.cosine(), steps=4, guidance_scale=g)
    assert model.rows == [rows] * 4


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=4,
        attention_head_dim=2,
        norm_num_groups=4,
    ).eval()


def test_a_unet_of_diffusers_and_rows_do_not_depend_on_their_batch(unet):
    x_T = initial_noise(1, torch.arange(3), (3, 8, 8))
    # From a timestep at which x_0 follows from x_t without a loss of digits: 1 / sqrt(abar) is 2, at the last 2e4.
    arguments = {"steps": 3, "guidance_scale": 2.0, "clip_sample": 1.0, "timesteps": (650, 400, 150)}
    schedule = NoiseSchedule.cosine()
    all_rows = ddim(unet, x_T, PROMPTS, NULL, schedule, **arguments)
    assert all_rows.shape == x_T.shape and all_rows.dtype == torch.float32 and not all_rows.requires_grad
    # Matrix products round differently at other batch sizes: each row alone is as near to float64 as all together.
    exact = copy.deepcopy(unet).double(), x_T.double(), PROMPTS.double(), NULL.double()
    truth = ddim(*exact, schedule, **arguments)
    rows = [ddim(unet, x_T[i : i + 1], PROMPTS[i : i + 1], NULL[None], schedule, **arguments) for i in range(3)]
    assert_alike(torch.cat(rows), all_rows, truth)
    as_tuple = ddim(lambda *a, **k: unet(*a, **k, return_dict=False), x_T, PROMPTS, NULL, schedule, **arguments)
    assert torch.equal(as_tuple, all_rows)


def test_low_precision_models_keep_a_float32_state():
    seen, states = [], []

    def model(x, t, encoder_hidden_states):
        seen.append(x.dtype)
        return smooth(x, t, encoder_hidden_states)

    x_T = torch.ones(3, 1, 2, 2, dtype=torch.bfloat16)
    x_0 = ddim(
        model,
        x_T,
        PROMPTS.bfloat16(),
        NULL.bfloat16(),
        NoiseSchedule.cosine(),
        steps=5,
        guidance_scale=2.0,
        callback=lambda index, t, x: states.append(x.dtype),
    )
    assert set(seen) == {torch.bfloat16} and set(states) == {torch.float32} and x_0.dtype == torch.bfloat16


def test_zero_terminal_signal():
    schedule = NoiseSchedule(torch.tensor([0.9, 0.5, 0.0]))
    x_T = torch.ones(3, 1, 2, 2)
    for kind in ("v_prediction", "sample"):
        x_0 = ddim(smooth, x_T, PROMPTS, NULL, schedule, steps=3, guidance_scale=1.0, prediction_type=kind)
        assert bool(torch.isfinite(x_0).all())
    with pytest.raises(InputError, match="expected sample or v_prediction where abar is 0"):
        ddim(smooth, x_T, PROMPTS, NULL, schedule, steps=3, guidance_scale=1.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": PROMPTS[:2]}, "prompts: expected rows [3 (batch of x_T), ...], got (2, 2, 4)"),
        ({"null_prompt": None}, "null_prompt: expected a row, for a guidance_scale of 2.0, got None"),
        ({"null_prompt": NULL[:1]}, "null_prompt: expected a row of prompts (2, 4), got (1, 4)"),
        ({"null_prompt": PROMPTS}, "null_prompt: expected a row of prompts (2, 4), got (3, 2, 4)"),
        ({"prompts": {"a": PROMPTS}}, "null_prompt: expected banks a, as prompts, got "),
        ({"prompts": {}}, "prompts: expected at least one bank, got none"),
        (
            {"prompts": {"a": PROMPTS}, "null_prompt": {"a": PROMPTS[0, 0]}},
            "null_prompt['a']: expected a row of prompts",
        ),
        ({"prompts": {"a": PROMPTS}, "null_prompt": {"b": NULL}}, "null_prompt: expected banks a, as prompts, got b"),
        ({"prompts": {"a": [1]}, "null_prompt": {"a": NULL}}, "prompts['a']: expected a tensor, got [1]"),
        ({"null_prompt": NULL.to("meta")}, "null_prompt: expected the device of x_T (cpu), got meta"),
        ({"x_T": torch.ones(3, 1, dtype=torch.int64)}, "x_T: expected floating point"),
        ({"steps": 0}, "steps: expected 1 to 1000"),
        ({"steps": 1001}, "steps: expected 1 to 1000"),
        ({"timesteps": [1, 2]}, "timesteps: expected decreasing values from 999 to 0, got [1, 2]"),
        ({"timesteps": [1000, 2]}, "timesteps: expected decreasing values from 999 to 0"),
        ({"timesteps": [5]}, "timesteps: expected 2 values, one per step, got 1"),
        ({"guidance": "2"}, "guidance: expected a schedule of w, or in its place guidance_scale (g = 1 + w), got both"),
        ({"guidance_scale": None}, "in its place guidance_scale (g = 1 + w), got neither"),
        ({"guidance_scale": None, "guidance": "cads:0..1,1,1:2"}, "guidance: expected a schedule without cads, got"),
        ({"guidance_scale": None, "guidance": "2@1e6,0"}, "the ends of the levels, got 1e+06"),
        ({"guidance_scale": math.nan}, "guidance_scale: expected a finite number, got nan"),
        ({"guidance_scale": "2"}, "guidance_scale: expected a finite number, got '2'"),
        ({"clip_sample": 0.0}, "clip_sample: expected a limit above 0"),
        ({"clip_sample": 1e300}, "clip_sample: expected a number within float32, got 1e+300"),
        ({"prediction_type": "eps"}, "prediction_type: expected one of epsilon, sample, v_prediction, got 'eps'"),
        ({"model": lambda *a, **k: torch.ones(1)}, "model: expected a prediction of shape (6, 1, 2, 2), got (1,)"),
        ({"model": lambda *a, **k: None}, "model: expected a prediction of shape (6, 1, 2, 2), got NoneType"),
    ],
)
def test_bad_input(changes, message):
    arguments = {
        "model": smooth,
        "x_T": torch.ones(3, 1, 2, 2),
        "prompts": PROMPTS,
        "null_prompt": NULL,
        "schedule": NoiseSchedule.cosine(),
        "steps": 2,
        "guidance_scale": 2.0,
    }
    with pytest.raises(InputError, match=re.escape(message)):
        ddim(**(arguments | changes))


def test_a_constant_schedule_is_its_scale_to_the_bit():
    given = smooth, torch.ones(3, 1, 2, 2), PROMPTS, NULL
    for schedule in (NoiseSchedule.cosine(), DDIMScheduler(clip_sample=False)):
        for w in (-1, 0, 1.5):
            scaled, scheduled = (
                ddim(*given, schedule, steps=3, **guidance) for guidance in ({"guidance_scale": 1 + w}, {"guidance": w})
            )
            assert scaled.equal(scheduled)


@pytest.mark.parametrize("guidance", ["3@4,-1@0.5,0", "2@0.8t,0", "2@50%,-1", "power:1.5^0.7"])
def test_a_schedule_is_that_of_sampling_on_the_grid(guidance):
    def passes(x, t, encoder_hidden_states):
        calls.append(len(x))
        return smooth(x, t, encoder_hidden_states)

    grid = Grid.trailing(NoiseSchedule.cosine(), 6)
    levels = {"prediction_type": "v_prediction", "guidance": guidance}

    def both(dtype):
        given = passes, torch.ones(3, 1, 2, 2, dtype=dtype), PROMPTS.to(dtype), NULL.to(dtype)
        return ddim(*given, NoiseSchedule.cosine(), steps=6, **levels), sample(*given, grid, **levels)

    calls = []
    ours, eager = both(torch.float32)
    assert sum(calls) == 2 * 3 * Guidance.parse(guidance).evaluations(grid)
    assert_alike(ours, eager, both(torch.float64)[1])
