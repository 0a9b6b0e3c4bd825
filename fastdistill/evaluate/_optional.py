# SPDX-License-Identifier: Apache-2.0
"""Packages that only the evaluation needs."""

from __future__ import annotations

import importlib
from typing import Any

from fastdistill.errors import FastdistillError


def require(module: str, extra: str = "demo") -> Any:
    """Import a module of an extra; if it is missing, FastdistillError with the command that installs it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        message = (
            f"{package}: expected to be installed for evaluation; run: pip install 'fastdistill[{extra}]' ({error})"
        )
        raise FastdistillError(message) from error
