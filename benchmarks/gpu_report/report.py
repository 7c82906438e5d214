"""The report: what is known by now, written to report.json and report.txt after every step and during the long ones.

Both are written aside and put in place whole, so whoever ends this program at whatever second finds readable files.
"""

import datetime
import json
import os
import re
import subprocess
import time

from . import plan, read
from .families import FAMILIES
from .folder import MARK, Log, atomic_write, complain
from .run import ROOT, TIMED_OUT

EVERY = 5  # seconds between two writings within a step
MAY_BE_MISSING = ("layers", "ncu", "sanitizers", "rest")  # steps without which a report can be ok
SEARCHING, RUNNING, ENDED, STOPPED, NO_GPU = "looking for a GPU", "running", "ended", "stopped", "no GPU"


def now():
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")


def commit():
    """Of the source, "+" if it was changed since; None if git cannot tell."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+"]
    try:
        return subprocess.run(command, check=False, capture_output=True, text=True, timeout=5).stdout.strip() or None
    except (OSError, subprocess.TimeoutExpired):
        return None


def pytest_counts(lines):
    """{"passed": 12, "failed": 1, ...} of pytest's last line, where there is one."""
    ends = [line for line in lines if re.search(r"\b\d+ \w+.* in \d+\.\d+s", line)]
    found = re.findall(r"(\d+) (passed|failed|skipped|deselected|error)", ends[-1]) if ends else []
    return {word: int(number) for number, word in found}


