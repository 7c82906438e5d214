"""The command: goes through the plan, one deadline for all of it, and lets the report be written whatever happens."""

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

from . import folder, plan, read
from .pretend import Pretended, parsed_faults
from .report import Report
from .run import GRACE, TIMED_OUT, run

MOST_RESTARTS = 50  # of the tests, or of the benchmark


def found_machine(world, until):
    """The machine, or RuntimeError with one line on why there is none."""
    step, lines = plan.machine(world), []
    status = run(step.groups[0], until, grace=GRACE * world.scale, log=lambda name, text: lines.append(text))["machine"]
    if status == TIMED_OUT:
        raise RuntimeError("no GPU that torch can use: asked for one, torch did not answer; the driver may hang")
    said = [line for line in lines if line.startswith(("{", "error: "))]
    if status == 0 and said:
        return json.loads(said[-1])
    raise RuntimeError(said[-1].removeprefix("error: ") if said else step.readers["machine"].reason())


def progress(world, step, name, status):
    """What a process that ended before its end had begun by then; None if it came to its end, or is not begun anew."""
    if not step.again or status == TIMED_OUT:
        return None
    if name in ("tests", "rest"):
        journal = read.journal(world.scratch / f"{name}.journal")
        return None if journal["ended"] else set(journal["started"])
    content = read.benchmark(world.out / "benchmark.json") or {}
    if "running" not in content and status != 3:  # benchmarks.run.LOST, which takes torch to import
        return None
    cases = {case["name"] for case in content.get("cases", ())}
    return cases | set(content.get("wrong", ())) | {content.get("running")}


def run_step(world, report, name, step, until):
    """Statuses of its processes."""
    statuses, before = {}, None
    options = {"grace": GRACE * world.scale, "at_once": world.jobs, "log": report.log}
    for group in step.groups:
        for _ in range(MOST_RESTARTS):
            done = run(group, until, **options, beat=lambda now, before=statuses: report.beat({**before, **now}))
            begun = progress(world, step, name, done[group[-1].name])
            if begun is None or begun == before:
                break
            before = begun
        statuses |= done
        if any(done.values()) and not step.every_group:
            break
    return statuses


def follow(world, report, ends):
    """All steps in their order."""
    for name, make in plan.STEPS.items():
        left = ends[name] - time.monotonic()
        if left < plan.LEAST * world.scale:
            report.skip(name, "no time was left")
            continue
        try:
            step = make(world)
        except Exception as error:  # noqa: BLE001 -- what cannot even be planned must not take the rest with it
            step = f"{type(error).__name__}: {error}"
        if isinstance(step, str):
            report.skip(name, step)
            continue
        limit = plan.limit(name, left, world.scale)
        report.begin(name, step, limit)
        ok = report.end(run_step(world, report, name, step, time.monotonic() + limit))
        say(f"{name}: {'ok' if ok else report.steps[-1]['why']}, {report.steps[-1]['seconds']:.0f} s\n")
        if name == "build" and not ok:
            report.note("nothing runs without the library")
            return
        if name == "smoke" and world.failed == set(plan.FAMILIES):
            report.note("no family of kernels works on this GPU, so nothing else was run")
            return


def say(text):
    """Whether or not somebody still listens."""
    try:
        print(text, end="", flush=True)
    except OSError:
        sys.stdout = open(os.devnull, "w")


def parsed(arguments):
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_report",
        description="Build, check, measure and report on the GPU that is here; all within nine minutes.",
    )
    parser.add_argument(
        "out",
        metavar="FOLDER",
        help="for report.txt, report.json, benchmark.json, failed.txt, log.txt. An earlier report there is replaced, "
        "other files are left alone; if it cannot be used, a new folder in the place for temporary files is",
    )
    parser.add_argument(
        "--pretend",
        nargs="?",
        const="",
        metavar="FAULTS",
        help="without a GPU: the same plan, with stand-ins that fail as told, tests=hang,ncu=absent,smoke.mix=fail",
    )
    parser.add_argument("--scale", type=float, default=1, metavar="X", help="of all time limits")
    options = parser.parse_args(arguments)
    if not options.scale > 0:
        parser.error(f"--scale: expected more than 0, got {options.scale:g}")
    try:
        options.pretend = None if options.pretend is None else parsed_faults(options.pretend)
    except ValueError as error:
        parser.error(f"--pretend: {error}")
    return options


def stopped(number, frame):
    raise KeyboardInterrupt


def main(arguments=None):
    """Exit status 0; 1 where a step failed or there is no GPU."""
    options, start = parsed(arguments), time.monotonic()
    before = signal.signal(signal.SIGTERM, stopped)
    try:
        with tempfile.TemporaryDirectory(prefix="gpu-report-") as scratch:
            kind, more = (plan.World, {}) if options.pretend is None else (Pretended, {"faults": options.pretend})
            return report_of(kind(Path(options.out).absolute(), Path(scratch), scale=options.scale, **more), start)
    finally:
        signal.signal(signal.SIGTERM, before)


def report_of(world, start):
    """Exit status."""
    ends = plan.ends(start, world.scale)
    try:
        world.machine = found_machine(world, start + plan.MOST["machine"] * world.scale)
    except RuntimeError as error:
        print(f"error: gpu-report: {error}", file=sys.stderr)
        return 1
    world.out, note = folder.prepared(world.out)
    report = Report(world)
    if note:
        report.note(note)
    report.write()
    try:
        follow(world, report, ends)
    except KeyboardInterrupt:
        report.stop("stopped from outside before the end")
    report.log.finish()
    report.write()
    say(report.text())
    return 0 if report.ok else 1
