# SPDX-License-Identifier: Apache-2.0
"""Builds the kernels through ninja, without torch: parallel, incremental, also in an isolated build environment.

fastdistill._cpu   C++ kernels, whenever a C++17 compiler (CXX, g++, clang++, c++) is there
                   FASTDISTILL_CPU=1 requires it, =0 skips
fastdistill._cuda  CUDA kernels, when nvcc is there too (PATH, CUDA_HOME, /usr/local/cuda)
                   FASTDISTILL_CUDA=1 requires it, =0 skips; FASTDISTILL_CUDA_ARCHS="80;90" names the architectures
FASTDISTILL_SANITIZE="address,undefined" builds fastdistill._cpu under these sanitizers (make sanitizers).
MAX_JOBS limits the compiler processes.

Without a compiler the package installs as pure Python. Objects stay under build/native-*, so that a second build
compiles nothing.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Extension, __version__, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
ISAS = {"baseline": [], "avx2": "-mavx2 -mfma -mf16c".split()}
ISAS["avx512"] = ISAS["avx2"] + "-mavx512f -mavx512bw -mavx512vl -mavx512dq".split()
# Nothing is contracted into a fused multiply-add but where the source asks for one.
KERNEL_FLAGS = "-ffp-contract=off -fno-math-errno -fno-trapping-math -fno-exceptions -fno-rtti".split()
WARNINGS = "-Wall -Wno-psabi -Wno-maybe-uninitialized -Wno-unknown-warning-option".split()
CXX_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", *WARNINGS]
SHARED = ["-bundle", "-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-shared"]
if SANITIZE := os.environ.get("FASTDISTILL_SANITIZE", ""):
    CXX_FLAGS += ["-O1", "-g1", f"-fsanitize={SANITIZE}", "-fno-sanitize=vptr", "-fno-sanitize-recover"]
    SHARED += [f"-fsanitize={SANITIZE}"]
INCLUDE = sysconfig.get_path("include")

if int(__version__.partition(".")[0]) < 77:
    raise SystemExit(f"fastdistill: building needs setuptools >= 77, got {__version__} (pip install -U setuptools)")


def say(text: str) -> None:
    print(f"fastdistill: {text}", file=sys.stderr, flush=True)


def compiles(command: list[str], source: str, suffix: str = ".cpp") -> bool:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "probe" + suffix)
        path.write_text(source)
        try:
            return (
                subprocess.run([*command, str(path), "-o", f"{folder}/probe.out"], capture_output=True).returncode == 0
            )
        except OSError:
            return False


def find_cxx() -> list[str] | None:
    """The first C++17 compiler that builds a Python extension."""
    want = os.environ.get("FASTDISTILL_CPU", "auto")
    if want == "0":
        return say("C++ kernels skipped (FASTDISTILL_CPU=0)")
    named = os.environ.get("CXX")
    source = "#include <Python.h>\n#include <cstdint>\nstatic_assert(__cplusplus >= 201703L);\n"
    for candidate in [named] if named else ["g++", "clang++", "c++"]:
        cxx = shlex.split(candidate)
        if compiles([*cxx, "-std=c++17", "-fPIC", *SHARED, f"-I{INCLUDE}"], source):
            return cxx
    tried = f"CXX={named}" if named else "g++, clang++ and c++"
    reason = f"no C++17 compiler that finds Python.h (tried {tried})"
    if want == "1":
        raise SystemExit(f"fastdistill: FASTDISTILL_CPU=1 but {reason}")
    return say(f"{reason}: installing as pure Python, WITHOUT the C++ and CUDA kernels (the slower reference runs)")


def find_nvcc() -> str | None:
    want = os.environ.get("FASTDISTILL_CUDA", "auto")
    homes = [os.environ.get("CUDA_HOME", ""), os.environ.get("CUDA_PATH", ""), "/usr/local/cuda"]
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path=os.pathsep.join(f"{home}/bin" for home in homes if home))
    if want == "0":
        return say("CUDA kernels skipped (FASTDISTILL_CUDA=0)")
    if nvcc is None or not CXX:
        reason = "no nvcc on PATH, in CUDA_HOME or in /usr/local/cuda" if CXX else "no C++17 compiler"
        if want == "1":
            raise SystemExit(f"fastdistill: FASTDISTILL_CUDA=1 but {reason}")
        return say(f"CUDA kernels skipped ({reason})") if CXX else None
    return nvcc


def gencode(nvcc: str) -> list[str]:
    """One binary per architecture that this nvcc knows, Hopper's with what only it has, and PTX of the last for newer
    GPUs."""
    archs = [a for a in os.environ.get("FASTDISTILL_CUDA_ARCHS", "").replace(",", ";").split(";") if a]
    if not archs:
        known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True).stdout.split()
        archs = [a for a in ("80", "86", "89", "90", "100") if f"compute_{a}" in known]
    own = {"90": "90a"}
    flags = [f"-gencode=arch=compute_{own.get(a, a)},code=sm_{own.get(a, a)}" for a in archs]
    return flags + [f"-gencode=arch=compute_{a},code=compute_{a}" for a in archs[-1:]]


class Ninja:
    """A build.ninja in the making; paths are relative to the repository root, so that a checkout can move."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.lines = ["ninja_required_version = 1.5", f"builddir = {folder}"]
        for rule, depfile in (("compile", True), ("link", False)):
            self.lines += [f"rule {rule}", "  command = $command", f"  description = {rule} $out"]
            self.lines += ["  depfile = $out.d", "  deps = gcc"] if depfile else []

    def add(self, rule: str, out: str, inputs: list[str], command: list[str]) -> str:
        quoted = shlex.join(command).replace("$", "$$")
        self.lines += [f"build {out}: {rule} {' '.join(inputs)}", f"  command = {quoted}"]
        return out

    def compile(self, source: str, compiler: list[str], flags: list[str], variant: str = "") -> str:
        out = f"{self.folder}/{source.removeprefix('csrc/').replace('/', '.')}{variant}.o"
        command = [*compiler, "-Icsrc", *flags, "-MD", "-MF", f"{out}.d", "-c", source, "-o", out]
        return self.add("compile", out, [source], command)

    def run(self) -> None:
        path = ROOT / self.folder / "build.ninja"
        path.write_text("\n".join(self.lines) + "\n")
        try:
            from ninja import BIN_DIR

            ninja = str(Path(BIN_DIR, "ninja"))
        except ImportError:
            ninja = shutil.which("ninja") or ""
        if not ninja:
            raise SystemExit("fastdistill: ninja is missing; pip install ninja")
        jobs = [f"-j{os.environ['MAX_JOBS']}"] if os.environ.get("MAX_JOBS") else []
        if subprocess.run([ninja, "-f", str(path.relative_to(ROOT)), *jobs], cwd=ROOT).returncode:
            raise SystemExit("fastdistill: the kernels did not compile (see above)")


