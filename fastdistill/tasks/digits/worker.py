# SPDX-License-Identifier: Apache-2.0
"""The part of the experiment for one model, in a separate process: train a student (or load the teacher), sample and
evaluate.

``python -m fastdistill.tasks.digits.worker JOB.json`` prints its progress as JSON lines and writes ``result.json`` and
``samples.safetensors`` next to the job file (``fastdistill.tasks.workers``).
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import nn

from fastdistill import ops
from fastdistill.data.fingerprint import plain, sha256_of_json
from fastdistill.data.latent_cache import LatentCache
from fastdistill.data.prompt_bank import PromptBank
from fastdistill.distill import RandomConditioning, Weights
from fastdistill.files import atomic_directory, atomic_write, located
from fastdistill.models import make_student
from fastdistill.models.export import save_model
from fastdistill.models.weights import weights_hash
from fastdistill.tasks.digits import data
from fastdistill.tasks.digits.config import STUDENTS, DigitsConfig
from fastdistill.tasks.digits.judge import Judge
from fastdistill.tasks.digits.sampling import SCHEDULE, sample
from fastdistill.tasks.digits.teacher import load_teacher
from fastdistill.tasks.workers import Report, result_in, serve
from fastdistill.train import DistillTrainer
from fastdistill.train.config import from_mapping

MODULE = "fastdistill.tasks.digits.worker"
EXPORTED = ("config.json", "diffusion_pytorch_model.safetensors")
EVALUATION_SEED = 2**31  # initial noise of the evaluated images, other than that of the cache


def run(job: Path, report: Report) -> None:
    """Run the job described by the file."""
    described = json.loads(job.read_text(encoding="utf-8"))
    config = from_mapping(DigitsConfig, described["config"])
    torch.set_num_threads(config.threads)
    teacher = load_teacher().to(config.device)
    bank = PromptBank.load(located(config.output) / "prompts").to(config.device)
    name, seed = described["model"], described["seed"]
    made_from = fingerprint(config, name, seed, weights_hash(teacher), bank.identity)
    result: dict[str, Any] = {"model": name, "seed": seed, "fingerprint": made_from}
    model: nn.Module = teacher
    if name != "teacher":
        model, training = _train(config, name, seed, teacher, bank, job.parent, report)
        result |= training
    result["parameters"] = sum(p.numel() for p in model.parameters())
    result |= _evaluate(config, model, bank, job.parent, report)
    result["backend"] = ops.used()
    atomic_write(job.parent / "result.json", json.dumps(result, indent=1).encode())


def fingerprint(config: DigitsConfig, model: str, seed: int, teacher: str, prompts: str) -> str:
    """What a result depends on, whichever machine made it; ``teacher`` and ``prompts`` by what identifies them."""
    settings = plain(dataclasses.asdict(config))
    for free in ("output", "seeds", "workers", "threads", "quick", "device"):
        del settings[free]
    for shown in ("preview", "trackers"):
        del settings["train"][shown]
    return sha256_of_json({**settings, "model": model, "seed": seed, "prompts": prompts, "teacher": teacher})


def finished(directory: Path, fingerprint: str) -> bool:
    """Whether the directory has a complete result with this fingerprint; a damaged one does not count."""
    result = result_in(directory, fingerprint)
    try:
        safetensors.torch.load_file(directory / "samples.safetensors")
    except (OSError, safetensors.SafetensorError):
        return False
    if result is None:
        return False
    return result["model"] == "teacher" or all((directory / "student" / name).exists() for name in EXPORTED)


def _export(model: Any, directory: Path) -> None:
    """``model.save_pretrained``, atomically."""
    with atomic_directory(directory, replace=True) as temporary:
        save_model(model, temporary)


def _train(
    config: DigitsConfig, name: str, seed: int, teacher: Any, bank: PromptBank, directory: Path, report: Report
) -> tuple[nn.Module, dict[str, Any]]:
    cache = LatentCache.load(located(config.output) / "cache", device=config.device)
    student = make_student(
        teacher, config.spec(), init="random" if config.student == "narrow" else "teacher", seed=seed
    )
    probability, parameters = STUDENTS[name]
    objective = RandomConditioning(
        probability=probability,
        parameters=parameters,
        null_probability=config.null_probability,
        weights=Weights(feature=config.feature_weight),
        feature_distance=config.feature_distance,
        taps=tuple(zip(student.teacher_taps, student.student_taps, strict=True)) if config.feature_weight else (),
    )
    train = dataclasses.replace(config.train, seed=config.train.seed + seed)
    trainer = DistillTrainer(teacher, student.model, SCHEDULE, cache, bank, objective, train, device=config.device)

    def progress(done: int, metrics: dict[str, float] | None) -> None:
        report(phase="training", done=done, total=train.steps, loss=metrics and metrics["loss"])

    fitted = trainer.fit(directory / "training", progress=progress)
    model = trainer.ema_student()
    _export(model, directory / "student")
    return model, {"seconds": fitted.seconds, "history": fitted.history}


def _evaluate(
    config: DigitsConfig, model: nn.Module, bank: PromptBank, directory: Path, report: Report
) -> dict[str, Any]:
    judge = Judge()
    prompt = torch.arange(len(data.PROMPTS)).repeat_interleave(config.images_per_prompt)
    start = time.perf_counter()
    images = sample(
        model,
        bank,
        prompt,
        torch.arange(len(prompt)),
        EVALUATION_SEED,
        config.sampling,
        progress=lambda done: report(phase="judging", done=done, total=len(prompt)),
    )
    seconds = time.perf_counter() - start
    right = judge.right(images, prompt)
    first = torch.arange(0, len(prompt), config.images_per_prompt)
    shown = {"images": images[first], "right": right[first]}
    atomic_write(directory / "samples.safetensors", safetensors.torch.save(shown))
    counts = {}
    for kind, rows in {"seen": data.SEEN, "unseen": data.UNSEEN}.items():
        among = torch.isin(prompt, torch.tensor(rows))
        counts[kind] = {"right": int(right[among].sum()), "n": int(among.sum())}
    return {
        "counts": counts,
        "images_per_second": len(prompt) / seconds,
        "judge_accuracy": judge.accuracy_on_real,
        "judge_n": data.HELD_OUT,
    }


def main() -> int:
    return serve(run, "lower --train.batch, --workers or the channels")


if __name__ == "__main__":
    sys.exit(main())
