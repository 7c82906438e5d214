"""What is passed on: the wheel's tag, contents and symbols, the source distribution, and what a mismatch is told."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from cpp_programs import ROOT, call, setup_constant
from setuptools.config.pyprojecttoml import read_configuration

from pom_ext import __version__
from pom_ext.cli.doctor import _describe_build, _describe_changes, _describe_cuda
from pom_ext.ops import _library

sys.path.insert(0, str(ROOT))  # the build is no part of the installed package

from tools.build import note as build_note

# What the library may ask of others: the C shims of torch's stable ABI, the module's entry of Python's, the compiler's
# own. Everything else carries the version of a system library, or belongs to std.
STABLE = re.compile(r"(aoti_)?torch_\w+|PyModule_Create2|_ITM_\w+|__gmon_start__|\w+@(GLIBC|GLIBCXX|CXXABI|GCC)_[\d.]+")
STD = re.compile(r"_ZN?[KORTVIS]*S[tsaiod]\w+")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of this source; what the library here was made of is not compiled again."""
    folder = tmp_path_factory.mktemp("wheel")
    command = (sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", folder, ROOT)
    alike = {"POM_EXT_CUDA": "1", "TORCH_CUDA_ARCH_LIST": _library.CUDA} if _library.CUDA else {"POM_EXT_CUDA": "0"}
    call(*command, env={**os.environ, **alike})
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel):
    """The folder that the wheel was unpacked to."""
    folder = wheel.with_name("installed")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def run_python(code, path, cwd):
    """Runs code that finds pom_ext in `path` alone. Without site (-S) no editable install adds a finder of its own,
    which would supply from the source what a copy of the package lacks."""
    everything = os.pathsep.join([str(path), *filter(None, sys.path)])
    return subprocess.run(
        [sys.executable, "-S", "-c", code],
        cwd=cwd,
        env={"PYTHONPATH": everything},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_tag_is_that_of_the_stable_abi(wheel, installed):
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    assert wheel.name == f"pom_ext-{__version__}-cp310-abi3-{platform}.whl"
    told = (installed / f"pom_ext-{__version__}.dist-info/WHEEL").read_text()
    assert f"Tag: cp310-abi3-{platform}\n" in told and "Root-Is-Purelib: false" in told
    assert "Requires-Python: >=3.10" in (installed / f"pom_ext-{__version__}.dist-info/METADATA").read_text()
    assert '("Py_LIMITED_API", "0x030A0000")' in (ROOT / "setup.py").read_text()


def test_the_wheel_holds_the_package_and_nothing_else(installed):
    source = ROOT / "pom_ext"
    expected = {path.relative_to(ROOT) for path in source.rglob("*.py")}
    engine = f"_engine.{sysconfig.get_config_var('SOABI')}.so"
    expected |= {Path("pom_ext") / name for name in ("_C.abi3.so", engine, "_build.json", "py.typed", "play/page.html")}
    info = {"METADATA", "RECORD", "WHEEL", "entry_points.txt", "top_level.txt"}
    info |= {"licenses/LICENSE", "licenses/NOTICE"}
    expected |= {Path(f"pom_ext-{__version__}.dist-info") / name for name in info}
    assert {path.relative_to(installed) for path in installed.rglob("*") if path.is_file()} == expected


def test_the_build_packs_every_folder_of_the_package():
    settings = read_configuration(ROOT / "pyproject.toml")["tool"]["setuptools"]
    files = [path.relative_to(ROOT) for path in (ROOT / "pom_ext").rglob("*") if path.is_file()]
    folders = {".".join(path.parent.parts) for path in files if path.suffix == ".py"}
    assert set(settings["packages"]) == folders
    assert all((ROOT / folder.replace(".", "/") / "__init__.py").is_file() for folder in folders)
    others = [path for path in files if path.suffix not in (".py", ".pyc", ".so", ".json")]
    data = {Path(*package.split("."), name) for package, names in settings["package-data"].items() for name in names}
    assert set(others) == data


def undefined(library):
    told = subprocess.run(["nm", "-D", "--undefined-only", library], check=True, capture_output=True, text=True).stdout
    return [line.split()[-1] for line in told.splitlines()]


def test_the_library_needs_nothing_beyond_the_stable_abi(installed):
    symbols = undefined(installed / "pom_ext/_C.abi3.so")
    assert any(name.startswith("aoti_torch_") for name in symbols)
    assert [name for name in symbols if not STABLE.fullmatch(name) and not STD.fullmatch(name)] == []


@pytest.mark.parametrize(
    "name", ["_ZN3c105ErrorC1ESt4pairE", "_ZNK2at6Tensor4sizeEl", "PyList_GetItemRef", "THPVariable_Wrap"]
)
def test_other_symbols_are_noticed(name):
    assert not STABLE.fullmatch(name) and not STD.fullmatch(name)


def test_the_wheel_works_without_its_source(installed, tmp_path):
    code = (
        "import torch, pom_ext, pom_ext.engine; from pom_ext.cli.doctor import diagnose; print(pom_ext.__file__);"
        "print(pom_ext.PoM(8)(torch.ones(1, 3, 8)).shape); print(*diagnose(), sep='\\n')"
    )
    done = run_python(code, installed, tmp_path)
    assert done.returncode == 0, done.stderr
    for text in (str(installed), "torch.Size([1, 3, 8])", "built      ", "library    loaded"):
        assert text in done.stdout
    assert "mismatch" not in done.stdout


def test_the_note_tells_what_was_built(installed):
    note = json.loads((installed / "pom_ext/_build.json").read_text())
    import torch

    assert (note["version"], note["torch"]) == (__version__, torch.__version__)
    assert note["minimum_torch"] == _library.MINIMUM_TORCH == build_note.release(setup_constant("TORCH_TARGET"))
    assert f'"torch>={_library.MINIMUM_TORCH}"' in (ROOT / "pyproject.toml").read_text()
    assert ";".join(note["architectures"]) == _library.CUDA and bool(note["cuda"]) == bool(_library.CUDA)
    assert re.search(r"\d+\.\d+", note["compiler"]) and note["platform"] == sysconfig.get_platform()


def test_the_source_distribution_builds(tmp_path):
    """Every file that the build reads is there, and it gets as far as to compile with nothing else at hand."""
    code = f"from setuptools.build_meta import build_sdist; print(build_sdist({str(tmp_path)!r}))"
    call(sys.executable, "-c", code, cwd=ROOT)
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        archive.extractall(tmp_path, filter="data")
    unpacked = tmp_path / f"pom_ext-{__version__}"
    files = {str(path.relative_to(unpacked)) for path in unpacked.rglob("*") if path.is_file()}
    wanted = {"setup.py", "pyproject.toml", "README.md"}
    for folder in ("csrc", "pom_ext", "cmake", "examples", "tools/build"):
        paths = [path for path in (ROOT / folder).rglob("*") if path.is_file()]
        wanted |= {
            str(path.relative_to(ROOT))
            for path in paths
            if path.suffix not in (".so", ".pyc") and path.name != "_build.json"
        }
    assert wanted <= files
    assert not [
        name for name in files if name.endswith((".so", ".o", ".pyc", "_build.json")) or name.startswith("tests")
    ]
    call(sys.executable, "setup.py", "--quiet", "egg_info", "build_py", cwd=unpacked)


@pytest.mark.parametrize(
    "version, refused", [("2.9.1", True), ("1.13.0", True), ("2.10.0a0+git1", False), ("3.0", False)]
)
def test_a_torch_that_is_too_old_is_named(version, refused, tmp_path):
    setup = f"import sys, torch, runpy; torch.__version__ = {version!r}; sys.argv = ['setup.py', '--version']; "
    done = run_python(setup + "runpy.run_path('setup.py')", ROOT, ROOT)
    use = f"import torch; torch.__version__ = {version!r}; import pom_ext; pom_ext.PoM(8)(torch.ones(1, 3, 8))"
    called = run_python(use, ROOT, tmp_path)
    assert (done.returncode != 0) == (called.returncode != 0) == refused, done.stderr + called.stderr
    if refused:
        assert "Traceback" not in done.stderr
        for said in (done.stderr, called.stderr.splitlines()[-1]):
            assert re.search(rf"torch {version} is too old.*: 2.10 or later is needed.*pip install 'torch>=2.10'", said)


def test_an_engine_for_another_python_is_named(tmp_path):
    shutil.copytree(ROOT / "pom_ext" / "cli", tmp_path / "pom_ext" / "cli")
    for name in ("__init__.py", "engine.py", "_io.py"):
        shutil.copy(ROOT / "pom_ext" / name, tmp_path / "pom_ext" / name)
    use = "from pom_ext.engine import Layer, Stream; Stream([Layer(8)])"
    ask = "from pom_ext.cli.doctor import _describe_engine; print(_describe_engine())"
    none = run_python(use, tmp_path, tmp_path).stderr
    assert "ImportError: pom_ext.engine: there is no compiled engine for this Python" in none
    (tmp_path / "pom_ext/_engine.cpython-39-x86_64-linux-gnu.so").touch()
    raised = run_python(use, tmp_path, tmp_path).stderr.splitlines()[-1]
    told = run_python(ask, tmp_path, tmp_path).stdout
    assert told.startswith("not for this Python: ")
    for said in (raised, told):
        assert f"is for cpython-39-x86_64-linux-gnu, and this Python is {sysconfig.get_config_var('SOABI')}" in said
        assert "pip install --no-build-isolation -e ." in said


def test_doctor_tells_of_a_build_that_does_not_fit():
    note = {
        "version": "1",
        "torch": "2.13.0",
        "minimum_torch": "2.10",
        "python": "3.11.7",
        "platform": "linux-x86_64",
        "libc": "glibc 2.36",
        "compiler": "g++ 12",
        "cuda": "13.0",
        "architectures": ["8.0", "9.0+PTX"],
        "chosen": "no GPU is visible, so for all",
    }
    fits = list(_describe_build(note, "1", "linux-x86_64", "build again"))
    assert fits == [
        "built      1 for linux-x86_64, glibc 2.36, by g++ 12; CUDA 13.0 for 8.0, 9.0+PTX "
        "(no GPU is visible, so for all)",
        "against    torch 2.13.0, Python 3.11.7; serves torch 2.10 and later",
    ]
    without = {**note, "cuda": None, "chosen": "no GPU is visible"}
    assert next(_describe_build(without, "1", "linux-x86_64", "")).endswith("no CUDA (no GPU is visible)")
    older = {key: value for key, value in note.items() if key != "chosen"}
    assert next(_describe_build(older, "1", "linux-x86_64", "")).endswith("CUDA 13.0 for 8.0, 9.0+PTX")
    older, elsewhere = list(_describe_build(note, "2", "linux-aarch64", "build again"))[2:]
    assert older == "mismatch   the library is of 1, the package of 2: build again"
    assert elsewhere.startswith("mismatch   built for linux-x86_64, and this is linux-aarch64: ")
    assert list(_describe_build({}, "1", "", "build again")) == ["built      unknown: no note of a build; build again"]


def test_a_library_that_lacks_an_operation_is_named(tmp_path):
    older = "import torch; torch.library.register_fake = lambda *args: torch.ops.pom_ext.newer; "
    done = run_python(older + "import pom_ext; pom_ext.PoM(8)(torch.ones(1, 3, 8))", ROOT, tmp_path)
    said = done.stderr.splitlines()[-1]
    assert re.search("ImportError: .* built before this source .*'newer'.* Build it again: pip install", said), said


def test_doctor_tells_of_source_that_was_changed_after_the_build(tmp_path):
    package, source = tmp_path / "pom_ext", tmp_path / "csrc/cpu/mix.cpp"
    for path, time in ((package / "_build.json", 100), (source, 99)):
        path.parent.mkdir(parents=True)
        path.touch()
        os.utime(path, (time, time))
    assert list(_describe_changes(package, "build")) == []
    os.utime(source, (101, 101))
    assert list(_describe_changes(package, "build")) == ["mismatch   csrc/cpu/mix.cpp is newer than the library: build"]


@pytest.mark.parametrize(
    "cuda, driver, said",
    [
        (None, None, "none: this torch is built for the CPU"),
        (None, "nvidia-smi", "none: this torch is built for the CPU; the GPU here needs one for CUDA"),
        ("13.0", "nvidia-smi", "none that this torch for CUDA 13.0 can use: nvidia-smi tells if the driver is old"),
        ("13.0", None, "no GPU here"),
    ],
)
def test_doctor_tells_why_there_is_no_gpu(cuda, driver, said, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: driver)
    without = SimpleNamespace(cuda=SimpleNamespace(is_available=lambda: False), version=SimpleNamespace(cuda=cuda))
    assert _describe_cuda(without) == said
