"""What GPUs a build compiles for: those that are here, or as it is asked."""

import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
from test_build import KNOWN, ROOT, script, toolkit

from tools.build import cuda as build_cuda

ALL = "8.0", "8.6", "8.9", "9.0", "10.0", "12.0+PTX"


@pytest.mark.parametrize(
    "environment, gpus, names, why",
    [
        ({}, {"9.0"}, ("9.0",), "for the GPU that is visible (9.0)"),
        ({}, {"9.0", "12.0", "8.9"}, ("8.9", "9.0", "12.0"), "visible (8.9, 9.0, 12.0)"),
        ({}, set(), ALL, "no GPU is visible, so for all"),
        ({"POM_EXT_CUDA": "gpu"}, set(), (), "no GPU is visible"),
        ({"POM_EXT_CUDA": "gpu"}, {"8.0"}, ("8.0",), "for the GPU that is visible (8.0)"),
        ({"POM_EXT_CUDA": "1"}, set(), ALL, "no GPU is visible, so for all"),
        ({"POM_EXT_CUDA": "1"}, {"8.0"}, ("8.0",), "for the GPU that is visible (8.0)"),
        ({"POM_EXT_CUDA": "0"}, {"8.0"}, (), "POM_EXT_CUDA=0"),
        ({"POM_EXT_CUDA": "gpu", "TORCH_CUDA_ARCH_LIST": "8.0;9.0"}, set(), ("8.0", "9.0"), "TORCH_CUDA_ARCH_LIST"),
        ({"TORCH_CUDA_ARCH_LIST": "8.6"}, {"9.0"}, ("8.6",), "TORCH_CUDA_ARCH_LIST"),
        ({"TORCH_CUDA_ARCH_LIST": "all"}, {"9.0"}, ALL, "TORCH_CUDA_ARCH_LIST"),
        ({"TORCH_CUDA_ARCH_LIST": " ; "}, {"9.0"}, ("9.0",), "visible"),
        ({"POM_EXT_CUDA": "0", "TORCH_CUDA_ARCH_LIST": "9.0"}, {"9.0"}, (), "POM_EXT_CUDA=0"),
        ({}, {"6.1"}, (), "nvcc compiles for none of the GPUs here (6.1)"),
        ({"POM_EXT_CUDA": "1"}, {"6.1"}, ALL, "none of the GPUs here (6.1), so for all"),
    ],
)
def test_what_is_built_is_what_is_asked_for_or_for_the_gpus_here(environment, gpus, names, why, tmp_path):
    root = toolkit(tmp_path)
    script(root / "bin/nvcc", "printf 'compute_%s\\n' 80 86 89 90 100 120")
    choice = build_cuda.choose({"CUDA_HOME": str(root), **environment}, gpus=lambda environment: gpus)
    assert choice.names == names and why in choice.why
    assert (choice.toolkit is None) == (not names)
    line = str(choice)
    assert "\n" not in line and choice.why in line
    if names:
        assert line.startswith(f"CUDA kernels for {', '.join(names)} by {root}/bin/nvcc: ")
        assert all(word in line for word in ("TORCH_CUDA_ARCH_LIST=9.0", "TORCH_CUDA_ARCH_LIST=all", "POM_EXT_CUDA=0"))
    else:
        assert line.startswith("No CUDA kernels: ") and "POM_EXT_CUDA=1" in line


def test_without_a_toolkit_nothing_is_asked_of_the_gpus():
    choice = build_cuda.choose({}, default="/nowhere", gpus=lambda environment: 1 / 0)
    assert choice.toolkit is None and str(choice).startswith("No CUDA kernels: no CUDA toolkit is here. ")


@pytest.mark.parametrize(
    "gpus, names",
    [
        ({"9.0"}, ("9.0",)),
        ({"8.7"}, ("8.6",)),
        ({"8.9"}, ("8.9",)),
        ({"12.1"}, ("12.0",)),
        ({"11.0"}, ("10.0+PTX",)),
        ({"11.0", "10.0"}, ("10.0+PTX",)),
        ({"10.3", "9.0", "13.0"}, ("9.0", "10.0", "12.0+PTX")),
        ({"7.5", "8.0"}, ("8.0",)),
        ({"7.5"}, ()),
        (set(), ()),
    ],
)
def test_what_serves_a_gpu(gpus, names):
    """Code of its major version, or for a later one than nvcc knows what its driver can translate."""
    assert build_cuda.serving(gpus, KNOWN) == names


