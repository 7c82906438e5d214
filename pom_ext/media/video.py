"""Video files written frame by frame, and contact sheets.

A frame is (C, H, W) in [-1, 1] (values outside are clamped), C 1 or 3.
"""

import fractions
import math
import sys
from contextlib import contextmanager

import torch

from .._io import atomic_write
from .figures import save_grid
from .frames import tile, to_pixels

SMALLEST = 256  # frames with a longer side below this many pixels are enlarged, since players show them tiny


class Writer:
    """Writes frames to a file, one after the other. `frames` holds those that are written after the last one."""

    def __init__(self, target, fps):
        if not 0 < fps < math.inf:
            raise ValueError(f"fps: expected a positive number, got {fps}")
        self.target, self.fps, self.size, self.frames = target, fps, None, []

    @contextmanager
    def opened(self):
        """Yield the writer. The complete file appears when the block ends.

        If the block fails, a file that was there before is unchanged.
        """
        with atomic_write(self.target) as self.path:
            try:
                yield self
                if self.size is None:
                    raise ValueError(f"frames: none were written to {self.target}")
                self.finish()
            except BaseException:
                self.abandon()
                raise

    def add(self, frame):
        """Write a frame (C, H, W)."""
        pixels = to_pixels(frame)
        if self.size is None:
            self.size = tuple(pixels.shape[:2])
            self.begin(pixels)
        elif tuple(pixels.shape[:2]) != self.size:
            raise ValueError(
                f"frame: the frames before are {self.size[0]} x {self.size[1]}, this one {pixels.shape[0]} x "
                f"{pixels.shape[1]}"
            )
        self.write(pixels)

    def begin(self, pixels):
        """Called with the first frame."""

    def abandon(self):
        """Called if the block failed."""

    def enlarged(self, pixels):
        """Pixels repeated by a whole factor, so that the longer side is at least `SMALLEST`."""
        factor = max(1, -(-SMALLEST // max(pixels.shape[:2])))
        return pixels.repeat_interleave(factor, dim=0).repeat_interleave(factor, dim=1)


class MP4(Writer):
    """H.264, written by PyAV frame by frame."""

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
    """An endless GIF, written by Pillow after the last frame; all frames stay in memory until then."""

    def write(self, pixels):
        from PIL import Image

        picture = Image.fromarray(self.enlarged(pixels).numpy())
        grey = bool((pixels == pixels[..., :1]).all())  # then 256 colours hold every frame exactly
        self.frames.append(picture.convert("L") if grey else picture.quantize(256, dither=Image.Dither.NONE))

    def finish(self):
        first, *rest = self.frames
        duration = 10 * max(1, round(100 / self.fps))  # in milliseconds, of which the format counts tens
        first.save(self.path, "GIF", save_all=True, append_images=rest, duration=duration, loop=0, disposal=1)


class Sheet(Writer):
    """All frames in one PNG, row by row, written after the last frame; all frames stay in memory until then."""

    def write(self, pixels):
        self.frames.append(pixels)

    def finish(self):
        from PIL import Image

        frames = torch.stack(self.frames).permute(0, 3, 1, 2)  # (T, 3, H, W)
        sheet = tile(frames.float() / 127.5 - 1, columns=min(len(frames), 8))
        Image.fromarray(to_pixels(sheet).numpy()).save(self.path, format="PNG")


class Raw(Writer):
    """rgb24 frames on standard output, frame by frame, not enlarged."""

    @contextmanager
    def opened(self):
        """Yield the writer; standard output stays open."""
        yield self

    def write(self, pixels):
        sys.stdout.buffer.write(pixels.numpy().tobytes())
        sys.stdout.buffer.flush()


WRITERS = {".mp4": MP4, ".gif": GIF, ".png": Sheet}


def open_writer(target, fps=8.0):
    """The writer for a file name that ends in .mp4, .gif or .png (a contact sheet), or for "-", standard output.

    Use it in a `with` block, see `Writer.opened`.

    Raises:
        ValueError: another ending, or fps that are not positive.
        BrokenPipeError: in `add`, if the reader of standard output has closed it.
    """
    if str(target) == "-":
        return Raw(target, fps).opened()
    for suffix, writer in WRITERS.items():
        if str(target).lower().endswith(suffix):
            return writer(target, fps).opened()
    raise ValueError(f"out: expected a name that ends in {', '.join(WRITERS)}, or -, got {target}")


def ffplay_command(height, width, fps):
    """The ffplay command that shows the output of `open_writer("-")`: ... | ffplay ..."""
    return f"ffplay -f rawvideo -pixel_format rgb24 -video_size {width}x{height} -framerate {fps:g} -"


def write_video(path, video, fps=8.0):
    """Write a video (C, T, H, W) to a file that `open_writer` can write."""
    with open_writer(path, fps) as writer:
        for frame in video.unbind(1):
            writer.add(frame)


def contact_sheet(videos, path, row_labels=None, columns=12, title=None):
    """Write a PNG with one row per video, of frames evenly spread over the video.

    Args:
        videos: (B, C, T, H, W).
        path: file to write.
        row_labels: one text per video, or None.
        columns: maximum number of frames per row.
        title: text above the rows.

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
