"""What the GPU report tells of a run that did not go well, and what it keeps of the one before it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_gpu_report_pretended import only, pretend, report_in, started, wait_for  # noqa: F401 -- only is a fixture

from benchmarks.gpu_report import command, folder, plan, read
from benchmarks.gpu_report.guard import Guard
from benchmarks.gpu_report.report import Report
from benchmarks.gpu_report.run import INTERRUPTED, TIMED_OUT

REAL = {"made_by": folder.MARK, "pretended": False, "steps": [{"status": 0}]}


def of_a_gpu(out, **more):
    """A folder that holds the report of one."""
    out.mkdir(exist_ok=True)
    (out / "report.json").write_text(json.dumps({**REAL, **more}))
    (out / "report.txt").write_text("of a GPU")


def test_how_a_process_ended():
    assert read.crash(-11) == read.crash(139) == "signal 11 (segmentation fault)"
    assert read.crash(1) is read.crash(0) is read.crash(TIMED_OUT) is None
    assert read.why_ended(["Timeout (0:00:30)!"], 1) == "hung, and was ended"
    assert read.why_ended([], -9) == "crashed: signal 9 (killed)"
    assert read.why_ended([], TIMED_OUT) == "was running when the time of its step was up"


def test_the_reason_of_what_was_stopped_is_not_its_interrupt():
    tail = read.Tail()
    for line in ("$ python setup.py", "compiling mix.cu", INTERRUPTED, "Traceback", "KeyboardInterrupt"):
        tail.line(line)
    assert tail.reason() == "the last it said: compiling mix.cu"


def test_failed_running_and_not_run_tests_are_told_apart(tmp_path):
    lines = "begin\nselected 9\nstart a\npassed a\nstart b\nfailed b\nstart c\nfailed c\nstart d\n"
    (tmp_path / "tests.journal").write_text(lines)
    report = Report(plan.World(tmp_path, tmp_path))
    report.begin("tests", plan.Step([], {"tests": read.Tail()}), 5)
    assert report.end({"tests": TIMED_OUT}) is False
    why = "2 failed, 1 running when it ended, 5 of 9 did not run"
    assert report.step("tests")["why"] == f"its time was up; {why}"
    assert "5 of 9 did not run" in report.text() and "failed.txt" not in report.text()


def test_one_test_that_hangs_does_not_end_the_others(tmp_path, capsys, only, monkeypatch):  # noqa: F811
    only("tests")
    monkeypatch.setattr(plan, "is_there", lambda package: False)
    monkeypatch.setattr(plan, "OF_A_TEST", 20)
    _, steps, report, _ = pretend(tmp_path, "tests=stuck")
    failed = {name.partition("::")[2] for name in report["tests"]["failed_tests"]}
    assert failed == {"test_first_failure", "test_misbehaves", "test_after"} and report["tests"]["passed"] == 3
    assert steps["tests"]["why"] == "3 failed" and "Timeout (" in (tmp_path / "log.txt").read_text()


def test_a_step_answers_for_its_own_cases(tmp_path, capsys, only):  # noqa: F811
    only("benchmark", "layers")
    _, steps, _, _ = pretend(tmp_path / "a", "benchmark=crash")
    assert steps["benchmark"]["why"] == "readout-pretended: crashed: signal 11 (segmentation fault)"
    assert steps["layers"]["ok"]
    _, steps, _, _ = pretend(tmp_path / "b", "benchmark=fail,layers=crash")
    assert steps["benchmark"]["why"] == "readout-pretended: error 0.5"
    assert steps["layers"]["why"] == f"{plan.SIDE_BY_SIDE}: crashed: signal 11 (segmentation fault)"


def test_a_crash_under_a_tool_is_called_one(tmp_path, capsys, only):  # noqa: F811
    only("ncu", "sanitizers")
    _, steps, _, text = pretend(tmp_path, "ncu=crash,memcheck=fail,synccheck=refuse")
    assert steps["ncu"]["why"].startswith("crashed: signal 11 (segmentation fault); ==PROF==")
    refused = "Error: Target device is not supported by this tool"
    assert steps["sanitizers"]["why"] == f"memcheck 1 errors, synccheck: refused: {refused}"
    assert "crashed: signal 11" in text and "came to no end" not in text


def test_what_is_missing_is_told_before_anything_runs(tmp_path, capsys, only):  # noqa: F811
    only("build", "tests")
    status, steps, report, text = pretend(tmp_path, "build=absent,tests=absent")
    assert status == 1 and {step["status"] for step in steps.values()} == {"not run"}
    assert "no nvcc: put the nvcc of a CUDA toolkit on the path" in steps["build"]["why"]
    assert any("-m pip install hypothesis" in note for note in report["notes"]) and text.startswith("INCOMPLETE")
    _, steps, _, _ = pretend(tmp_path, "tests=absent")
    assert steps["build"]["ok"] and steps["tests"]["why"].startswith("no hypothesis: ")


def test_missing_packages(tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "is_there", lambda package: package not in ("pytest", "pybind11"))
    monkeypatch.setattr(plan.World, "program", lambda self, name: None)
    assert plan.World(tmp_path, tmp_path).missing() == {"build": ["pybind11", "nvcc"], "tests": ["pytest"]}
    monkeypatch.setattr(plan, "is_there", lambda package: True)
    monkeypatch.setattr(plan.World, "program", lambda self, name: name)
    assert plan.World(tmp_path, tmp_path).missing() == {}


def test_the_report_of_a_gpu_is_kept(tmp_path, capsys):
    out = tmp_path / "out"
    of_a_gpu(out)
    assert folder.prepared(out) == (out, None)
    assert {path.name for path in out.iterdir()} == set(folder.EARLIER.values())
    assert (out / "earlier-report.txt").read_text() == "of a GPU"
    of_a_gpu(out, steps=[{"status": "not run"}])  # found no GPU: less than what is kept
    (out / "report.txt").write_text("nothing")
    assert folder.prepared(out) == (out, None) and (out / "earlier-report.txt").read_text() == "of a GPU"


def test_one_that_pretends_does_not_take_its_place(tmp_path):
    of_a_gpu(tmp_path)
    other, note = folder.prepared(tmp_path, pretended=True)
    assert other != tmp_path and "holds the report of a GPU, and this one pretends" in note
    assert (tmp_path / "report.txt").read_text() == "of a GPU"


def test_two_reports_take_two_folders(tmp_path):
    out = tmp_path / "out"
    process = started(out, "machine=hang", scale="5")
    try:
        wait_for((out / "report.txt").exists)
        assert report_in(out)[1].startswith("NOT ENDED: looking for a GPU")
        other, note = folder.prepared(out, pretended=True)
        assert other != out and f"another report runs there (process {process.pid})" in note
    finally:
        process.send_signal(signal.SIGTERM)
        printed = process.communicate()[0]
    assert process.returncode == 1 and report_in(out)[1].startswith("STOPPED") and "Traceback" not in printed


def test_a_terminal_that_closes_stops_it_politely(tmp_path):
    process = started(tmp_path, "build=stuck", scale="1")
    wait_for(lambda: (tmp_path / "report.txt").exists() and "running build" in (tmp_path / "report.txt").read_text())
    process.send_signal(signal.SIGHUP)
    process.communicate(timeout=60)
    report, text = report_in(tmp_path)
    assert process.returncode == 1 and text.startswith("STOPPED") and report["steps"][0]["status"] == "stopped"
    assert {step["why"] for step in report["steps"]} == {"stopped from outside before the end"}


def test_a_full_folder_is_found_out_at_once(tmp_path, monkeypatch):
    def full(self, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    other, note = folder.prepared(tmp_path)
    assert other != tmp_path and "cannot be used (No space left on device)" in note and not list(tmp_path.iterdir())


@pytest.mark.parametrize("ended", [True, False])
def test_a_case_left_in_the_file_of_a_benchmark_that_ended(ended, tmp_path):
    """By a disk that was full for a while."""
    world = plan.World(tmp_path, tmp_path)
    (tmp_path / "benchmark.json").write_text(json.dumps({"cases": [], "wrong": [], "running": "mix"}))
    lines = ["$ python", "33 cases, 60 s"] if ended else ["$ python"]
    assert command.settle(world, Report(world), lines, 1) is ended
    wrong = [] if ended else ["mix: ended its process: exit status 1"]
    assert json.loads((tmp_path / "benchmark.json").read_text()) == {"cases": [], "wrong": wrong}


def test_a_killed_report_leaves_no_process_and_no_working_folder(tmp_path):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    sleep = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {sleep!r}])"
    code = (
        "import os, signal, sys, time\nfrom benchmarks.gpu_report.guard import Guard\n"
        "from benchmarks.gpu_report.run import Process, run\n"
        "def line(text):\n    if text.isdigit(): print(text, flush=True); os.kill(os.getpid(), signal.SIGKILL)\n"
        f"guard = Guard({str(scratch)!r})\n"
        f"run([Process('a', (sys.executable, '-c', {child!r}), line=line)], time.monotonic() + 60, watch=guard)"
    )
    environment = {**os.environ, "PYTHONPATH": str(folder.ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True, check=False)
    grandchild = Path(f"/proc/{int(done.stdout)}/stat")

    def is_gone():
        try:
            return grandchild.read_text().rpartition(")")[2].split()[0] == "Z"
        except OSError:
            return True

    wait_for(lambda: is_gone() and not scratch.exists())


def test_a_guard_lets_go_of_what_is_over(tmp_path):
    guard = Guard(tmp_path / "none")
    with subprocess.Popen(["sleep", "30"], start_new_session=True) as process:
        guard("+", process.pid)
        guard("-", process.pid)
        guard.close()
        time.sleep(0.2)
        assert process.poll() is None
        process.kill()


@pytest.mark.parametrize(
    "arguments, told",
    [
        ([""], "FOLDER: expected the name of a folder"),
        (["--pretend", "out"], "FOLDER comes before --pretend"),
        (["out", "--pretend", "rest=absent"], "expected absent only of build, tests, ncu"),
        (["out", "--pretend", "build=refuse"], "expected refuse only of ncu"),
    ],
)
def test_arguments_that_would_mislead(arguments, told, capsys):
    with pytest.raises(SystemExit):
        command.main(arguments)
    assert told in capsys.readouterr().err


def test_the_help_tells_modes_and_statuses(capsys):
    with pytest.raises(SystemExit):
        command.main(["--help"])
    printed = capsys.readouterr().out
    assert "pom_ext/*.so" in printed and "exit status" in printed and "stuck" in printed
    assert command.parsed(["--pretend", "tests=fail"]).out == "out/gpu-report"
