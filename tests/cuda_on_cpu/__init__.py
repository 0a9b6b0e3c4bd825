# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels of csrc/ on a machine without a GPU: compiled by g++ with ``emulation.h`` and run on the CPU."""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import importlib.machinery
import importlib.util
import os
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from types import ModuleType

from tests.sanitizers import SANITIZE

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
FLAGS = "-std=c++17 -O1 -g1 -fPIC -ffp-contract=off -Wno-unknown-pragmas -Wno-psabi".split()
# These options report every access to memory.cpp, and trap at bad indices and unaligned vectors.
WATCHED = "-fsanitize=thread,bounds,alignment -fsanitize-undefined-trap-on-error".split()
LINK = "-shared -Wl,-z,defs".split()
if SANITIZE:  # the compiler's sanitizers instead
    WATCHED = [f"-fsanitize={SANITIZE}", "-fno-sanitize-recover", "-fno-omit-frame-pointer"]
    LINK = ["-shared", f"-fsanitize={SANITIZE}"]
loaded: list[ctypes.CDLL] = []  # libraries whose kernels can run


@cache
def kernels(sources: tuple[Path, ...]) -> Path:
    """A library with only kernels, because all its thread-local memory counts as shared memory of blocks."""
    scheduler = [(HERE / name, ("-O2",)) for name in ("emulation.cpp", "memory.cpp")]
    flags = (*WATCHED, "-include", str(HERE / "emulation.h"), "-x", "c++")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(lambda one: _compiled(*one), [(source, flags) for source in sources] + scheduler))
    library = _linked("kernels.so", objects, LINK)
    loaded.append(ctypes.CDLL(str(library)))
    loaded[-1].fd_forbid.argtypes = [ctypes.c_size_t, ctypes.c_size_t, ctypes.c_bool]
    return library


def _compiled(source: Path, flags: tuple[str, ...]) -> Path:
    """The object file of a source, compiled again if the source or any header has changed."""
    import pybind11  # imported here: a machine with a GPU compiles nothing for the tests

    headers = [*HERE.glob("*.h"), *(ROOT / "csrc").rglob("*.h"), *(ROOT / "csrc").rglob("*.cuh")]
    content = b"".join(path.read_bytes() for path in [source, *sorted(headers)])
    includes = [f"-I{path}" for path in (HERE, ROOT / "csrc", pybind11.get_include(), sysconfig.get_path("include"))]
    return _made(f"{source.parent.name}.{source.name}.o", content, [*FLAGS, *includes, *flags, "-c", str(source)])


def _linked(name: str, objects: list[Path], flags: list[str]) -> Path:
    return _made(name, b"", [*map(str, objects), *flags])


def _made(name: str, content: bytes, options: list[str]) -> Path:
    key = hashlib.sha256(content + " ".join(options).encode()).hexdigest()[:16]
    path = ROOT / "build" / "cuda_on_cpu" / key / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with (path.parent / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # only one of several test processes compiles
        if not path.exists():
            temporary = path.with_suffix(f".{os.getpid()}.tmp")
            done = subprocess.run(["g++", *options, "-o", str(temporary)], capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            temporary.replace(path)
    return path


@cache
def module() -> ModuleType:
    """``fastdistill._cuda``, emulated."""
    library = kernels(tuple(sorted((ROOT / "csrc").rglob("*.cu"))))
    bindings = _compiled(ROOT / "csrc" / "bindings_cuda.cpp", ())
    path = _linked("_cuda.so", [bindings], ["-shared", str(library), f"-Wl,-rpath,{library.parent}"])
    loader = importlib.machinery.ExtensionFileLoader("_cuda", str(path))
    spec = importlib.util.spec_from_loader("_cuda", loader)
    assert spec is not None
    found = importlib.util.module_from_spec(spec)
    loader.exec_module(found)
    return found
