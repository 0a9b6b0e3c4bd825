# SPDX-License-Identifier: Apache-2.0
"""The released files: metadata, the files of the sdist, and the wheel of ``make wheels`` in an empty environment."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import fastdistill

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
#: Tracked but not released: the configuration of git, editors and test machines.
APART = re.compile(r"\.(ci|github)/.*|\.gitignore|\.pre-commit-config\.yaml")
# Runs an op with the C++ kernel and two threads, and prints the files that the process has mapped.
TRY = """
import json, os, torch
torch.set_num_threads(2)
import fastdistill.ops as ops
with ops.use("cpp"):
    ops.feature_match([torch.ones(2, 64, 32, 32)] * 4, [torch.zeros(2, 64, 32, 32)] * 4)
mapped = {line.split()[-1] for line in open("/proc/self/maps") if "/" in line}
print(json.dumps({"used": ops.used(), "place": ops.__file__, "threads": len(os.listdir("/proc/self/task")),
    "mapped": sorted(mapped)}))
"""
# A small version of the experiment: cache, two students as runs, evaluation, report.
DEMO = "--train.steps 8 --train.warmup 2 --cache-images 48 --images-per-prompt 1 --sampling.steps 3 --workers 1"


def test_the_version_is_that_of_the_changelog() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", fastdistill.__version__), fastdistill.__version__
    newest = re.findall(r"^## (?!Unreleased)(\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)[0]
    assert newest == fastdistill.__version__


def test_the_metadata_is_complete() -> None:
    oldest = int(PROJECT["requires-python"].removeprefix(">=3."))
    assert f"Programming Language :: Python :: 3.{oldest}" in PROJECT["classifiers"]
    assert PROJECT["license"] == "Apache-2.0" and not any("License" in text for text in PROJECT["classifiers"])
    assert (ROOT / PROJECT["readme"]).exists() and (ROOT / "fastdistill" / "py.typed").exists()
    pinned = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    for need in PROJECT["optional-dependencies"]["release"]:
        assert f"\n{need}==" in pinned, f"{need} of `make wheels` is not in constraints.txt"


def test_the_documentation_names_the_oldest_versions() -> None:
    text = (ROOT / "docs" / "compatibility.md").read_text(encoding="utf-8")
    required = {row[0]: row[1] for line in text.splitlines() if len(row := line.strip("| ").split(" | ")) == 4}
    assert required["Python"] == f"{PROJECT['requires-python'].removeprefix('>=')} or newer"
    for name in ("torch", "diffusers"):
        (oldest,) = (need.removeprefix(f"{name}>=") for need in PROJECT["dependencies"] if need.startswith(f"{name}>="))
        assert required[name] == f"{oldest} or newer"


def test_the_sdist_has_what_is_tracked(tmp_path: Path) -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("no checkout: nothing is tracked")
    command = [sys.executable, "setup.py", "--quiet", "egg_info", "--egg-base", str(tmp_path)]
    environment = os.environ | {"FASTDISTILL_CPU": "0"}  # no compiler is used
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    (listed,) = tmp_path.glob("*.egg-info/SOURCES.txt")
    released = set(listed.read_text(encoding="utf-8").splitlines()) | {"MANIFEST.in"}
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    missing = {name for name in tracked.split("\0") if name and not APART.fullmatch(name)} - released
    assert not missing, sorted(missing)


@pytest.fixture(scope="module")
def dist() -> Path:
    """The folder with the sdist and the wheel of this Python."""
    if not list((ROOT / "dist").glob(f"*-{sys.implementation.cache_tag.replace('cpython-', 'cp')}-*.whl")):
        pytest.skip("no wheel of this Python in dist: make wheels")
    return ROOT / "dist"


def wheel_in(dist: Path) -> Path:
    (wheel,) = dist.glob(f"fastdistill-{fastdistill.__version__}-*.whl")
    return wheel


@pytest.mark.slow
def test_the_wheel_is_for_any_linux_that_is_new_enough(dist: Path) -> None:
    """It contains no library; its kernels use torch's OpenMP."""
    wheel = wheel_in(dist)
    assert re.search(r"-manylinux_2_\d+_\w+\.whl$", wheel.name), wheel.name
    with zipfile.ZipFile(wheel) as file:
        names = file.namelist()
    assert not [name for name in names if re.search(r"\.libs/|libgomp", name)]
    assert not [name for name in names if not name.startswith(("fastdistill/", "fastdistill-"))]
    own = {str(p.relative_to(ROOT)) for p in (ROOT / "fastdistill").rglob("*") if p.is_file()}
    wanted = {name for name in own if not re.search(r"__pycache__|\.so$", name)}
    assert wanted <= set(names), sorted(wanted - set(names))
    assert [name for name in names if re.fullmatch(r"fastdistill-[^/]+/licenses/LICENSE", name)]
    with tarfile.open(next(dist.glob("*.tar.gz"))) as packed:
        inside = {name.partition("/")[2] for name in packed.getnames()}
    assert {"LICENSE", "PKG-INFO", "constraints.txt", "csrc/common.h", "tests/build/test_release.py"} <= inside


@pytest.fixture(scope="module")
def installed(dist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder outside of the checkout; its ``venv`` contains only the wheel and its requirements."""
    place = tmp_path_factory.mktemp("empty")
    subprocess.run([sys.executable, "-m", "venv", str(place / "venv")], check=True)
    for package in ("torch", f"{wheel_in(dist)}[demo]"):
        command = [str(place / "venv/bin/pip"), "install", "--quiet", package]
        done = subprocess.run(command, env=alone() | {"PIP_CONSTRAINT": str(ROOT / "constraints.txt")}, cwd=place)
        assert done.returncode == 0
    return place


def alone() -> dict[str, str]:
    """The environment without variables that lead to the checkout."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "FASTDISTILL"))}
    return kept | {"OMP_NUM_THREADS": "2"}


def said(place: Path, *command: str) -> str:
    done = subprocess.run(
        [str(place / "venv/bin" / command[0]), *command[1:]], cwd=place, env=alone(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_wheel_runs_in_an_empty_environment(installed: Path) -> None:
    assert "No broken requirements" in said(installed, "pip", "check")
    assert said(installed, "fastdistill", "--version").split()[-1] == fastdistill.__version__
    told = json.loads(said(installed, "fastdistill", "doctor", "--json"))
    assert told["versions"]["fastdistill"] == fastdistill.__version__

    found = json.loads(said(installed, "python", "-c", TRY))
    assert found["place"].startswith(str(installed)) and found["used"]["feature_match"] == ["cpp"]
    assert found["threads"] >= 2
    openmp = [path for path in found["mapped"] if "libgomp" in path]
    assert len(openmp) == 1 and openmp[0].endswith("/torch/lib/libgomp.so.1"), openmp


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_demo_runs_in_an_empty_environment(installed: Path) -> None:
    said(installed, "fastdistill", "demo", "digits", "--output", "digits", *DEMO.split())
    report = json.loads((installed / "digits" / "report.json").read_text(encoding="utf-8"))
    assert report["versions"]["fastdistill"] == fastdistill.__version__
    assert {"feature_match", "noise_gather", "adamw_ema"} <= set(report["backend"])
    assert all(kernel == "cpp" for kernel in report["backend"].values()), report["backend"]
