"""The torch-free library, tested in C++: the programs in tests/cpp are compiled, run, and their failures are shown."""

from pathlib import Path

import pytest
from cpp_programs import BUILT_OF, CPP, ROOT, compile_all, link_and_run, setup_constant

# Quick to compile: sanitizers as calls, line numbers only, and nothing twice that the address sanitizer sees.
SANITIZED = [
    *("-std=c++17", "-O1", "-g1", "-Wall", "-Wextra", "-pthread"),
    *("-fsanitize=address,undefined", "-fno-sanitize=null,object-size", "-fno-sanitize-recover"),
    *("--param", "asan-instrumentation-with-call-threshold=0"),
]
# The inner loops take as long as all others together: they come first.
LIBRARY = sorted(
    [ROOT / "csrc/status.cpp", *(ROOT / "csrc/cpu").glob("*.cpp"), *(ROOT / "csrc/engine").glob("*.cpp")],
    key=lambda file: file.stem != "kernels",
)
PROGRAMS = (
    *("test_api", "test_mix", "test_status", "test_engine", "test_engine_refusals"),
    *("test_project_cpu", "test_folded_cpu"),
)


def supported_instruction_sets():
    """Names and flags of the instruction sets that this processor has."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    has = {flag for line in lines if line.startswith("flags") for flag in line.split()}
    sets = BUILT_OF["instruction_sets"]
    return {name: flags for name, flags in sets.items() if {flag.removeprefix("-m") for flag in flags} <= has}


INSTRUCTION_SETS = supported_instruction_sets()


@pytest.fixture(scope="module")
def objects(tmp_path_factory):
    """Futures of the object files by name."""
    release = [*setup_constant("COMMON"), *BUILT_OF["kernel_flags"]]
    jobs = {source.stem: (source, SANITIZED) for source in LIBRARY}
    jobs |= {name: (CPP / f"{name}.cpp", SANITIZED) for name in PROGRAMS}
    jobs |= {f"simd_{name}": (CPP / "test_simd.cpp", release + flags) for name, flags in INSTRUCTION_SETS.items()}
    jobs |= {"test_math": (CPP / "test_math.cpp", release)}
    return compile_all(tmp_path_factory.mktemp("cpp"), jobs)


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
def test_simd(name, objects):
    link_and_run(objects[f"simd_{name}"])


def test_math(objects):
    link_and_run(objects["test_math"])


@pytest.mark.parametrize("name", PROGRAMS)
def test_library(name, objects):
    link_and_run(objects[name], *(objects[source.stem] for source in LIBRARY), flags=SANITIZED)
