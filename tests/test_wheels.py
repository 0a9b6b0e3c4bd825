# SPDX-License-Identifier: Apache-2.0
"""Wheels for a machine without a network: a wheel that does not fit, or lacks a requirement, is named."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from benchmarks import wheels


def wheel(folder: Path, name: str, *requires: str, tags: str = "py3-none-any") -> None:
    package, version = name.split("-")
    lines = [
        "Metadata-Version: 2.1",
        f"Name: {package}",
        f"Version: {version}",
        *(f"Requires-Dist: {r}" for r in requires),
    ]
    with zipfile.ZipFile(folder / f"{name}-{tags}.whl", "w") as file:
        file.writestr(f"{name}.dist-info/METADATA", "\n".join(lines) + "\n")


def test_what_is_wrong_with_a_folder_of_wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wheels, "WANTED", ["first", "second<3", "third"])
    wheel(tmp_path, "first-1.0", "second>=2", "torch>=2", 'old; python_version < "3.12"', 'more; extra == "all"')
    wheel(tmp_path, "second-2.1", tags="cp312-cp312-manylinux_2_17_x86_64")
    wheel(tmp_path, "third-1.0", tags="cp39-abi3-manylinux_2_28_x86_64")
    assert list(wheels.faults(tmp_path, "3.12")) == []

    wheel(tmp_path, "second-1.9", tags="cp311-cp311-manylinux_2_17_x86_64")
    wheel(tmp_path, "third-1.1", "fourth", "first>1")
    for name in ("second-2.1-cp312-cp312-manylinux_2_17_x86_64", "third-1.0-cp39-abi3-manylinux_2_28_x86_64"):
        (tmp_path / f"{name}.whl").unlink()
    assert list(wheels.faults(tmp_path, "3.12")) == [
        "second-1.9-cp311-cp311-manylinux_2_17_x86_64.whl: expected a wheel for Python 3.12 on x86-64 Linux",
        "first-1.0-py3-none-any.whl: requires second>=2, got 1.9",
        "third-1.1-py3-none-any.whl: requires fourth, of which there is no wheel",
        "third-1.1-py3-none-any.whl: requires first>1, got 1.0",
    ]
    wheel(tmp_path, "first-1.2")
    (tmp_path / "second-1.9-cp311-cp311-manylinux_2_17_x86_64.whl").unlink()
    found = list(wheels.faults(tmp_path, "3.12"))
    assert "first-1.2-py3-none-any.whl: expected one version of first, got 1.0 too" in found
    assert f"second: expected a wheel of it in {tmp_path}" in found
