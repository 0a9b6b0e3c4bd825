# SPDX-License-Identifier: Apache-2.0
"""The commands that train a task's teacher."""

from __future__ import annotations

import importlib

from fastdistill.commands._options import configured, import_pydantic


def train(task: str, arguments: list[str]) -> None:
    """Trains the teacher of ``fastdistill.tasks.<task>`` and compares it with the shipped one."""
    import_pydantic()
    from fastdistill.data.fingerprint import listed
    from fastdistill.tasks.digits.teacher import other_recipe, provenance

    teacher = importlib.import_module(f"fastdistill.tasks.{task}.teacher")
    config = configured(teacher.TeacherConfig, arguments, f"teacher {task}")
    if config is None:
        return
    from rich.console import Console
    from rich.progress import Progress

    console = Console()
    with Progress(console=console, refresh_per_second=2) as progress:
        bar = progress.add_task(f"{task} teacher", total=config.train.steps)

        def show(done: int, metrics: dict[str, float] | None) -> None:
            progress.update(bar, completed=done)
            if metrics is not None:
                progress.update(bar, description=f"{task} teacher: loss {metrics['loss']:.3f}")

        made = teacher.train_teacher(config, show)
    shipped = provenance(config.shipped)
    changed = other_recipe(made, shipped)
    recipe = (
        f"another recipe than the shipped weights' ({listed(changed)})" if changed else "the shipped weights' recipe"
    )
    console.print(f"{config.output}/teacher.safetensors: trained by {recipe}", soft_wrap=True)
    for name, value in made["metrics"].items():
        console.print(f"  {name:24} {value:.4g}   (shipped: {shipped['metrics'][name]:.4g})")
