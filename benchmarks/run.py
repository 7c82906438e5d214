"""Measures the registered cases, prints a table of each, and writes a JSON file: `python -m benchmarks.run --help`."""

import argparse
import dataclasses
import datetime
import faulthandler
import fnmatch
import gc
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import torch

import pom_ext
from pom_ext._io import atomic_write
from pom_ext.ops import _library

from . import cases, device, device_cases
from .fatal import is_fatal
from .measure import COPY_BANDWIDTH, MICROSECONDS, OURS, CheckFailed
from .ops import short
from .timing import HostClock, Settings, other

ROOT = Path(__file__).parent.parent
CASES = {"cpu": cases.CASES, "cuda": device_cases.CASES}
FULL = {"cpu": Settings(), "cuda": Settings(seconds=1, least_rounds=5, most_rounds=100)}
QUICK = {
    "cpu": Settings(seconds=0.5, least_rounds=3, most_rounds=10),
    "cuda": Settings(seconds=0.2, least_rounds=5, most_rounds=40),
}
LOST = 3  # exit status where the GPU is lost to this process: start another one with --resume


def processor():
    """Model name of the processor, as Linux has it."""
    cpuinfo = Path("/proc/cpuinfo")
    names = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next(
        (line.split(":", 1)[1].strip() for line in names if line.startswith("model name")), platform.processor()
    )