@pytest.fixture
def torch_with(monkeypatch):
    """Makes `import torch` give one for that CUDA, with GPUs of these capabilities."""

    def put(cuda, *capabilities):
        here = SimpleNamespace(
            is_available=lambda: len(capabilities) > 0,
            device_count=lambda: len(capabilities),
            get_device_capability=lambda i: capabilities[i],
        )
        monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(version=SimpleNamespace(cuda=cuda), cuda=here))

    return put


def test_the_gpus_are_those_of_torch_or_of_the_driver(torch_with, tmp_path):
    path = {"PATH": str(tmp_path)}
    torch_with(None)
    assert build_cuda.visible_gpus(path) == set(), "no tool"
    script(tmp_path / "nvidia-smi", 'echo "$@" | grep -q compute_cap && printf "9.0\\n12.0\\n9.0\\n"')
    assert build_cuda.visible_gpus(path) == {"9.0", "12.0"}
    assert build_cuda.visible_gpus({**path, "CUDA_VISIBLE_DEVICES": "1"}) == {"9.0", "12.0"}
    for hidden in ("", "-1"):
        assert build_cuda.visible_gpus({**path, "CUDA_VISIBLE_DEVICES": hidden}) == set()
    torch_with("13.0", (8, 6), (8, 6))
    assert build_cuda.visible_gpus(path) == {"8.6"}
    torch_with(None)
    for answer in ("echo 'NVIDIA-SMI has failed'; exit 9", "echo '[N/A]'", "echo 'not a valid field to query: 1.0'"):
        script(tmp_path / "nvidia-smi", answer)
        assert build_cuda.visible_gpus(path) == set(), answer
    (tmp_path / "nvidia-smi").write_text("no program")
    assert build_cuda.visible_gpus(path) == set()


def unasked():
    """The environment, less what asks for CUDA."""
    asking = ("POM_EXT_CUDA", "TORCH_CUDA_ARCH_LIST", "CUDA_HOME", "MAKEFLAGS")
    return {name: value for name, value in os.environ.items() if name not in asking}


@pytest.fixture
def make(tmp_path):
    """Runs the Makefile in a folder of its own, with programs that do nothing but note how they were called."""
    (tmp_path / "csrc").mkdir()
    for name in ("Makefile", "pyproject.toml", "setup.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    said = 'test "$1" = -m && shift; echo "$(basename $0) $1 $POM_EXT_CUDA|$TORCH_CUDA_ARCH_LIST" >>calls'
    for name in ("python", "pip", "pom-ext"):
        script(tmp_path / ".venv/bin" / name, said)
    (tmp_path / ".venv/environment").touch()

    def run(target, **asked):
        (tmp_path / "calls").unlink(missing_ok=True)
        subprocess.run(["make", "--silent", target], cwd=tmp_path, env={**unasked(), **asked}, check=True)
        return (tmp_path / "calls").read_text().splitlines()

    return run


def test_make_compiles_cuda_only_for_a_gpu_here_unless_asked(make):
    told, built = "python tools.build.cuda", "pip install"
    assert make("demo") == [f"{told} gpu|", f"{built} gpu|", "pom-ext demo gpu|"]
    assert make("demo") == ["pom-ext demo gpu|"], "nothing changed"
    assert make("demo", POM_EXT_CUDA="1") == [f"{told} 1|", f"{built} 1|", "pom-ext demo 1|"]
    assert make("demo", TORCH_CUDA_ARCH_LIST="8.0;9.0")[1] == f"{built} gpu|8.0;9.0"
    assert make("demo", TORCH_CUDA_ARCH_LIST="8.0;9.0") == ["pom-ext demo gpu|8.0;9.0"]
    assert make("demo")[1] == f"{built} gpu|"


def test_make_wheel_compiles_for_all_unless_asked(make):
    assert make("wheel") == ["python tools.build.cuda gpu|all", "pip wheel gpu|all"]
    assert make("wheel", TORCH_CUDA_ARCH_LIST="9.0")[1] == "pip wheel gpu|9.0"


def test_the_test_run_of_every_change_asks_for_cuda(tmp_path):
    """There nothing that tests compiled kernels may be left out."""
    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / ".ci/run", tmp_path / ".ci/run")
    (tmp_path / "Makefile").write_text('test:\n\t@echo "$$POM_EXT_CUDA|$$TORCH_CUDA_ARCH_LIST"\n')
    done = subprocess.run([tmp_path / ".ci/run"], env=unasked(), check=True, capture_output=True, text=True)
    assert "1|8.0;9.0" in done.stdout.splitlines()  # make within make tells its folders too
