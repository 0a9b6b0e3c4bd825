# SPDX-License-Identifier: Apache-2.0
"""Packages that only evaluation needs."""

from __future__ import annotations

import importlib
from typing import Any

from fastdistill.errors import FastdistillError


def require(module: str) -> Any:
    """The module of this name from the ``demo`` extra, or one clear error that says how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        message = f"{package}: expected to be installed for evaluation; run: pip install 'fastdistill[demo]' ({error})"
        raise FastdistillError(message) from error
