"""A video model that starts from the weights of an image model."""

from __future__ import annotations

from typing import Any

import torch

from ..layers.blocks import FRAME_MIXERS, INSIDE
from .config import VideoDiTConfig
from .image import ImageDiT
from .video import VideoDiT


def inflate(
    model: ImageDiT, *, length: int, size: tuple[int, int] | None = None, frames: int = 1, **options: Any
) -> VideoDiT:
    """A `VideoDiT` with the weights of an `ImageDiT`. Of a single frame, it predicts what the image model predicts.

    The local convolution starts with the image model's weights on a frame itself and zeros on those before. With
    read="split" the gate of a frame's own tokens is that of the image model. The video model has positions="space",
    so a stream has no end, and two times if the image model has.

    Args:
        model: an `ImageDiT` without registers and local attention, with a width that is a multiple of 8.
        length: video frames of a clip in training.
        size: (H, W) of the videos; None takes that of the images.
        frames: video frames in one token, patch[0].
        options: `read`, `fade`, `sink`, `space_groups` and `local_conv` of `VideoDiT`, and `mixer` to put softmax
            inside the frames of a polynomial model ("attention+power").

    Returns:
        VideoDiT in the dtype and on the device of the model.

    Raises:
        TypeError, ValueError: not an image model, or one that has no video counterpart.
    """
    if not isinstance(model, ImageDiT):
        raise TypeError(f"model: expected an ImageDiT, got {type(model).__name__}")
    if model.n_registers:
        raise ValueError(f"model: expected n_registers=0, got {model.n_registers}; video models have no registers")
    config = dict(model.config)
    mixers = [config["mixer"]] if isinstance(config["mixer"], str) else config["mixer"]
    if not set(mixers) <= set(FRAME_MIXERS):
        raise ValueError(f"model: expected mixers of {', '.join(FRAME_MIXERS)}, got {config['mixer']}")
    side, patch = config.pop("image_size"), config.pop("patch")
    for name in ("n_registers", "window"):
        del config[name]
    size = (side, side) if size is None else size
    layers = {name: options[name] for name in ("mixer", "local_conv") if name in options}
    _check_layers(VideoDiTConfig(**config), VideoDiTConfig(**config | layers))
    video = VideoDiT(size=size, length=length, patch=(frames, patch, patch), positions="space", **config | options)
    tensors, new = {}, video.state_dict()
    for name, tensor in model.state_dict().items():
        if name == "patch_in.weight":  # (D, h * w * C) -> (D, t * h * w * C), the mean of the frames of a token
            tensor = tensor.repeat(1, frames) / frames
        elif name.startswith("patch_out."):  # (h * w * C, ...) -> (t * h * w * C, ...)
            tensor = torch.cat([tensor] * frames)
        elif name.endswith("local_conv.conv.weight"):  # (D, 1, 3, 3) -> (D, 1, earlier + 1, 3, 3)
            tensor = torch.stack([torch.zeros_like(tensor)] * (new[name].shape[2] - 1) + [tensor], dim=2)
        elif ".mixer." in name and name not in new:  # the mixer of a hybrid
            name = name.replace(".mixer.", ".mixer.across.")
        tensors[name] = tensor
    weight = model.patch_in.weight
    # Gates and fades of the past, attention inside frames, and convolutions, all as they start.
    added = {name: tensor for name, tensor in new.items() if ".mixer." in name or ".local_conv." in name}
    video.to(weight.device, weight.dtype).load_state_dict(added | tensors)
    return video


def _check_layers(image: VideoDiTConfig, video: VideoDiTConfig) -> None:
    """ValueError unless every layer of the video model has what the image model has there."""
    for theirs, ours in zip(image.mixers, video.mixers, strict=False):
        if ours not in (theirs, INSIDE + theirs) or (theirs == "attention" != ours):
            raise ValueError(
                f"mixer: expected {', '.join(image.mixers)} of the image model, or with attention inside frames "
                f"{INSIDE}power or {INSIDE}product for its power or product, got {video.mixer!r}"
            )
    if any(a is not None and b is None for a, b in zip(image.conv_frames, video.conv_frames, strict=False)):
        raise ValueError(
            "local_conv: expected a convolution in the layers where the image model has one, 'frame' for one without "
            f"earlier frames, got {video.local_conv!r}"
        )
