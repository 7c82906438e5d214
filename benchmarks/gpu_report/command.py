"""The command: goes through the plan, one deadline for all of it, and lets the report be written whatever happens."""

import argparse
import contextlib
import json
import os
import re
import signal
import sys
import tempfile
import time
from pathlib import Path

from . import folder, plan, read
from .guard import Guard
from .pretend import MODES, NAMES, OF_STEP, Pretended, parsed_faults
from .report import NO_GPU, RUNNING, Report
from .run import GRACE, TIMED_OUT, run

MOST_RESTARTS = 50  # of the tests, or of the benchmark
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
LOST = 3  # benchmarks.run.LOST, which takes torch to import
EPILOG = f"""The library is built for this one GPU, in place: pom_ext/*.so and pom_ext/_build.json are replaced.
It takes torch, pybind11, setuptools and nvcc; for the tests pytest and hypothesis.

exit status: 0 if nothing failed and build, smoke, benchmark and tests ran; else 1, also if there is no GPU, or if one
of these had no time

FAULTS: NAME=MODE,...
names: {", ".join(n for n in NAMES if "." not in n)}, smoke.FAMILY ({", ".join(n[6:] for n in OF_STEP["smoke"])})
modes: {", ".join(MODES)}. An interrupt ends hang, only a kill ends stuck; lost is a CUDA error after
which a process can do nothing; refuse is for ncu and the sanitizers, absent for these, build and tests"""


def found_machine(world, until, log):
    """The machine, or RuntimeError with one line on why there is none."""
    step, lines = plan.machine(world), []

    def heard(name, text):
        lines.append(text)
        log(name, text)

    options = {"grace": GRACE * world.scale, "log": heard, "watch": world.watch}
    status = run(step.groups[0], until, **options)["machine"]
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
    if "running" not in content and status != LOST:
        return None
    cases = {case["name"] for case in content.get("cases", ())}
    return cases | set(content.get("wrong", ())) | {content.get("running")}


def settle(world, report, lines, status):
    """Note of the case that a process of the benchmark was busy with why it has no result. True if the process came to
    its end and there is none, though a disk that was full for a while may have left one in the file."""
    path = world.out / "benchmark.json"
    path.with_name(f"{path.name}.tmp").unlink(missing_ok=True)
    content, ended = read.benchmark(path) or {}, bool(lines and re.fullmatch(r"\d+ cases, \d+ s", lines[-1]))
    if name := content.pop("running", None):
        if not ended:
            content.setdefault("wrong", []).append(f"{name}: {read.why_ended(lines, status)}")
        try:
            with folder.atomic_write(path) as aside:
                aside.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            report.unwritten(error)
    return ended


def run_step(world, report, name, step, until):
    """Statuses of its processes."""
    statuses, before = {}, None
    options = {"grace": GRACE * world.scale, "at_once": world.jobs, "log": report.log, "watch": world.watch}
    for group in step.groups:
        for _ in range(MOST_RESTARTS):
            done = run(group, until, **options, beat=lambda now, before=statuses: report.beat({**before, **now}))
            begun = progress(world, step, name, done[group[-1].name])
            if name in ("benchmark", "layers") and settle(world, report, since_begun(step, name), done[name]):
                break
            if begun is None or begun == before:
                break
            before = begun
        statuses |= done
        if any(done.values()) and not step.every_group:
            break
    return statuses


def since_begun(step, name):
    """What the last of its processes said."""
    lines = step.readers[name].lines
    begins = [i for i, line in enumerate(lines) if line.startswith("$ ")]
    return lines[begins[-1] :] if begins else lines


def follow(world, report, ends):
    """All steps in their order. Why it ended before the last of them, or None."""
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
        say(f"{name}: {'ok' if ok else report.step(name)['why']}, {report.step(name)['seconds']:.0f} s\n")
        if name == "build" and not ok:
            return "nothing runs without the library"
        if name == "smoke" and world.failed == set(plan.FAMILIES):
            return "no family of kernels works on this GPU, so nothing else was run"
    return None


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
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "out",
        metavar="FOLDER",
        nargs="?",
        default="out/gpu-report",
        help="for report.txt, report.json, benchmark.json, failed.txt, log.txt (default: %(default)s). An earlier "
        "report there is kept as earlier-report.txt and earlier-report.json, the rest of it is replaced, other files "
        "are left alone; if it cannot be used, a new folder in the place for temporary files is",
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
    if not options.out:
        parser.error("FOLDER: expected the name of a folder, got an empty one")
    if not options.scale > 0:
        parser.error(f"--scale: expected more than 0, got {options.scale:g}")
    try:
        options.pretend = None if options.pretend is None else parsed_faults(options.pretend)
    except ValueError as error:
        parser.error(f"--pretend: {error} (FOLDER comes before --pretend)")
    return options


def stopped(number, frame):
    for other in STOPS:  # once is enough, and the report is to be written
        signal.signal(other, signal.SIG_IGN)
    raise KeyboardInterrupt


@contextlib.contextmanager
def stoppable():
    """Within it SIGINT, SIGTERM and SIGHUP raise KeyboardInterrupt, once; but nohup's SIGHUP stays ignored."""
    before = {number: signal.getsignal(number) for number in STOPS}
    try:
        for number in STOPS:
            if number != signal.SIGHUP or before[number] != signal.SIG_IGN:
                signal.signal(number, stopped)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def main(arguments=None):
    """Exit status 0; 1 if a step failed or a needed one had no time, or if there is no GPU."""
    options, start = parsed(arguments), time.monotonic()
    with stoppable(), tempfile.TemporaryDirectory(prefix="gpu-report-work-", ignore_cleanup_errors=True) as scratch:
        kind, more = (plan.World, {}) if options.pretend is None else (Pretended, {"faults": options.pretend})
        world = kind(Path(options.out).absolute(), Path(scratch), scale=options.scale, **more)
        world.watch = guard = Guard(scratch)
        try:
            return report_of(world, start)
        except KeyboardInterrupt:  # before there was a report
            return 1
        finally:
            folder.unlock(world.out)
            guard.close()


def report_of(world, start):
    """Exit status."""
    world.out, note = folder.prepared(world.out, world.pretended)
    report = Report(world)
    if note:
        report.note(note)
    report.write()
    try:
        tell_missing(world, report)
        try:
            world.machine = found_machine(world, start + plan.MOST["machine"] * world.scale, report.log)
        except RuntimeError as error:
            report.finish(str(error), NO_GPU)
        else:
            report.state = RUNNING
            report.write()
            report.finish(unbuildable(world) or follow(world, report, plan.ends(start, world.scale)))
    except KeyboardInterrupt:
        report.stop("stopped from outside before the end")
    report.log.finish()
    report.write()
    say(report.text())
    return 0 if report.ok else 1


def unbuildable(world):
    """Why the library cannot be built, or None."""
    lacking = world.missing().get("build")
    return plan.lack(lacking) if lacking else None


def tell_missing(world, report):
    """Before anything takes time."""
    for step, names in world.missing().items():
        report.note(f"{step}: {plan.lack(names)}")
