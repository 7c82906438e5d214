"""The command of the benchmarks, and the cases that it checks, chooses, times and writes down."""

import json
import sys
from pathlib import Path

import pytest
import torch

from pom_ext.ops import _library

sys.path.insert(0, str(Path(__file__).parents[2]))  # the benchmarks are no part of the installed package

from benchmarks import run
from benchmarks.harness import baselines, checked, op_case
from benchmarks.harness.measure import OURS
from benchmarks.harness.table import table
from benchmarks.harness.timing import Settings
from benchmarks.suites import SUITES, core

ROUNDS = Settings(seconds=0, least_rounds=2)


def test_every_suite_is_in_the_table(capsys):
    """And every module of the folder is a suite."""
    folder = Path(run.__file__).parent / "suites"
    assert {path.stem.replace("_", "-") for path in folder.glob("[a-z]*.py")} == set(SUITES)
    assert run.main(["--list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(SUITES)
    assert run.main(["--help"]) == 0
    assert "SUITE --help" in capsys.readouterr().out


@pytest.mark.parametrize("suite", SUITES)
def test_a_suite_tells_its_options(suite, capsys):
    with pytest.raises(SystemExit) as ended:
        run.main([suite, "--help"])
    printed = " ".join(capsys.readouterr().out.split())
    assert ended.value.code == 0 and f"python -m benchmarks.run {suite} " in printed and "--json FILE" in printed
    assert SUITES[suite] in printed


@pytest.mark.parametrize("suite", SUITES)
def test_a_missing_folder_is_an_error_of_every_suite(suite, capsys):
    with pytest.raises(SystemExit) as ended:
        run.main([suite, "--json", "no/folder/x.json"])
    assert ended.value.code == 2 and "--json: there is no folder no/folder" in capsys.readouterr().err


def test_a_suite_that_does_not_exist(capsys):
    with pytest.raises(SystemExit) as ended:
        run.main(["crossover"])
    assert ended.value.code == 2
    assert "error: no suite is called 'crossover'; there are core, ops, " in capsys.readouterr().err


def test_command(registry, tmp_path, capsys):
    path = tmp_path / "results.json"
    assert run.main(["--json", str(path)]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert "cores" in printed[0] and torch.__version__ in printed[0]
    assert any("≥ 1e+09 MISSED" in line for line in printed)
    assert "0 of 1 targets reached" in printed
    content = json.loads(path.read_text())
    assert set(content) == {"machine", "settings", "cases", "wrong"}
    assert {"processor", "cores", "instruction_set", "threads", "torch", "commit", "date", "load"} <= set(
        content["machine"]
    )
    assert list(content["settings"]["cleared_bytes"]) == ["host"]
    assert [case["name"] for case in content["cases"]] == [case.name for case in registry]
    state = content["cases"][0]
    assert state["dtype"] == "float32" and state["kind"] == "time"
    assert state["shapes"] == {"u": [1, 33, 32], "coeff": [32, 2]}
    assert state["targets"][0]["reached"] is False and state["targets"][0]["measured"] == state["ratios"]["plain"]
    assert list(tmp_path.iterdir()) == [path]


def test_device_command(stand_in, tmp_path, capsys):
    path = tmp_path / "results.json"
    assert run.main(["--device", "cuda", "--json", str(path), "--predict", "2"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("A GPU, driver 1.2.3, CUDA 13.0, ") and torch.__version__ in printed[0]
    assert printed[1].startswith("copy of 4.0 KiB: ")
    assert any("copy bandwidth ≥ 1e-09 reached, microseconds ≤ 0.001 MISSED" in line for line in printed)
    assert any("of copy" in line and "warm µs" in line for line in printed)
    content = json.loads(path.read_text())
    assert set(content) == {"machine", "settings", "copy", "cases", "wrong"}
    assert content["machine"]["gpu"] == "A GPU" and content["copy"]["bytes_moved"] == 8192
    mix = content["cases"][0]
    assert (mix["clock"], mix["judged"], mix["bytes_moved"]) == ("graph", "cold", stand_in[0].bytes_moved)
    assert mix["predicted_us"] == mix["bytes_moved"] / 2e3
    row = mix["contenders"][OURS]
    assert row["bytes_per_second"] == pytest.approx(1e3 * mix["bytes_moved"] / row["median_ms"])
    assert row["share_of_copy"] == row["bytes_per_second"] / content["copy"]["bytes_per_second"]
    assert mix["targets"][0]["measured"] == row["share_of_copy"]
    assert mix["targets"][1]["measured"] == pytest.approx(1e3 * row["median_ms"])
    assert "warm_median_ms" in row and mix["warm_ratios"] == {}


def test_device_that_is_not_there(no_gpu):
    with pytest.raises(SystemExit, match="--device cuda: torch .* finds no GPU"):
        run.main(["--device", "cuda"])


def test_library_without_kernels_for_the_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(_library, "DEVICES", ("cpu",))
    with pytest.raises(SystemExit, match="--device cuda: the library was built without its kernels"):
        run.main(["--device", "cuda"])


def test_predictions_need_no_device(no_gpu, capsys):
    chosen = ("--case", "state-power3-N16384-*-bfloat16", "layer-*")
    assert run.main(["--device", "cuda", "--list", "--predict", "1000", *chosen]) == 0
    head, line = capsys.readouterr().out.splitlines()
    assert head.split() == ["at", "1000", "GB/s", "bytes", "µs"]
    size = 2 * 16384 * 2048 + 4 * 2048 * 3 + 2 * 4 * 2048 + 8
    assert line.split() == ["state-power3-N16384-E2048-bfloat16", f"{size:,}", "67.1"]


def test_case_that_does_not_run(registry, monkeypatch, tmp_path, capsys):
    def broken(*arguments, **options):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(op_case, "polynomial_state", broken)
    path = tmp_path / "results.json"
    assert run.main(["--json", str(path)]) == 1
    content = json.loads(path.read_text())
    assert content["wrong"] == [f"{registry[0].name}: RuntimeError: out of memory"]
    assert [case["name"] for case in content["cases"]] == [registry[1].name]


def test_quick_keeps_the_cases_with_targets(registry):
    (case,) = checked.selected(core.CASES["cpu"], [], quick=True)
    assert case.name == registry[0].name and case.against == ("plain",)
    assert len(checked.selected(core.CASES["cpu"], [], quick=True, also=["mix*"])) == 2


def test_cases_and_baselines_that_are_left_out(registry):
    (case,) = checked.selected(core.CASES["cpu"], [], quick=False, without=["mix*"], against=["sum"])
    assert case.name == registry[0].name and case.against == ("sum",)


def test_list(registry, capsys):
    assert run.main(["--list", "--case", "mix*"]) == 0
    assert capsys.readouterr().out.split() == [registry[1].name]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--case", "nothing*"],
        ["--json", "no/folder/x.json"],
        ["--threads", "0"],
        ["--resume"],
        ["--limit", "0"],
        ["--quick", "--case", "mix*"],
        ["--predict", "3350"],  # of the host
        ["--predict", "0", "--device", "cuda"],
        ["--device", "tpu"],
    ],
)
def test_wrong_arguments(registry, arguments, capsys):
    with pytest.raises(SystemExit) as error:
        run.main(arguments)
    assert arguments[0] in str(error.value) + capsys.readouterr().err


def test_wrong_results_are_not_timed(registry, monkeypatch, tmp_path, capsys):
    polynomial_state = op_case.polynomial_state
    monkeypatch.setattr(op_case, "polynomial_state", lambda u, *rest, **more: polynomial_state(2 * u, *rest, **more))
    path = tmp_path / "results.json"
    assert run.main(["--json", str(path)]) == 1
    assert f"WRONG {registry[0].name}: error" in capsys.readouterr().out
    content = json.loads(path.read_text())
    assert [case["name"] for case in content["cases"]] == [registry[1].name]
    assert len(content["wrong"]) == 1


def test_baseline_that_does_not_run(registry, monkeypatch, clock):
    def broken(*arguments):
        raise RuntimeError("not on this machine")

    monkeypatch.setattr(baselines, "features", broken)
    result = registry[0].measure(clock, ROUNDS)
    assert result["failed"] == {"plain": "RuntimeError: not on this machine"}
    assert list(result["ratios"]) == ["sum"]
    assert result["targets"][0]["reached"] is None
    assert any("did not run: RuntimeError" in line for line in table(registry[0].name, result))
