"""The torch-free library, tested in C++: every program in tests/cpp is compiled, run, and its failures are shown."""

import ast
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CXX = os.environ.get("CXX", "g++")
INCLUDE = [f"-I{ROOT / folder}" for folder in ("csrc", "csrc/include", "tests/cpp")]
# Quick to compile: sanitizers as calls, line numbers only, and nothing twice that the address sanitizer sees.
SANITIZED = [
    *("-std=c++17", "-O1", "-g1", "-Wall", "-Wextra", "-pthread"),
    *("-fsanitize=address,undefined", "-fno-sanitize=null,object-size", "-fno-sanitize-recover"),
    *("--param", "asan-instrumentation-with-call-threshold=0"),
]
# The inner loops take as long as all others together: they come first.
LIBRARY = sorted(
    [ROOT / "csrc/status.cpp", *(ROOT / "csrc/cpu").glob("*.cpp")], key=lambda file: file.stem != "kernels"
)


def setup_constant(name):
    """The value of a constant in setup.py: the flags that the library is built with."""
    for statement in ast.parse((ROOT / "setup.py").read_text()).body:
        if isinstance(statement, ast.Assign) and statement.targets[0].id == name:
            return ast.literal_eval(statement.value)
    raise LookupError(f"setup.py has no {name}")


def supported_instruction_sets():
    """Names and flags of the instruction sets that this processor has."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    has = {flag for line in lines if line.startswith("flags") for flag in line.split()}
    sets = setup_constant("INSTRUCTION_SETS")
    return {name: flags for name, flags in sets.items() if {flag.removeprefix("-m") for flag in flags} <= has}


INSTRUCTION_SETS = supported_instruction_sets()


def call(*command):
    """Run a command; what it prints is shown if it fails."""
    command = [str(word) for word in command]
    done = subprocess.run(command, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        pytest.fail(f"{' '.join(command)}\nexit status {done.returncode}\n{done.stdout}", pytrace=False)


@pytest.fixture(scope="module")
def objects(tmp_path_factory):
    """Futures of the object files by name, compiled side by side."""
    folder = tmp_path_factory.mktemp("cpp")

    def compile_one(name, source, flags):
        target = folder / f"{name}.o"
        call(CXX, *flags, *INCLUDE, "-c", source, "-o", target)
        return target

    release = [*setup_constant("COMMON"), *setup_constant("KERNELS")]
    tests = ROOT / "tests/cpp"
    jobs = [
        (source.stem, source, SANITIZED) for source in (*LIBRARY, tests / "test_api.cpp", tests / "test_status.cpp")
    ]
    jobs += [(f"simd_{name}", tests / "test_simd.cpp", release + flags) for name, flags in INSTRUCTION_SETS.items()]
    jobs += [("test_math", tests / "test_math.cpp", release)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return {job[0]: pool.submit(compile_one, *job) for job in jobs}


def link_and_run(*objects, flags=()):
    files = [future.result() for future in objects]
    program = files[0].with_suffix("")
    call(CXX, *flags, *files, "-o", program)
    call(program)


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
def test_simd(name, objects):
    link_and_run(objects[f"simd_{name}"])


def test_math(objects):
    link_and_run(objects["test_math"])


@pytest.mark.parametrize("name", ["test_api", "test_status"])
def test_library(name, objects):
    link_and_run(objects[name], *(objects[source.stem] for source in LIBRARY), flags=SANITIZED)
