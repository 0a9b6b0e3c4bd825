# SPDX-License-Identifier: Apache-2.0
"""train classifiers on canonical images of a diffusion teacher, on a toy task"""

from __future__ import annotations

from fastdistill.commands._options import configured, import_pydantic


def run(arguments: list[str]) -> None:
    import_pydantic()
    from fastdistill.tasks.context.demo_config import DemoConfig

    config = configured(DemoConfig, arguments, "demo context")
    if config is not None:
        from fastdistill.tasks.context.demo import run

        run(config)
