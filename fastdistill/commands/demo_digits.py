# SPDX-License-Identifier: Apache-2.0
"""compare random conditioning with paired prompts on handwritten digits"""

from __future__ import annotations

from fastdistill.commands._options import configured, import_pydantic


def run(arguments: list[str]) -> None:
    import_pydantic()
    from fastdistill.tasks.digits.config import DigitsConfig

    config = configured(DigitsConfig, arguments, "demo digits")
    if config is not None:
        from fastdistill.tasks.digits.demo import run

        run(config)
