# SPDX-License-Identifier: Apache-2.0
"""train a teacher of the context task (its weights are part of the package)"""

from __future__ import annotations

from fastdistill.commands._teacher import train


def run(arguments: list[str]) -> None:
    train("context", arguments)
