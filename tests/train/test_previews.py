# SPDX-License-Identifier: Apache-2.0
"""Previews: grids with the same prompts and noise for every architecture; they change nothing in the run."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from PIL import Image
from torch import Tensor

from fastdistill.data.prompt_bank import PromptBank
from fastdistill.diffusion.flow import FlowSchedule
from fastdistill.diffusion.sampler import ddim, initial_noise
from fastdistill.diffusion.schedule import NoiseSchedule
from fastdistill.diffusion.scheduled import sample_with, scheduler_of
from fastdistill.errors import InputError
from fastdistill.evaluate.previews import Previews, pictured
from fastdistill.train.state import state_of
from tests import tiny
from tests.harness import EPS
from tests.models import tiny_families
from tests.train.ranks import make
from tests.train.test_randomness import Dropping

FLOW = ("sd3", "flux", "sana")


def state(run: Any) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in state_of(run.step, run.student).items()}


def pixels(png: bytes) -> Tensor:
    with Image.open(io.BytesIO(png)) as image:
        return torch.tensor(list(image.convert("RGB").tobytes()), dtype=torch.uint8).reshape(image.height, -1, 3)


def test_previews_change_no_step_and_show_the_training(tmp_path: Path) -> None:
    """At the start, every n steps and at the end; the teacher's row stays the same, also in a continued run."""
    preview = {"every": 3, "prompts": 2, "steps": 1, "guidance_scale": 2.0}
    alone, watched = make(student=Dropping(6), steps=3), make(student=Dropping(6), steps=3, preview=preview)
    alone.fit()
    make(student=Dropping(6), steps=2, preview=preview).fit(tmp_path)
    watched.fit(tmp_path)
    one, two = state(alone), state(watched)
    assert all(torch.equal(one[name], two[name]) for name in one)
    files = sorted((tmp_path / "previews").iterdir())
    assert [file.name for file in files] == [f"step-{step:08d}.png" for step in (0, 2, 3)]
    first, *_, last = (pixels(file.read_bytes()) for file in files)
    rows = [slice(None, len(first) // 2), slice(len(first) // 2, None)]
    assert torch.equal(first[rows[0]], last[rows[0]]) and not torch.equal(first[rows[1]], last[rows[1]])


@pytest.mark.parametrize("name", [n for n in tiny_families.TINY if n != "lcm"])
def test_models_of_every_family(name: str) -> None:
    flow = name.startswith(FLOW)
    schedule: Any = FlowSchedule(50, shift=3.0) if flow else NoiseSchedule.linear(50)
    scheduler = scheduler_of(schedule, "flow_prediction" if flow else "epsilon")
    models, bank = [tiny_families.model(name, seed).eval() for seed in (0, 1)], tiny_families.bank(name)
    shape = tuple(tiny_families.cache(name).latents.shape[1:])
    settings: dict[str, Any] = {
        "wanted": [2, "prompt 0"],
        "steps": 2,
        "guidance": {"guidance_scale": 2.0},
        "seeds": [7, 1],
        "batch": 1,
    }
    made = Previews(models[0], scheduler, bank, shape, torch.device("cpu"), **settings)
    samples = made._samples(models[1])
    assert not torch.equal(made._samples(models[0]), samples) and bool(samples.isfinite().all())
    prompt, null = ({k: v[i] for k, v in bank.banks.items()} for i in ([0], [3]))
    noise = initial_noise(1, torch.arange(2), shape)[1:]
    assert len(samples) == 4  # one for each prompt and seed
    assert torch.equal(sample_with(scheduler, models[1], noise, prompt, null, steps=2, guidance_scale=2.0), samples[3:])


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_the_scheduler_of_a_schedule(prediction: Any) -> None:
    """DDIM of diffusers and ``ddim`` agree: some operations per step with an error of eps of a few times the state."""
    schedule, model = NoiseSchedule.scaled_linear(60), tiny.Net().eval()
    x, prompts = torch.randn(2, 4, 5, 3, generator=torch.Generator().manual_seed(0)), tiny.bank().embeddings[:2]
    ours = ddim(model, x, prompts, None, schedule, steps=6, guidance_scale=1.0, prediction_type=prediction)
    found = sample_with(scheduler_of(schedule, prediction), model, x, prompts, steps=6)
    assert (found - ours).abs().max() <= 6 * 16 * EPS * 4 * ours.abs().max()
    limited = sample_with(scheduler_of(schedule, prediction, 0.5), model, x, prompts, steps=1)
    assert limited.abs().max() == 0.5 < found.abs().max()
    flow = scheduler_of(FlowSchedule(shift=3.0), "flow_prediction")
    flow.set_timesteps(4)
    assert flow.config["shift"] == 3 and float(flow.sigmas[0]) == 1 and float(flow.sigmas[-1]) == 0
    assert flow.timesteps[0] == 1000 and float(flow.timesteps[1]) > 750  # shifted towards more noise


def test_latents_as_images() -> None:
    x = torch.linspace(-1, 1, 2 * 5 * 3 * 4).reshape(2, 5, 3, 4)
    for latents, shape in (
        (x, (2, 3, 3, 4)), (x[:, :1], (2, 1, 3, 4)), (x[:, :2], (2, 3, 3, 4)), (x[:, :, None], (2, 3, 3, 4)),
        (x[..., 0], (2, 1, 5, 3)), (x[..., 0, 0], (2, 1, 1, 5)),
    ):  # fmt: skip
        images = pictured(latents, (-1.0, 1.0))
        assert images.shape == shape and 0 <= images.min() <= images.max() <= 1
    assert torch.equal(pictured(x, (-1.0, 1.0))[:, 1], (x[:, 1] + 1) / 2)
    assert torch.equal(pictured(x, (0.0, 0.5)), (2 * x[:, :3]).clamp(0, 1))


def test_images_of_a_decoder_and_a_scheduler_of_ones_own(tmp_path: Path) -> None:
    seen: list[tuple[int, ...]] = []

    def decode(latents: Tensor) -> Tensor:
        seen.append(tuple(latents.shape))
        return latents.new_full((len(latents), 3, 8, 8), 1.0)

    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    preview = {"every": 1, "prompts": ["b"], "steps": 1}
    run = tiny.trainer(schedule=scheduler, preview=preview, steps=1, decode=decode)
    (tmp_path / "previews").mkdir()
    (tmp_path / "previews" / ".step-00000000.png.7-ab.tmp").touch()  # left by a killed process; it is removed
    run.fit(tmp_path)
    assert seen == [(1, 4, 5, 3)] * 3 and len(list((tmp_path / "previews").iterdir())) == 2


def test_prompts_that_are_not_in_the_pool_by_several_seeds(tmp_path: Path) -> None:
    seen: list[Tensor] = []

    def decode(latents: Tensor) -> Tensor:
        seen.append(latents)
        return latents[:, :3]

    rows = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(3))
    preview = {"every": 1, "prompts": ["elsewhere"], "seeds": [4, 0, 4], "steps": 1}
    made = [PromptBank(rows, ["elsewhere"]), None]
    for own, texts in zip(made, (["elsewhere"], ["a"]), strict=True):
        run = tiny.trainer(preview=preview | {"prompts": texts}, preview_prompts=own, steps=1, decode=decode)
        run.fit(tmp_path / texts[0])
    (first, again, same), (pool, *_) = seen[:3], seen[9:]
    assert len(seen) == 18 and torch.equal(first, same) and not torch.equal(first, again)
    assert not torch.equal(first, pool)  # the same noise with another prompt


def test_no_room_for_a_preview_is_a_warning(tmp_path: Path) -> None:
    def decode(latents: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("no memory")

    with pytest.warns(UserWarning, match="preview of step 0: left out, no memory"):
        assert tiny.trainer(preview={"every": 2}, decode=decode).fit(tmp_path).steps == 2


def test_no_place_for_a_preview_is_a_warning(tmp_path: Path) -> None:
    (tmp_path / "previews").touch()
    said = "previews: expected a directory, got a file .*; training goes on without the preview of step 2"
    with pytest.warns(UserWarning, match=said):
        run = tiny.trainer(preview={"every": 2, "steps": 1}, decode=lambda latents: latents[:, :3])
        assert run.fit(tmp_path).steps == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preview": {"every": 1, "prompts": ["c"]}}, r"preview.prompts\[0\]: expected a text of the bank, got 'c'"),
        ({"preview": {"every": 1, "prompts": ["a", 2]}}, r"preview.prompts\[1\]: expected a row of the bank, 0 to 1"),
        ({"preview": {"every": 1, "steps": 51}}, "preview.steps: expected at most the schedule's 50"),
        ({"preview": {"every": 0}}, "preview.every"),
        ({"preview": {"every": 1, "seeds": []}}, "preview.seeds: tuple should have at least 1 item"),
        ({"preview_prompts": torch.zeros(2, 5, 6)}, "preview_prompts: expected a PromptBank, or None, got Tensor"),
        (
            {"preview_prompts": PromptBank({"y": torch.zeros(2)}, ["c"])},
            "preview_prompts: expected the banks of prompts, encoder_hidden_states, got y",
        ),
        (
            {"preview_prompts": PromptBank(torch.zeros(2, 5, 7), ["c"])},
            r"preview_prompts\['encoder_hidden_states'\]: expected rows \(5, 6\), as those of prompts, got \(5, 7\)",
        ),
        (
            {
                "prompts": PromptBank(tiny.bank().banks, ["a", "b"], encoder={"sha256": "x"}),
                "preview_prompts": PromptBank(torch.zeros(2, 5, 6), ["c"], encoder={"sha256": "y"}),
            },
            "preview_prompts: expected the text encoder of prompts, got sha256: expected 'x', got 'y'",
        ),
        (
            {"preview": {"every": 1, "clip_sample": 1}, "schedule": FlowSchedule()},
            r"config\.preview\.clip_sample: expected none but for a NoiseSchedule .*, got 1",
        ),
        ({"preview": {"every": 1}, "decode": 3}, "decode: expected a function"),
        (
            {"preview": {"every": 1}, "schedule": DDPMScheduler(50, variance_type="learned_range")},
            "scheduler: expected one with a fixed variance, got learned_range",
        ),
    ],
)
def test_what_cannot_be_shown_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        tiny.trainer(**options)


@pytest.mark.parametrize("made", [[1], torch.zeros(8, 4, 5, 3), torch.zeros(1, 3, 5, 3), torch.zeros(8, 3)])
def test_a_decoder_that_makes_no_images_is_named(made: Any, tmp_path: Path) -> None:
    run = tiny.trainer(preview={"every": 1, "prompts": 2}, decode=lambda latents: made)
    with pytest.raises(InputError, match=r"decode\(latents\): expected images \[2, 1 or 3, H, W\], got"):
        run.fit(tmp_path)


def test_previews_need_a_directory_and_a_schedule_to_sample_from() -> None:
    with pytest.raises(InputError, match=r"directory: expected one for config\.preview\.every, got None"):
        tiny.trainer(preview={"every": 1}).fit()
    dark = NoiseSchedule(torch.linspace(0.9, 0, 50))
    with pytest.raises(InputError, match="prediction_type: expected sample or v_prediction, to sample where"):
        scheduler_of(dark, "epsilon")
    with pytest.raises(InputError, match="prediction_type: expected flow_prediction, to sample from rectified flow"):
        scheduler_of(FlowSchedule(), "epsilon")
