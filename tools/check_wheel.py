"""Installs a wheel beside other releases of torch, each in a new environment, and runs the tests of the package there.

    python tools/check_wheel.py dist/*.whl --torch 2.12.0 2.14.1

Nothing is compiled, and the source is out of reach: the tests run in a copy of their folder. pip's own settings decide
where torch comes from; its builds for CUDA take about 6 GB of disk, one release at a time. The exit code is 1 if a test
failed, or none ran.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parents[1]
COPIED = ("tests", "docs", "README.md", "pyproject.toml")
# What is no part of a wheel: builds from source, the C++ examples, the benchmarks, and a browser.
OF_THE_SOURCE = (
    *("aoti", "build*", "cmake", "cpp", "cuda_code", "cuda_on_cpu", "export", "wheel"),
    *("benchmark*", "cuda_launches", "gpu_report*", "play_browser"),
)
OF_THE_ENGINE = (
    "--ignore=tests/engine/test_engine.py",
    "--deselect=tests/test_readme.py::test_the_page_on_the_engine_runs",
)


def run(*command, cwd, env, check=True):
    print("$", *command, flush=True)
    return subprocess.run([str(word) for word in command], cwd=cwd, env=env, check=check).returncode


def check_wheel(wheel, release, python, selected):
    """Install and test. Returns (a line on the result, whether all is well)."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="check_wheel_") as folder:
        folder = Path(folder)
        env = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
        env["PATH"] = f"{folder / 'env/bin'}{os.pathsep}{env['PATH']}"
        run(python, "-m", "venv", folder / "env", cwd=folder, env=env)
        python = folder / "env/bin/python"
        everything = f"pom_ext[train,play,test] @ {wheel.resolve().as_uri()}"
        run(python, "-m", "pip", "install", "--quiet", f"torch=={release}", everything, cwd=folder, env=env)
        installed = time.perf_counter()
        copy_tests(folder / "copy")
        there = {"cwd": folder / "copy", "env": env}
        run(python, "-c", WHERE, folder / "env", **there)
        run("pom-ext", "doctor", **there)
        options = [f"--ignore-glob=tests/test_{name}.py" for name in OF_THE_SOURCE]
        options += ["--deselect=tests/test_readme.py::test_linked_files_exist"]
        if run(python, "-c", "import pom_ext._engine", check=False, **there):
            options += OF_THE_ENGINE  # built for another version of Python, as just said
        report = folder / "report.xml"
        run(python, "-m", "pytest", "-q", *options, f"--junitxml={report}", *selected, check=False, **there)
        passed, failed, skipped = counts(report)
    ended = time.perf_counter()
    return (
        f"torch {release}: {passed} passed, {failed} failed, {skipped} skipped; "
        f"installed in {installed - start:.0f} s, tested in {ended - installed:.0f} s"
    ), passed > 0 and failed == 0


WHERE = """
import sys, pom_ext
if not pom_ext.__file__.startswith(sys.argv[1]):
    sys.exit(f"the tests would run on {pom_ext.__file__}, not on the wheel in {sys.argv[1]}")
"""


def copy_tests(folder):
    folder.mkdir()
    for name in COPIED:
        source, target = ROOT / name, folder / name
        shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)


def counts(report):
    """(passed, failed, skipped) of pytest's report; an error counts as failed."""
    suite = ElementTree.parse(report).getroot().find("testsuite")
    tests, failures, errors, skipped = (int(suite.get(name)) for name in ("tests", "failures", "errors", "skipped"))
    return tests - failures - errors - skipped, failures + errors, skipped


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--torch", nargs="+", required=True, metavar="RELEASE", help="such as 2.12.0")
    parser.add_argument("--python", default=sys.executable, help="interpreter of the environments; this one by default")
    parser.add_argument("--pytest", nargs=argparse.REMAINDER, default=[], help="what follows goes to pytest")
    options = parser.parse_args()
    results = [check_wheel(options.wheel, release, options.python, options.pytest) for release in options.torch]
    for line, _ in results:
        print(line)
    sys.exit(not all(well for _, well in results))


if __name__ == "__main__":
    main()
