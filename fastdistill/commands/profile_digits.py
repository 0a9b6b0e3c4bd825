# SPDX-License-Identifier: Apache-2.0
"""profile a few training steps: a Chrome trace, or ranges for Nsight"""

from __future__ import annotations

from fastdistill.commands._options import configured, import_pydantic


def run(arguments: list[str]) -> None:
    import_pydantic()
    from rich.console import Console

    from fastdistill.profile import ProfileConfig, profile_digits

    config = configured(ProfileConfig, arguments, "profile digits")
    if config is not None:
        profile_digits(config, Console())
