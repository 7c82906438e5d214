"""The report of a GPU machine, without one: its commands, its time limits, and how it reads what they print."""

import ast
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import sanitized
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # the benchmarks are no part of the installed package

from benchmarks import device_cases, run
from benchmarks.gpu_report import command, machine, plan, profiled, read
from benchmarks.gpu_report.families import FAMILIES
from benchmarks.gpu_report.plan import World


@pytest.fixture
def world(tmp_path, monkeypatch):
    monkeypatch.setattr(World, "program", lambda self, name: f"/bin/{name}")
    return World(tmp_path, tmp_path, {"capability": "9.0"})


def words(process):
    return [str(word) for word in process.command]


def after(process, option):
    return words(process)[words(process).index(option) + 1]


def test_without_a_gpu_one_line_says_so(tmp_path, capsys):
    assert command.main([str(tmp_path / "out"), "--pretend", "machine=fail"]) == 1
    printed = capsys.readouterr()
    assert printed.err == "gpu-report: no GPU that torch can use: as told\n"
    assert printed.out == (tmp_path / "out/report.txt").read_text()
    assert printed.out.startswith("NOTHING RAN: no GPU that torch can use: as told\n")
    assert printed.out.count("told") == 1
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert not report["ok"] and {step["status"] for step in report["steps"]} == {"not run"}
    assert report["steps"][0]["why"] == "no GPU that torch can use: as told"


