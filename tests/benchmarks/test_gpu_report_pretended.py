"""The whole GPU report without a GPU: every step of the plan by stand-ins that fail, hang and crash.

What was found stays.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # the benchmarks are no part of the installed package

from benchmarks.gpu_report import command, folder, plan
from benchmarks.gpu_report.folder import EARLIER, FILES
from benchmarks.gpu_report.pretend import parsed_faults
from benchmarks.gpu_report.report import ENDED, Report

SCALE = "0.1"


def report_in(out):
    """(report.json, report.txt) as whoever comes later reads them."""
    names = {path.name for path in out.iterdir()}
    assert names <= {*FILES, *EARLIER.values(), *(f"{name}.tmp" for name in FILES)} and len(names) <= 8, names
    return json.loads((out / "report.json").read_text()), (out / "report.txt").read_text()


def pretend(out, faults="", *, scale=SCALE):
    """(exit status, report.json by step, all of it, report.txt)."""
    status = command.main([str(out), "--pretend", faults, "--scale", scale])
    report, text = report_in(out)
    return status, {step["name"]: step for step in report["steps"]}, report, text


@pytest.fixture
def only(monkeypatch):
    """Some of the steps."""
    return lambda *names: monkeypatch.setattr(plan, "STEPS", {name: plan.STEPS[name] for name in names})


@pytest.fixture
def briefly(monkeypatch):
    """Steps that hang may take seconds here, not all that the others left."""
    monkeypatch.setattr(plan, "MOST", {**plan.MOST, "tests": 45, "sanitizers": 20, "ncu": 20})


def test_all_is_well(tmp_path, capsys):
    status, steps, report, text = pretend(tmp_path / "out", scale="1")
    assert status == 0 and report["ok"] and list(steps) == list(plan.STEPS) and all(s["ok"] for s in steps.values())
    assert report["machine"]["capability"] == "9.0" and text.startswith(
        "OK\nPRETENDED, NO GPU (9.0), driver none, torch none"
    )
    assert {found["outcome"] for found in report["smoke"].values()} == {"ok"} and not report["failed_families"]
    assert report["tests"]["passed"] == 6 and report["rest"]["passed"] == 6
    assert [case["name"] for case in report["benchmark"]["cases"]][-1] == plan.SIDE_BY_SIDE
    assert {tool: found["errors"] for tool, found in report["sanitizers"].items()} == dict.fromkeys(
        report["sanitizers"], 0
    )
    assert report["ncu"]["kernels"][0]["top_stall"] == "long_scoreboard" and "long_scoreboard 3.2" in text
    assert "FAILED" not in text and capsys.readouterr().out.endswith(text)
    log = (tmp_path / "out/log.txt").read_text()
    assert all(f"\n{name}| $ " in log for name in ("smoke.project", "ncu", "memcheck", "tests", "layers"))


def test_what_hangs_is_stopped_and_what_it_had_found_stays(tmp_path, briefly):
    faults = "smoke.project=hang,benchmark=hang,ncu=stuck,tests=stuck,memcheck=hang"
    status, steps, report, text = pretend(tmp_path / "out", faults)
    assert status == 1 and not report["ok"]
    assert report["failed_families"] == ["project"] and report["smoke"]["project"]["outcome"] == "hung"
    assert steps["layers"]["status"] == "not run" and "project" in steps["layers"]["why"]
    assert [case["name"] for case in report["benchmark"]["cases"]] == ["state-pretended", "mix-pretended"]
    assert report["benchmark"]["wrong"] == ["readout-pretended: hung, and was ended"]
    assert report["ncu"]["profiled"] == ["features_of_pieces"] and steps["ncu"]["status"] == "timed out"
    assert report["tests"]["passed"] == 3 and "test_pretended.py::test_first_failure" in report["tests"]["failed_tests"]
    assert "as told, in the middle of the run" in (tmp_path / "out/failed.txt").read_text()
    assert report["sanitizers"]["memcheck"]["errors"] == 1 and not report["sanitizers"]["memcheck"]["finished"]
    assert "join_groups" in text and "memcheck          1 errors, then came to no end" in text
    assert report["sanitizers"]["racecheck"]["errors"] == 0 and steps["rest"]["ok"]


def test_what_crashes_is_begun_anew_without_what_crashed(tmp_path, capsys):
    """Of the tests and of the benchmark; both lose their GPU, or their process."""
    faults = "smoke.mix=fail,smoke.causal=crash,smoke.mask=lost,benchmark=lost,tests=crash,rest=lost"
    faults += ",synccheck=crash,ncu=crash"
    status, steps, report, text = pretend(tmp_path / "out", faults)
    assert status == 1 and report["failed_families"] == ["causal", "mask", "mix"]
    outcomes = {family: found["outcome"] for family, found in report["smoke"].items()}
    assert (outcomes["mix"], outcomes["causal"], outcomes["mask"], outcomes["state"]) == (
        "wrong",
        "crashed",
        "failed",
        "ok",
    )
    assert "error 0.5" in text and "illegal memory access" in report["smoke"]["mask"]["why"]
    assert [case["name"] for case in report["benchmark"]["cases"]] == ["state-pretended", "mix-pretended"]
    assert "illegal memory access" in report["benchmark"]["wrong"][0]
    tracebacks = (tmp_path / "out/failed.txt").read_text()
    for step in ("tests", "rest"):
        failed = {name.partition("::")[2] for name in report[step]["failed_tests"]}
        assert failed == {"test_first_failure", "test_misbehaves", "test_after"} and report[step]["passed"] == 3
        assert steps[step]["ok"] is False and report[step]["ended"]
    assert tracebacks.count("===== test_pretended.py::test_after (call)") == 2 and "illegal memory access" in tracebacks
    assert report["sanitizers"]["synccheck"]["errors"] == 1 and steps["ncu"]["status"] == -11


def test_tools_that_are_absent_or_refuse_are_a_line_each(tmp_path, capsys, only):
    only("build", "ncu", "sanitizers")
    _, steps, _, text = pretend(tmp_path / "a", "ncu=absent,sanitizers=refuse")
    assert steps["ncu"]["status"] == "not run" and steps["ncu"]["why"] == "there is no ncu on this machine"
    assert steps["sanitizers"]["ok"] is None and "not supported by this tool" in steps["sanitizers"]["why"]
    assert text.startswith("INCOMPLETE; no result: ncu, sanitizers\n") and "FAILED" not in text
    _, steps, _, _ = pretend(tmp_path / "b", "ncu=refuse,sanitizers=absent")
    assert steps["ncu"]["ok"] is None and "ERR_NVGPUCTRPERM" in steps["ncu"]["why"]
    assert steps["sanitizers"]["why"] == "there is no compute-sanitizer on this machine"


@pytest.mark.parametrize(
    "changed, ok",
    [
        ({}, True),
        ({"ncu": None}, True),
        ({"sanitizers": None}, True),
        ({"tests": None}, False),
        ({"ncu": False}, False),
    ],
)
def test_what_a_machine_lacks_is_no_failure(changed, ok, tmp_path):
    report = Report(plan.World(tmp_path, tmp_path))
    report.steps = [{"name": name, "ok": changed.get(name, True)} for name in plan.STEPS]
    assert not report.ok, "it has not come to its end"
    report.state = ENDED
    assert report.ok is ok


def test_without_a_library_nothing_else_runs(tmp_path, capsys):
    status, steps, report, text = pretend(tmp_path, "build=fail")
    assert status == 1 and "this nvcc does not compile for 9.0" in steps["build"]["why"]
    assert list(steps) == list(plan.STEPS) and not any(steps[name]["seconds"] for name in steps if name != "build")
    assert steps["rest"]["why"] == "nothing runs without the library"
    assert "nothing runs without the library" in report["notes"] and "nothing was measured" in text


def test_without_a_kernel_that_works_nothing_else_runs(tmp_path, capsys):
    status, steps, report, _ = pretend(tmp_path, "smoke=lost")
    begun = [name for name in steps if steps[name]["status"] != "not run"]
    assert status == 1 and begun == ["build", "smoke"] and len(report["failed_families"]) == 12


def listen_to_hangups():
    """Though whatever started the tests does not: nohup, say."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def started(out, faults, scale="0.1"):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-m", "benchmarks.gpu_report", str(out), "--pretend", faults, "--scale", scale]
    return subprocess.Popen(
        words, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        preexec_fn=listen_to_hangups,
    )  # fmt: skip


