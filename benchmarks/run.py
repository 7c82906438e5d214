"""The benchmarks: `python -m benchmarks.run SUITE [options]`. `--list` shows the suites, `SUITE --help` the options of one."""

import importlib
import sys

from .suites import DEFAULT, SUITES

USAGE = "usage: python -m benchmarks.run [SUITE] [options]"


def suite_lines():
    """One line for each suite."""
    return [f"  {name:<14}{line}" for name, line in SUITES.items()]


def load_suite(name):
    return importlib.import_module(f".suites.{name.replace('-', '_')}", __package__)


def main(arguments=None):
    """Run a suite, `core` if the arguments name none. Returns the exit status of the suite."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments in (["--list"], ["--help"], ["-h"]):
        note = f"options of a suite: SUITE --help; without SUITE the options are those of {DEFAULT}"
        print(*([] if arguments == ["--list"] else [USAGE, "", note, ""]), *suite_lines(), sep="\n")
        return 0
    name = DEFAULT if not arguments or arguments[0].startswith("-") else arguments.pop(0)
    if name not in SUITES:
        raise SystemExit(f"{USAGE}\nerror: no suite is called {name!r}; there are {', '.join(SUITES)}")
    return load_suite(name).main(arguments)


if __name__ == "__main__":
    sys.exit(main())
