# SPDX-License-Identifier: Apache-2.0
"""train the teacher of the digits task (its weights are part of the package)"""

from __future__ import annotations

from fastdistill.commands._options import configured, import_pydantic


def run(arguments: list[str]) -> None:
    import_pydantic()
    from fastdistill.data.fingerprint import listed
    from fastdistill.tasks.digits.teacher import TeacherConfig, other_recipe, provenance, train_teacher

    config = configured(TeacherConfig, arguments, "teacher digits")
    if config is None:
        return
    from rich.console import Console
    from rich.progress import Progress

    console = Console()
    with Progress(console=console, refresh_per_second=2) as progress:
        task = progress.add_task("digits teacher", total=config.train.steps)

        def show(done: int, metrics: dict[str, float] | None) -> None:
            progress.update(task, completed=done)
            if metrics is not None:
                progress.update(task, description=f"digits teacher: loss {metrics['loss']:.3f}")

        made = train_teacher(config, show)
    shipped = provenance()
    changed = other_recipe(made, shipped)
    recipe = (
        f"another recipe than the shipped weights' ({listed(changed)})" if changed else "the shipped weights' recipe"
    )
    console.print(f"{config.output}/teacher.safetensors: trained by {recipe}", soft_wrap=True)
    for name, value in made["metrics"].items():
        console.print(f"  {name:24} {value:.4g}   (shipped: {shipped['metrics'][name]:.4g})")
