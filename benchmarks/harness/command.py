"""The command line that all suites share. Imports no torch: some suites need none."""

import argparse
from pathlib import Path

from ..suites import SUITES


def suite_parser(suite):
    """A parser with the option --json; the suite adds its own."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.run {suite}", description=SUITES[suite])
    parser.add_argument("--json", metavar="FILE", help="write the results to this file")
    return parser


def parse(parser, arguments, files=("json",)):
    """The parsed arguments. An error if an option of `files` names a file in a folder that does not exist."""
    options = parser.parse_args(arguments)
    for name in files:
        path = getattr(options, name)
        if path and not Path(path).parent.is_dir():
            parser.error(f"--{name}: there is no folder {Path(path).parent}")
    return options
