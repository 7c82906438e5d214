"""Compiles and runs the C++ programs of tests/cpp."""

import ast
import json
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CPP = ROOT / "tests/cpp"
BUILT_OF = json.loads((ROOT / "csrc/library.json").read_text())  # the library: sources and flags
CXX = os.environ.get("CXX", "g++")
INCLUDE = [f"-I{ROOT / folder}" for folder in ("csrc", "csrc/include", "tests/cpp")]


def setup_constant(name):
    """The value of a constant in setup.py: the flags that the library is built with."""
    for statement in ast.parse((ROOT / "setup.py").read_text()).body:
        if isinstance(statement, ast.Assign) and statement.targets[0].id == name:
            return ast.literal_eval(statement.value)
    raise LookupError(f"setup.py has no {name}")


def call(*command, cwd=None, env=None):
    """Run a command; what it prints is shown if it fails."""
    command = [str(word) for word in command]
    done = subprocess.run(
        command, cwd=cwd, env=env, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode:
        pytest.fail(f"{' '.join(command)}\nexit status {done.returncode}\n{done.stdout}", pytrace=False)


def side_by_side(tasks):
    """Futures of {name: (function, *arguments)}, all of them done."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return {name: pool.submit(*task) for name, task in tasks.items()}


def compile_all(folder, jobs):
    """Compile {name: (source, flags)}. Returns futures of the object files by name."""

    def compile_one(name, source, flags):
        target = folder / f"{name}.o"
        call(CXX, *flags, *INCLUDE, "-c", source, "-o", target)
        return target

    return side_by_side({name: (compile_one, name, *job) for name, job in jobs.items()})


def link_and_run(*objects, flags=()):
    """Make a program of object files, named after the first, and run it."""
    files = [future.result() for future in objects]
    program = files[0].with_suffix("")
    call(CXX, *flags, *files, "-o", program)
    call(program)