class Report:
    def __init__(self, world, notes=()):
        self.world, self.notes = world, list(notes)
        self.state, self.begun, self.commit = SEARCHING, now(), commit()
        self.steps = [
            {"name": name, "status": "not run", "seconds": 0.0, "limit": 0.0, "ok": None, "why": None}
            for name in plan.STEPS
        ]
        self.findings, self._step, self._why = {}, None, None
        self.log = Log(world.out / "log.txt", self.unwritten)
        self._readers, self._started, self._written = {}, 0.0, 0.0

    def note(self, text):
        """One line, told once."""
        if text not in self.notes:
            self.notes.append(text)
            complain(text)

    def step(self, name):
        return next(step for step in self.steps if step["name"] == name)

    def begin(self, name, step, limit):
        self._readers, self._started = step.readers, time.monotonic()
        self._step = self.step(name)
        self._step |= {"status": "running", "limit": limit}
        self.beat({}, 0)

    def skip(self, name, why):
        self.step(name)["why"] = why
        self.write()

    def end(self, statuses):
        """Of the step that runs; True, False, or None where it could not be done."""
        step = self._step
        bad = [status for status in statuses.values() if status != 0]
        step["status"] = TIMED_OUT if TIMED_OUT in bad else bad[0] if bad else 0
        step["ok"], step["why"] = self._look(step, statuses)
        step["seconds"] = time.monotonic() - self._started
        self.write()
        return step["ok"]

    def beat(self, statuses, every=EVERY):
        """Called all the time while a step runs, with the statuses of its processes that have ended."""
        now = time.monotonic()
        if now - self._written > every * self.world.scale:
            self._step["seconds"] = now - self._started
            self._look(self._step, statuses)
            self.write()

    def stop(self, why):
        """From outside, in the middle of a step or between two."""
        if self._step and self._step["status"] == "running":
            self._look(self._step, {})
            self._step |= {"status": "stopped", "ok": False, "why": why}
        self.finish(why, STOPPED)

    def finish(self, why=None, state=ENDED):
        """Nothing runs from here on; why, if not all was run."""
        self.state, self._why = state, why
        if why:
            self.note(why)
        for step in self.steps:
            if step["status"] == "not run":
                step["why"] = step["why"] or why

    def _look(self, step, statuses):
        """Put what is found by now into self.findings. Returns (whether all is well, why not)."""
        name, status = step["name"], step["status"]
        what = {"layers": "benchmark", "rest": "tests"}.get(name, name)
        try:
            ok, why = getattr(self, f"_look_at_{what}")(name, status, statuses)
        except Exception as error:  # noqa: BLE001 -- output of a kind never seen must not end the report
            ok, why = False, f"what it printed could not be read: {type(error).__name__}: {error}"
        if status == TIMED_OUT:
            return False, f"its time was up{f'; {why}' if why else ''}"
        if ok is False and (signal := read.crash(status)) and signal not in (why or ""):
            return False, f"crashed: {signal}{f'; {why}' if why else ''}"
        return ok, why

    def _look_at_build(self, name, status, statuses):
        return status == 0, None if status == 0 else self._readers[name].reason()

    def _look_at_smoke(self, name, status, statuses):
        found = {f: self._readers[f].found(statuses[f"smoke.{f}"]) for f in FAMILIES if f"smoke.{f}" in statuses}
        self.findings["smoke"] = found
        self.world.failed = {family for family, said in found.items() if said["outcome"] != "ok"}
        failed = [f"{family} {found[family]['outcome']}" for family in found if family in self.world.failed]
        return not failed, ", ".join(failed) or None

    def _look_at_benchmark(self, name, status, statuses):
        content = read.benchmark(self.world.out / "benchmark.json")
        if content is not None:
            self.findings["benchmark"] = content
        self.findings.setdefault("measured", {})[name] = self._readers[name].lines
        if status == 0:
            return True, None
        # What an earlier step did not measure stands in the file too.
        wrong = (content or {}).get("wrong", [])
        wrong = [case for case in wrong if name == "benchmark" or case.startswith(f"{plan.SIDE_BY_SIDE}:")]
        return False, "; ".join(map(read.short, wrong)) or self._readers[name].reason()

    def _look_at_ncu(self, name, status, statuses):
        reader = self._readers[name]
        self.findings["ncu"] = {"kernels": reader.table(), "profiled": reader.profiled}
        if reader.refused() and status != TIMED_OUT:
            return None, f"refused: {reader.refused()}"
        if status in (126, 127):  # a script that starts a program that is not there
            return None, reader.tail.reason()
        return status == 0, None if status == 0 else reader.tail.reason()

    def _look_at_tests(self, name, status, statuses):
        found = read.journal(self.world.scratch / f"{name}.journal")
        begun = len(set(found.pop("started")))
        if not found["ended"]:
            found = {**pytest_counts(self._readers[name].lines), **found}
        self.findings[name] = found
        if found["selected"] is not None:
            found["not_run"] = found["selected"] - begun
        told = {"failed": len(found["failed_tests"]), "running when it ended": len(found["lost"])}
        told["of {} did not run".format(found["selected"])] = found.get("not_run", 0)
        why = ", ".join(f"{count} {what}" for what, count in told.items() if count > 0)
        ok = status in (0, 5) and not why  # 5: none selected
        return ok, None if ok else why or self._readers[name].reason()

    def _look_at_sanitizers(self, name, status, statuses):
        found = {tool: reader.found(statuses.get(tool)) for tool, reader in self._readers.items()}
        self.findings["sanitizers"] = found
        bad = [
            f"{tool} {said['errors']} errors" if said["errors"] else f"{tool}: {_of_no_end(said, statuses.get(tool))}"
            for tool, said in found.items()
            if not said["finished"] or said["errors"]
        ]
        refused = {said["refused"] for said in found.values() if "refused" in said}
        if refused and not any(said["errors"] for said in found.values()):
            return None, f"refused: {refused.pop()}"
        if not bad and status not in (0, "running"):  # what it ran failed, with nothing for a sanitizer to find
            return False, next(r.tail.reason() for tool, r in self._readers.items() if statuses.get(tool) != 0)
        return not bad, ", ".join(bad) or None

    @property
    def ok(self):
        """Whether it came to its end, nothing failed, and all ran but what a machine may lack."""
        done = {step["name"] for step in self.steps if step["ok"]}
        needed = {"build", "smoke", "benchmark", "tests"}
        return (
            self.state == ENDED
            and needed <= done
            and all(step["ok"] or step["name"] in MAY_BE_MISSING and step["ok"] is None for step in self.steps)
        )

    def verdict(self):
        """One line."""
        failed = [step["name"] for step in self.steps if step["ok"] is False]
        missing = [step["name"] for step in self.steps if step["ok"] is None and step["status"] != "running"]
        said = [f"{word}: {', '.join(names)}" for word, names in (("failed", failed), ("no result", missing)) if names]
        if self.state in (SEARCHING, RUNNING):
            running = next((step["name"] for step in self.steps if step["status"] == "running"), None)
            what = f"{self.state}{f' {running}' if running else ''}"
            return "; ".join([f"NOT ENDED: {what} at {now()}. If process {os.getpid()} is gone, it was killed", *said])
        if self.state == NO_GPU:
            return f"NOTHING RAN: {self._why}"
        word = "STOPPED" if self.state == STOPPED else "OK" if self.ok else "FAILED" if failed else "INCOMPLETE"
        return "; ".join([word, *said])

    def content(self):
        findings = {key: value for key, value in self.findings.items() if key != "measured"}
        world = self.world
        return {
            "made_by": MARK,
            "ok": self.ok,
            "verdict": self.verdict(),
            "pretended": world.pretended,
            "begun": self.begun,
            "written": now(),
            "process": os.getpid(),
            "commit": self.commit,
            "machine": world.machine,
            "notes": self.notes,
            "steps": self.steps,
            "failed_families": sorted(world.failed),
            "left_out": plan.left_out(),
            **findings,
        }

    def write(self):
        """Both files. Where a disk is full or gone a line tells so, and the report goes on in memory."""
        self._written = time.monotonic()
        for name, text in {
            "report.json": json.dumps(self.content(), indent=1) + "\n",
            "report.txt": self.text(),
        }.items():
            try:
                with atomic_write(self.world.out / name) as aside:
                    aside.write_text(text, encoding="utf-8")
            except OSError as error:
                self.unwritten(error)

    def unwritten(self, error):
        self.note(f"{self.world.out} does not take all of the report: {error.strerror or error}")

    def text(self):
        """report.txt."""
        m = self.world.machine
        lines = [self.verdict()]
        if m:
            lines += [f"{m['gpu']} ({m['capability']}), driver {m['driver']}, torch {m['torch']}, CUDA {m['cuda']}"]
        lines += [f"begun {self.begun}, process {os.getpid()}, commit {self.commit or 'unknown'}"]
        lines += [f"note: {note}" for note in self.notes if note not in lines[0]]
        lines += ["", *(_step_line(step, self._why) for step in self.steps), ""]
        lines += [*self._smoke_lines(), *self._test_lines(), *self._sanitizer_lines(), *self._ncu_lines()]
        measured = self.findings.get("measured", {})
        for name, said in measured.items():
            lines += ["", f"{name}:", *(line for line in said if not line.startswith("$ "))]
        if not measured:
            lines += ["", "nothing was measured"]
        if (self.world.out / "log.txt").exists():
            lines += ["", "all that the steps printed is in log.txt"]
        return "\n".join(lines) + "\n"

    def _smoke_lines(self):
        found = self.findings.get("smoke", {})
        lines = [f"{family:<18}{said['outcome']:<9}{said['why']}" for family, said in found.items()]
        if self.world.failed:
            lines.append(f"left out of the steps after it, for what needs them: {', '.join(sorted(self.world.failed))}")
        return ["kernels, each family by itself:", *lines, ""] if lines else []

    def _test_lines(self):
        lines = []
        for name in ("tests", "rest"):
            if (counts := self.findings.get(name)) is None:
                continue
            words = {word: n for word, n in counts.items() if type(n) is int and word not in ("selected", "not_run")}
            if counts.get("not_run"):
                words["of {} did not run".format(counts["selected"])] = counts["not_run"]
            told = (f"{n} {word}" for word, n in words.items())
            lines.append(
                f"{name:<12}" + (", ".join(told) or "none ran") + ("" if counts["ended"] else "; came to no end")
            )
            lines += [f"  failed: {test}" for test in counts["failed_tests"]]
            lines += [f"  ran when it ended: {test}" for test in counts["lost"]]
        if lines:
            if (self.world.out / "failed.txt").exists():
                lines.append("  tracebacks are in failed.txt")
            lines.append("  tests of the CPU's half of the device axis are left out")
            lines += [f"  left out, no {package}: {', '.join(tests)}" for package, tests in plan.left_out().items()]
        return lines

    def _sanitizer_lines(self):
        lines = []
        for tool, said in self.findings.get("sanitizers", {}).items():
            errors = _of_no_end(said) if said["errors"] is None else f"{said['errors']} errors"
            errors += ", then came to no end" if said["errors"] is not None and not said["finished"] else ""
            lines.append(f"{tool:<18}{errors}")
            lines += [f"  {record}" for record in said["records"]]
        return lines

    def _ncu_lines(self):
        found = self.findings.get("ncu")
        if not found:
            return []
        if not found["kernels"]:
            return [f"ncu began with {', '.join(found['profiled'])} and gave no table"] if found["profiled"] else []
        heads = {"us": "µs", "memory_percent": "memory %", "dram_percent": "DRAM %", "sm_percent": "SM %",
                 "occupancy_percent": "occupancy %", "registers": "registers"}  # fmt: skip
        lines = ["", "".join(f"{head:>13}" for head in heads.values()) + f"{'top stall, cycles':>32}  kernel"]
        for kernel in found["kernels"]:
            cells = "".join(f"{'' if kernel[k] is None else format(kernel[k], '.1f'):>13}" for k in heads)
            stall = f"{kernel['top_stall']} {kernel['stalled_cycles']:.1f}" if "top_stall" in kernel else ""
            lines.append(f"{cells}{stall:>32}  {kernel['kernel']}")
        return lines


def _of_no_end(said, status=None):
    """Of a sanitizer that gave no sum."""
    if "refused" in said:
        return f"refused: {said['refused']}"
    return f"crashed: {signal}" if (signal := read.crash(status)) else "came to no end"


def _step_line(step, told=None):
    """told: a reason of what was not run that need not be told again."""
    word = {True: "ok", False: "FAILED", None: "not run" if step["status"] == "not run" else "no result"}[step["ok"]]
    word = "running" if step["status"] == "running" else word
    why = step["why"] or ""
    if step["status"] == "not run":
        return f"{step['name']:<12}{word:<10}{why if why != told else ''}".rstrip()
    return f"{step['name']:<12}{word:<10}{step['seconds']:>6.0f} s of {step['limit']:.0f}  {why}".rstrip()