class BuildKernels(build_ext):
    def build_extensions(self) -> None:
        folder = f"build/native-{sys.implementation.cache_tag}-{sysconfig.get_platform()}{SANITIZE and '-sanitized'}"
        Path(ROOT, folder).mkdir(parents=True, exist_ok=True)
        ninja = Ninja(folder)
        # An isolated build has pybind11 at a new path every time; a copy at a fixed path keeps the objects valid.
        import pybind11

        headers = Path(folder, f"pybind11-{pybind11.__version__}")
        if not Path(ROOT, headers).exists():
            shutil.copytree(pybind11.get_include(), Path(ROOT, f"{headers}.partial"), dirs_exist_ok=True)
            Path(ROOT, f"{headers}.partial").rename(ROOT / headers)
        binding_flags = [*CXX_FLAGS, f"-I{headers}", f"-I{INCLUDE}"]
        outputs = {}
        for extension in list(self.extensions):
            target = f"{folder}/{extension.name}{sysconfig.get_config_var('EXT_SUFFIX')}"
            if extension.name.endswith("_cpu"):
                self.cpu(ninja, target, binding_flags)
            elif not self.cuda(ninja, target, binding_flags):
                self.extensions.remove(extension)
                continue
            outputs[extension.name] = target
        ninja.run()
        for name in ("fastdistill._cpu", "fastdistill._cuda"):
            installed = Path(self.get_ext_fullpath(name))
            if name in outputs:
                installed.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / outputs[name], installed)
            else:
                installed.unlink(missing_ok=True)  # of an earlier build with other settings
        say(f"built {', '.join(outputs)}")

    def cpu(self, ninja: Ninja, target: str, binding_flags: list[str]) -> None:
        cxx = CXX or []
        source = "#include <omp.h>\nint threads() { return omp_get_max_threads(); }\n"
        openmp = ["-fopenmp"] if compiles([*cxx, "-fPIC", *SHARED, "-fopenmp"], source) else []
        if not openmp:
            say(f"{cxx[0]} has no OpenMP: the C++ kernels use one thread")
        x86 = platform.machine().lower() in ("x86_64", "amd64")
        wanted = ISAS if x86 else {"baseline": []}
        isas = {isa: flags for isa, flags in wanted.items() if compiles([*cxx, "-c", *flags], "")}
        have = [f"-DFD_HAVE_{isa.upper()}" for isa in isas]
        objects = [ninja.compile("csrc/bindings_cpu.cpp", cxx, [*binding_flags, *openmp, *have])]
        for source in CPU_SOURCES[1:]:
            for isa, flags in isas.items():
                all_flags = [*CXX_FLAGS, *KERNEL_FLAGS, *openmp, *flags, f"-DFD_ISA={isa}"]
                objects.append(ninja.compile(source, cxx, all_flags, f".{isa}"))
        ninja.add("link", target, objects, [*cxx, *SHARED, *openmp, *objects, "-o", target])

    def cuda(self, ninja: Ninja, target: str, binding_flags: list[str]) -> bool:
        cxx, nvcc = CXX or [], NVCC or ""
        common = [nvcc, f"-ccbin={cxx[-1]}", *gencode(nvcc)]
        if not compiles([*common, "-std=c++17", "-c"], "#include <cuda_runtime.h>\n__global__ void k() {}\n", ".cu"):
            reason = f"{nvcc} cannot compile with {cxx[-1]} (its architectures: FASTDISTILL_CUDA_ARCHS)"
            if os.environ.get("FASTDISTILL_CUDA") == "1":
                raise SystemExit(f"fastdistill: FASTDISTILL_CUDA=1 but {reason}")
            say(f"CUDA kernels skipped ({reason})")
            return False
        objects = [ninja.compile("csrc/bindings_cuda.cpp", cxx, binding_flags)]
        flags = "-std=c++17 -O3 -lineinfo --threads=0 -Xcompiler=-fPIC,-fvisibility=hidden".split()
        objects += [ninja.compile(source, common, flags) for source in CUDA_SOURCES[1:]]
        ninja.add(
            "link", target, objects, [nvcc, f"-ccbin={cxx[-1]}", "-shared", "-cudart=static", *objects, "-o", target]
        )
        return True


def sources(bindings: str, pattern: str) -> list[str]:
    kernels = [*ROOT.glob(f"csrc/primitives{Path(pattern).suffix}"), *ROOT.glob(f"csrc/*/{pattern}")]
    return [f"csrc/{bindings}", *sorted(str(path.relative_to(ROOT)) for path in kernels)]


CXX = find_cxx()
NVCC = find_nvcc()
CPU_SOURCES = sources("bindings_cpu.cpp", "cpu.cpp")
CUDA_SOURCES = sources("bindings_cuda.cpp", "cuda.cu")
extensions = [Extension("fastdistill._cpu", CPU_SOURCES)] if CXX else []
extensions += [Extension("fastdistill._cuda", CUDA_SOURCES)] if NVCC else []
setup(ext_modules=extensions, cmdclass={"build_ext": BuildKernels})
