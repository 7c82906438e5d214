"""Video to look at: files written frame by frame, and pictures of many frames.

A frame is (C, H, W) in [-1, 1] (clamped), C 1 or 3.
"""

import fractions
import math
import sys

import torch

from .._io import atomic_write
from .figures import save_grid

SMALLEST = 256  # players and browsers show less than this many pixels as a stamp: smaller frames are enlarged


def to_pixels(frame):
    """(C, H, W) in [-1, 1] -> (H, W, 3) uint8, contiguous."""
    if frame.dim() != 3 or frame.shape[0] not in (1, 3) or not frame.numel():
        raise ValueError(f"frame: expected (C, H, W) with 1 or 3 channels and some pixels, got {tuple(frame.shape)}")
    pixels = ((frame.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return pixels.expand(3, -1, -1).permute(1, 2, 0).contiguous()


def tile(frames, columns=None, gap=1):
    """(B, C, H, W) side by side as one frame, row by row, with `gap` pixels between them; columns: None is near square."""
    count, channels, height, width = frames.shape
    columns = columns or -(-count // max(1, round(count**0.5)))
    rows = -(-count // columns)
    sheet = frames.new_full((channels, rows * (height + gap) - gap, columns * (width + gap) - gap), -0.5)
    for number, frame in enumerate(frames):
        top, left = number // columns * (height + gap), number % columns * (width + gap)
        sheet[:, top : top + height, left : left + width] = frame
    return sheet


class Writer:
    """Where frames go, one after the other: a context manager. What is written appears when the block ends, whole; if it
    fails, nothing does, and a file that was there is what it was."""

    def __init__(self, target, fps):
        if not 0 < fps < math.inf:
            raise ValueError(f"fps: expected a positive number, got {fps}")
        self.target, self.fps, self.size = target, fps, None

    def __enter__(self):
        self.aside = atomic_write(self.target)
        self.path = self.aside.__enter__()
        return self

    def __exit__(self, *error):
        try:
            if error[0] is None:
                if self.size is None:
                    raise ValueError(f"frames: none were written to {self.target}")
                self.finish()
        except BaseException:
            self.abandon()
            self.aside.__exit__(*sys.exc_info())
            raise
        if error[0] is not None:
            self.abandon()
        self.aside.__exit__(*error)

    def add(self, frame):
        """Write a frame (C, H, W)."""
        pixels = to_pixels(frame)
        if self.size is None:
            self.size = tuple(pixels.shape[:2])
            self.begin(pixels)
        elif tuple(pixels.shape[:2]) != self.size:
            raise ValueError(
                f"frame: the frames before are {self.size[0]} x {self.size[1]}, this one {pixels.shape[0]} x {pixels.shape[1]}"
            )
        self.write(pixels)

    def begin(self, pixels):
        """Called with the first frame."""

    def abandon(self):
        """Called where the block failed."""

    def enlarged(self, pixels):
        """By a whole factor, so that the longer side is `SMALLEST` or more."""
        factor = max(1, -(-SMALLEST // max(pixels.shape[:2])))
        return pixels.repeat_interleave(factor, dim=0).repeat_interleave(factor, dim=1)


class MP4(Writer):
    """H.264 by PyAV; frames leave memory as they come."""

    file = None

    def begin(self, pixels):
        import av

        self.file = av.open(str(self.path), "w", format="mp4")
        codec = next(name for name in ("libx264", "libopenh264", "mpeg4") if name in av.codecs_available)
        self.stream = self.file.add_stream(codec, rate=fractions.Fraction(self.fps).limit_denominator(1001))
        height, width = self.enlarged(pixels).shape[:2]
        self.stream.height, self.stream.width, self.stream.pix_fmt = height + height % 2, width + width % 2, "yuv420p"
        if codec == "libx264":
            self.stream.options = {"crf": "16"}

    def write(self, pixels):
        import av

        pixels = self.enlarged(pixels)
        height, width = pixels.shape[:2]
        even = torch.nn.functional.pad(pixels, (0, 0, 0, width % 2, 0, height % 2))
        self.file.mux(self.stream.encode(av.VideoFrame.from_ndarray(even.numpy(), format="rgb24")))

    def finish(self):
        self.file.mux(self.stream.encode(None))
        self.file.close()

    def abandon(self):
        if self.file is not None:
            self.file.close()


class GIF(Writer):
    """Pillow's, without end; all frames are in memory until the last."""

    def begin(self, pixels):
        self.frames = []

    def write(self, pixels):
        from PIL import Image

        picture = Image.fromarray(self.enlarged(pixels).numpy())
        grey = bool((pixels == pixels[..., :1]).all())  # then 256 colours hold every frame exactly
        self.frames.append(picture.convert("L") if grey else picture.quantize(256, dither=Image.Dither.NONE))

    def finish(self):
        first, *rest = self.frames
        first.save(
            self.path,
            format="GIF",
            save_all=True,
            append_images=rest,
            duration=10 * max(1, round(100 / self.fps)),  # the format counts in hundredths of a second
            loop=0,
            disposal=1,
        )


class Sheet(Writer):
    """All frames in one PNG, row by row; all are in memory until the last."""

    def begin(self, pixels):
        self.frames = []

    def write(self, pixels):
        self.frames.append(pixels)

    def finish(self):
        from PIL import Image

        frames = torch.stack(self.frames).permute(0, 3, 1, 2)  # (T, 3, H, W)
        sheet = tile(frames.float() / 127.5 - 1, columns=min(len(frames), 8))
        Image.fromarray(to_pixels(sheet).numpy()).save(self.path, format="PNG")


class Raw(Writer):
    """rgb24 frames on standard output, as they come, in the size they have."""

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def write(self, pixels):
        sys.stdout.buffer.write(pixels.numpy().tobytes())
        sys.stdout.buffer.flush()


WRITERS = {".mp4": MP4, ".gif": GIF, ".png": Sheet}


def open_writer(target, fps=8.0):
    """The writer for a file name that ends in .mp4, .gif or .png (a contact sheet), or for "-", standard output.

    Raises:
        ValueError: another ending, or fps that are not positive. BrokenPipeError from `add`: nobody reads any more.
    """
    if str(target) == "-":
        return Raw(target, fps)
    for suffix, writer in WRITERS.items():
        if str(target).lower().endswith(suffix):
            return writer(target, fps)
    raise ValueError(f"out: expected a name that ends in {', '.join(WRITERS)}, or -, got {target}")


def ffplay_command(height, width, fps):
    """What shows the frames that `open_writer("-")` writes, as they come: ... | ffplay ..."""
    return f"ffplay -f rawvideo -pixel_format rgb24 -video_size {width}x{height} -framerate {fps:g} -"


def write_video(path, video, fps=8.0):
    """Write (C, T, H, W) as `open_writer` does."""
    with open_writer(path, fps) as writer:
        for frame in video.unbind(1):
            writer.add(frame)


def contact_sheet(videos, path, row_labels=None, columns=12, title=None):
    """Write a PNG with a row, labelled or not, for each of (B, C, T, H, W), of at most so many frames evenly spread over it.

    Raises:
        ValueError: no video or no frames, fewer than one column, or not one label per row.
    """
    row_labels = [""] * len(videos) if row_labels is None else row_labels
    if videos.dim() != 5 or not videos.numel():
        raise ValueError(f"videos: expected (B, C, T, H, W) with at least one frame, got {tuple(videos.shape)}")
    if columns < 1 or len(row_labels) != len(videos):
        raise ValueError(
            f"columns, row_labels: expected at least 1 and {len(videos)}, got {columns} and {len(row_labels)}"
        )
    frames = videos.shape[2]
    chosen = torch.linspace(0, frames - 1, min(columns, frames)).round().long()
    pictures = videos[:, :, chosen].transpose(1, 2).flatten(0, 1)  # (B * columns, C, H, W)
    save_grid(pictures, row_labels, path, title, column_labels=[str(number + 1) for number in chosen.tolist()])
