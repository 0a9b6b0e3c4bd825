# SPDX-License-Identifier: Apache-2.0
"""train the teacher of the shades task (its weights are part of the package)"""

from __future__ import annotations

from fastdistill.commands._teacher import train


def run(arguments: list[str]) -> None:
    train("shades", arguments)
