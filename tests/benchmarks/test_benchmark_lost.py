"""A benchmark that loses its GPU, its process or its disk loses no result: another run goes on where it ended."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))  # the benchmarks are no part of the installed package

from test_benchmarks import registry, stand_in  # noqa: F401 -- fixtures

from benchmarks import ops, run
from benchmarks.fatal import is_fatal


def test_a_lost_gpu_ends_the_run_and_another_goes_on(stand_in, monkeypatch, tmp_path, capsys):
    lost, other = stand_in
    path = tmp_path / "results.json"
    command = ["--device", "cuda", "--json", str(path), "--resume", "--limit", "60"]
    monkeypatch.setattr(run.faulthandler, "dump_traceback_later", lambda *arguments, **options: None)

    def broken(*arguments, **options):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with monkeypatch.context() as gpu_is_lost:
        gpu_is_lost.setattr(ops, "polynomial_mix", broken)
        assert run.main(command) == run.LOST
    content = json.loads(path.read_text())
    told = [f"{lost.name}: RuntimeError: CUDA error: an illegal memory access was encountered"]
    assert content["wrong"] == told and content["cases"] == []
    copied = content["copy"]
    assert run.main(command) == 1  # of the case that was lost
    content = json.loads(path.read_text())
    assert content["wrong"] == told and [case["name"] for case in content["cases"]] == [other.name]
    assert content["copy"] == copied and "running" not in content
    assert run.main(command) == 1 and json.loads(path.read_text())["cases"] == content["cases"]


def test_a_case_that_ended_the_process_is_told_and_not_run_again(registry, tmp_path, capsys):
    path = tmp_path / "results.json"
    path.write_text(json.dumps({"cases": [], "wrong": [], "running": registry[0].name}))
    assert run.main(["--json", str(path), "--resume"]) == 1
    content = json.loads(path.read_text())
    assert content["wrong"] == [f"{registry[0].name}: ended its process, or was stopped"]
    assert [case["name"] for case in content["cases"]] == [registry[1].name]


def test_the_case_that_runs_is_in_the_file(registry, monkeypatch, tmp_path):
    path = tmp_path / "results.json"

    def stopped(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(ops, "polynomial_mix", stopped)
    with pytest.raises(KeyboardInterrupt):
        run.main(["--json", str(path)])
    content = json.loads(path.read_text())
    assert content["running"] == registry[1].name and [case["name"] for case in content["cases"]] == [registry[0].name]


def test_a_file_that_cannot_be_written_does_not_end_the_run(registry, monkeypatch, tmp_path, capsys):
    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run, "atomic_write", full)
    assert run.main(["--json", str(tmp_path / "results.json")]) == 0
    printed = capsys.readouterr().out
    assert "could not be written: [Errno 28] No space left on device" in printed and "1 targets reached" in printed


def test_what_other_cases_lacked_is_no_failure_of_these(registry, tmp_path, capsys):
    path = tmp_path / "results.json"
    path.write_text(json.dumps({"cases": [], "wrong": [f"{registry[0].name}: hung"]}))
    assert run.main(["--json", str(path), "--resume", "--case", registry[1].name]) == 0
    assert run.main(["--json", str(path), "--resume"]) == 1


def test_a_file_of_something_else_is_begun_anew(tmp_path):
    path = tmp_path / "results.json"
    for text in ("", "[1]", "{}", '{"cases": []}'):
        path.write_text(text)
        assert run.left_by(path) == {"cases": [], "wrong": []}
    assert run.left_by(tmp_path / "none") == {"cases": [], "wrong": []}


def test_fatal_errors():
    for text in ("CUDA error: misaligned address", "CUDA refused the call (unspecified launch failure on cuda:0)"):
        assert is_fatal(text)
    assert not is_fatal("CUDA out of memory. Tried to allocate 2 GiB") and not is_fatal("error 0.5 against the formula")
