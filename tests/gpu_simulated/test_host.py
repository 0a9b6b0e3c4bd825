# SPDX-License-Identifier: Apache-2.0
"""The host's part of a call does not grow unnoticed: calls of this package's functions, which are the same on every
machine. A faster call may lower its limits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.gpu_simulated.driver import missing

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))
#: A forward without gradients, a forward, a backward.
LIMITS = {
    "group_norm_silu": {"cuda": (39, 43, 39), "triton": (46, 50, 60)},
    "group_norm_silu in tiles": {"cuda": (39, 43, 39), "triton": (46, 50, 60)},
    "layer_norm_modulate": {"triton": (53, 57, 69)},
    "layer_norm_modulate affine": {"triton": (53, 57, 71)},
    "geglu": {"triton": (27, 31, 30)},
    "cross_attention 40": {"triton": (39, 43, 34)},
    "cross_attention 80": {"cuda": (54, 58, 51), "triton": (39, 43, 40)},
    "feature_match 9 taps": {"cuda": (85, 95, 33), "triton": (141, 160, 71)},
}


def test_a_call_makes_no_more_python_calls_than_it_did() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-m", "tests.gpu_simulated.host", "--calls"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], env=environment)
    assert done.returncode == 0, done.stderr[-6000:]
    made = json.loads(done.stdout)
    assert set(made) == set(LIMITS)
    for name, kernels in made.items():
        for kernel, found in kernels.items():
            limits = LIMITS[name][kernel]
            assert all(n <= limit for n, limit in zip(found, limits, strict=True)), (name, kernel, found, limits)
