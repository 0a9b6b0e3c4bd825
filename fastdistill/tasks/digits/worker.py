# SPDX-License-Identifier: Apache-2.0
"""The part of the experiment for one model, in a separate process: train a student (or load the teacher), sample and
evaluate; and the part that measures the sampling speed of all models.

``python -m fastdistill.tasks.digits.worker JOB.json`` prints its progress as JSON lines and writes ``result.json`` and
``samples.safetensors`` next to the job file (``fastdistill.tasks.processes``).
"""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from fastdistill import ops, runs
from fastdistill.data.fingerprint import plain, sha256_of_json
from fastdistill.files import atomic_write
from fastdistill.runs import Run
from fastdistill.tasks.digits import data
from fastdistill.tasks.digits.config import STUDENTS, DigitsConfig
from fastdistill.tasks.digits.judge import Judge
from fastdistill.tasks.digits.teacher import provenance
from fastdistill.tasks.digits.text_encoder import prompt_bank
from fastdistill.tasks.processes import Report, serve
from fastdistill.tasks.workers import images_per_second, keep_result, result_in
from fastdistill.train.config import APART, from_mapping

MODULE = "fastdistill.tasks.digits.worker"
SPEED = "speed"  # the part that measures the sampling speed
SAMPLES = "samples.safetensors"  # images [80 * I, 3, 8, 8], I consecutive ones per prompt, and whether they are right
EXPORTED = ("config.json", "diffusion_pytorch_model.safetensors")
EVALUATION_SEED = 2**31  # initial noise of the evaluated images, different from that of the cache
_BATCH = 64  # images per batch


def run(job: Path, report: Report) -> None:
    """Run the job described by the file."""
    described = json.loads(job.read_text(encoding="utf-8"))
    config = from_mapping(DigitsConfig, described["config"])
    torch.set_num_threads(config.threads)
    name, seed = described["model"], described["seed"]
    if name == SPEED:
        result: dict[str, Any] = {"images_per_second": _speed(config, report)}
    else:
        result = _model(config, name, seed, job.parent, report)
    result |= {"model": name, "seed": seed, "fingerprint": fingerprint(config, name, seed), "backend": ops.used()}
    keep_result(job.parent, result)


def _model(config: DigitsConfig, name: str, seed: int, directory: Path, report: Report) -> dict[str, Any]:
    """Train a student, or load the teacher, and evaluate it."""
    result: dict[str, Any] = {}
    own = config.run_file(name if name in STUDENTS else next(iter(STUDENTS)), seed)
    opened = runs.opened(own)
    if name == "teacher":
        model = opened.pipeline.model(device=opened.config.device, dtype=opened.teacher_dtype)
    else:
        total = own.train.steps

        def progress(done: int, metrics: dict[str, float] | None) -> None:
            report(phase="training", done=done, total=total, loss=metrics and metrics["loss"])

        fitted = runs.distill(own, progress=progress)
        runs.export(own, directory / "student", overwrite=True)
        model = runs.trained_student(opened)
        result |= {"seconds": fitted.seconds, "history": fitted.history}
    result["parameters"] = sum(p.numel() for p in model.parameters())
    return result | _evaluate(config, opened, model, directory, report)


def _speed(config: DigitsConfig, report: Report) -> dict[str, float]:
    """Images per second of the teacher and of a trained student of each kind."""
    prompts = torch.arange(_BATCH)
    contestants = {}
    for name in ("teacher", *STUDENTS):
        opened = runs.opened(config.run_file(name if name in STUDENTS else next(iter(STUDENTS)), 0))
        if name == "teacher":
            model = opened.pipeline.model(device=opened.config.device, dtype=opened.teacher_dtype)
        else:
            model = runs.trained_student(opened)
        contestants[name] = functools.partial(_sampled, config, opened, model, prompts, prompts)
    return images_per_second(contestants, _BATCH, report)


def fingerprint(config: DigitsConfig, model: str, seed: int) -> str:
    """The inputs of a result, independent of the machine."""
    settings = plain(dataclasses.asdict(config))
    for free in ("output", "seeds", "workers", "threads", "quick", "device"):
        del settings[free]
    settings["train"] = {name: value for name, value in settings["train"].items() if name not in APART}
    made_from = {"prompts": prompt_bank().identity, "teacher": provenance()["sha256"]}
    return sha256_of_json({**settings, "model": model, "seed": seed, **made_from})


def finished(directory: Path, fingerprint: str) -> bool:
    """Whether the directory has a complete result with this fingerprint; a damaged one does not count."""
    result = result_in(directory, fingerprint)
    if result is not None and result["model"] == SPEED:
        return True
    try:
        images = safetensors.torch.load_file(directory / SAMPLES)["images"]
    except (OSError, KeyError, safetensors.SafetensorError):
        return False
    if result is None or len(images) != sum(count["n"] for count in result["counts"].values()):
        return False
    return result["model"] == "teacher" or all((directory / "student" / name).exists() for name in EXPORTED)


def _sampled(config: DigitsConfig, run: Run, model: nn.Module, prompt: Tensor, rows: Tensor) -> Tensor:
    options = {"steps": config.sampling.steps, **config.sampling.guided(), "seed": EVALUATION_SEED}
    images: Tensor = run.pipeline.sample(model, prompt_bank(), prompt, rows, **options).cpu()
    return images


def _evaluate(config: DigitsConfig, run: Run, model: nn.Module, directory: Path, report: Report) -> dict[str, Any]:
    judge = Judge()
    prompt = torch.arange(len(data.PROMPTS)).repeat_interleave(config.images_per_prompt)
    parts: list[Tensor] = []
    for part in torch.split(torch.arange(len(prompt)), _BATCH):
        parts.append(_sampled(config, run, model, prompt[part], part))
        report(phase="judging", done=sum(map(len, parts)), total=len(prompt))
    images = torch.cat(parts)
    right = judge.right(images, prompt)
    atomic_write(directory / SAMPLES, safetensors.torch.save({"images": images, "right": right}))
    counts = {}
    for kind, rows in data.KINDS.items():
        among = torch.isin(prompt, torch.tensor(rows))
        counts[kind] = {"right": int(right[among].sum()), "n": int(among.sum())}
    return {
        "counts": counts,
        "judge_accuracy": judge.accuracy_on_real,
        "judge_n": data.HELD_OUT,
    }


def main() -> int:
    return serve(run, "lower --train.batch, --workers or the channels")


if __name__ == "__main__":
    sys.exit(main())
