"""Builds the compiled library. What the package is and needs is in pyproject.toml."""

import os
import platform
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

TORCH_TARGET = "0x020a000000000000"  # the stable ABI of torch 2.10: this build serves that torch and later ones
INCLUDE = ["csrc", "csrc/include"]
COMMON = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
# GCC 12 takes the undefined operand inside its own AVX-512 intrinsics for an uninitialised variable.
KERNELS = ["-ffp-contract=fast", "-fno-math-errno", "-Wno-maybe-uninitialized", "-Wno-uninitialized"]
X86 = platform.machine().lower() in ("x86_64", "amd64")
INSTRUCTION_SETS = {
    "generic": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c", "-mbmi2"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mf16c", "-mbmi2"],
}


def torch_free_objects(build_folder):
    """Compile the torch-free library: the inner loops once per instruction set, everything else once."""
    define = ["-DPOM_X86"] if X86 else []
    sets = INSTRUCTION_SETS if X86 else {"generic": []}
    jobs = [("csrc/cpu/kernels.cpp", f"kernels_{name}", KERNELS + flags) for name, flags in sets.items()]
    for source in ["csrc/status.cpp"] + sorted(map(str, Path("csrc/cpu").glob("*.cpp"))):
        if not source.endswith("kernels.cpp"):
            jobs.append((source, Path(source).stem, []))
    headers = max(path.stat().st_mtime for path in Path("csrc").rglob("*.h"))
    compiler = os.environ.get("CXX", "g++")

    def compile_one(job):
        source, name, flags = job
        target = Path(build_folder) / f"{name}.o"
        newest = max(headers, Path(source).stat().st_mtime, Path(__file__).stat().st_mtime)
        if not target.exists() or target.stat().st_mtime < newest:
            command = [
                compiler,
                *COMMON,
                *define,
                *flags,
                *(f"-I{i}" for i in INCLUDE),
                "-c",
                source,
                "-o",
                str(target),
            ]
            print(" ".join(command), flush=True)
            subprocess.run(command, check=True)
        return str(target)

    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count())) as pool:
        return list(pool.map(compile_one, jobs))


class Build(BuildExtension):
    def build_extensions(self):
        folder = Path("build/pom")  # not pip's temporary folder: what has not changed is not compiled again
        folder.mkdir(parents=True, exist_ok=True)
        for extension in self.extensions:
            extension.extra_objects += torch_free_objects(folder)
        super().build_extensions()


setup(
    ext_modules=[
        CppExtension(
            "pom_ext._C",
            ["csrc/torch/binding.cpp", "csrc/torch/module.cpp"],
            include_dirs=[os.path.abspath(path) for path in INCLUDE],
            define_macros=[("TORCH_TARGET_VERSION", TORCH_TARGET), ("Py_LIMITED_API", "0x030A0000")],
            extra_compile_args={"cxx": ["-O2", "-fvisibility=hidden"]},
            py_limited_api=True,
        )
    ],
    cmdclass={"build_ext": Build},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
