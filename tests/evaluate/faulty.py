# SPDX-License-Identifier: Apache-2.0
"""Reports with one fault."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastdistill.errors import InputError


def refused(
    write: Callable[[Path, Any], object], folder: Path, report: Any, path: str, value: Any, message: str
) -> None:
    """Replace the entry at ``path`` (keys and indices, separated by dots), or remove it (None): ``write`` raises an
    error that contains ``message``, and writes nothing."""
    bad: Any = copy.deepcopy(report)
    *parents, last = (int(key) if key.isdecimal() else key for key in path.split("."))
    place = bad
    for key in parents:
        place = place[key]
    if value is None:
        del place[last]
    else:
        place[last] = value
    with pytest.raises(InputError, match=re.escape(message)):
        write(folder / "new", bad)
    assert not (folder / "new").exists()
