# SPDX-License-Identifier: Apache-2.0
"""measure schedules of guidance, and distil them into one pass, on toy tasks"""

from __future__ import annotations

from fastdistill.commands._options import configured, import_pydantic


def run(arguments: list[str]) -> None:
    import_pydantic()
    from fastdistill.tasks.guidance.demo_config import DemoConfig

    config = configured(DemoConfig, arguments, "demo guidance")
    if config is not None:
        from fastdistill.tasks.guidance.demo import run

        run(config)
