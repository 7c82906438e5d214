"""Checkpoints: one safetensors file with the model, its averaged weights, the optimizer and the settings of the run.

Tensors are named "part.name", with the parts of `save_checkpoint`; one metadata entry holds the settings as JSON.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .._io import atomic_write
from .config import VideoDiTConfig
from .image import ImageDiT
from .video import VideoDiT

METADATA_KEY = "pom_ext"
ARCHITECTURES = {"ImageDiT": ImageDiT, "VideoDiT": VideoDiT}


def save_checkpoint(path: str | os.PathLike, parts: Mapping[str, Mapping[str, Tensor]], settings: Any) -> None:
    """Write a checkpoint. At any time, the file at `path` is the old one or the new one, never half of either.

    Args:
        path: the file to write.
        parts: {"model": {name: tensor}, "ema": ..., ...}; part names without a dot.
        settings: anything that JSON can hold.
    """
    tensors = {f"{part}.{name}": t.detach().contiguous() for part, named in parts.items() for name, t in named.items()}
    with atomic_write(path) as temporary:
        save_file(tensors, temporary, metadata={METADATA_KEY: json.dumps(settings)})


def read_checkpoint(
    path: str | os.PathLike, parts: Collection[str] | None = None
) -> tuple[dict[str, dict[str, Tensor]], Any]:
    """Read a checkpoint.

    Args:
        path: a file that `save_checkpoint` wrote.
        parts: names of the parts to read; None reads all.

    Returns:
        {part: {name: tensor}} and the settings.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is truncated, not safetensors, or not written by `save_checkpoint`.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint: no file at {path}")
    tensors: dict[str, dict[str, Tensor]] = {}
    try:
        with safe_open(path, framework="pt") as file:
            settings = json.loads((file.metadata() or {})[METADATA_KEY])
            keys = file.keys()
            for key in keys:
                part, name = key.split(".", 1)
                if parts is None or part in parts:
                    tensors.setdefault(part, {})[name] = file.get_tensor(key)
    except SafetensorError as error:
        raise ValueError(f"checkpoint: {path} is truncated or is not a safetensors file ({error})") from error
    except KeyError:
        raise ValueError(f"checkpoint: {path} is a safetensors file, but not a checkpoint of pom_ext") from None
    model = settings.get("model") if isinstance(settings, dict) else None
    if isinstance(model, dict) and "length" in model:
        settings["model"] = VideoDiTConfig.from_file(model)
    return tensors, settings


def changed_settings(stored: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    """The names, in order, of settings that differ as JSON, where true is not 1: `local_conv` has both."""

    def written(settings: Mapping[str, Any], name: str) -> str:
        return json.dumps(settings.get(name), sort_keys=True)

    return sorted(name for name in stored.keys() | expected.keys() if written(stored, name) != written(expected, name))


def load_model(
    path: str | os.PathLike, *, ema: bool = True, device: torch.device | str = "cpu"
) -> tuple[ImageDiT | VideoDiT, dict[str, Any]]:
    """Load the model of a checkpoint, in evaluation mode.

    Args:
        path: a file that training wrote.
        ema: take the averaged weights, which draw better images than the last ones.
        device: where to put the model.

    Returns:
        The model and the checkpoint's settings.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is not a checkpoint, or holds no model.
    """
    part = "ema" if ema else "model"
    parts, settings = read_checkpoint(path, [part])
    if part not in parts:
        raise ValueError(f"checkpoint: {path} holds no model; expected a file that training wrote")
    model = ARCHITECTURES[settings.get("architecture", "ImageDiT")](**settings["model"])
    model.load_state_dict(parts[part])
    return model.to(device).eval(), settings
