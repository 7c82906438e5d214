"""Frames (C, H, W) in [-1, 1] as pixels, and several frames as one."""

import torch


def to_pixels(frame):
    """(C, H, W) in [-1, 1] (clamped), C 1 or 3 -> (H, W, 3) uint8 on the CPU, contiguous."""
    if frame.dim() != 3 or frame.shape[0] not in (1, 3) or not frame.numel():
        raise ValueError(f"frame: expected (C, H, W) with 1 or 3 channels and some pixels, got {tuple(frame.shape)}")
    pixels = ((frame.detach().float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return pixels.expand(3, -1, -1).permute(1, 2, 0).contiguous().cpu()


def tile(frames, columns=None, gap=1, fill=-0.5):
    """(B, C, H, W) as one frame, row by row, with `gap` pixels of value `fill` between them.

    columns: None makes the grid nearly square.
    """
    count, channels, height, width = frames.shape
    columns = columns or -(-count // max(1, round(count**0.5)))
    rows = -(-count // columns)
    sheet = frames.new_full((channels, rows * (height + gap) - gap, columns * (width + gap) - gap), fill)
    for number, frame in enumerate(frames):
        top, left = number // columns * (height + gap), number % columns * (width + gap)
        sheet[:, top : top + height, left : left + width] = frame
    return sheet