def commit():
    """The commit of the source folder, marked where files differ from it; None outside a repository."""

    def git(*arguments):
        return subprocess.run(
            ["git", "-C", ROOT, *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("-modified" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def machine():
    return {
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "instruction_set": torch.ops.pom_ext.instruction_set(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "pom_ext": pom_ext.__version__,
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "load": os.getloadavg()[0],
    }


def machine_line(m):
    version = f"commit {m['commit']}" if m["commit"] else f"pom_ext {m['pom_ext']}"
    gpu = f"{m['gpu']}, driver {m['driver']}, CUDA {m['cuda']}, " if "gpu" in m else ""
    return (
        f"{gpu}{m['processor']}, {m['cores']} cores, {m['instruction_set']}, {m['threads']} threads, "
        f"torch {m['torch']}, {version}, {m['date']}, load {m['load']:.1f}"
    )


def amount(size):
    for unit, factor in (("MiB", 2**20), ("KiB", 2**10)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size} B"


def verdict(target):
    """One bound and whether it was reached."""
    bound = f"≥ {target['at_least']:g}" if target["at_most"] is None else f"≤ {target['at_most']:g}"
    return f"{bound} {({True: 'reached', False: 'MISSED', None: 'not measured'})[target['reached']]}"


def table(name, result):
    """The lines of one case."""
    shapes = ", ".join(f"{tensor} {tuple(shape)}" for tensor, shape in result["shapes"].items())
    lines = [f"{name}   {shapes}   error {result['check']['error']:.1e} (allowed {result['check']['allowed']:.0e})"]
    verdicts = {target["of"]: verdict(target) for target in result["targets"]}
    if result["kind"] == "memory":
        for contender, row in result["contenders"].items():
            lines.append(f"  {contender:<20}{amount(row['extra_bytes']):>12} beyond the inputs")
        for size, value in result["ratios"].items():
            of_size = f"{amount(result['bytes'][size])} of {size}"
            lines.append(f"  {OURS} / {of_size:<24}{value:>10.3g}   {verdicts.get(size, '')}".rstrip())
        return lines
    rest = other(result["judged"])
    unit, scale, digits = ("ms", 1, 3) if result["clock"] == "host" else ("µs", 1e3, 2)
    heads = (f"median {unit}", "min", "IQR", f"{rest} {unit}", "ratio", f"{rest} ratio", "GB/s")
    heads += ("of copy",) * ("share_of_copy" in result["contenders"][OURS])
    lines.append(" " * 22 + "".join(f"{head:>11}" for head in heads))
    verdicts[OURS] = ", ".join(f"{of} {verdicts[of]}" for of in (COPY_BANDWIDTH, MICROSECONDS) if of in verdicts)
    for contender, row in result["contenders"].items():
        times = (row[f"{kind}_ms"] for kind in ("median", "min", "iqr", f"{rest}_median"))
        ratios = (result[kind].get(contender, 1) for kind in ("ratios", f"{rest}_ratios"))
        speed = "" if row["bytes_per_second"] is None else f"{row['bytes_per_second'] / 1e9:.1f}"
        share = f"{row['share_of_copy']:.1%}" if "share_of_copy" in row else ""
        cells = (*(f"{scale * time:.{digits}f}" for time in times), *(f"{ratio:.3g}" for ratio in ratios), speed, share)
        figures = "".join(f"{cell:>11}" for cell in cells)
        lines.append(f"  {contender:<20}{figures}   {verdicts.get(contender, '')}".rstrip())
    lines += [f"  {contender:<20} did not run: {why}" for contender, why in result["failed"].items()]
    return lines


def predicted_us(case, speed):
    """Microseconds that the bytes of a case take at `speed` GB/s; None for a case that memory does not bound."""
    return None if not speed or case.bytes_moved is None else case.bytes_moved / speed / 1e3


def predictions(cases, speed):
    """The lines of a table of all cases that memory bounds."""
    rows = [(case.name, case.bytes_moved, predicted_us(case, speed)) for case in cases if case.bytes_moved]
    lines = [f"{'at ' + format(speed, 'g') + ' GB/s':<64}{'bytes':>15}{'µs':>10}"]
    return lines + [f"{name:<64}{size:>15,}{microseconds:>10.1f}" for name, size, microseconds in rows]


def matches(name, patterns):
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def selected(cases, patterns, quick, *, without=(), also=(), against=None):
    """Cases by name or pattern. Quick: those with a target alone, against the baselines of the targets alone.

    without, also: names and patterns of cases that are left out, and that quick keeps without a target.
    against: the only baselines, if given.
    """
    for pattern in patterns:
        if not fnmatch.filter(cases, pattern):
            raise SystemExit(f"--case: no case is called {pattern!r}; --list shows all")
    patterns = patterns or ["*"]
    cases = [case for name, case in cases.items() if matches(name, patterns) and not matches(name, without)]
    if against is not None:
        cases = [dataclasses.replace(case, against=tuple(n for n in case.against if n in against)) for case in cases]
    if not quick:
        return cases
    cases = [case for case in cases if case.targets or matches(case.name, also)]
    if not cases:
        raise SystemExit("--quick: none of these cases has a target; run them without --quick")
    return [
        dataclasses.replace(case, against=tuple(t.of for t in case.targets if t.of in case.against)) for case in cases
    ]


def outcome(case, clock, settings, bandwidth, speed):
    """(result as in the JSON file, None), or (None, complaint) where a case fails its check or does not run.

    bandwidth: bytes per second of a copy, if measured. speed: GB/s to predict the time from, if given.
    """
    try:
        result = case.measure(clock, settings, bandwidth)
    except CheckFailed as error:
        return None, str(error)
    except Exception as error:  # noqa: BLE001 -- what one case lacks, memory perhaps, the others may have
        return None, f"{case.name}: {type(error).__name__}: {error}".splitlines()[0]
    predicted = {"predicted_us": predicted_us(case, speed)} if speed else {}
    return {"name": case.name, "dtype": short(case.dtype), **predicted, **result}, None


def save(content, path):
    """Write the JSON file anew. Where that fails, on a full disk say, the run goes on and a line tells why."""
    try:
        with atomic_write(path) as aside:
            aside.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        print(f"--json: {path} could not be written: {error}", flush=True)


def left_by(path):
    """{"cases", "wrong", "copy"?} of a file that an earlier run left; the case that it was busy with has failed."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        content = None
    if not isinstance(content, dict) or not {"cases", "wrong"} <= set(content):
        return {"cases": [], "wrong": []}
    found = {key: content[key] for key in ("cases", "wrong", "copy") if key in content}
    if name := content.get("running"):
        found["wrong"].append(f"{name}: ended its process, or was stopped")
    return found


def names_in(content):
    """Of the cases that a file holds, measured or not."""
    return {case["name"] for case in content["cases"]} | {complaint.split(":")[0] for complaint in content["wrong"]}


def target_lines(results):
    """How many targets were reached, and which were not."""
    targets = [(result["name"], target) for result in results for target in result["targets"]]
    missed = [f"not reached: {name} / {target['of']}" for name, target in targets if not target["reached"]]
    return [f"{len(targets) - len(missed)} of {len(targets)} targets reached", *missed]


def require(name):
    """Exits where the device is not there, or the library has no kernels for it."""
    _library.load()
    if name == "cuda" and not torch.cuda.is_available():
        raise SystemExit(
            f"--device cuda: torch {torch.__version__} finds no GPU; --list and --predict need none, the rest runs on a "
            "machine with one"
        )
    if name not in _library.DEVICES:
        raise SystemExit(
            f"--device {name}: the library was built without its kernels; build it, with nvcc on the path: "
            f"{_library.BUILD_CUDA}"
        )


def parsed(arguments):
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__.split(":")[0])
    parser.add_argument("--device", choices=tuple(CASES), default="cpu")
    parser.add_argument("--case", nargs="+", default=[], metavar="NAME", help="cases by name or pattern ('layer*')")
    parser.add_argument("--list", action="store_true", help="print the names of all cases")
    parser.add_argument("--predict", type=float, metavar="GB/s", help="the time that memory of this speed would take")
    parser.add_argument("--quick", action="store_true", help="only what the targets need, and few rounds")
    parser.add_argument("--against", nargs="*", metavar="NAME", help="only these baselines")
    parser.add_argument("--json", metavar="FILE", help="write the results there")
    parser.add_argument("--resume", action="store_true", help="keep what FILE holds and run only what it lacks")
    parser.add_argument("--limit", type=float, metavar="SECONDS", help="end the run if one case takes longer")
    parser.add_argument("--without", nargs="+", default=[], metavar="NAME", help="leave out cases by name or pattern")
    parser.add_argument("--also", nargs="+", default=[], metavar="NAME", help="cases that --quick is to keep")
    parser.add_argument("--threads", type=int, metavar="N", help="threads of torch (default: torch's own choice)")
    options = parser.parse_args(arguments)
    if options.json and not Path(options.json).parent.is_dir():
        parser.error(f"--json: there is no folder {Path(options.json).parent}")
    if options.resume and not options.json:
        parser.error("--resume: expected --json FILE too, the file to go on with")
    if options.limit is not None and not options.limit > 0:
        parser.error(f"--limit: expected more than 0 seconds, got {options.limit:g}")
    if options.threads is not None and options.threads < 1:
        parser.error(f"--threads: expected 1 or more, got {options.threads}")
    if options.predict is not None and (options.device == "cpu" or not options.predict > 0):
        parser.error(f"--predict: expected more than 0 and --device cuda, got {options.predict} for {options.device}")
    return options


def main(arguments=None):
    """Exit status 0; 1 where a case computed something wrong, LOST where it left this process without its GPU. A target
    that is not reached is no error."""
    options = parsed(arguments)
    chosen = {"without": options.without, "also": options.also, "against": options.against}
    cases = selected(CASES[options.device], options.case, options.quick, **chosen)
    before = left_by(options.json) if options.resume else {"cases": [], "wrong": []}
    if options.list:
        lines = predictions(cases, options.predict) if options.predict else (case.name for case in cases)
        print(*lines, sep="\n")
        return 0
    require(options.device)
    if options.threads:
        torch.set_num_threads(options.threads)

    start, settings = time.perf_counter(), (QUICK if options.quick else FULL)[options.device]
    found, bandwidth = machine(), None
    content = {"machine": found, "settings": dataclasses.asdict(settings), **before}
    if options.device == "cuda":
        found |= device.machine()
        print(machine_line(found), flush=True)
        clocks = device.clocks()
        copied = content["copy"] = content.get("copy") or device.copy_bandwidth(clocks["events"])
        bandwidth = copied["bytes_per_second"]
        print(f"copy of {amount(copied['bytes_moved'] // 2)}: {bandwidth / 1e9:.0f} GB/s, read and written", flush=True)
    else:
        print(machine_line(found), flush=True)
        clocks = {"host": HostClock()}
    content["settings"]["cleared_bytes"] = {name: clock.cleared_bytes for name, clock in clocks.items()}
    torch.compiler.reset()  # imports the compiler
    gc.collect()
    gc.freeze()  # the collection before every case need not look through all that was imported
    results, wrong, done = content["cases"], content["wrong"], names_in(content)
    if options.json:
        save(content, options.json)
    for case in cases:
        if case.name in done:
            continue
        if options.json:
            save({**content, "running": case.name}, options.json)
        if options.limit:
            faulthandler.dump_traceback_later(options.limit, exit=True)
        result, complaint = outcome(case, clocks[case.clock], settings, bandwidth, options.predict)
        if options.limit:
            faulthandler.cancel_dump_traceback_later()
        if complaint:
            wrong.append(complaint)
            print(f"\nWRONG {complaint}", flush=True)
        else:
            results.append(result)
            print("", *table(case.name, result), sep="\n", flush=True)
        if options.json:
            save(content, options.json)  # after every case: a run that is cut short leaves what it has
        if complaint and options.device == "cuda" and is_fatal(complaint):
            print("the GPU is lost to this process; the other cases need another one (--resume)", flush=True)
            return LOST
    print("", *target_lines(results), f"{len(cases)} cases, {time.perf_counter() - start:.0f} s", sep="\n")
    chosen = {case.name for case in cases}  # what else an earlier run left in the file is none of this one's
    return int(any(complaint.split(":")[0] in chosen for complaint in wrong))


if __name__ == "__main__":
    sys.exit(main())
