"""Measures the registered cases, prints a table of each, and writes a JSON file: `python -m benchmarks.run --help`."""

import argparse
import dataclasses
import datetime
import fnmatch
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import torch

import pom_ext
from pom_ext import _library
from pom_ext.checkpoint import written_aside

from .cases import CASES
from .measure import OURS, CheckFailed
from .timing import HostClock, Settings

ROOT = Path(__file__).parent.parent
QUICK = Settings(seconds=0.5, least_rounds=3, most_rounds=10)


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
    return (
        f"{m['processor']}, {m['cores']} cores, {m['instruction_set']}, {m['threads']} threads, torch {m['torch']}, "
        f"{version}, {m['date']}, load {m['load']:.1f}"
    )


def amount(size):
    for unit, factor in (("MiB", 2**20), ("KiB", 2**10)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size} B"


def verdict(target):
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
    heads = ("median ms", "min", "IQR", "GB/s", "ratio", "cold ms", "cold ratio")
    lines.append(" " * 22 + "".join(f"{head:>11}" for head in heads))
    for contender, row in result["contenders"].items():
        speed = "" if row["bytes_per_second"] is None else f"{row['bytes_per_second'] / 1e9:.1f}"
        warm, cold = (f"{result[key].get(contender, 1):.3g}" for key in ("ratios", "cold_ratios"))
        times = [f"{row[key]:.3f}" for key in ("median_ms", "min_ms", "iqr_ms", "cold_median_ms")]
        figures = "".join(f"{figure:>11}" for figure in (*times[:3], speed, warm, times[3], cold))
        lines.append(f"  {contender:<20}{figures}   {verdicts.get(contender, '')}".rstrip())
    lines += [f"  {contender:<20} did not run: {why}" for contender, why in result["failed"].items()]
    return lines


def selected(patterns, quick):
    """Cases by name or pattern. Quick: those with a target alone, against the baselines of the targets alone."""
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in CASES):
            raise SystemExit(f"--case: no case is called {pattern!r}; --list shows all")
    patterns = patterns or ["*"]
    cases = [case for name, case in CASES.items() if any(fnmatch.fnmatchcase(name, p) for p in patterns)]
    if not quick:
        return cases
    cases = [case for case in cases if case.targets]
    if not cases:
        raise SystemExit("--quick: none of these cases has a target; run them without --quick")
    return [
        dataclasses.replace(case, against=tuple(t.of for t in case.targets if t.of in case.against)) for case in cases
    ]


def report(case, result):
    """A case in the JSON file: what it is, then what was measured."""
    return {"name": case.name, "dtype": str(case.dtype).removeprefix("torch."), **result}


def measured(cases, clock, settings):
    """(results, complaints). A case whose check fails is not timed; the others go on."""
    results, wrong = [], []
    for case in cases:
        try:
            result = case.measure(clock, settings)
        except CheckFailed as error:
            wrong.append(str(error))
            print(f"\nWRONG {error}", flush=True)
            continue
        results.append(report(case, result))
        print("", *table(case.name, result), sep="\n", flush=True)
    return results, wrong


def target_lines(results):
    """How many targets were reached, and which were not."""
    targets = [(result["name"], target) for result in results for target in result["targets"]]
    missed = [f"not reached: {name} / {target['of']}" for name, target in targets if not target["reached"]]
    return [f"{len(targets) - len(missed)} of {len(targets)} targets reached", *missed]


def parsed(arguments):
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__.split(":")[0])
    parser.add_argument("--case", nargs="+", default=[], metavar="NAME", help="cases by name or pattern ('layer*')")
    parser.add_argument("--list", action="store_true", help="print the names of all cases")
    parser.add_argument("--quick", action="store_true", help="only what the targets need, and few rounds")
    parser.add_argument("--json", metavar="FILE", help="write the results there")
    parser.add_argument("--threads", type=int, metavar="N", help="threads of torch (default: torch's own choice)")
    options = parser.parse_args(arguments)
    if options.json and not Path(options.json).parent.is_dir():
        parser.error(f"--json: there is no folder {Path(options.json).parent}")
    if options.threads is not None and options.threads < 1:
        parser.error(f"--threads: expected 1 or more, got {options.threads}")
    return options


def main(arguments=None):
    """Exit status 0; 1 where a case computed something wrong. A target that is not reached is no error."""
    options = parsed(arguments)
    cases = selected(options.case, options.quick)
    if options.list:
        print(*(case.name for case in cases), sep="\n")
        return 0
    _library.load()
    if options.threads:
        torch.set_num_threads(options.threads)

    start, clock, settings = time.perf_counter(), HostClock(), QUICK if options.quick else Settings()
    found = machine()
    print(machine_line(found), flush=True)
    results, wrong = measured(cases, clock, settings)
    print("", *target_lines(results), f"{len(cases)} cases, {time.perf_counter() - start:.0f} s", sep="\n")
    if options.json:
        how = {**dataclasses.asdict(settings), "cleared_bytes": clock.cleared_bytes}
        content = {"machine": found, "settings": how, "cases": results, "wrong": wrong}
        with written_aside(options.json) as aside:
            aside.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
