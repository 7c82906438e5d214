"""Readers of the output of the steps: each takes lines as they come, and can tell its results at any time."""

import csv
import json
import re
import signal
from collections import Counter
from pathlib import Path

from ..suites.resources import shortened
from .run import INTERRUPTED, TIMED_OUT

LONGEST = 300  # characters of one line in the report


def short(text):
    """One line of a report."""
    return " ".join(text.split())[:LONGEST]


def crash(status):
    """ "signal 11 (segmentation fault)" of an exit status that tells so, the program's own or a shell's; else None."""
    number = abs(status) - (128 if status > 0 else 0) if isinstance(status, int) else 0
    return f"signal {number} ({signal.strsignal(number).lower()})" if number in signal.valid_signals() else None


class Tail:
    """The last lines."""

    def __init__(self, size=200):
        self.lines, self._size, self._at_interrupt = [], size, None

    def line(self, text):
        if text == INTERRUPTED:
            said = [line for line in self.lines if line.strip() and not line.startswith("$ ")]
            self._at_interrupt = f"the last it said: {short(said[-1])}" if said else "it had printed nothing"
        self.lines.append(text)
        del self.lines[: -self._size]

    def reason(self):
        """The line that best tells why a command failed: the last about an error, else the last; the last line before
        it was stopped, if it was stopped."""
        if self._at_interrupt:
            return self._at_interrupt
        said = [line for line in self.lines if line.strip() and not line.startswith("$ ")]
        errors = [line for line in said if re.search(r"\b(error|Error|ERROR|fatal|refused)\b|Error:", line)]
        return short((errors or said or ["it printed nothing"])[-1])


class Smoke:
    """The result that a process of smoke.py printed for its family."""

    def __init__(self):
        self._tail, self._said, self._hung = Tail(), None, False

    def line(self, text):
        self._tail.line(text)
        if match := re.match(r"smoke (ok|wrong|failed): (.*)", text):
            self._said = match[1], short(match[2])
        self._hung |= bool(re.match(r"Timeout \(\d+:\d+:\d+", text))

    def found(self, status):
        """{"outcome": "ok", "wrong", "failed", "hung" or "crashed", "why"}, given the exit status of its process."""
        if status == TIMED_OUT or self._hung:
            where = [line.strip() for line in self._tail.lines if re.match(r"\s+File ", line)]
            return {"outcome": "hung", "why": short(where[0]) if where else "it was stopped"}
        if self._said is None or (status < 0 and self._said[0] == "ok"):
            return {"outcome": "crashed", "why": f"{crash(status) or f'exit status {status}'}: {self._tail.reason()}"}
        outcome, why = self._said
        return {"outcome": outcome, "why": why}


def journal(path):
    """Of a journal that failures.py wrote: {"passed": 12, "failed": 1, ..., "failed_tests": [...], "started": [...],
    "lost": the tests that began and have no outcome, "ended": whether every process of the tests came to its end,
    "selected": how many tests there are, None if that is not known}."""
    outcomes, started, ended, selected = {}, [], True, None
    try:
        lines = Path(path).read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    for line in lines:
        word, _, test = line.partition(" ")
        if word == "begin":
            ended = False
        elif word == "end":
            ended = True
        elif word == "start":
            started.append(test)
        elif word == "selected":  # by each process: the first has them all, later ones those that are left
            selected = max(selected or 0, int(test))
        elif outcomes.get(test) not in ("failed", "error"):
            outcomes[test] = word
    counts = Counter(outcomes.values())
    return {
        **counts,
        "failed_tests": sorted(test for test, word in outcomes.items() if word in ("failed", "error")),
        "started": started,
        "lost": [test for test in started if test not in outcomes],
        "ended": ended and bool(lines),
        "selected": selected,
    }


