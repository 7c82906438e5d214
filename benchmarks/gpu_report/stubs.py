"""Stand-ins for the processes of the plan without a GPU: they print what those would print, and fail on request.

python -m benchmarks.gpu_report.stubs NAME MODE the real command
"""

import faulthandler
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

LIBRARY = os.environ.get("POM_EXT_TEST_LIBRARY")
MACHINE = {
    "gpu": "PRETENDED, NO GPU",
    "capability": "9.0",
    "driver": "none",
    "torch": "none",
    "cuda": "none",
    "python": ".".join(map(str, sys.version_info[:3])),
    "cores": len(os.sched_getaffinity(0)),
}
LOST_ERROR = "RuntimeError: CUDA error: an illegal memory access was encountered"


def say(*lines):
    print(*lines, sep="\n", flush=True)


def hang(stuck=False):
    if stuck:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    time.sleep(3600)


def misbehave(mode):
    """The failures of any process."""
    if mode in ("hang", "stuck"):
        hang(mode == "stuck")
    elif mode == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)


def value_after(words, option):
    return words[words.index(option) + 1]


def from_python(words):
    """The command that a tool runs."""
    return words[words.index(sys.executable) :]


def machine(mode, words):
    misbehave(mode)
    if mode != "ok":
        say("error: no GPU that torch can use: as told")
        return 1
    say(json.dumps(MACHINE))
    return 0


def build(mode, words):
    say("compiling nothing")
    misbehave(mode)
    if mode != "ok":
        say("error: TORCH_CUDA_ARCH_LIST: this nvcc does not compile for 9.0, only for 7.5; use another toolkit")
    return int(mode != "ok")


def smoke(mode, words):
    if mode == "hang":  # as smoke.py ends one
        faulthandler.dump_traceback_later(float(value_after(words, "--seconds")), exit=True)
    misbehave(mode)
    if mode == "ok" and LIBRARY:
        os.execv(words[0], words)
    lines = {"ok": "ok: not run", "fail": "wrong: power3-whole: y, part 0: error 0.5, bound 0.01"}
    say(f"smoke {lines.get(mode, f'failed: {LOST_ERROR}')}")
    return int(mode != "ok")


