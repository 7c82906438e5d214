"""The report of a GPU machine, without one: its commands, its time limits, how it reads logs, and what it says."""

import ast
import json
import sys
import time
from pathlib import Path

import pytest
import sanitized
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # the benchmarks are no part of the installed package

from benchmarks import gpu_report
from benchmarks.gpu_report import Step

GPU = {"gpu": "Testing 100", "capability": "9.0", "driver": "1.2", "torch": "2.11", "cuda": "13.0"}


def python(code):
    return (sys.executable, "-c", code)


def test_without_a_gpu_one_line_says_so(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_report.main([str(tmp_path / "out")]) == 1
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1
    assert printed.err.startswith("error: gpu-report: no GPU that torch can use: torch " + torch.__version__)
    assert not (tmp_path / "out").exists()
    monkeypatch.setitem(sys.modules, "torch", None)
    assert gpu_report.main([str(tmp_path / "out")]) == 1
    assert "has no torch" in capsys.readouterr().err


def test_all_steps_together_end_within_nine_minutes(tmp_path):
    groups = gpu_report.steps("9.0", tmp_path / "a.json")
    assert sum(max(step.seconds for step in group) for group in groups) <= 9 * 60 - 10
    assert len([step for group in groups for step in group]) <= 6, "eight files with report.json and report.txt"


def test_steps_build_for_this_gpu_alone(tmp_path):
    (build,), (tests,), sanitizers, (benchmark,) = gpu_report.steps("9.0", tmp_path / "a.json")
    for step in (build, tests):
        assert step.environment["TORCH_CUDA_ARCH_LIST"] == "9.0" and step.environment["POM_EXT_CUDA"] == "1"
    assert build.commands[0] == (sys.executable, "setup.py", "build_ext", "--inplace")
    for step, tool in zip(sanitizers, ("memcheck", "racecheck", "synccheck"), strict=True):
        ((_, *words),) = step.commands
        assert words[:2] == ["--tool", tool] and words[-2:] == [ROOT / "tests/sanitized.py", "cuda"]
    assert benchmark.commands[0][-4:] == ("cuda", "--quick", "--json", tmp_path / "a.json")


def test_a_library_without_cuda_kernels_fails_the_build_step(tmp_path, monkeypatch):
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from pom_ext import _library; _library.DEVICES = ('cpu',); "
    step = Step("build", (python(code + gpu_report.HAS_KERNELS),), 60)
    assert step.run(tmp_path)["status"] == 1
    assert "built without CUDA kernels" in (tmp_path / "build.log").read_text()


def test_tests_of_missing_packages_are_left_out():
    everything = gpu_report.pytest_command(lambda package: True)
    assert everything[everything.index("-k") + 1] == "not cpu" and "-n" in everything
    assert not any("deselect" in word or "ignore" in word for word in everything)
    without = gpu_report.pytest_command(lambda package: package == "mlxtend")
    assert "-n" not in without and "--ignore=tests/test_diffusion.py" in without
    assert "--deselect=tests/test_training.py::test_noise_prediction_trains" in without
    assert not any("test_data" in word for word in without)
    assert set(gpu_report.left_out(lambda package: package == "mlxtend")) == {"diffusers", "peft"}


def test_what_is_left_out_exists():
    for test in (test for tests in gpu_report.NEEDS.values() for test in tests):
        file, _, name = test.partition("::")
        tree = ast.parse((ROOT / file).read_text())
        assert not name or name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, test


def test_steps_run_until_one_fails(tmp_path):
    step = Step("a", (python("print('one')"), python("exit(3)"), python("print('never')")), 60)
    result = step.run(tmp_path)
    assert result["status"] == 3 and result["name"] == "a" and 0 < result["seconds"] < 60
    log = (tmp_path / "a.log").read_text()
    assert "\none\n" in log and "\nnever\n" not in log
    assert Step("b", (("no-such-program",),), 60).run(tmp_path)["status"] == 127
    assert "no-such-program" in (tmp_path / "b.log").read_text()


def test_a_step_is_stopped_with_all_that_it_started(tmp_path):
    alive = tmp_path / "alive"
    child = f"import time; time.sleep(3); open({str(alive)!r}, 'w')"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    start = time.monotonic()
    assert Step("a", (python(parent),), 1).run(tmp_path)["status"] == "timed out"
    assert time.monotonic() - start < 3
    time.sleep(3)
    assert not alive.exists()


def test_steps_have_their_environment_and_the_source_folder(tmp_path):
    code = "import os, pom_ext; print(os.environ['A'], os.getcwd())"
    assert Step("a", (python(code),), 60, {"A": "5"}).run(tmp_path)["status"] == 0
    assert f"\n5 {ROOT}\n" in (tmp_path / "a.log").read_text()


def test_of_long_logs_the_end_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_report, "LONGEST_LOG", 100)
    Step("a", (python("print('x' * 1000 + 'end')"),), 60).run(tmp_path)
    log = (tmp_path / "a.log").read_text()
    assert len(log) < 150 and log.startswith("(the beginning was cut)") and log.endswith("end\n")


