# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels of csrc/ on a machine without a GPU: compiled by g++ under ``emulation.h`` and run on the CPU."""

from __future__ import annotations

import hashlib
import importlib.machinery
import importlib.util
import os
import subprocess
import sysconfig
from functools import cache
from pathlib import Path
from types import ModuleType

import pybind11

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
FLAGS = "-std=c++17 -O1 -fPIC -shared -ffp-contract=off -Wno-unknown-pragmas -Wno-psabi".split()


def kernels(sources: list[Path]) -> Path:
    """A library of kernels. It holds nothing else, as all its thread-local memory counts as shared memory of blocks."""
    options = ["-include", str(HERE / "emulation.h"), "-x", "c++", *map(str, sources), str(HERE / "emulation.cpp")]
    return _compiled("kernels.so", sources, options)


def _compiled(name: str, sources: list[Path], options: list[str]) -> Path:
    """The library that these options make of the sources, made anew when any source or header has changed."""
    headers = [*HERE.glob("emulation.*"), *(ROOT / "csrc").rglob("*.h"), *(ROOT / "csrc").rglob("*.cuh")]
    content = b"".join(path.read_bytes() for path in sorted({*sources, *headers}))
    key = hashlib.sha256(content + " ".join([*FLAGS, *options]).encode()).hexdigest()[:16]
    library = ROOT / "build" / "cuda_on_cpu" / key / name
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        includes = [HERE, ROOT / "csrc", pybind11.get_include(), sysconfig.get_path("include")]
        temporary = library.with_suffix(f".{os.getpid()}.tmp")
        command = ["g++", *FLAGS, *(f"-I{path}" for path in includes), *options, "-o", str(temporary)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        temporary.replace(library)
    return library


@cache
def module() -> ModuleType:
    """``fastdistill._cuda``, emulated."""
    library = kernels(sorted((ROOT / "csrc").rglob("*.cu")))
    bindings = ROOT / "csrc" / "bindings_cuda.cpp"
    path = _compiled("_cuda.so", [bindings], [str(bindings), str(library), f"-Wl,-rpath,{library.parent}"])
    loader = importlib.machinery.ExtensionFileLoader("_cuda", str(path))
    spec = importlib.util.spec_from_loader("_cuda", loader)
    assert spec is not None
    found = importlib.util.module_from_spec(spec)
    loader.exec_module(found)
    return found
