# SPDX-License-Identifier: Apache-2.0
"""measure what guidance does to distributions with exact scores"""

from __future__ import annotations

from fastdistill.commands._options import configured, import_pydantic


def run(arguments: list[str]) -> None:
    import_pydantic()
    from fastdistill.tasks.guidance.config import LabConfig

    config = configured(LabConfig, arguments, "guidance lab")
    if config is not None:
        from fastdistill.tasks.guidance.lab import run

        run(config)
