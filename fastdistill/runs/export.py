# SPDX-License-Identifier: Apache-2.0
"""Writes the student of a run in a form that does not need this package (``fastdistill export``)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from torch import nn

import fastdistill
from fastdistill.errors import InputError, StorageError, called
from fastdistill.files import atomic_directory, located
from fastdistill.models import peft
from fastdistill.runs.config import RunConfig
from fastdistill.runs.distill import RUN_FILE
from fastdistill.runs.models import checkpoint_of, student_in
from fastdistill.runs.opened import Run, opened
from fastdistill.train import checkpoint
from fastdistill.train.config import from_yaml, to_yaml
from fastdistill.train.yaml_text import parsed

CARD = "README.md"


def export(
    config: RunConfig,
    to: str | Path,
    *,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    step: int | None = None,
    averaged: bool = True,
    link: bool = False,
    overwrite: bool = False,
    allow_code: bool = False,
) -> Path:
    """Write the student of a checkpoint to ``to``, with a model card.

    For a pipeline this is a whole folder that ``DiffusionPipeline.from_pretrained`` loads; for a task, which is not a
    pipeline, a folder with only the model (``from_pretrained`` of its class); for a student with adapters only the
    adapters in PEFT's format (``load_lora_weights``).

    Args:
        dtype: of the weights; None: float32. step: of the checkpoint; None: the newest.
        averaged: write the averaged weights; False: the weights of that step.
        link: make the other components of the pipeline symbolic links to the teacher's folder.
        overwrite: replace an existing pipeline folder.

    Raises:
        StorageError: no checkpoint, or one of another student; ``to`` exists or cannot be written.
        InputError: an invalid dtype; ``link`` or ``overwrite`` for adapters.
    """
    to = located(to, "to")
    if dtype not in (None, "float32", "bfloat16", "float16"):
        raise InputError.of("dtype", "float32, bfloat16 or float16", dtype)
    run = opened(config, allow_code=allow_code)
    adapted = config.student.lora.rank is not None
    for name, given in {"link": link, "overwrite": overwrite}.items():
        if adapted and given:
            raise InputError.of(name, "False for adapters, which are a file alone", given)
    if adapted and to.exists():
        raise StorageError(f"{to}: expected a new folder, got one that is there already")
    path, saved, made_by = checkpoint_of(run, step)
    model = student_in(run, path, saved, averaged)
    target = None if dtype is None else getattr(torch, dtype)
    card = model_card(run, saved, made_by, model)
    if not adapted:
        with called("to", "target"):
            run.pipeline.export(model, to, dtype=target, link=link, overwrite=overwrite, texts={CARD: card})
        return to
    for key, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in key)  # only the trained weights
    name = peft.chosen(model, None)
    weights = {key: p.detach() for key, p in model.named_parameters()}
    found = peft.exported(model, weights, name)
    with atomic_directory(to) as folder:
        peft.write(model, {key: t.to(target or torch.float32).contiguous() for key, t in found.items()}, name, folder)
        (folder / CARD).write_text(card, encoding="utf-8")
    return to


def model_card(run: Run, saved: checkpoint.Checkpoint, made_by: Mapping[str, Any], model: nn.Module) -> str:
    """Markdown with metadata for the Hub: what the student is, its teacher, how it was trained."""
    pipeline, config = run.pipeline, _trained(run)
    adapted = config.student.lora.rank is not None
    teacher = sum(p.numel() for p in pipeline.model(device="meta").parameters())
    own = sum(p.numel() for name, p in model.named_parameters() if not adapted or "lora_" in name)
    size = f"{own:,} parameters" + (
        " in adapters" if adapted else f", {own / teacher:.0%} of the teacher's {teacher:,}"
    )
    made = f"trained for {saved.step:,} steps by fastdistill {fastdistill.__version__}"
    base = pipeline.index.get("_name_or_path") or Path(config.teacher).name
    head = {
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "base_model": base,
        "tags": ["diffusers", "distillation", "fastdistill", *(["lora"] if adapted else [])],
    }
    lines = [
        "---",
        *(f"{name}: {json.dumps(value)}" for name, value in head.items()),
        "---",
        "",
        f"# Distilled from {base}",
        "",
        f"A {type(model).__name__} with {size}, {made}. The teacher's licence applies.",
        "",
        "```python",
        *pipeline.loads(base if adapted else None),
        "```",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in _facts(run, config, made_by).items()),
        "",
        "Its settings, but for paths:",
        "",
        "```yaml",
        _settings(config),
        "```",
        "",
    ]
    return "\n".join(lines)


def _trained(run: Run) -> RunConfig:
    """The settings of the last call of ``distill``, whose command line may have changed them."""
    file = run.directory / RUN_FILE
    return from_yaml(RunConfig, file) if file.exists() else run.config


def _settings(config: RunConfig) -> str:
    """The parts of a run file that determine the student, without paths of a machine."""
    values = parsed(to_yaml(config))
    for section in ("student", "objective", "train"):
        values[section] = {name: value for name, value in values[section].items() if value is not None}
    told: str = yaml.safe_dump(
        {name: values[name] for name in ("seed", "student", "objective", "train")}, sort_keys=False
    )
    return told.rstrip()


def _facts(run: Run, config: RunConfig, made_by: Mapping[str, Any]) -> dict[str, object]:
    objective = config.objective
    return {
        "teacher's weights (SHA-256)": made_by["teacher"]["weights"],
        "prompts": f"{len(run.pool.texts):,}, of which {run.pool.seen:,} with latents",
        "sampling of the latents": f"{config.cache.steps} steps, guidance w = {run.guidance_text}",
        "random conditioning": f"p(t) {objective.random_conditioning.probability}",
        "batch": config.train.batch,
        "learning rate": config.train.lr,
    }
