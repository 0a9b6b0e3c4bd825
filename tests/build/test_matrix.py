# SPDX-License-Identifier: Apache-2.0
"""Isolated installation: with and without nvcc, without a C++ compiler, and twice (``make build-matrix``)."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow
TRY = """
import sys
# An editable install beside the one under test would lend it the modules that it lacks.
sys.meta_path[:] = [f for f in sys.meta_path if "Editable" not in getattr(f, "__name__", type(f).__name__)]
import json, torch
from fastdistill.ops import feature_match, used, _native
feature_match([torch.ones(3)], [torch.zeros(3)])
print(json.dumps([used()["feature_match"], _native.cuda_reason() is None]))
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """The tracked files in another folder, without a build folder and without extensions."""
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for name in tracked:
        (tmp_path / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / "source" / name)
    return tmp_path / "source"


def install(source: Path, target: Path, **environment: str) -> str:
    """The output of pip for an isolated build into ``target``."""
    command = [sys.executable, "-m", "pip", "install", "--verbose", "--no-deps", "--target", str(target), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def runs_on(target: Path) -> str:
    environment = os.environ | {"PYTHONPATH": str(target), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", TRY], capture_output=True, text=True, env=environment, cwd=target)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc here")
def test_with_nvcc(source: Path, tmp_path: Path) -> None:
    install(source, tmp_path / "site", FASTDISTILL_CUDA="1")
    assert runs_on(tmp_path / "site") == '[["cpp"], true]'


def test_without_nvcc(source: Path, tmp_path: Path) -> None:
    said = install(source, tmp_path / "site", FASTDISTILL_CUDA="0")
    assert "CUDA kernels skipped" in said
    assert runs_on(tmp_path / "site") == '[["cpp"], false]'


def test_without_a_compiler(source: Path, tmp_path: Path) -> None:
    said = install(source, tmp_path / "site", CXX="/nonexistent/c++", CUDA_HOME="/nonexistent", FASTDISTILL_CUDA="0")
    assert "pure Python" in said
    assert runs_on(tmp_path / "site") == '[["reference"], false]'


def test_requiring_a_compiler_that_is_not_there(source: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--target", str(tmp_path / "site"), str(source)]
    environment = os.environ | {"CXX": "/nonexistent/c++", "FASTDISTILL_CPU": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode != 0 and "FASTDISTILL_CPU=1" in done.stdout + done.stderr


def test_a_second_build_compiles_nothing(source: Path) -> None:
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    for built in (True, False):
        done = subprocess.run(
            command, cwd=source, capture_output=True, text=True, env=os.environ | {"FASTDISTILL_CUDA": "0"}
        )
        assert done.returncode == 0, done.stderr
        said = done.stdout + done.stderr
        assert ("compile" in said or "[1/" in said) is built, said
