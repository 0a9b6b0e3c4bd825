# SPDX-License-Identifier: Apache-2.0
"""``make gpu-wheels``: the packages that a machine with torch but without a network lacks, as wheels in
build/gpu-wheels; ``benchmarks.gpu`` installs them from there.

Versions not named here are those of constraints.txt. Each wheel is checked to fit the machine's Python, and its
requirements must be among the wheels or be expected on the machine.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from email.parser import Parser
from pathlib import Path

from packaging.requirements import Requirement
from packaging.tags import compatible_tags, cpython_tags
from packaging.utils import canonicalize_name, parse_wheel_filename
from packaging.version import Version

from benchmarks.gpu import ROOT, WHEELS

WANTED = (
    "diffusers importlib_metadata pydantic pydantic_core annotated_types typing_inspection typing_extensions tyro"
    " docstring_parser typeguard rich pygments markdown-it-py mdurl lazy-importer zipp pybind11 ninja xformers"
    " liger_kernel setuptools<82"
).split()  # torch 2.11 does not work with later setuptools
#: Installed with torch and with the libraries of models.
THERE = "torch triton numpy filelock huggingface-hub packaging pillow pyyaml regex requests safetensors".split()
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in (28, 27, 24, 17)] + ["manylinux2014_x86_64"]
MARKERS = {"sys_platform": "linux", "platform_system": "Linux", "platform_machine": "x86_64", "extra": ""}


def download(folder: Path, python: str) -> None:
    """Download the wheels and replace those in the folder.

    Raises:
        subprocess.CalledProcessError: pip found no fitting wheel of a package.
    """
    for old in folder.glob("*.whl"):
        old.unlink()
    platforms = [part for name in PLATFORMS for part in ("--platform", name)]
    versions = (ROOT / "constraints.txt").read_text().splitlines()
    own = {Requirement(text).name for text in WANTED if Requirement(text).specifier}
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as constraints:
        constraints.write("\n".join(line for line in versions if line.partition("==")[0] not in own))
        constraints.flush()
        command = [sys.executable, *"-m pip download --quiet --no-deps --only-binary=:all: --constraint".split()]
        command += [constraints.name, "--python-version", python, "--implementation", "cp", *platforms]
        subprocess.run([*command, "--dest", str(folder), *WANTED], check=True)


def faults(folder: Path, python: str) -> Iterator[str]:
    """What is wrong with the wheels in a folder, for this Python ("3.12") on Linux."""
    major, minor = map(int, python.split("."))
    tags = {
        *cpython_tags((major, minor), platforms=PLATFORMS),
        *compatible_tags((major, minor), f"cp{major}{minor}", PLATFORMS),
    }
    environment = MARKERS | {"python_version": python, "python_full_version": f"{python}.0"}
    versions: dict[str, Version] = {}
    requirements: list[tuple[str, Requirement]] = []
    for path in sorted(folder.glob("*.whl")):
        name, version, _, its = parse_wheel_filename(path.name)
        if not its & tags:
            yield f"{path.name}: expected a wheel for Python {python} on x86-64 Linux"
        if name in versions:
            yield f"{path.name}: expected one version of {name}, got {versions[name]} too"
        versions[name] = version
        with zipfile.ZipFile(path) as wheel:
            (metadata,) = (n for n in wheel.namelist() if n.count("/") == 1 and n.endswith(".dist-info/METADATA"))
            fields = Parser().parsestr(wheel.read(metadata).decode())
        requirements += ((path.name, Requirement(text)) for text in fields.get_all("Requires-Dist", []))
    for missing in sorted({canonicalize_name(Requirement(text).name) for text in WANTED} - versions.keys()):
        yield f"{missing}: expected a wheel of it in {folder}"
    for wheel_name, needed in requirements:
        name = canonicalize_name(needed.name)
        if (needed.marker and not needed.marker.evaluate(environment)) or name in THERE:
            continue
        if name not in versions:
            yield f"{wheel_name}: requires {needed}, of which there is no wheel"
        elif not needed.specifier.contains(versions[name], prereleases=True):
            yield f"{wheel_name}: requires {needed}, got {versions[name]}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.wheels", description=__doc__, allow_abbrev=False)
    parser.add_argument("--python", default="3.12", help="of the machine (%(default)s)")
    parser.add_argument("--folder", type=Path, default=WHEELS, help=f"({WHEELS.relative_to(ROOT)})")
    options = parser.parse_args(arguments)
    options.folder.mkdir(parents=True, exist_ok=True)
    download(options.folder, options.python)
    wrong = list(faults(options.folder, options.python))
    for fault in wrong:
        print(fault, file=sys.stderr)
    wheels = list(options.folder.glob("*.whl"))
    print(f"{len(wheels)} wheels, {sum(path.stat().st_size for path in wheels) / 1e6:.1f} MB, in {options.folder}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
