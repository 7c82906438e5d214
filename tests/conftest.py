"""Fixtures of every test: a fixed seed, and the device axis."""

import pytest
import torch
from hypothesis import settings

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]

settings.register_profile("repeatable", derandomize=True, database=None, deadline=None, max_examples=25)
settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session", params=DEVICES)
def device(request):
    return torch.device(request.param)
