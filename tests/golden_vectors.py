"""Reads tests/golden/*.npz: inputs, weights, outputs and gradients of the authors' public code, in float64."""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

FOLDER = Path(__file__).parent / "golden"


class Golden(NamedTuple):
    meta: dict
    inputs: dict  # by the authors' argument names
    params: dict  # by the authors' parameter names
    out: torch.Tensor
    grad_out: torch.Tensor
    input_grads: dict
    param_grads: dict


def names(*patterns):
    return sorted(path.stem for pattern in patterns for path in FOLDER.glob(f"{pattern}.npz"))


def load(name, dtype=torch.float64):
    """One golden file, with inputs and parameters in `dtype`; what it expects stays in float64."""
    with np.load(FOLDER / f"{name}.npz") as file:
        arrays = {key: torch.from_numpy(file[key]) for key in file.files if key != "meta"}
        meta = json.loads(str(file["meta"]))

    def group(prefix, dtype):
        chosen = {key.removeprefix(prefix): value for key, value in arrays.items() if key.startswith(prefix)}
        return {key: value.to(dtype) if value.is_floating_point() else value for key, value in chosen.items()}

    return Golden(
        meta,
        group("in.", dtype),
        group("param.", dtype),
        arrays["out"],
        arrays["grad_out"],
        group("gin.", torch.float64),
        group("gparam.", torch.float64),
    )


def relative_error(actual, expected):
    expected = expected.double()
    return ((actual.detach().double() - expected).norm() / expected.norm()).item()
