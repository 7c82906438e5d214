"""Fixtures of every test: a fixed seed, and the device axis."""

import os

# Thousands of small calls: threads that spin while they wait make them ten times slower on a machine that is in use.
# Read when torch is first imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch
from hypothesis import settings

from pom_ext import _library

DEVICES = [device for device in _library.DEVICES if device == "cpu" or torch.cuda.is_available()]

settings.register_profile("repeatable", derandomize=True, database=None, deadline=None, max_examples=25)
settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session", params=DEVICES)
def device(request):
    return torch.device(request.param)
