"""Runs checked cases: holds each against the definition, times it, prints its table, and writes a JSON file.

A case has `name`, `dtype`, `clock`, `bytes_moved`, `against`, `targets` and `measure`.
"""

import dataclasses
import faulthandler
import fnmatch
import gc
import json
import time
from pathlib import Path

import torch

from pom_ext.ops import _library

from . import command, device
from .fatal import LOST, is_fatal
from .measure import CheckFailed, short
from .report import amount, machine, machine_line, save
from .table import predicted_us, predictions, table, target_lines
from .timing import HostClock, Settings

FULL = {"cpu": Settings(), "cuda": Settings(seconds=1, least_rounds=5, most_rounds=100)}
QUICK = {
    "cpu": Settings(seconds=0.5, least_rounds=3, most_rounds=10),
    "cuda": Settings(seconds=0.2, least_rounds=5, most_rounds=40),
}


def matches(name, patterns):
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def selected(cases, patterns, quick, *, without=(), also=(), against=None):
    """The cases of {name: case} that match the patterns, all if there are none.

    quick: only cases with a target, and of their baselines only those of the targets. without: names and patterns of
    cases to leave out. also: cases that quick keeps without a target. against: if not None, the only baselines.
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
    """(result as in the JSON file, None), or (None, complaint) if a case fails its check or does not run.

    bandwidth: bytes per second of a copy, or None. speed: GB/s to predict the time from, or None.
    """
    try:
        result = case.measure(clock, settings, bandwidth)
    except CheckFailed as error:
        return None, str(error)
    except Exception as error:  # noqa: BLE001 -- the other cases may run: this one may lack memory
        return None, f"{case.name}: {type(error).__name__}: {error}".splitlines()[0]
    predicted = {"predicted_us": predicted_us(case, speed)} if speed else {}
    return {"name": case.name, "dtype": short(case.dtype), **predicted, **result}, None


def left_by(path):
    """{"cases", "wrong", "copy"?} of the file of an earlier run. A case that was running then counts as failed."""
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
    """Names of the cases in a file, measured or failed."""
    return {case["name"] for case in content["cases"]} | {complaint.split(":")[0] for complaint in content["wrong"]}


def require(name):
    """Exits if there is no such device, or the library has no kernels for it."""
    _library.load()
    if name == "cuda" and not torch.cuda.is_available():
        raise SystemExit(
            f"--device cuda: torch {torch.__version__} finds no GPU; --list and --predict need none, the rest runs on "
            "a machine with one"
        )
    if name not in _library.DEVICES:
        raise SystemExit(
            f"--device {name}: the library was built without its kernels; build it, with nvcc on the path: "
            f"{_library.BUILD_CUDA}"
        )


def parsed(suite, devices, arguments):
    """The options of a suite whose cases run on these devices."""
    parser = command.suite_parser(suite)
    parser.add_argument("--device", choices=devices, default="cpu")
    parser.add_argument("--case", nargs="+", default=[], metavar="NAME", help="cases by name or pattern ('layer*')")
    parser.add_argument("--list", action="store_true", help="print the names of the cases")
    parser.add_argument("--predict", type=float, metavar="GB/s", help="the time that memory of this speed would take")
    parser.add_argument("--quick", action="store_true", help="only the cases and baselines with a target, few rounds")
    parser.add_argument("--against", nargs="*", metavar="NAME", help="only these baselines")
    parser.add_argument("--resume", action="store_true", help="keep the results in FILE and run the cases it lacks")
    parser.add_argument("--limit", type=float, metavar="SECONDS", help="end the run if one case takes longer")
    parser.add_argument("--without", nargs="+", default=[], metavar="NAME", help="leave out cases by name or pattern")
    parser.add_argument("--also", nargs="+", default=[], metavar="NAME", help="cases that --quick is to keep")
    parser.add_argument("--threads", type=int, metavar="N", help="threads of torch (default: torch's own choice)")
    options = command.parse(parser, arguments)
    if options.resume and not options.json:
        parser.error("--resume: expected --json FILE too, the file to go on with")
    if options.limit is not None and not options.limit > 0:
        parser.error(f"--limit: expected more than 0 seconds, got {options.limit:g}")
    if options.threads is not None and options.threads < 1:
        parser.error(f"--threads: expected 1 or more, got {options.threads}")
    if options.predict is not None and (options.device == "cpu" or not options.predict > 0):
        parser.error(f"--predict: expected more than 0 and --device cuda, got {options.predict} for {options.device}")
    return options


def prepare(options, settings, before):
    """(content of the JSON file, clocks by name, bytes per second of a copy or None). Prints the machine."""
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
    return content, clocks, bandwidth


def run(suite, cases, arguments):
    """Run a suite. cases: {device: {name: case}}.

    Returns the exit status: 0; 1 if a case computed a wrong result or did not run; LOST if a case made the GPU unusable
    for this process. A missed target is no error.
    """
    options = parsed(suite, tuple(cases), arguments)
    chosen = {"without": options.without, "also": options.also, "against": options.against}
    cases = selected(cases[options.device], options.case, options.quick, **chosen)
    before = left_by(options.json) if options.resume else {"cases": [], "wrong": []}
    if options.list:
        lines = predictions(cases, options.predict) if options.predict else (case.name for case in cases)
        print(*lines, sep="\n")
        return 0
    require(options.device)
    if options.threads:
        torch.set_num_threads(options.threads)
    start, settings = time.perf_counter(), (QUICK if options.quick else FULL)[options.device]
    content, clocks, bandwidth = prepare(options, settings, before)
    results, wrong, done = content["cases"], content["wrong"], names_in(content)
    save(content, options.json)
    for case in cases:
        if case.name in done:
            continue
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
        save(content, options.json)  # after every case: a run that is cut short leaves its results
        if complaint and options.device == "cuda" and is_fatal(complaint):
            print("the GPU is lost to this process; the other cases need another one (--resume)", flush=True)
            return LOST
    print("", *target_lines(results), f"{len(cases)} cases, {time.perf_counter() - start:.0f} s", sep="\n")
    names = {case.name for case in cases}  # other complaints in the file are those of an earlier run
    return int(any(complaint.split(":")[0] in names for complaint in wrong))