def wait_for(condition):
    for _ in range(1200):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("waited in vain")


def kill(process):
    process.kill()
    process.stdout.close()
    process.wait()


def test_killed_from_outside_in_the_middle_of_the_tests(tmp_path):
    out = tmp_path / "out"
    process = started(out, "tests=stuck,smoke.mix=fail", scale="0.5")
    failed = out / "failed.txt"
    wait_for(lambda: failed.exists() and "in the middle" in failed.read_text())
    kill(process)
    report, text = report_in(out)
    statuses = {step["name"]: step["status"] for step in report["steps"]}
    assert list(statuses) == list(plan.STEPS) and statuses["tests"] == "running" and statuses["rest"] == "not run"
    assert text.startswith("NOT ENDED: running tests at ") and f"process {process.pid} is gone" in text
    assert report["failed_families"] == ["mix"] and report["benchmark"]["cases"] and "tests       running" in text


@pytest.mark.parametrize("seed", range(3))
def test_killed_from_outside_at_any_moment(seed, tmp_path):
    out, draw = tmp_path / "out", random.Random(seed)
    process = started(out, "benchmark=lost,tests=lost,ncu=hang")
    wait_for(lambda: (out / "report.txt").exists() and "PRETENDED" in (out / "report.txt").read_text())
    time.sleep(draw.uniform(0, 4))
    kill(process)
    report, text = report_in(out)
    names = [step["name"] for step in report["steps"]]
    assert names == list(plan.STEPS) and "\nPRETENDED" in text
    if (out / "benchmark.json").exists():
        json.loads((out / "benchmark.json").read_text())


