"""What setup.py builds with: toolkit, architectures, flags, and which objects it compiles again."""

import os
import shutil
import stat
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from setuptools._distutils.filelist import FileList
from setuptools.errors import CompileError, OptionError, PlatformError

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # the build is no part of the installed package

from pom_ext.cli.doctor import _describe_driver, _describe_kernels
from pom_ext.ops import _library
from tools.build import cuda as build_cuda
from tools.build.objects import Job, compile_stale, workers

KNOWN = {"8.0", "8.6", "8.9", "9.0", "10.0", "12.0"}


def script(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def toolkit(root, without="", libraries="lib64"):
    """A folder that looks like a toolkit, less one file."""
    for file in ("include/cuda_runtime.h", f"{libraries}/libcudart_static.a"):
        if file != without:
            (root / file).parent.mkdir(parents=True, exist_ok=True)
            (root / file).touch()
    if without != "bin/nvcc":
        script(root / "bin/nvcc", "echo compute_75; echo compute_90; echo compute_120")
    return root


def found(environment, default="/nowhere"):
    return build_cuda.find_toolkit(environment, default)[0]


def test_the_toolkit_is_looked_for_in_order(tmp_path):
    a, b, c, d = (toolkit(tmp_path / name) for name in "abcd")
    environment = {"CUDA_HOME": str(a), "CUDA_PATH": str(b), "PATH": str(c / "bin")}
    for expected in (a, b, c):
        assert found(environment, d).root == expected
        environment.pop(next(iter(environment)))
    assert found({}, d).root == d
    assert found({}, tmp_path / "none") is None


def test_a_folder_is_a_toolkit_only_if_it_holds_one(tmp_path):
    """The prefix of a wrapper on the path, or a runtime without a compiler, is none: the next place is asked."""
    good = toolkit(tmp_path / "good")
    for i, file in enumerate(("include/cuda_runtime.h", "bin/nvcc", "lib64/libcudart_static.a")):
        bad = toolkit(tmp_path / str(i), without=file)
        chosen, refused = build_cuda.find_toolkit({"CUDA_HOME": str(bad)}, good)
        assert chosen.root == good
        assert f"CUDA_HOME: {bad} has no {file}" in refused


@pytest.mark.parametrize("libraries", ["lib64", "lib", "targets/x86_64-linux/lib"])
def test_the_static_runtime_is_found_in_every_layout(libraries, tmp_path):
    root = toolkit(tmp_path, libraries=libraries)
    assert found({"CUDA_HOME": str(root)}).libraries == root / libraries


def test_a_link_or_a_wrapper_leads_to_the_toolkit(tmp_path):
    root = toolkit(tmp_path / "real")
    (tmp_path / "links").mkdir()
    (tmp_path / "links/nvcc").symlink_to(root / "bin/nvcc")
    assert found({"PATH": str(tmp_path / "links")}).root == root
    told = script(tmp_path / "wrapper/bin/nvcc", f"echo '#$ _HERE_=x' >&2; echo '#$ TOP={root}/bin/..' >&2")
    assert found({"PATH": str(told.parent)}).root == root
    mute = script(tmp_path / "mute/bin/nvcc", "exit 1")
    chosen, refused = build_cuda.find_toolkit({"PATH": str(mute.parent)}, "/nowhere")
    assert chosen is None
    assert f"nvcc on the path: {tmp_path}/mute has no include/cuda_runtime.h" in refused


def test_cuda_can_be_forbidden_and_demanded(tmp_path):
    root = toolkit(tmp_path / "good")
    here = {"CUDA_HOME": str(root)}
    assert build_cuda.wanted_toolkit(here).root == root
    assert build_cuda.wanted_toolkit({**here, "POM_EXT_CUDA": "1"}).root == root
    assert build_cuda.wanted_toolkit({**here, "POM_EXT_CUDA": "0"}) is None
    assert build_cuda.wanted_toolkit({}, default="/nowhere") is None
    with pytest.raises(
        PlatformError, match="POM_EXT_CUDA=1, but there is no CUDA toolkit .*/nowhere has no.*CUDA_HOME"
    ):
        build_cuda.wanted_toolkit({"POM_EXT_CUDA": "1"}, default="/nowhere")
    assert build_cuda.wanted_toolkit({**here, "POM_EXT_CUDA": "gpu"}).root == root
    with pytest.raises(OptionError, match="POM_EXT_CUDA: expected 0 .* 1 .* gpu .* got 'yes'"):
        build_cuda.wanted_toolkit({**here, "POM_EXT_CUDA": "yes"})
    with pytest.raises(PlatformError, match="^TORCH_CUDA_ARCH_LIST=9.0, but there is no CUDA toolkit"):
        build_cuda.wanted_toolkit({"TORCH_CUDA_ARCH_LIST": "9.0"}, default="/nowhere")
    for given in ({"TORCH_CUDA_ARCH_LIST": "9.0", "POM_EXT_CUDA": "0"}, {"TORCH_CUDA_ARCH_LIST": "all"}):
        assert build_cuda.wanted_toolkit(given, default="/nowhere") is None


def test_nvcc_tells_what_it_compiles_for(tmp_path):
    assert found({"CUDA_HOME": str(toolkit(tmp_path))}).architectures() == {"7.5", "9.0", "12.0"}


def chosen(value, known=KNOWN):
    return build_cuda.architectures(known, {"TORCH_CUDA_ARCH_LIST": value})


def test_architectures_are_those_asked_for():
    assert chosen("8.0;9.0+PTX") == chosen(" 8.0  9.0+PTX; ") == chosen("8.0;9.0+PTX;8.0") == ("8.0", "9.0+PTX")
    assert chosen("9.0a;10.0f") == ("9.0a", "10.0f")


def test_default_architectures_are_those_nvcc_knows_and_ptx_of_the_last():
    assert chosen("") == ("8.0", "8.6", "8.9", "9.0", "10.0", "12.0+PTX")
    assert build_cuda.architectures(KNOWN, {}) == chosen("") == chosen("all")
    assert chosen("", {"7.5", "8.0", "8.6"}) == ("8.0", "8.6+PTX")
    with pytest.raises(PlatformError, match="none of 8.0, .* CUDA 12 or later, or set POM_EXT_CUDA=0"):
        chosen("", {"5.0", "7.5"})


@pytest.mark.parametrize("value", ["Hopper", "90", "9", "9.0+ptx", "8.0,9.0", "sm_90", "9.0x"])
def test_other_forms_of_architectures_are_refused(value):
    with pytest.raises(OptionError, match="TORCH_CUDA_ARCH_LIST: expected all, or numbers such as 8.0;9.0a;12.0.PTX, "):
        chosen(f"8.0;{value}")


def test_an_architecture_that_nvcc_does_not_know_is_refused():
    with pytest.raises(
        OptionError, match="does not compile for 13.0.PTX, only for 8.0, 8.6, 8.9, 9.0, 10.0, 12.0; leave"
    ):
        chosen("9.0;13.0+PTX")


def test_gencode_flags():
    assert build_cuda.gencode(("9.0+PTX",)) == [
        *("-gencode", "arch=compute_90a,code=sm_90a"),
        *("-gencode", "arch=compute_90,code=compute_90"),
    ]
    assert build_cuda.gencode(("8.0", "9.0", "12.0+PTX")) == [
        *("-gencode", "arch=compute_80,code=sm_80"),
        *("-gencode", "arch=compute_90a,code=sm_90a"),
        *("-gencode", "arch=compute_120,code=sm_120"),
        *("-gencode", "arch=compute_120,code=compute_120"),
    ]


def test_every_kernel_file_is_a_job(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    jobs = build_cuda.jobs(build_cuda.Toolkit(tmp_path), ("9.0",), tmp_path)
    assert {job.source for job in jobs} == {path.relative_to(ROOT) for path in (ROOT / "csrc/cuda").glob("*.cu")}
    for job in jobs:
        assert job.words()[0] == str(tmp_path / "bin/nvcc") and "arch=compute_90a,code=sm_90a" in job.words()
        assert {Path("csrc/cuda/launch.h"), Path("csrc/checks.h"), Path("csrc/include/pom/pom.h")} <= set(job.headers)


@pytest.fixture
def job(tmp_path):
    """A job whose compiler copies the source, says something, and counts its calls."""
    compiler = script(
        tmp_path / "compiler",
        f'echo >> {tmp_path}/calls; echo "ptxas info : fine"; echo a remark; cp "${{@: -3:1}}" "${{@: -1}}"',
    )
    compiler.write_text(compiler.read_text().replace("#!/bin/sh", "#!/bin/bash"))
    for name in ("a.cpp", "a.h"):
        (tmp_path / name).write_text(name)
        os.utime(tmp_path / name, (1, 1))
    return Job((compiler, "-O3"), tmp_path / "a.cpp", tmp_path / "objects/a.o", (tmp_path / "a.h",))


def calls(job):
    compile_stale([job])
    return len((job.source.parent / "calls").read_text().splitlines())


def test_only_what_changed_is_compiled_again(job):
    assert calls(job) == 1 and job.target.read_text() == "a.cpp"
    assert calls(job) == 1, "nothing changed"
    os.utime(job.headers[0])
    assert calls(job) == 2, "a header changed"
    os.utime(job.headers[0], (1, 1))
    other = Job((*job.command, "-g"), job.source, job.target, job.headers)
    assert calls(other) == 3 and calls(other) == 3, "the flags changed"
    job.target.unlink()
    assert calls(other) == 4, "the object is gone"


def test_what_is_saved_while_the_compiler_runs_is_not_missed(job):
    compiler = job.source.parent / "compiler"
    compiler.write_text(compiler.read_text() + f"touch {job.headers[0]}\n")
    compile_stale([job])
    assert job.is_stale()


def test_what_the_compiler_says_is_kept_and_shown(job, capsys):
    compile_stale([job])
    assert job.target.with_suffix(".log").read_text() == "ptxas info : fine\na remark\n"
    printed = capsys.readouterr().out
    assert "-O3 -c" in printed and "a remark" in printed and "ptxas info" not in printed


def test_a_source_that_does_not_compile_is_named(job, capsys):
    compile_stale([job])
    script(job.source.parent / "compiler", "echo the reason >&2; exit 3")
    os.utime(job.source)
    with pytest.raises(CompileError, match="a.cpp does not compile: .*compiler ended with exit status 3"):
        compile_stale([job])
    assert "the reason" in capsys.readouterr().out
    assert job.is_stale(), "the object from before is not taken for the new one"


def test_max_jobs(monkeypatch):
    monkeypatch.setenv("MAX_JOBS", "3")
    assert workers() == 3
    monkeypatch.setenv("MAX_JOBS", "")
    assert workers() == os.cpu_count()


@pytest.mark.parametrize(
    "built, capability, serves",
    [
        ("8.0;9.0", (8, 0), True),
        ("8.0;9.0", (8, 9), True),
        ("8.0;9.0", (7, 5), False),
        ("8.6;9.0", (8, 0), False),
        ("8.0;9.0", (10, 0), False),
        ("8.0;9.0+PTX", (10, 0), True),
        ("9.0a+PTX", (9, 0), True),
        ("9.0a+PTX", (10, 0), False),
        ("10.0f+PTX", (10, 3), True),
        ("10.0f+PTX", (12, 0), False),
    ],
)
def test_doctor_knows_which_gpus_a_build_serves(built, capability, serves):
    def torch_with(architectures, *capabilities):
        ops = SimpleNamespace(pom_ext=SimpleNamespace(cuda_architectures=lambda: architectures))
        here = SimpleNamespace(
            is_available=lambda: len(capabilities) > 0,
            device_count=lambda: len(capabilities),
            get_device_capability=lambda i: capabilities[i],
        )
        return SimpleNamespace(ops=ops, cuda=here)

    said = _describe_kernels(torch_with(built, capability), "build")
    assert said.startswith(f"CPU, CUDA {built.replace(';', ', ')}, ")
    assert ("serves every GPU here" in said) == serves
    assert ("TORCH_CUDA_ARCH_LIST='{}.{}' build".format(*capability) in said) == (not serves)
    assert _describe_kernels(torch_with(built), "build") == f"CPU, CUDA {built.replace(';', ', ')}"
    for remedy in ("for one kind of GPU: TORCH_CUDA_ARCH_LIST=9.0 build", "for all: POM_EXT_CUDA=1 build"):
        assert remedy in _describe_kernels(torch_with(""), "build")
    lacking = _describe_kernels(torch_with("", capability), "build")
    assert "NOT the GPU here ({}.{})".format(*capability) in lacking and lacking.endswith("POM_EXT_CUDA=1 build")


@pytest.mark.parametrize(
    "versions, of_torch, said",
    [
        ("", None, []),
        ("13.0 0.0", None, ["driver     none; the library is linked to CUDA 13.0"]),
        ("13.0 13.1", "13.0", ["driver     serves CUDA 13.1; the library is linked to CUDA 13.0"]),
        ("13.1 13.0", "13.0", ["driver     serves CUDA 13.0; the library is linked to CUDA 13.1"]),
        ("13.0 12.8", "12.6", ["driver     serves CUDA 12.8; the library is linked to CUDA 13.0", "of CUDA 12.6:"]),
        ("13.0 9.2", None, ["driver     serves CUDA 9.2; the library is linked to CUDA 13.0", "of CUDA 9.2:"]),
    ],
)
def test_doctor_knows_whether_the_driver_serves(versions, of_torch, said):
    lines = list(_describe_driver(versions, of_torch, "build"))
    assert lines[:1] == said[:1] and len(lines) == len(said)
    for line, text in zip(lines[1:], said[1:], strict=True):
        assert line.startswith("mismatch   the driver is too old for CUDA 13.0: ") and line.endswith("its folder build")
        assert text in line


def test_the_library_tells_the_versions_of_cuda():
    import torch

    versions = torch.ops.pom_ext.cuda_versions()
    assert bool(versions) == bool(_library.CUDA)
    if versions:
        runtime, driver = versions.split()
        assert runtime == _library.build_note()["cuda"]
        assert (float(driver) > 0) == (shutil.which("nvidia-smi") is not None)


def test_a_call_names_the_command_that_builds_for_the_gpu_here():
    """Only a GPU that the library was not built for gets to see it."""
    assert f"`{_library.BUILD}` builds for the GPUs that are visible" in (ROOT / "csrc/torch/device.h").read_text()


def test_a_source_distribution_holds_all_that_is_compiled(monkeypatch):
    monkeypatch.chdir(ROOT)
    files = FileList()
    files.findall()
    for line in Path("MANIFEST.in").read_text().splitlines():
        files.process_template_line(line)
    folders = [path for folder in ("csrc", "cmake", "examples") for path in Path(folder).rglob("*") if path.is_file()]
    wanted = {str(path) for path in folders} | {"tools/build/cuda.py", "tools/build/objects.py", "CMakeLists.txt"}
    assert "cmake/architectures.cmake" in wanted
    assert wanted <= set(files.files)
