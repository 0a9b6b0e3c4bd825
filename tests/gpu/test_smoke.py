# SPDX-License-Identifier: Apache-2.0
"""The first look at a GPU's kernels; here emulated where there is no GPU."""

from __future__ import annotations

import sys

import pytest
import torch

from fastdistill.ops import _dispatch
from tests.gpu import smoke
from tests.gpu.work import KERNELS, Work

here = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.skipif("triton" not in KERNELS, reason="no Triton")
def test_a_kernel_is_compared_with_the_reference() -> None:
    assert smoke.one("geglu", "triton", here) is None


@pytest.mark.parametrize("wrong", [1.001, float("nan")])
def test_a_wrong_kernel_is_told(wrong: float, monkeypatch: pytest.MonkeyPatch) -> None:
    def step() -> list[torch.Tensor]:
        return [torch.ones(3), torch.ones(3) * (1 if _dispatch.forced() == "reference" else wrong)]

    monkeypatch.setitem(smoke.WORKS, "planted", lambda device: Work([], step))
    assert (smoke.one("planted", "triton", here) or "").startswith("tensor 1: expected a distance of at most 1.7e-06")


def test_a_crash_costs_one_kernel(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    planted = {"crash": "import os; os.abort()", "wrong": "print('it is wrong'); raise SystemExit(1)", "good": "pass"}

    def command(work: str, kernel: str, device: str) -> list[str]:
        return [sys.executable, "-c", planted[work]]

    monkeypatch.setattr(smoke, "_command", command)
    monkeypatch.setattr(smoke, "PAIRS", [("k", name) for name in planted])
    monkeypatch.setattr(smoke, "KERNELS", ["cuda"])
    monkeypatch.setitem(smoke.REASONS, "triton", lambda: "it is not there")
    assert smoke.main(here) == 1
    first, *told = [line.split("  ")[-1] for line in capsys.readouterr().out.splitlines()]
    assert first == "left out: triton: it is not there"
    assert sorted(told) == ["k crash: ended with -6: ", "k good: right", "k wrong: ended with 1: it is wrong"]