class Sanitizer:
    """The errors that compute-sanitizer prints, counted line by line, since its own sum may never come."""

    MOST = 10  # that are told in words
    RECORD = re.compile(
        r"=+ (Invalid \S+ (?:read|write|atomic).*|(?:Error|Warning|Info): (?:Race|Potential) .*|Barrier error.*|"
        r"Program hit .*|Malformed .*|Fatal UTF-8 .*|Uninitialized .*|Missing wait.*|.* hazard .* detected.*)"
    )
    REFUSED = re.compile(
        r"(?i)not supported|unable to|no attachable process|internal sanitizer error|insufficient driver"
    )

    def __init__(self):
        self.errors, self.records, self._summary, self._place = 0, [], None, False
        self.tail = Tail()

    def line(self, text):
        self.tail.line(text)
        if match := re.search(r"(?:ERROR|RACECHECK) SUMMARY: (\d+) (?:error|hazard)", text):
            self._summary = int(match[1])
        elif match := self.RECORD.match(text):
            self.errors += 1
            self._place = len(self.records) < self.MOST
            if self._place:
                self.records.append(short(match[1]))
        elif self._place and (match := re.match(r"=+\s+(?:at|Saved|and) (.*)", text)):
            self.records[-1] = short(f"{self.records[-1]} at {match[1]}")
            self._place = False

    def found(self, status):
        """{"errors", "finished", "records", "refused"?}; errors is None where it came to no end and found nothing."""
        finished = self._summary is not None
        errors = max(self.errors, self._summary or 0)
        found = {"errors": errors if finished or errors else None, "finished": finished, "records": self.records}
        said = [line for line in self.tail.lines if line.startswith("=") and self.REFUSED.search(line)]
        if not finished and not errors and (said or status == 127):
            found["refused"] = short(said[-1]).lstrip("= ") if said else self.tail.reason()
        return found


class Ncu:
    """The table of Nsight Compute: `--csv --page raw`, a row per kernel, after a row of units."""

    OF_PEAK = "throughput.avg.pct_of_peak_sustained_elapsed"
    COLUMNS = {  # by the names that its versions give them
        "us": ("gpu__time_duration.sum",),
        "memory_percent": (f"gpu__compute_memory_{OF_PEAK}",),
        "dram_percent": (f"gpu__dram_{OF_PEAK}", f"dram__{OF_PEAK}"),
        "sm_percent": (f"sm__{OF_PEAK}",),
        "occupancy_percent": ("sm__warps_active.avg.pct_of_peak_sustained_active",),
        "registers": ("launch__registers_per_thread",),
    }
    STALL = re.compile(r"smsp__average_warps?_(?:latency_)?issue_stalled_(\w+?)(?:_per_issue_active)?\.ratio")
    TO_US = {"nsecond": 1e-3, "ns": 1e-3, "usecond": 1, "us": 1, "msecond": 1e3, "ms": 1e3, "second": 1e6, "s": 1e6}

    def __init__(self):
        self._header, self._rows, self.profiled, self.tail = None, [], [], Tail()

    def line(self, text):
        self.tail.line(text)
        if match := re.match(r'==PROF== Profiling "(.+?)"', text):
            self.profiled.append(match[1])
        elif text.startswith('"ID"'):
            self._header = next(csv.reader([text]))
        elif self._header and text.startswith('"'):
            self._rows.append(dict(zip(self._header, next(csv.reader([text])), strict=False)))

    def refused(self):
        """The error of Nsight Compute if it may not read the counters, or None."""
        said = [line for line in self.tail.lines if re.match("==ERROR==(?!.*application)", line)]
        return short(said[0]).removeprefix("==ERROR== ") if said and not self._rows else None

    def table(self):
        """A dictionary per kernel: its name, what is in COLUMNS, the stall that takes the most and its cycles."""
        units, kernels, seen = {}, [], set()
        for row in self._rows:
            if not row.get("ID"):
                units = row
                continue
            name = shortened(row.get("Kernel Name", "?").replace("<unnamed>::", ""))
            kernel = {"kernel": name, "grid": row.get("Grid Size")}
            if tuple(kernel.values()) in seen:
                continue
            seen.add(tuple(kernel.values()))
            for name, columns in self.COLUMNS.items():
                column = next((column for column in columns if column in row), None)
                scale = self.TO_US.get(units.get(column, ""), 1e-3) if name == "us" else 1
                value = number(row.get(column))
                kernel[name] = None if value is None else scale * value
            stalls = {m[1]: number(row[c]) or 0.0 for c in row if c and (m := self.STALL.fullmatch(c))}
            for name in [name for name in stalls if name == "selected" or name.endswith("_not_issued")]:
                del stalls[name]  # no stall, and the others counted in another way
            if stalls:
                kernel["top_stall"] = max(stalls, key=stalls.get)
                kernel["stalled_cycles"] = stalls[kernel["top_stall"]]
            kernels.append(kernel)
        return kernels


def number(text):
    try:
        return float((text or "").replace(",", ""))
    except ValueError:
        return None


def why_ended(lines, status):
    """Why a process of the benchmark ended in the middle of a case."""
    if status == TIMED_OUT:
        return "was running when the time of its step was up"
    if any(line.startswith("Timeout (") for line in lines):
        return "hung, and was ended"
    return f"crashed: {crash(status)}" if crash(status) else f"ended its process: exit status {status}"


def benchmark(path):
    """The results of the benchmark so far, or None."""
    try:
        return json.loads(Path(path).read_text())
    except (OSError, ValueError):
        return None
