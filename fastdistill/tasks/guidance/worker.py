# SPDX-License-Identifier: Apache-2.0
"""The parts of the guidance experiment, each in a separate process (``fastdistill.tasks.processes``): the teachers of
the shades and the digits, the exact worlds, each student, and the sampling speed of all models.

``python -m fastdistill.tasks.guidance.worker JOB.json`` writes ``result.json`` next to the job file, and for the
shades' teacher ``samples.safetensors``.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch

from fastdistill import ops
from fastdistill.data.fingerprint import plain, sha256_of_json
from fastdistill.diffusion.grid import Grid
from fastdistill.diffusion.guidance import Guidance
from fastdistill.evaluate.diagnosis import diagnose
from fastdistill.files import atomic_write
from fastdistill.tasks.digits import data
from fastdistill.tasks.digits.sampling import SCHEDULE
from fastdistill.tasks.digits.text_encoder import prompt_bank
from fastdistill.tasks.guidance import lab
from fastdistill.tasks.guidance.config import LabConfig
from fastdistill.tasks.guidance.demo_config import DemoConfig
from fastdistill.tasks.guidance.diagnose import SEED, measured, subject
from fastdistill.tasks.guidance.students import Student, initial, sampler, students, trained
from fastdistill.tasks.processes import Report, serve
from fastdistill.tasks.shades.sampling import sample
from fastdistill.tasks.workers import images_per_second, keep_result, result_in
from fastdistill.train.config import APART, from_mapping

MODULE = "fastdistill.tasks.guidance.worker"
TEACHERS = ("shades", "digits")
SHOWN = ("a red seven", "a blue three")  # prompts of the samples in the report
_COLUMNS = 12
_BATCH = 64  # for the measurement of speed


def run(job: Path, report: Report) -> None:
    """Do the part that the file describes."""
    described = json.loads(job.read_text(encoding="utf-8"))
    config = from_mapping(DemoConfig, described["config"])
    torch.set_num_threads(config.threads)
    part, seed, start = described["part"], described["seed"], time.perf_counter()
    told = _told(report, "images")
    result: dict[str, Any]
    if part == "worlds":
        options = LabConfig(quick=not config.full or config.quick, world=config.worlds).resolved()
        result = {"worlds": lab.measured(options, job.parent, told)}
    elif part == "digits":
        result = measured(part, config.digits(), keep=job.parent / "kept", progress=told).to_json()
    elif part == "shades":
        result = dict(measured(part, config.shades(), keep=job.parent / "kept", progress=told).to_json())
        result["shown"] = _shown(config, result, job.parent / "samples.safetensors")
    elif part == "speed":
        result = {"images_per_second": _speed(config, report)}
    else:
        result = _student(config, part, seed, job.parent, report)
    result |= {"part": part, "seed": seed, "all_seconds": time.perf_counter() - start, "backend": ops.used()}
    result["fingerprint"] = described["fingerprint"]
    keep_result(job.parent, result)


def fingerprint(config: DemoConfig, part: str, seed: int, made_from: Any) -> str:
    """The inputs of the result of a part, independent of the machine: a part is kept if only settings of other parts
    change. ``made_from``: the teachers and the prompts."""
    settings: dict[str, Any]
    if part in TEACHERS:
        settings = dataclasses.asdict(config.shades() if part == "shades" else config.digits())
        for free in ("output", "threads", "device", "quick"):
            del settings[free]
        if part == "shades":
            settings["shown"] = config.student
    elif part == "worlds":
        settings = {"quick": not config.full or config.quick, "worlds": config.worlds}
    elif part == "speed":
        settings = {"grid": config.grid, "schedules": config.shades().schedules}
        settings["students"] = {name: dataclasses.asdict(each) for name, each in students(config).items()}
    else:
        names = ("student", "grid", "images_per_prompt", "cache_images", "train")
        settings = {name: getattr(config, name) for name in names} | dataclasses.asdict(students(config)[part])
        train = dataclasses.asdict(config.train)
        settings["train"] = {name: value for name, value in train.items() if name not in APART}
    return sha256_of_json({**plain(settings), "part": part, "seed": seed, "made_from": made_from})


def finished(directory: Path, wanted: str) -> bool:
    """Whether the directory has the complete result of a part with this fingerprint."""
    result = result_in(directory, wanted)
    if result is None or result["part"] != "shades":
        return result is not None
    try:
        safetensors.torch.load_file(directory / "samples.safetensors")
    except (OSError, safetensors.SafetensorError):
        return False
    return True


def _shown(config: DemoConfig, result: dict[str, Any], file: Path) -> list[str]:
    """Writes twelve samples of two prompts: without guidance, with a window, and with the constant weight of equal
    separation. Returns their schedules."""
    rows = {row["schedule"]: row for row in result["rows"]}
    constants = sorted((float(text), row["separation"]) for text, row in rows.items() if "@" not in text)
    weights, separations = np.array(constants).T
    window = config.student if config.student in rows else config.windows[0]
    equal = float(np.interp(rows[window]["separation"], separations, weights))
    schedules = ["0", f"{equal:.2g}", window]
    task, bank = subject("shades"), prompt_bank().to(config.device)
    model = task.model.to(config.device)
    prompts = torch.tensor([bank.texts.index(text) for text in SHOWN]).repeat_interleave(_COLUMNS)
    images = torch.stack([
        sample(model, bank, prompts, torch.arange(len(prompts)), SEED, config.grid, schedule)
        for schedule in schedules
    ])  # fmt: skip
    right = torch.stack([task.right(one, prompts) for one in images])
    atomic_write(file, safetensors.torch.save({"images": images, "right": right}))
    return schedules


def _student(config: DemoConfig, part: str, seed: int, directory: Path, report: Report) -> dict[str, Any]:
    """Rows of ``students`` by name, from the images of one seed."""
    student = students(config)[part]
    task, bank = subject("shades"), prompt_bank().to(config.device)
    model, fitted = trained(config, part, seed, task.model.to(config.device), bank, directory, report)
    rows = {}
    for name, schedule, scale in measured_at(config, part, student):
        make = sampler(config, student, model, bank, scale)
        prompts = torch.arange(len(data.PROMPTS)).repeat_interleave(config.images_per_prompt)
        found = diagnose(
            make,
            task.features,
            prompts,
            task.reference,
            [schedule],
            Grid.parse(config.grid, SCHEDULE),
            classes=task.classes[prompts],
            right=task.right,
            seeds=[SEED + seed],
            progress=_told(report, f"images {name}"),
        )
        rows[name] = found.to_json()["rows"][0]
        if not student.conditioned:
            rows[name]["evaluations_per_image"] = len(Grid.parse(config.grid, SCHEDULE))
    parameters = sum(p.numel() for p in model.parameters())
    return {"rows": rows, "parameters": parameters, "seconds": fitted.seconds, "history": fitted.history}


def _speed(config: DemoConfig, report: Report) -> dict[str, float]:
    """Images per second of the teacher with each schedule and of each student (``student <name>``), in turns in one
    process. Speed does not depend on weights, so the students are untrained."""
    task, bank = subject("shades"), prompt_bank().to(config.device)
    teacher, grid = task.model.to(config.device), Grid.parse(config.grid, SCHEDULE)
    prompts = torch.arange(_BATCH) % len(data.PROMPTS)
    contestants: dict[str, Callable[[], Any]] = {
        schedule: functools.partial(sample, teacher, bank, prompts, prompts, SEED, grid, schedule)
        for schedule in config.shades().schedules
    }
    for name, student in students(config).items():
        model = initial(student, teacher).model.eval().requires_grad_(False)
        make = sampler(config, student, model, bank, 1.0)
        schedule = Guidance.parse(config.student)
        contestants[f"student {name}"] = functools.partial(make, schedule, prompts, prompts, SEED)
    return images_per_second(contestants, _BATCH, report)


def measured_at(config: DemoConfig, part: str, student: Student) -> list[tuple[str, str, float]]:
    """(name in the report, schedule, input weight) for each row of a student."""
    if student.scales:
        return [(f"{part}_{scale:g}", f"{scale:g}", scale) for scale in student.scales]
    return [(part, config.student, 0.0)]


def _told(report: Report, phase: str) -> Callable[..., object]:
    def progress(done: int, total: int, what: str = phase) -> None:
        report(phase=what.replace("_", " "), done=done, total=total)

    return progress


def main() -> int:
    return serve(run, "lower --train.batch or --workers")


if __name__ == "__main__":
    sys.exit(main())
