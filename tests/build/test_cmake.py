"""The library as a stranger gets it: built and installed by CMake, found by another project, linked from C and C++."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from cpp_programs import BUILT_OF, CPP, CXX, INCLUDE, ROOT, call, compile_all

sys.path.insert(0, str(ROOT))  # the build is no part of the installed package

from tools.build import cuda as build_cuda

TOOLKIT, REFUSED = build_cuda.find_toolkit()
needs_nvcc = pytest.mark.skipif(TOOLKIT is None, reason=f"no CUDA toolkit ({'; '.join(REFUSED)})")

MEGABYTE = 1 << 20
CONSUMER = """
cmake_minimum_required(VERSION 3.20)
project(app LANGUAGES C CXX)
find_package(pom 0.1 REQUIRED)
foreach(library pom pom_static)
  add_executable(from_c_${library} app.c)
  add_executable(from_cpp_${library} app.cpp)
  target_link_libraries(from_c_${library} pom::${library})
  target_link_libraries(from_cpp_${library} pom::${library})
  set_target_properties(from_c_${library} PROPERTIES C_STANDARD 99 LINKER_LANGUAGE CXX)
endforeach()
"""
FROM_C = """
#include <pom/engine.h>
#include <stdio.h>
static char memory[1 << 16], workspace[1 << 16];
static float u[2 * 4], gate[2 * 4], y[2 * 4];
int main(void) {
  pom_layer layer = {POM_PRODUCT, 1, POM_F32, 1, 4, 0};
  pom_shape shape = {&layer, 1, 1, 1};
  pom_place place = {0};
  pom_stream stream;
  pom_frame frame = {0};
  pom_status status;
  int i;
  for (i = 0; i < 8; ++i) u[i] = 30;  /* GELU(30) is 30, sigmoid(30) is 1 */
  for (i = 0; i < 8; ++i) gate[i] = 30;
  status = pom_stream_open(&stream, &shape, &place, memory, sizeof memory);
  frame.tokens = frame.queries = 2;
  frame.u = u, frame.u_token_stride = 4, frame.gate = gate, frame.gate_token_stride = 4, frame.y = y;
  if (!status) status = pom_stream_commit(&stream, 0, 0, &frame, workspace, sizeof workspace);
  printf("%s %g %g\\n", pom_status_message(status), y[0], y[7]);
  return status;
}
"""
FROM_CPP = """
#include <pom/engine.hpp>
#include <cstdio>
#include <vector>
int main() {
  const pom_layer layer = {POM_POWER, 2, POM_F64, 1, 4, 0};
  const pom_shape shape = {&layer, 1, 1, 1};
  std::vector<char> memory(pom::Stream::bytes(shape));
  pom::Stream stream;
  const pom::Status status = stream.open(shape, {}, memory.data(), memory.size());
  const size_t bytes = pom::cpu::workspace(pom::ReadoutArgs{});  // the operations are there too
  std::printf("%s %d\\n", pom::message(status), bytes > 0);
  return int(status);
}
"""


@pytest.fixture(scope="module")
def built(cmake_library):
    """The folders of the build and of the installation."""
    return cmake_library[:2]


@pytest.fixture(scope="module")
def has_cuda(cmake_library):
    return "-DPOM_CUDA=ON" in cmake_library[2]


def test_a_stranger_finds_and_links_it(built, tmp_path):
    for name, text in (("CMakeLists.txt", CONSUMER), ("app.c", FROM_C), ("app.cpp", FROM_CPP)):
        (tmp_path / name).write_text(text)
    call("cmake", "-S", tmp_path, "-B", tmp_path / "build", "-G", "Ninja", f"-DCMAKE_PREFIX_PATH={built[1]}")
    call("cmake", "--build", tmp_path / "build")
    for library in ("pom", "pom_static"):
        for name, said in (("from_c", "ok 30 30\n"), ("from_cpp", "ok 1\n")):
            program = tmp_path / "build" / f"{name}_{library}"
            assert subprocess.run([program], check=True, capture_output=True, text=True).stdout == said


def shown(library):
    """What a shared library defines for others: demangled names with their versions."""
    listed = subprocess.run(
        ["nm", "--dynamic", "--defined-only", "--demangle", "--with-symbol-versions", library],
        check=True,
        capture_output=True,
        text=True,
    )
    return [line.split(" ", 2)[2] for line in listed.stdout.splitlines()]


def test_only_the_api_is_exported_and_versioned(built, has_cuda):
    header = (ROOT / "csrc/include/pom/engine.h").read_text()
    functions = set(re.findall(r"^[a-z_0-9 *]*?\b(pom_\w+)\(", header, re.MULTILINE))
    assert {"pom_stream_open", "pom_status_message", "pom_cpu_linear"} <= functions
    names = set()
    for name in shown(built[1] / "lib/libpom.so"):
        if name == "POM_1":  # the version itself
            continue
        assert name.endswith("@@POM_1"), name
        names.add(name.removesuffix("@@POM_1").split("(")[0])
    assert {name for name in names if name.startswith("pom_")} == functions
    rest = {name for name in names if not name.startswith("pom_")}
    operations = {"state", "readout", "mix", "update", "causal_mix", "workspace"}
    operations |= {f"{name}_backward" for name in ("state", "readout", "causal_mix")}
    devices = ("cpu", "cuda") if has_cuda else ("cpu",)
    wanted = {"pom::message"} | {f"pom::{device}::{name}" for device in devices for name in operations}
    projected = ("project_state", "project_state_backward", "project_readout", "project_readout_backward")
    wanted |= {f"pom::cpu::{name}" for name in (*projected, "folded_readout")}
    of_a_gpu = {"error", "versions", "projects", "project_state", "folds", "folded_readout"}
    assert rest == wanted | ({f"pom::cuda::{name}" for name in of_a_gpu} if has_cuda else set())


def test_it_is_small_and_needs_little(built, has_cuda):
    libraries = built[1] / "lib"
    if not has_cuda:
        assert (libraries / "libpom.so").stat().st_size < 5 * MEGABYTE
        assert (libraries / "libpom.a").stat().st_size < 5 * MEGABYTE
    needed = subprocess.run(
        ["readelf", "-d", libraries / "libpom.so"], check=True, capture_output=True, text=True
    ).stdout
    libraries = re.findall(r"NEEDED.*\[(.+?)\.so", needed)
    assert set(libraries) <= {"libstdc++", "libm", "libgcc_s", "libc", "ld-linux-x86-64"}


def test_cmake_and_setup_compile_alike(built):
    """Every source, and the inner loops with the same flags."""
    commands = (built[0] / "compile_commands.json").read_text()
    sources = {path for folder in (".", "cpu", "engine") for path in (ROOT / "csrc" / folder).glob("*.cpp")}
    for source in sources:
        assert f'"{source.resolve()}"' in commands, source
    lines = [line for line in commands.splitlines() if '"command"' in line and "kernels.cpp" in line]
    for flags in BUILT_OF["instruction_sets"].values():
        wanted = {*flags, *BUILT_OF["kernel_flags"]}
        assert any(wanted <= set(line.split()) and line.count(" -m") == len(flags) for line in lines), flags


@pytest.mark.parametrize(
    "asked, compiled",
    [
        ("90", "90a-real;90-virtual"),
        ("90-real", "90a-real"),
        ("80-real;90;120", "80-real;90a-real;90-virtual;120"),
        ("90a-real;90-real", "90a-real"),
        ("90-virtual", "90-virtual"),
        ("native", "80-real;90a-real"),
        ("all", "75-real;90a-real;100-real;100-virtual"),
        ("all-major", "70-real;90a-real;90-virtual"),
    ],
)
def test_hopper_code_wherever_code_for_9_0_is_asked_for(asked, compiled, tmp_path):
    script = tmp_path / "script.cmake"
    script.write_text(
        f"""
        set(CMAKE_CUDA_ARCHITECTURES_NATIVE 80-real 90-real)
        set(CMAKE_CUDA_ARCHITECTURES_ALL 75-real 90-real 100-real 100-virtual)
        set(CMAKE_CUDA_ARCHITECTURES_ALL_MAJOR 70-real 90)
        set(CMAKE_CUDA_ARCHITECTURES "{asked}")
        include({ROOT}/cmake/architectures.cmake)
        pom_exact_architectures(CMAKE_CUDA_ARCHITECTURES)
        message("${{CMAKE_CUDA_ARCHITECTURES}}")
        """
    )
    told = subprocess.run(["cmake", "-P", script], check=True, capture_output=True, text=True).stderr
    assert told.strip() == compiled


def test_cmake_and_setup_choose_the_same_gpus(tmp_path):
    """If nobody asks for any: machine code for all in the list, PTX of the last."""
    (tmp_path / "CMakeLists.txt").write_text(
        f"""
        cmake_minimum_required(VERSION 3.20)
        project(choose LANGUAGES NONE)
        set(CMAKE_CURRENT_SOURCE_DIR {ROOT})
        include({ROOT}/cmake/library.cmake)
        include({ROOT}/cmake/architectures.cmake)
        pom_default_architectures(gpus)
        pom_exact_architectures(gpus)
        file(WRITE {tmp_path}/chosen "${{gpus}}")
        """
    )
    call("cmake", "-S", tmp_path, "-B", tmp_path / "build")
    *names, last = build_cuda.DEFAULT
    flags = " ".join(build_cuda.gencode((*names, f"{last}+PTX")))
    chosen = (tmp_path / "chosen").read_text().split(";")
    assert [name.removesuffix("-real") for name in chosen] == re.findall(r"code=sm_(\w+)", flags)
    assert [name for name in chosen if not name.endswith("-real")] == re.findall(r"code=compute_(\w+)", flags)


def architectures_of(commands):
    """What nvcc is told to make machine code for, in a compile_commands.json."""
    kernels = [entry["command"] for entry in json.loads(commands.read_text()) if entry["file"].endswith(".cu")]
    assert len(kernels) == len(list((ROOT / "csrc/cuda").glob("*.cu")))
    (codes,) = {tuple(re.findall(r"\bsm_(\w+)", command)) for command in kernels}
    return codes


@needs_nvcc
def test_nvcc_is_told_so(tmp_path):
    call(
        "cmake",
        "-S",
        ROOT,
        "-B",
        tmp_path,
        "-G",
        "Ninja",
        "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON",
        "-DPOM_CUDA=ON",
        "-DCMAKE_CUDA_ARCHITECTURES=80;90",
        f"-DCMAKE_CUDA_COMPILER={TOOLKIT.nvcc}",
    )
    assert architectures_of(tmp_path / "compile_commands.json") == ("80", "90a")


def test_the_gpu_here_gets_its_own_code(built, has_cuda):
    if not has_cuda:
        assert not list(built[0].rglob("*.cu.o"))
        return
    codes = architectures_of(built[0] / "compile_commands.json")
    number = "".join(map(str, torch.cuda.get_device_capability()))
    assert ("90a" if number == "90" else number) in codes


def test_the_header_is_c():
    call(
        os.environ.get("CC", "gcc"),
        "-std=c99",
        "-pedantic",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-fsyntax-only",
        "-x",
        "c",
        ROOT / "csrc/include/pom/engine.h",
    )


def test_a_stream_allocates_nothing(built, tmp_path):
    program = tmp_path / "program"
    call(CXX, "-std=c++17", "-O1", *INCLUDE, CPP / "test_engine_memory.cpp", built[1] / "lib/libpom.a", "-o", program)
    call(program)


def test_streams_of_two_threads(built, tmp_path):
    """Under the thread sanitizer, all but the inner loops: those are arithmetic on their arguments."""
    sources = [ROOT / "csrc/status.cpp", *(ROOT / "csrc/engine").glob("*.cpp"), *(ROOT / "csrc/cpu").glob("*.cpp")]
    sources = [source for source in sources if source.stem != "kernels"] + [CPP / "test_engine_threads.cpp"]
    flags = ["-std=c++17", "-O1", "-g1", "-pthread", "-fsanitize=thread"]
    objects = compile_all(tmp_path, {source.stem: (source, flags) for source in sources})
    program = tmp_path / "program"
    call(CXX, *flags, *(future.result() for future in objects.values()), built[1] / "lib/libpom.a", "-o", program)
    call(program)


def test_the_benchmark_of_the_engine(built, tmp_path, monkeypatch, capsys):
    program, result = tmp_path / "engine_benchmark", tmp_path / "engine.json"
    call(CXX, "-std=c++17", *INCLUDE, ROOT / "benchmarks/suites/engine.cpp", built[1] / "lib/libpom.a", "-o", program)
    monkeypatch.syspath_prepend(ROOT)
    from benchmarks.suites import engine

    monkeypatch.setattr(engine, "build", lambda folder: program)
    threads = torch.get_num_threads()
    try:
        assert engine.main(["--shape", "S", "--frames", "30", "--json", str(result)]) == 0
    finally:
        torch.set_num_threads(threads)
    (shape,) = json.loads(result.read_text())["shapes"]
    assert shape["shape"] == "S" and shape["width"] == 768 and shape["overhead_us"] < 1e6
    for contender in ("engine", "engine from Python", "torch"):
        row = shape["contenders"][contender]
        assert row["frames"] == 30 and 0 < row["median_us"] <= row["p99_us"] <= row["worst_us"], contender
    assert "the engine's own part of a call" in capsys.readouterr().out
    assert subprocess.run([program, "1"], check=False, capture_output=True).returncode == 2


def test_figures_of_a_latency():
    from benchmarks.suites.engine import figures

    row = figures(np.arange(1.0, 1001))
    assert row["median_us"] == 500.5 and row["worst_us"] == 1000 and row["frames"] == 1000
    assert abs(row["p99_us"] - 990) < 1 and abs(row["iqr_us"] - 500) < 1
