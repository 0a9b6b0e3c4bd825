# SPDX-License-Identifier: Apache-2.0
"""The calls of ``calls.py`` with GPU kernels on a CPU: Triton's interpreted, CUDA's emulated. They are slow, so each
call uses only one kind of values."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st

import tests.gpu_on_cpu  # noqa: F401  first: Triton decides at its import whether it interprets
from tests.fuzz import calls as plain
from tests.fuzz.calls import Call
from tests.harness import kernels_of
from tests.ops.test_cross_attention import multiply_numbers

multiply_numbers()
NAMES = {"residual_layer_norm_modulate": "layer_norm_modulate"}


def calls(one: Callable[[Any], Call]) -> st.SearchStrategy[tuple[Call, int]]:
    """Only valid calls: invalid arguments are refused before any kernel."""
    return plain.calls(one, wrongs=False)


def check(example: tuple[Call, int], counts: Counter[str]) -> None:
    """See ``calls.check``."""
    call, seed = example
    kernels = [str(kernel) for kernel in kernels_of(NAMES.get(call.op, call.op), ["cpu"]) if kernel != "cpp"]
    plain.check((dataclasses.replace(call, kernels=tuple(kernels)), seed), counts, repeats=1)
