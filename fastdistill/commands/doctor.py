# SPDX-License-Identifier: Apache-2.0
"""print versions, devices and kernels, with the reason for each that cannot run"""

from __future__ import annotations

from dataclasses import dataclass

from fastdistill.commands._arguments import parsed
from fastdistill.documented import documented


@documented
@dataclass(frozen=True)
class DoctorConfig:
    """Print versions, devices and the kernels of every op."""

    json: bool = False
    """Print the result as JSON."""


def run(arguments: list[str]) -> None:
    from rich.console import Console

    from fastdistill.doctor import doctor

    options = parsed([DoctorConfig], arguments, "fastdistill doctor")
    doctor(Console(), as_json=options.json)