def test_a_polite_stop_from_outside_is_told(tmp_path):
    out = tmp_path / "out"
    process = started(out, "benchmark=stuck", scale="0.5")
    running = out / "benchmark.json"
    wait_for(lambda: running.exists() and "readout-pretended" in running.read_text())
    process.send_signal(signal.SIGTERM)
    printed = process.communicate()[0]
    report, text = report_in(out)
    assert process.returncode == 1 and "stopped from outside before the end" in report["notes"]
    assert [case["name"] for case in report["benchmark"]["cases"]] == ["state-pretended"] and printed.endswith(text)


def test_nobody_need_listen(tmp_path):
    process = started(tmp_path / "out", "build=fail")
    process.stdout.close()
    assert process.wait() == 1
    assert "this nvcc does not compile" in report_in(tmp_path / "out")[1]


def test_an_earlier_report_is_replaced_and_other_files_are_left_alone(tmp_path, capsys):
    assert folder.prepared(tmp_path) == (tmp_path, None)
    pretend(tmp_path, "build=fail")
    (tmp_path / "failed.txt").write_text("old")
    (tmp_path / "mine.txt").write_text("mine")
    found, note = folder.prepared(tmp_path)
    assert found == tmp_path and "mine.txt" in note and [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_files_of_something_else_are_not_overwritten(tmp_path, capsys):
    (tmp_path / "log.txt").write_text("mine")
    assert command.main([str(tmp_path), "--pretend", "build=fail"]) == 1
    told = capsys.readouterr().err.splitlines()[0]
    assert "holds log.txt of something else; the report goes to " in told
    other = Path(told.rpartition(" ")[2])
    assert report_in(other)[0]["notes"][0] in told and [path.name for path in tmp_path.iterdir()] == ["log.txt"]


def test_a_folder_that_cannot_be_used_has_another_take_its_place(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file/folder", Path("/proc/folder")):
        found, note = folder.prepared(path)
        assert found != path and found.is_dir() and f"{path} cannot be used (" in note


def test_on_a_full_disk_the_steps_go_on_and_all_is_printed(tmp_path, monkeypatch, capsys, only):
    only("build", "benchmark", "tests")

    def full(self, *arguments, **more):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(folder, "prepared", lambda path, pretended: (path, None))
    monkeypatch.setattr(Path, "write_text", full)
    assert command.main([str(tmp_path / "no/folder"), "--pretend", "tests=fail", "--scale", SCALE]) == 1
    printed = capsys.readouterr()
    assert printed.err.count("does not take all of the report: No space left on device") == 1
    assert "tests       4 passed, 2 failed" in printed.out and "note: " in printed.out


def test_faults():
    assert parsed_faults("") == {} and parsed_faults("ncu=hang,smoke.mix=fail") == {"ncu": "hang", "smoke.mix": "fail"}
    assert set(parsed_faults("sanitizers=refuse")) == {*plan.SANITIZERS, "memcheck_at_once"}
    for wrong in ("tests", "tests=odd", "nothing=fail"):
        with pytest.raises(ValueError, match="expected NAME=MODE"):
            parsed_faults(wrong)


@pytest.mark.parametrize("arguments", [["--pretend", "tests=odd"], ["--scale", "0"]])
def test_wrong_arguments(arguments, tmp_path, capsys):
    with pytest.raises(SystemExit):
        command.main([str(tmp_path), *arguments])
    assert arguments[0] in capsys.readouterr().err
