# SPDX-License-Identifier: Apache-2.0
"""Code of the user: imports a name from a module in the current directory or from an installed module."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

from fastdistill.errors import FastdistillError, quoted


def imported(module: str, name: str, argument: str) -> Any:
    """``name`` of ``module``; None if the module does not have it.

    Raises:
        FastdistillError: the module does not exist, or its import fails; the message names ``argument``.
    """
    sys.path.insert(0, here := str(Path.cwd()))
    try:
        return getattr(importlib.import_module(module), name, None)
    except Exception as error:
        raise FastdistillError(f"{argument}: {name} of {module} could not be imported: {quoted(error)}") from error
    finally:
        if here in sys.path:
            sys.path.remove(here)
