"""The inner loops of the instruction sets below this machine's best one, which the other tests run on."""

import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
from cases import DTYPES, FORMS, Case, check, draw_inputs

import pom_ext  # noqa: F401  registers torch.ops.pom_ext

SETS = ("generic", "avx2", "avx512")
CASES = [
    *(Case(form, 3, "causal+weight", dtype, tokens=131, width=33) for form, dtype in product(FORMS, DTYPES)),
    *(Case(form, 2, "frames_unequal", dtype, tokens=70, width=101) for form, dtype in product(FORMS, DTYPES)),
    *(Case(form, 5, "whole", dtype, batch=1, tokens=9, width=519) for form, dtype in product(FORMS, DTYPES)),
    *(Case("power", 4, "mask", dtype, queries=5, width=27, axes=2) for dtype in DTYPES),
    *(Case("product", 1, "weight", dtype, tokens=17, width=3, heads=3) for dtype in DTYPES),
]


def lesser_sets():
    return SETS[: SETS.index(torch.ops.pom_ext.instruction_set())]


def report():
    """What the process runs on, and for every case the error that its check raised."""
    errors = {}
    for case in CASES:
        torch.manual_seed(0)
        try:
            check(draw_inputs(case))
        except AssertionError as error:
            errors[str(case)] = str(error)
    print(json.dumps({"instruction_set": torch.ops.pom_ext.instruction_set(), "errors": errors}))


@pytest.fixture(scope="module", params=lesser_sets())
def reported(request):
    """The asked for set, and the report of a process that was asked to run on it."""
    environment = os.environ | {"POM_EXT_ISA": request.param, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", f"import {Path(__file__).stem} as tests; tests.report()"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return request.param, json.loads(done.stdout)


def test_the_set_that_was_asked_for(reported):
    asked, report = reported
    assert report["instruction_set"] == asked


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_definition(case, reported):
    error = reported[1]["errors"].get(str(case))
    assert error is None, error
