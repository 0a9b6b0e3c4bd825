# SPDX-License-Identifier: Apache-2.0
"""Code of the user's own: what a module in the current directory, or an installed one, has by a name."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

from fastdistill.errors import FastdistillError, quoted


def imported(module: str, name: str, argument: str) -> Any:
    """``name`` of ``module``; None if the module does not have it.

    Raises:
        FastdistillError: the module is not there, or fails; it names ``argument``.
    """
    sys.path.insert(0, here := str(Path.cwd()))
    try:
        return getattr(importlib.import_module(module), name, None)
    except Exception as error:
        raise FastdistillError(f"{argument}: {name} of {module} could not be imported: {quoted(error)}") from error
    finally:
        if here in sys.path:
            sys.path.remove(here)