def benchmark(mode, words):
    """Writes three cases to the file as benchmarks.run does; the second misbehaves."""
    path = Path(value_after(words, "--json"))
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        content = {"cases": [], "wrong": []}
    if running := content.pop("running", None):
        content["wrong"].append(f"{running}: ended its process, or was stopped")
        save(content, path)
    names = (
        [value_after(words, "--case")]
        if "--case" in words
        else [f"{op}-pretended" for op in ("state", "readout", "mix")]
    )
    done = {case["name"] for case in content["cases"]} | {complaint.split(":")[0] for complaint in content["wrong"]}
    for name in names:
        if name in done:
            continue
        save({**content, "running": name}, path)
        if name == names[len(names) // 2]:
            if mode == "hang":
                faulthandler.dump_traceback_later(float(value_after(words, "--limit")), exit=True)
            misbehave(mode)
            if mode != "ok":
                content["wrong"].append(f"{name}: {LOST_ERROR if mode == 'lost' else 'error 0.5'}")
                say(f"WRONG {content['wrong'][-1]}")
                save(content, path)
                if mode == "lost":
                    return 3
                continue
        content["cases"].append({"name": name})
        say(name, "  pom_ext                   1.00")
        save(content, path)
    say(f"{len(names)} cases, 0 s")
    return int(any(complaint.split(":")[0] in names for complaint in content["wrong"]))


def save(content, path):
    try:
        aside = path.with_name(path.name + ".tmp")
        aside.write_text(json.dumps(content))
        os.replace(aside, path)
    except OSError as error:
        say(f"--json: {path} could not be written: {error}")


NCU = {
    "ID": "0", "Grid Size": "(2048, 1, 1)",
    "Kernel Name": "void pom::cuda::sum_features_kernel<pom::cuda::Instance<>>(Args)",
    "gpu__time_duration.sum": "33,500", "gpu__compute_memory_throughput.avg.pct_of_peak_sustained_elapsed": "66.1",
    "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed": "61.5",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "71.2",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "34.5", "launch__registers_per_thread": "78",
    "smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio": "3.25",
    "smsp__average_warps_issue_stalled_wait_per_issue_active.ratio": "1.5",
    "smsp__average_warps_issue_stalled_long_scoreboard_not_issued_per_issue_active.ratio": "9",
}  # fmt: skip


def ncu(mode, words):
    if mode == "refuse":
        say(
            "==PROF== Connected to process 1 (/usr/bin/python3)",
            "==ERROR== ERR_NVGPUCTRPERM - The user does not have permission to access NVIDIA GPU Performance Counters "
            "on the target device 0.",
        )
        return 1
    if LIBRARY and subprocess.run([*from_python(words), "--small"], check=False).returncode:
        return 1
    say('==PROF== Profiling "sum_features_kernel" - 0: 0%....50%....100% - 12 passes')
    misbehave(mode)
    if mode != "ok":
        say("==PROF== Disconnected", "error: the application ended with an error")
        return 1
    units = {**dict.fromkeys(NCU, ""), "gpu__time_duration.sum": "ns"}
    for row in ({column: column for column in NCU}, units, NCU):
        say(",".join(f'"{cell}"' for cell in row.values()))
    return 0


INVALID = (
    "========= Invalid __global__ read of size 4 bytes",
    "=========     at pom::cuda::reduce_groups_kernel(ReduceArgs)+0x70",
    "=========     by thread (0,0,0) in block (1,0,0)",
)


def sanitizer(mode, words):
    say("========= COMPUTE-SANITIZER")
    if mode == "refuse":
        say("========= Error: Target device is not supported by this tool")
        return 1
    if mode == "ok" and LIBRARY and (status := subprocess.run(from_python(words), check=False).returncode):
        return status
    if mode != "ok":
        say(*INVALID)
    misbehave(mode)
    errors = int(mode != "ok")
    summary = "RACECHECK SUMMARY: {} hazards displayed" if "racecheck" in words else "ERROR SUMMARY: {} errors"
    say(f"========= {summary.format(errors)}")
    return errors


TESTS = """
import os, signal, time
import pytest
MODE = {mode!r}

@pytest.mark.parametrize("number", range(3))
def test_before(number):
    pass

def test_first_failure():
    assert MODE == "ok", "as told, in the middle of the run"

def test_misbehaves():
    if MODE in ("hang", "stuck"):
        if MODE == "stuck":
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        time.sleep(3600)
    if MODE == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if MODE == "lost":
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

def test_after():
    assert MODE == "ok", "as told, at the end"
"""


def tests(mode, words):
    """The real pytest with the real options, except for the selection, over a few tests."""
    folder = Path(os.environ["POM_EXT_JOURNAL"]).with_suffix("")
    folder.mkdir(exist_ok=True)
    file = folder / "test_pretended.py"
    file.write_text(TESTS.format(mode=mode))
    words[words.index("-k") + 1] = "test"
    words = [word for word in words if not word.startswith(("--deselect", "--ignore"))]
    apart = ("-p", "no:hypothesispytest", "-c", os.devnull, "--rootdir", str(folder))  # of seconds, and of this project
    os.execv(words[0], [*words, *apart, str(file)])


def main():
    name, mode, *words = sys.argv[1:]
    kinds = {"library": build, "layers": benchmark, "rest": tests, "racecheck": sanitizer, "synccheck": sanitizer}
    kinds |= {"memcheck": sanitizer, "memcheck_at_once": sanitizer}
    kind = kinds.get(name) or globals()[name.partition(".")[0]]
    return kind(mode, words)


if __name__ == "__main__":
    sys.exit(main())
