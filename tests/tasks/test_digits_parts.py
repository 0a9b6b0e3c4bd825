# SPDX-License-Identifier: Apache-2.0
"""Data, text encoder, judge and teacher of the digits task."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastdistill.data.latent_cache import LatentCache
from fastdistill.diffusion.sampler import ddim, initial_noise
from fastdistill.distill import RandomConditioning
from fastdistill.errors import InputError, StorageError
from fastdistill.models import StudentSpec, make_student
from fastdistill.tasks.digits import data, teacher, text_encoder
from fastdistill.tasks.digits.config import DigitsConfig
from fastdistill.tasks.digits.judge import Judge
from fastdistill.tasks.digits.sampling import SCHEDULE, Sampling, sample
from fastdistill.tasks.digits.teacher import (
    WEIGHTS,
    TeacherConfig,
    load_teacher,
    other_recipe,
    provenance,
    train_teacher,
)
from fastdistill.tasks.digits.text_encoder import encode, prompt_bank, tokenize
from fastdistill.tasks.digits.worker import fingerprint
from fastdistill.train import DistillTrainer, TrainConfig
from fastdistill.train.config import PreviewConfig


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge()


def test_prompts_and_their_split() -> None:
    assert len(data.PROMPTS) == 80 and len(data.SEEN) == 48 and len(data.UNSEEN) == 32
    assert data.PROMPTS[7].text == "a red seven" and not data.PROMPTS[7].seen
    for row in data.SEEN:
        _, color, digit = data.PROMPTS[row].text.split()
        assert color not in data.UNSEEN_COLORS and digit not in data.UNSEEN_DIGITS


def test_scans_are_the_ones_that_the_teacher_was_made_from() -> None:
    kept, held_out = data.scans()
    assert len(kept.ink) == 1437 and len(held_out.ink) == 360
    assert data.fingerprint() == provenance()["data"]
    images, rows = data.tinted(kept)
    assert images.shape == (8 * 1437, 3, 8, 8) and images.abs().max() <= 1
    assert torch.equal(rows % 10, kept.digit.repeat(8))


def test_the_shipped_prompts_are_those_of_the_shipped_teacher() -> None:
    bank = prompt_bank()
    assert bank.texts == [prompt.text for prompt in data.PROMPTS] and bank.null_text == ""
    assert bank.embeddings.shape == (81, 5, 32) and bank.identity == provenance()["prompts"]


def encoded_in_float64(texts: list[str], relative: float = 0.0) -> np.ndarray:
    """The text encoder written again; its weights are changed by +-``relative`` of their size."""
    signs = np.random.default_rng(0)
    weights = [w.double().numpy() for w in text_encoder._weights()]
    weights = [w * (1 + relative * signs.choice([-1, 1], w.shape)) for w in weights]
    embedding, position, to_q, to_k, to_v, to_out = weights

    def normed(x: np.ndarray) -> np.ndarray:
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)

    hidden = embedding[[tokenize(text) for text in texts]] + position
    scores = normed(hidden) @ to_q @ (normed(hidden) @ to_k).transpose(0, 2, 1) / 32**0.5
    shares = np.exp(scores - scores.max(-1, keepdims=True))
    shares /= shares.sum(-1, keepdims=True)
    return normed(hidden + 0.25 * (shares @ (normed(hidden) @ to_v) @ to_out))


def test_text_encoder() -> None:
    """The shipped embeddings can be computed again, except for the rounding of float32 on both machines.

    An evaluation in float32 equals one in float64 with each of its ten stages (weights, sum, two norms, four
    projections, softmax, mixing) changed by some units of rounding; the effect of one unit in the weights is measured.
    """
    bank = prompt_bank()
    texts = [*bank.texts, ""]
    truth = encoded_in_float64(texts)
    unit = np.abs(encoded_in_float64(texts, float(np.finfo(np.float32).eps)) - truth).max()
    for embeddings in (bank.embeddings, encode(texts)):
        assert np.abs(embeddings.double().numpy() - truth).max() <= 10 * unit
    distance = torch.cdist(bank.embeddings.flatten(1), bank.embeddings.flatten(1)) + 10 * torch.eye(81)
    assert distance.min() > 1  # all prompts differ clearly
    with pytest.raises(InputError, match=r"text: expected words of .*got 'sevn' \(did you mean seven\?\)"):
        encode(["a red sevn"])
    with pytest.raises(InputError, match="text: expected at most 3 words, got 4"):
        encode(["a red red seven"])


def test_judge_on_real_scans(judge: Judge) -> None:
    assert judge.accuracy_on_real >= 0.97
    held_out = data.scans()[1]
    images, rows = data.tinted(held_out)
    right = judge.right(images, rows)
    assert right.double().mean() == pytest.approx(judge.accuracy_on_real)  # the tint has no effect
    noisy = images + 0.2 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    assert judge.right(noisy, rows).double().mean() > 0.95
    assert judge.right(images[right], (rows[right] + 1) % 80).sum() == 0  # the next digit or color is wrong
    assert judge(torch.empty(0, 3, 8, 8)).shape == (0,)


def test_the_shipped_teacher_is_what_it_says(judge: Judge) -> None:
    teacher = load_teacher()
    made = provenance()
    assert WEIGHTS.stat().st_size <= 5_000_000
    assert sum(p.numel() for p in teacher.parameters()) == 984_867
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())
    assert made["metrics"]["right"] >= 0.95 and made["metrics"]["images"] >= 1280
    assert made["recipe"]["train"]["steps"] == TeacherConfig().train.steps  # the current recipe
    rows = torch.arange(3, 80, 7)
    images = sample(teacher, prompt_bank(), rows, rows, 123, Sampling())
    assert judge.right(images, rows).double().mean() >= 0.9


def test_an_image_depends_on_its_own_row_alone() -> None:
    teacher, bank = load_teacher(), prompt_bank()
    rows = torch.tensor([5, 17, 44])
    few = Sampling(steps=3)
    whole = sample(teacher, bank, rows, rows, 1, few)
    alone = sample(teacher, bank, rows[1:2], rows[1:2], 1, few)
    torch.testing.assert_close(alone, whole[1:2], rtol=1e-4, atol=1e-4)


def test_bfloat16_weights_with_float32_masters() -> None:
    """A student of the digits learns like one in float32; the exported weights are the average in float32."""
    teacher, bank = load_teacher(), prompt_bank()
    g = torch.Generator().manual_seed(0)
    rows = torch.arange(256) % 48
    cache = LatentCache(torch.randn(256, 3, 8, 8, generator=g), rows, {})
    losses = {}
    for precision in ("float32", "bfloat16"):
        student = make_student(teacher, StudentSpec(block_out_channels=(8, 16)), init="random", seed=1)
        taps = tuple(zip(student.teacher_taps, student.student_taps, strict=True))
        config = TrainConfig(steps=16, batch=4, lr=1e-2, log_every=4, precision=precision)
        trainer = DistillTrainer(teacher, student.model, SCHEDULE, cache, bank, RandomConditioning(taps=taps), config)
        losses[precision] = [m["loss"] for m in trainer.fit().history]
        exported = trainer.ema_student()
        optimizer = trainer.step.optimizer
        for p in trainer.step.parameters:
            assert p.dtype == getattr(torch, precision)
            if precision == "bfloat16":
                assert torch.equal(optimizer.state[p]["master"].bfloat16(), p)
        for p, q in zip(trainer.student.parameters(), exported.parameters(), strict=True):
            assert q.dtype == torch.float32 and torch.equal(q, optimizer.state[p]["ema"])
    for one, two in zip(losses["float32"], losses["bfloat16"], strict=True):
        assert two == pytest.approx(one, rel=0.05)
    assert losses["bfloat16"][-1] < 0.9 * losses["bfloat16"][0]


def test_a_recipe_is_compared_by_its_inputs() -> None:
    """The weights of a recipe differ between machines."""
    shipped = provenance()
    recipe = dataclasses.asdict(TeacherConfig())
    made = shipped | {"recipe": {k: recipe[k] for k in shipped["recipe"]}, "sha256": "0" * 64, "prompts": "1" * 64}
    assert not other_recipe(made, shipped)
    made["recipe"]["train"]["preview"]["guidance_scale"] = 7.0
    assert not other_recipe(made, shipped)
    made["recipe"]["train"]["lr"], made["data"] = 1e-2, "2" * 64
    assert other_recipe(made, shipped) == [
        f"data: expected '{'2' * 64}', got '{shipped['data']}'",
        "train.lr: expected 0.01, got 0.004",
    ]


def test_a_result_is_that_of_any_device() -> None:
    gpu, cpu = (dataclasses.replace(DigitsConfig(), device=device) for device in ("cuda", "cpu"))
    assert fingerprint(gpu, "paired", 0) == fingerprint(cpu, "paired", 0)


def test_the_run_of_a_student() -> None:
    config = DigitsConfig(train=TrainConfig(seed=3, trackers=("wandb",), preview=PreviewConfig(prompts=(7, "seven"))))
    run = config.run_file("paired", 2)
    assert run.seed == 5 and run.cache.seed == 0 and run.log == ("jsonl", "wandb")
    assert run.preview.prompts == ("a red seven", "seven")
    assert run.objective.random_conditioning.probability == "const"
    assert dataclasses.replace(config, cache_images=100).run_file("paired", 0).cache.images_per_prompt == 3
    for changes, message in (
        ({"sampling": Sampling(clip_sample=1.0)}, "sampling.clip_sample: expected 1.2, that of the task, got 1.0"),
        (
            {"train": TrainConfig(preview=PreviewConfig(prompts=(80,)))},
            "train.preview.prompts: expected rows 0 to 79, or texts, got 80",
        ),
    ):
        with pytest.raises(InputError, match=message):
            dataclasses.replace(config, **changes).run_file("paired", 0)


def test_settings_that_the_teacher_does_not_have(tmp_path: Path) -> None:
    config = TeacherConfig(output=str(tmp_path / "made"), train=TrainConfig(fuse=True))
    with pytest.raises(InputError, match=r"train.fuse: expected False, as the teacher has no other, got True"):
        train_teacher(config)
    assert not (tmp_path / "made").exists()


def test_damaged_weights_are_refused(tmp_path: Path) -> None:
    content = bytearray(WEIGHTS.read_bytes())
    content[-3] ^= 4
    path = tmp_path / "teacher.safetensors"
    path.write_bytes(content)
    with pytest.raises(StorageError, match=r"teacher\.safetensors: damaged"):
        load_teacher(path)
    path.write_bytes(content[:1000])
    with pytest.raises(StorageError, match=r"teacher\.safetensors: damaged"):
        load_teacher(path)
    with pytest.raises(StorageError, match=r"nothing\.safetensors: could not be read"):
        load_teacher(tmp_path / "nothing.safetensors")


def test_the_recipe_runs_and_resumes_to_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = TeacherConfig(images_per_prompt=1, sampling=Sampling(steps=1))
    train = dataclasses.replace(recipe.train, steps=4, batch=4, checkpoint_every=2, log_every=2)
    recipe = dataclasses.replace(recipe, train=train)
    whole = train_teacher(dataclasses.replace(recipe, output=str(tmp_path / "whole")))

    def stop(done: int, _: object) -> None:
        if done == 3:
            raise InterruptedError

    monkeypatch.setattr(teacher, "judged", lambda *_: {})  # it takes most of the time, and once is enough
    halved = dataclasses.replace(recipe, output=str(tmp_path / "halved"))
    with pytest.raises(InterruptedError):
        train_teacher(halved, stop)
    assert train_teacher(halved)["sha256"] == whole["sha256"]
    assert load_teacher(tmp_path / "halved" / "teacher.safetensors") is not None


def test_a_schedule_of_guidance_samples_the_task() -> None:
    """In the run of a student, and for sampling; not together with a scale."""
    window = dataclasses.replace(DigitsConfig(), sampling=Sampling(steps=4, guidance="2@1,-1@0.3,0"))
    cache = window.run_file("paired", 0).cache
    assert (cache.guidance, cache.guidance_scale) == ("2@1,-1@0.3,0", None)
    model, bank, rows = load_teacher(), prompt_bank(), torch.arange(2)
    made = sample(model, bank, rows, rows, 0, window.sampling)
    noise = initial_noise(0, rows, data.SHAPE)
    options: dict[str, Any] = {"steps": 4, "guidance": "2@1,-1@0.3,0", "clip_sample": 1.2}
    assert made.equal(ddim(model, noise, bank.embeddings[rows], bank.null, SCHEDULE, **options))
    both = dataclasses.replace(window, sampling=Sampling(guidance_scale=3.0, guidance="2"))
    with pytest.raises(InputError, match=r"sampling.guidance_scale: expected its default 2.5 beside sampling.guidance"):
        both.run_file("paired", 0)