PYTEST = """
.....F
FAILED tests/test_mix.py::test_mix[cuda-power3] - AssertionError: y, part 0
ERROR tests/test_data.py::test_mnist - ModuleNotFoundError: ...
1 failed, 1203 passed, 2 skipped, 40 deselected, 1 error in 63.20s (0:01:03)
"""
MEMCHECK = "========= COMPUTE-SANITIZER\n39 cases on cuda\n========= ERROR SUMMARY: {} errors\n"
RACECHECK = "========= RACECHECK SUMMARY: {} hazards displayed (0 errors, 0 warnings)\n"


def test_logs_are_read():
    counts = gpu_report.pytest_counts(PYTEST)
    assert counts.pop("failed_tests") == ["tests/test_mix.py::test_mix[cuda-power3]", "tests/test_data.py::test_mnist"]
    assert counts == {"failed": 1, "passed": 1203, "skipped": 2, "deselected": 40, "error": 1}
    assert gpu_report.pytest_counts("killed") == {"failed_tests": []}
    assert gpu_report.sanitizer_errors(MEMCHECK.format(0)) == 0
    assert gpu_report.sanitizer_errors(MEMCHECK.format(12)) == 12
    assert gpu_report.sanitizer_errors("ERROR SUMMARY: 1 error") == 1
    assert gpu_report.sanitizer_errors(RACECHECK.format(3)) == 3
    assert gpu_report.sanitizer_errors("killed") is None


def run_report(folder, monkeypatch, **logs):
    """main() with steps that print given logs; a log may be (text, exit status)."""

    def steps(capability, benchmark_json):
        def step(name):
            text, status = logs[name] if isinstance(logs[name], tuple) else (logs[name], 0)
            write = f"open({str(benchmark_json)!r}, 'w').write('[1]'); " if name == "benchmark" else ""
            return Step(name, (python(f"{write}print({text!r}); exit({status})"),), 60)

        return [[step("build")], [step("tests")], [step("memcheck"), step("racecheck")], [step("benchmark")]]

    monkeypatch.setattr(gpu_report, "machine", lambda: GPU)
    monkeypatch.setattr(gpu_report, "steps", steps)
    status = gpu_report.main([str(folder)])
    return status, json.loads((folder / "report.json").read_text()), (folder / "report.txt").read_text()


GOOD = {
    "build": "built",
    "tests": "12 passed in 1.00s",
    "memcheck": MEMCHECK.format(0),
    "racecheck": RACECHECK.format(0),
    "benchmark": "a table",
}


def test_the_report_of_a_machine_where_all_is_well(tmp_path, monkeypatch):
    status, report, text = run_report(tmp_path / "out", monkeypatch, **GOOD)
    assert status == 0 and report["ok"]
    assert report["machine"] == GPU and report["tests"]["passed"] == 12 and report["benchmark"] == [1]
    assert report["sanitizers"] == {"memcheck": 0, "racecheck": 0}
    assert text.startswith("Testing 100 (9.0), driver 1.2, torch 2.11, CUDA 13.0\n")
    assert "a table" in text and "12 passed" in text and "FAILED" not in text
    assert len(list((tmp_path / "out").iterdir())) == 7


@pytest.mark.parametrize(
    "name, log, shown",
    [
        ("tests", (PYTEST, 1), "failed: tests/test_mix.py::test_mix[cuda-power3]"),
        ("memcheck", MEMCHECK.format(2), "2 errors"),
        ("racecheck", "killed", "came to no end"),
        ("benchmark", ("WRONG", 1), "WRONG"),
    ],
)
def test_one_failed_step_fails_the_report_and_the_others_run(name, log, shown, tmp_path, monkeypatch):
    status, report, text = run_report(tmp_path, monkeypatch, **{**GOOD, name: log})
    assert status == 1 and not report["ok"]
    assert [step["name"] for step in report["steps"] if not step["ok"]] == [name]
    assert len(report["steps"]) == 5 and shown in text


def test_without_a_library_nothing_else_runs(tmp_path, monkeypatch):
    status, report, text = run_report(tmp_path, monkeypatch, **{**GOOD, "build": ("error: no nvcc", 1)})
    assert status == 1 and [step["name"] for step in report["steps"]] == ["build"]
    assert "nothing was measured" in text


def test_the_selection_for_the_sanitizer_runs(capsys):
    sanitized.main("cpu")
    assert f"{len(sanitized.SELECTION)} cases on cpu" in capsys.readouterr().out
