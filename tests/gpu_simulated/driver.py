# SPDX-License-Identifier: Apache-2.0
"""Triton's own compiler and launcher on CPU tensors; only the launch itself is replaced."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from filelock import FileLock

HERE = Path(__file__).parent
BUILT = HERE.parents[1] / "build" / "gpu_simulated"
FLAGS = "-std=gnu11 -O2 -Wall -Werror -Wno-attribute-alias -shared -fPIC".split()
_HOOK = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_void_p, ctypes.POINTER(ctypes.c_uint), ctypes.c_uint, ctypes.c_uint,
    ctypes.POINTER(ctypes.c_void_p),
)  # fmt: skip
#: ``(compiled kernel, grid, threads, bytes of shared memory, addresses of the arguments)``
Launched = Callable[[Any, tuple[int, ...], int, int, Any], None]

_loaded: dict[int, Any] = {}  # compiled kernels by the simulated driver's function handle


def missing() -> str | None:
    """Why kernels cannot be simulated here; None if they can."""
    if importlib.util.find_spec("triton") is None:
        return "no Triton"
    return None if shutil.which("gcc") else "no gcc"


def built(source: str, name: str, *options: str) -> Path:
    """A library from a C file of this folder, compiled again if the file has changed."""
    path = BUILT / name
    BUILT.mkdir(parents=True, exist_ok=True)
    with FileLock(BUILT / "lock"):
        if not path.exists() or path.stat().st_mtime < (HERE / source).stat().st_mtime:
            command = ["gcc", *FLAGS, *options, str(HERE / source), "-o", f"{path}.new"]
            subprocess.run(command, check=True)
            os.replace(f"{path}.new", path)
    return path


@cache
def _driver() -> ctypes.CDLL:
    """``driver.c``, loaded as libcuda.so.1 of this process."""
    spec = importlib.util.find_spec("triton")
    assert spec is not None and spec.origin is not None
    headers = Path(spec.origin).parent / "backends" / "nvidia" / "include"
    path = built("driver.c", "libcuda.so.1", "-Wl,-soname,libcuda.so.1", f"-I{headers}")
    link = BUILT / "libcuda.so"  # for the linker
    if not link.is_symlink():
        link.symlink_to(path.name)
    return ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)


@contextmanager
def simulated(launched: Launched, arch: int = 90) -> Iterator[None]:
    """Inside, Triton compiles for ``arch`` and a launch calls ``launched``. This needs a process in which Triton does
    not interpret and has launched nothing."""
    os.environ["TRITON_LIBCUDA_PATH"] = str(BUILT)
    loaded = _driver()
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia import driver as nvidia
    from triton.compiler.compiler import CompiledKernel
    from triton.runtime import driver

    class Simulated(nvidia.CudaDriver):
        def __init__(self) -> None:  # the base class would ask torch for a device
            self.utils, self.launcher_cls = nvidia.CudaUtils(), nvidia.CudaLauncher
            self.get_current_device = lambda: 0
            self.set_current_device = lambda device: None
            self.get_current_stream = lambda device: 0
            self.get_device_capability = lambda device=0: divmod(arch, 10)

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", arch, 32)

    errors: list[BaseException] = []
    load = CompiledKernel._init_handles

    def remember(kernel: Any) -> None:
        fresh = kernel.module is None
        load(kernel)
        if fresh:
            _loaded[kernel.function] = kernel

    @_HOOK
    def hook(function: int, grid: Any, threads: int, shared: int, arguments: Any) -> int:
        try:
            launched(_loaded[function], tuple(grid[:3]), threads, shared, arguments)
        except BaseException as error:
            errors.append(error)
            return 1
        return 0

    loaded.simulated_device(arch // 10, hook)
    driver.set_active(Simulated())
    CompiledKernel._init_handles = remember
    try:
        yield
    except Exception as error:  # Triton's error for a failed launch
        if errors:
            raise errors[0] from error
        raise
    finally:
        CompiledKernel._init_handles = load
        loaded.simulated_device(arch // 10, _HOOK())
