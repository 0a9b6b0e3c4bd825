# SPDX-License-Identifier: Apache-2.0
"""``make sanitizers`` detects a planted bug of each kind in each kind of kernel."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from tests.sanitizers import ROOT, SANITIZE

pytestmark = pytest.mark.skipif(not SANITIZE, reason="make sanitizers builds what this needs")
CALL = """
import torch, tests.gpu_on_cpu
from fastdistill.ops import _native
gradient, factor = torch.ones(40), torch.full((2,), 2.0)
addresses = gradient.data_ptr() + {first}, factor.data_ptr() + {off}
_native.{module}().scale_gradients([addresses[0]], [{n}], [0], addresses[1], {last})
print("passed", gradient.sum().item())
"""
OVERFLOW = "AddressSanitizer: heap-buffer-overflow"
BUGS = {
    "none": ({"first": 0, "off": 0, "n": 40}, "(?m)^passed 80.0$"),
    "past the end": ({"first": 0, "off": 0, "n": 41}, OVERFLOW),
    "before the start": ({"first": -4, "off": 0, "n": 40}, OVERFLOW),
    "misaligned": ({"first": 0, "off": 2, "n": 40}, "runtime error: .* misaligned address"),
}


@pytest.mark.parametrize(("module", "last"), [("cpu", "1"), ("cuda", "(0, 1)")])
@pytest.mark.parametrize("bug", BUGS)
def test_planted_bugs(module: str, last: str, bug: str) -> None:
    where, found = BUGS[bug]
    script = CALL.format(module=module, last=last, **where)
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120)
    output = done.stdout + done.stderr
    assert re.search(found, output), output
    assert (done.returncode == 0) == (bug == "none")
