"""The processes of the GPU report: stopped in time with all that they started, and every line passed on as it comes."""

import os
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # the benchmarks are no part of the installed package

from benchmarks.gpu_report.folder import Log
from benchmarks.gpu_report.run import INTERRUPTED, TIMED_OUT, Process, run


def python(name, code, **more):
    return Process(name, (sys.executable, "-c", code), **more)


def run_all(*processes, seconds=60, grace=0.5, **more):
    """({name: status}, {name: its lines})."""
    lines = {}

    def log(name, text):
        lines.setdefault(name, []).append(text)

    return run(list(processes), time.monotonic() + seconds, grace=grace, log=log, **more), lines


IGNORE = "import os, signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); "
SLEEP = f"{IGNORE}print(os.getpid(), flush=True); time.sleep(60)"


def ends(pid):
    """Whether a process ends before it has slept."""
    for _ in range(200):
        try:
            if (Path(f"/proc/{pid}/stat")).read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.1)
    return False


def test_exit_statuses_and_lines():
    heard = []
    statuses, lines = run_all(
        python("a", "print('one'); print('two', end='')", line=heard.append),
        python("b", "exit(3)"),
        python("c", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"),
        Process("d", ("no-such-program",)),
    )
    assert statuses == {"a": 0, "b": 3, "c": -11, "d": 127}
    assert heard[0].startswith("$ ") and heard[1:] == ["one", "two"] and lines["a"] == heard
    assert "no-such-program" in lines["d"][-1]


def test_processes_have_their_environment_and_the_source_folder(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/somewhere/else")
    code = "import os, pom_ext, sys; print(os.environ['A'], os.getcwd(), '/somewhere/else' in sys.path)"
    statuses, lines = run_all(python("a", code, environment={"A": "5"}))
    assert statuses == {"a": 0} and lines["a"][-1] == f"5 {ROOT} True"


def test_an_interrupt_comes_first_and_what_is_said_then_is_heard():
    code = "import time\ntry:\n    print('began'); time.sleep(60)\nexcept KeyboardInterrupt:\n    print('found: 3')"
    statuses, lines = run_all(python("a", code), seconds=1.5, grace=20)
    assert statuses == {"a": TIMED_OUT} and lines["a"][1:] == ["began", INTERRUPTED, "found: 3"]


def test_a_kill_comes_then_with_all_that_it_started():
    parent = f"import subprocess, sys; child = subprocess.Popen([sys.executable, '-c', {SLEEP!r}]); {SLEEP}"
    statuses, lines = run_all(python("a", parent), seconds=4)
    assert statuses == {"a": TIMED_OUT} and lines["a"][3:] == [INTERRUPTED]
    assert all(ends(pid) for pid in lines["a"][1:3])


def test_what_a_process_leaves_behind_is_stopped_with_it():
    """Though that one holds the pipe."""
    leave = f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', {SLEEP!r}], stdout=subprocess.PIPE)"
    statuses, lines = run_all(python("a", f"{leave}; print(p.stdout.readline().decode())"))
    assert statuses == {"a": 0} and ends(lines["a"][1])


def test_side_by_side_and_limits_of_their_own():
    hung = [python(name, "import time; time.sleep(60)", seconds=1.5) for name in "ab"]
    statuses, _ = run_all(*hung, python("c", "print('c')"))
    assert statuses == {"a": TIMED_OUT, "b": TIMED_OUT, "c": 0}


def test_some_at_a_time_and_none_begins_too_late():
    code = "import time; print(time.monotonic()); time.sleep(0.4); print(time.monotonic())"
    _, lines = run_all(python("a", code), python("b", code), at_once=1)
    assert float(lines["a"][2]) <= float(lines["b"][1])
    statuses, lines = run_all(python("a", "pass"), seconds=-1)
    assert statuses == {"a": TIMED_OUT} and not lines


def test_a_reader_that_fails_stops_nothing():
    def line(text):
        raise ValueError("never seen")

    statuses, lines = run_all(python("a", "print('one')", line=line))
    assert statuses == {"a": 0} and "one" in lines["a"] and "never seen" in lines["a"][-1]


def test_a_process_ends_with_the_one_that_runs_it():
    """Though that is killed and can do nothing about it."""
    code = (
        "import os, signal, sys, time; from benchmarks.gpu_report.run import Process, run\n"
        "def line(text):\n    if text.isdigit(): print(text, flush=True); os.kill(os.getpid(), signal.SIGKILL)\n"
        f"run([Process('a', (sys.executable, '-c', {SLEEP!r}), line=line)], time.monotonic() + 60)"
    )
    statuses, lines = run_all(python("outer", code))
    assert statuses == {"outer": -9} and ends(lines["outer"][-1])


def test_an_interrupt_is_heard_by_those_whom_a_script_started_in_the_background():
    """Such a script has its children ignore it."""
    code = (
        "import signal, sys, time; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "from benchmarks.gpu_report.run import Process, run\n"
        "child = Process('a', (sys.executable, '-c', 'import time; time.sleep(60)'), line=print)\n"
        "run([child], time.monotonic() + 1, grace=30)"
    )
    statuses, lines = run_all(python("outer", code), seconds=30)
    assert statuses == {"outer": 0} and lines["outer"][-1] == "KeyboardInterrupt"


def test_of_who_says_too_much_begin_and_end_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.gpu_report.folder.LONGEST_LOG", 200)
    monkeypatch.setattr("benchmarks.gpu_report.folder.END_OF_LOG", 2)
    log = Log(tmp_path / "log.txt", unwritten=None)
    for i in range(100):
        log("a", f"line {i}")
    log("b", "other")
    log.finish()
    text = (tmp_path / "log.txt").read_text()
    assert text.startswith("a| line 0\na| line 1\n") and text.endswith("left out here)\na| line 98\na| line 99\n")
    assert "b| other\n" in text and len(text) < 400


def test_a_log_that_cannot_be_written_is_told():
    told = []
    Log(Path(os.devnull) / "log.txt", told.append)("a", "line")
    assert len(told) == 1 and isinstance(told[0], OSError)