def test_the_machine_without_a_gpu_or_torch(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert machine.main() == 1
    assert capsys.readouterr().out.startswith("error: no GPU that torch can use: torch " + torch.__version__)
    monkeypatch.setitem(sys.modules, "torch", None)
    assert machine.main() == 1
    assert "has no torch" in capsys.readouterr().out


def test_a_driver_that_is_too_old_is_told(monkeypatch):
    said = "CUDA initialization: The NVIDIA driver on your system is too old (found version 11040)."

    def is_available():
        warnings.warn(said, stacklevel=1)
        return False

    monkeypatch.setattr(torch.cuda, "is_available", is_available)
    with pytest.raises(RuntimeError, match="driver on your system is too old"):
        machine.describe()


def test_all_steps_together_end_within_the_deadline():
    ends = plan.ends(0)
    assert max(ends.values()) + 10 <= plan.DEADLINE == 540
    assert list(ends) == ["machine", *plan.STEPS] and sorted(ends.values()) == list(ends.values())
    assert ends["tests"] - ends["ncu"] == plan.SECONDS["tests"], "unused seconds are passed on: an end is a time"
    assert plan.limit("tests", 300) == 300 and plan.limit("ncu", 300) == plan.MOST["ncu"] < 300
    assert plan.limit("ncu", 300, scale=0.1) == pytest.approx(plan.MOST["ncu"] / 10)


def test_the_build_is_for_this_gpu_alone(world):
    ((build,), (library,)) = plan.build(world).groups
    assert words(build) == [sys.executable, "setup.py", "build_ext", "--inplace"]
    for process in (build, library, plan.tests(world).groups[0][0]):
        assert process.environment["TORCH_CUDA_ARCH_LIST"] == "9.0" and process.environment["POM_EXT_CUDA"] == "1"


def test_a_library_without_cuda_kernels_fails_the_build_step():
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from pom_ext import _library; _library.DEVICES = ('cpu',); "
    done = subprocess.run([sys.executable, "-c", code + plan.HAS_KERNELS], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "built without CUDA kernels" in done.stderr


def test_every_family_has_a_process_and_the_newest_is_alone(world):
    together, (alone,) = plan.smoke(world).groups
    assert [process.name for process in (*together, alone)] == [f"smoke.{family}" for family in FAMILIES]
    assert alone.name == "smoke.project" and after(alone, "--seconds") == "15"


def test_the_benchmark_writes_into_the_folder_and_can_go_on(world):
    ((quick,),) = plan.quick_benchmark(world).groups
    assert {"--quick", "--resume", "--limit"} <= set(words(quick))
    assert (
        after(quick, "--json") == str(world.out / "benchmark.json") == after(plan.layers(world).groups[0][0], "--json")
    )
    assert after(quick, "--without") == plan.SIDE_BY_SIDE == after(plan.layers(world).groups[0][0], "--case")


def test_what_the_benchmark_is_told(world):
    def selected(step):
        command = words(step.groups[0][0])
        options = run.parsed(command[command.index("benchmarks.run") + 1 :])
        more = {"without": options.without, "also": options.also, "against": options.against}
        return run.selected(run.CASES["cuda"], options.case, options.quick, **more)

    names = [case.name for case in selected(plan.quick_benchmark(world))]
    assert plan.SIDE_BY_SIDE not in names and "causal_mix_backward-power3-N16384-E2048-bfloat16" in names
    ops = list(dict.fromkeys(name.partition("-")[0].partition("_")[0] for name in names))
    assert ops == ["state", "readout", "mix", "update", "causal", "layer"]
    (layer,) = selected(plan.layers(world))
    assert layer.name == plan.SIDE_BY_SIDE and set(layer.against) == {"context projection", "by blocks", "at once"}
    world.failed = {"state", "causal_backward"}
    names = {case.name.partition("-")[0] for case in selected(plan.quick_benchmark(world))}
    assert names == {"state_backward", "readout", "readout_backward", "mix", "mix_backward", "update", "causal_mix"}


def test_the_cases_that_are_named_exist():
    layer = device_cases.CASES[plan.SIDE_BY_SIDE]
    assert {"by blocks", "at once", "context projection"} <= set(layer.against)
    for pattern in sorted({pattern for family in FAMILIES.values() for pattern in family.cases}):
        assert any(run.matches(name, [pattern]) for name in device_cases.CASES), pattern


def test_what_needs_a_failed_family_is_left_out(world):
    world.failed = {"causal", "project"}
    assert plan.layers(world) == "project failed in the smoke step"
    quick = words(plan.quick_benchmark(world).groups[0][0])
    assert "causal_mix*" in quick and plan.SIDE_BY_SIDE not in quick
    selection = after(plan.tests(world).groups[0][0], "-k")
    assert selection.startswith(f"({plan.FIRST_TESTS}) and not (") and "causal" in selection
    (group,) = plan.sanitizers(world).groups
    assert all(words(process)[-3:] == ["--without", "causal", "project"] for process in group)
    assert words(plan.ncu(world).groups[0][0])[-3:] == ["--without", "causal_mix", "project"]


def test_what_families_name_exists():
    parts, calls = {*sanitized.MODES, *sanitized.PARTS}, set(profiled.calls("cpu", small=True))
    for name, family in FAMILIES.items():
        assert set(family.parts) <= parts and set(family.calls) <= calls, name


def test_tools_that_are_absent_are_told(world, monkeypatch):
    monkeypatch.setattr(World, "program", lambda self, name: None)
    assert "no ncu" in plan.ncu(world) and "no compute-sanitizer" in plan.sanitizers(world)


def test_the_sanitizers_keep_the_newest_kernel_apart(world):
    (group,) = plan.sanitizers(world).groups
    *others, newest = group
    assert [after(process, "--tool") for process in group] == ["memcheck", "racecheck", "synccheck", "memcheck"]
    for process in others:
        assert after(process, "--kernel-name-exclude") == "kernel_substring=project_pieces"
        assert words(process)[-4:] == [str(ROOT / "tests/sanitized.py"), "cuda", "--only", "cases"]
    assert words(newest)[-1] == "at_once" and "--kernel-name-exclude" not in words(newest)
    assert after(others[1], "--racecheck-report") == "all"
    assert all(process.environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1" for process in group)


def test_tests_of_missing_packages_are_left_out():
    everything = plan.pytest_words("not cpu", is_there=lambda package: True)
    assert everything[everything.index("-k") + 1] == "not cpu" and "-n" in everything and "--timeout=40" in everything
    assert "--continue-on-collection-errors" in everything
    assert not any("deselect" in word or "ignore" in word for word in everything)
    without = plan.pytest_words("not cpu", is_there=lambda package: package == "mlxtend")
    assert "-n" not in without and "--ignore=tests/diffusion/test_diffusion.py" in without
    assert not any("--timeout" in word for word in without)
    assert "--deselect=tests/training/test_training.py::test_noise_prediction_trains" in without
    assert not any("test_data" in word for word in without)
    assert set(plan.left_out(lambda package: package == "mlxtend")) == {"diffusers", "peft"}


def test_what_is_left_out_exists():
    for test in (test for tests in plan.NEEDS.values() for test in tests):
        file, _, name = test.partition("::")
        tree = ast.parse((ROOT / file).read_text())
        assert not name or name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, test


@pytest.mark.parametrize(
    "selection, failed, names",
    [
        (plan.FIRST_TESTS, (), {"test_a[cuda]", "test_graph_of_cuda"}),
        (plan.OTHER_TESTS, (), {"test_mask"}),
        (plan.OTHER_TESTS, ("mask",), set()),
    ],
)
def test_selections(selection, failed, names, tmp_path_factory):
    """Those with a device axis first, each test once, none of the CPU's."""
    code = (
        "import pytest\n@pytest.mark.parametrize('device', ['cpu', 'cuda'])\ndef test_a(device): pass\n"
        "def test_graph_of_cuda(): pass\ndef test_cuda_on_cpu(): pass\ndef test_mask(): pass\n"
    )
    folder = tmp_path_factory.mktemp("folder")  # whose name, unlike that of tmp_path, holds none of the words
    (folder / "test_selection.py").write_text(code)
    options = ["--collect-only", "-p", "no:hypothesispytest", "-c", os.devnull, "--rootdir", str(folder), str(folder)]
    arguments = plan.pytest_words(selection, failed, lambda package: package not in ("xdist", "pytest_timeout"))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *arguments, *options], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    found = {line.split("::")[1] for line in done.stdout.splitlines() if line.startswith("test_selection.py::")}
    assert found == names, done.stdout + done.stderr


def feed(reader, text):
    for line in text.splitlines():
        reader.line(line)
    return reader


MEMCHECK = """========= COMPUTE-SANITIZER
========= Invalid __global__ read of size 4 bytes
=========     at pom::cuda::join_groups(Join)+0x70
=========     by thread (0,0,0) in block (1,0,0)
========= Invalid __shared__ write of size 8 bytes
=========     at pom::cuda::scan_groups(Join)+0x10
"""
RACECHECK = (
    "========= Error: Race reported between Write access at a(int)+0x90 and Read access at a(int)+0xa0 [16 hazards]\n"
)


def test_sanitizers_are_counted_as_they_come():
    cut_short = feed(read.Sanitizer(), MEMCHECK).found("timed out")
    assert cut_short["errors"] == 2 and not cut_short["finished"]
    assert cut_short["records"][0] == "Invalid __global__ read of size 4 bytes at pom::cuda::join_groups(Join)+0x70"
    whole = feed(read.Sanitizer(), MEMCHECK + "========= ERROR SUMMARY: 12 errors").found(1)
    assert whole["errors"] == 12 and whole["finished"]
    none = feed(read.Sanitizer(), "39 cases on cuda\n========= ERROR SUMMARY: 0 errors").found(0)
    assert none == {"errors": 0, "finished": True, "records": []}
    summary = "========= RACECHECK SUMMARY: 3 hazards displayed (1 error, 2 warnings)"
    assert feed(read.Sanitizer(), RACECHECK + summary).found(1)["errors"] == 3
    assert feed(read.Sanitizer(), RACECHECK).found(1)["errors"] == 1
    assert feed(read.Sanitizer(), "killed").found(-9) == {"errors": None, "finished": False, "records": []}
    refused = feed(read.Sanitizer(), "========= Error: Target device is not supported").found(1)
    assert refused["refused"] == "Error: Target device is not supported"


def test_the_table_of_ncu_is_read():
    stall = "smsp__average_warps_issue_stalled_{}_per_issue_active.ratio"
    columns = [names[-1] for names in read.Ncu.COLUMNS.values()]
    rows = [
        [
            "ID",
            "Kernel Name",
            "Grid Size",
            *columns,
            *map(stall.format, ("wait", "barrier", "barrier_not_issued")),
        ],
        ["", "", "", "ns", "%", "%", "%", "%", "register/thread", "inst", "inst", "inst"],
        [
            "0",
            "void pom::cuda::<unnamed>::slopes<float>(Args)",
            "(1,1,1)",
            *["33,500", "80", "70", "60", "50", "64", "1.5", "2.5", "9"],
        ],
        [
            "1",
            "void pom::cuda::<unnamed>::slopes<float>(Args)",
            "(1,1,1)",
            *["34,500", "80", "70", "60", "50", "64", "1.5", "2.5", "9"],
        ],
        ["2", "mix_slab", "(2,1,1)", *["nan?", "80", "70", "60", "50", "64", "1.5", "0.5", "9"]],
    ]
    text = "\n".join(",".join(f'"{cell}"' for cell in row) for row in rows)
    reader = feed(read.Ncu(), f'==PROF== Profiling "slopes" - 0: 0%....100% - 12 passes\nprofiled state\n{text}')
    first, second = reader.table()
    assert reader.profiled == ["slopes"] and reader.refused() is None
    assert first["kernel"] == "slopes<float>" and first["us"] == pytest.approx(33.5) and first["dram_percent"] == 70
    assert (first["top_stall"], first["stalled_cycles"]) == ("barrier", 2.5)
    assert second["us"] is None and second["top_stall"] == "wait"
    refused = feed(read.Ncu(), "==ERROR== ERR_NVGPUCTRPERM - The user does not have permission")
    assert refused.refused().startswith("ERR_NVGPUCTRPERM") and refused.table() == []
    assert feed(read.Ncu(), "==ERROR== The application returned an error code (11).").refused() is None


@pytest.mark.parametrize(
    "text, status, outcome, why",
    [
        ("smoke ok: 3 cases", 0, "ok", "3 cases"),
        ("smoke wrong: y, part 0: error 0.5", 1, "wrong", "y, part 0: error 0.5"),
        ("smoke failed: RuntimeError: no kernel image", 2, "failed", "RuntimeError: no kernel image"),
        ('Timeout (0:00:15)!\nThread 1:\n  File "a.py", line 3\n  File "b.py"', 1, "hung", 'File "a.py", line 3'),
        ("", "timed out", "hung", "it was stopped"),
        ("Fatal Python error: Aborted", -6, "crashed", "signal 6 (aborted): Fatal Python error: Aborted"),
        ("smoke ok: 3 cases", -11, "crashed", "signal 11 (segmentation fault): smoke ok: 3 cases"),
    ],
)
def test_smoke_is_read(text, status, outcome, why):
    assert feed(read.Smoke(), text).found(status) == {"outcome": outcome, "why": why}


def test_a_journal_is_read(tmp_path):
    path = tmp_path / "journal"
    assert read.journal(path)["ended"] is False and read.journal(path)["failed_tests"] == []
    path.write_text("begin \nstart a[x y]\npassed a[x y]\nstart b\nfailed b\nerror b\nstart c\n")
    found = read.journal(path)
    assert (found["passed"], found["failed"], found["failed_tests"], found["lost"]) == (1, 1, ["b"], ["c"])
    assert not found["ended"] and found["started"] == ["a[x y]", "b", "c"]
    path.write_text(path.read_text() + "begin \nstart d\nskipped d\nend \n")
    assert read.journal(path)["ended"] and read.journal(path)["skipped"] == 1


def test_a_driver_that_hangs_is_told(tmp_path, capsys):
    assert command.main([str(tmp_path / "out"), "--pretend", "machine=stuck", "--scale", "0.02"]) == 1
    assert "torch did not answer" in capsys.readouterr().err


def test_the_selection_for_the_sanitizer_runs(capsys):
    sanitized.main(["cpu"])
    assert f"{len(sanitized.SELECTION)} cases on cpu" in capsys.readouterr().out
    sanitized.main(["cpu", "--only", "cases", "--without", "backward", "update", "mask"])
    without = [case for case in sanitized.SELECTION if case.mode != "mask"]
    assert f"{len(without)} cases on cpu" in capsys.readouterr().out
    case = without[0]
    assert set(sanitized.results_of(case, "cpu", ("backward", "update"))) == {"y", "state"}
    assert {"grad u", "updated"} <= set(sanitized.results_of(case, "cpu"))
    sanitized.main(["cpu", "--only", "at_once"])
    assert capsys.readouterr().out.startswith("0 cases on cpu")


def test_json_of_the_machine(monkeypatch, capsys):
    monkeypatch.setattr(machine, "describe", lambda: {"gpu": "Testing 100"})
    assert machine.main() == 0 and json.loads(capsys.readouterr().out) == {"gpu": "Testing 100"}
