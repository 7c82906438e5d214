"""The benchmarks: `python -m benchmarks.run SUITE [options]`; `--list` shows the suites, `SUITE --help` the options."""

import argparse
import importlib
import sys

from .suites import DEFAULT, SUITES


def make_parser():
    """The command without a suite: it only explains itself."""
    return argparse.ArgumentParser(
        prog="python -m benchmarks.run",
        usage="%(prog)s [SUITE] [options]",
        description=f"SUITE --help shows the options of a suite; without SUITE they are those of {DEFAULT}.",
        epilog="suites:\n" + "\n".join(suite_lines()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def suite_lines():
    """One line for each suite."""
    return [f"  {name:<14}{line}" for name, line in SUITES.items()]


def main(arguments=None):
    """Run a suite, `core` if the arguments name none. Returns the exit status of the suite."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments == ["--list"]:
        print(*suite_lines(), sep="\n")
        return 0
    if arguments in (["--help"], ["-h"]):
        make_parser().print_help()
        return 0
    name = DEFAULT if not arguments or arguments[0].startswith("-") else arguments.pop(0)
    if name not in SUITES:
        make_parser().error(f"no suite is called {name!r}; there are {', '.join(SUITES)}")
    return importlib.import_module(f".suites.{name.replace('-', '_')}", __package__).main(arguments)


if __name__ == "__main__":
    sys.exit(main())
