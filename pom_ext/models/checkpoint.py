"""Checkpoints: one safetensors file holds the model, its average, the optimizer and how they were made.

Tensors are named "part.name", with the parts of `Checkpoint.parts`; one metadata entry holds the settings as JSON.
"""

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .._io import atomic_write

METADATA_KEY = "pom_ext"


def save_checkpoint(path, parts, settings):
    """Write a checkpoint. The file at `path` is the old one or the new one at any time, never half of either.

    Args:
        path: the file to write.
        parts: {"model": {name: tensor}, "ema": ..., ...}; part names without a dot.
        settings: anything that JSON can hold.
    """
    tensors = {f"{part}.{name}": t.detach().contiguous() for part, named in parts.items() for name, t in named.items()}
    with atomic_write(path) as aside:
        save_file(tensors, aside, metadata={METADATA_KEY: json.dumps(settings)})


def read_checkpoint(path, parts=None):
    """Read the settings and the tensors of the given parts (None: all) as ({part: {name: tensor}}, settings).

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is truncated, not safetensors, or not written by `save_checkpoint`.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint: no file at {path}")
    found = {}
    try:
        with safe_open(path, framework="pt") as file:
            settings = json.loads((file.metadata() or {})[METADATA_KEY])
            keys = file.keys()
            for key in keys:
                part, name = key.split(".", 1)
                if parts is None or part in parts:
                    found.setdefault(part, {})[name] = file.get_tensor(key)
    except SafetensorError as error:
        raise ValueError(f"checkpoint: {path} is truncated or is not a safetensors file ({error})") from error
    except KeyError:
        raise ValueError(f"checkpoint: {path} is a safetensors file, but not a checkpoint of pom_ext") from None
    return found, settings


def load_model(path, *, ema=True, device="cpu"):
    """The model of a checkpoint, ready to sample with, and the checkpoint's settings.

    ema: take the averaged weights, which draw better images than the last ones.
    Raises what `read_checkpoint` raises.
    """
    from ..models import ImageDiT, VideoDiT

    part = "ema" if ema else "model"
    parts, settings = read_checkpoint(path, [part])
    if part not in parts:
        raise ValueError(f"checkpoint: {path} holds no model; expected a file that training wrote")
    architectures = {kind.__name__: kind for kind in (ImageDiT, VideoDiT)}
    model = architectures[settings.get("architecture", "ImageDiT")](**settings["model"])
    model.load_state_dict(parts[part])
    return model.to(device).eval(), settings
