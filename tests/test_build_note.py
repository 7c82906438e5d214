"""What stays written of a build, who reads it, and what a torch that is too old is told."""

import json
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # the build is no part of the installed package

from cpp_programs import setup_constant

import build_note
from pom_ext import _library
from pom_ext.doctor import _describe_build

TARGET = setup_constant("TORCH_TARGET")


def test_the_minimum_is_said_once():
    assert build_note.release(TARGET) == _library.MINIMUM_TORCH


@pytest.mark.parametrize("version", ("2.10.0", "2.10.0a0+git1234", "2.13.0+cpu", "3.0.0"))
def test_a_torch_that_is_new_enough(version):
    build_note.refuse_older_torch(version, TARGET)


@pytest.mark.parametrize("version", ("2.9.1+cpu", "2.1.0", "1.13.1"))
def test_a_torch_that_is_too_old_ends_the_build(version):
    with pytest.raises(SystemExit, match=rf"torch {version.replace('+', '.')} is too old.*2.10 or later.*pip install"):
        build_note.refuse_older_torch(version, TARGET)


def test_a_torch_that_is_too_old_is_named_by_the_call():
    """Importing says nothing; the call does, before anything of the library is loaded."""
    script = """
import torch
torch.__version__ = "2.9.1"
import pom_ext
try:
    pom_ext.polynomial_state(torch.randn(1, 2, 4), form="product", degree=2)
except ImportError as error:
    print(error)
"""
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert said.startswith("pom_ext: torch 2.9.1 is too old: 2.10 or later is needed. Update it with pip install")


def test_a_note_is_written_and_read(tmp_path):
    path = tmp_path / "_build.json"
    build_note.write_note(path, "1.2", "2.13.0+cpu", TARGET, "g++", None, ())
    note = json.loads(path.read_text())
    assert note["minimum_torch"] == "2.10" and note["cuda"] is None and note["compiler"]
    here = sysconfig.get_platform()
    built, against = _describe_build(note, "1.2", here, "remedy")
    assert "1.2 for" in built and "no CUDA" in built and "torch 2.13.0+cpu, for 2.10 and later" in against
    mismatches = list(_describe_build(note, "1.3", "another-one", "remedy"))[2:]
    assert len(mismatches) == 2 and all("mismatch" in line and "remedy" in line for line in mismatches)
    assert ["unknown" in line for line in _describe_build({}, "1.2", here, "remedy")] == [True]
    with_cuda = note | {"cuda": "13.0", "architectures": ["8.0", "9.0"]}
    assert "CUDA 13.0 for 8.0, 9.0" in next(_describe_build(with_cuda, "1.2", here, "remedy"))


def test_this_build_has_a_note():
    note = _library.build_note()
    assert note["minimum_torch"] == _library.MINIMUM_TORCH and note["platform"] == sysconfig.get_platform()
