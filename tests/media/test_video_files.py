"""Files of video: what is read back is what was written, and a failure leaves nothing behind."""

import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

from pom_ext.media import contact_sheet, open_writer, write_video
from pom_ext.media.video import ffplay_command, tile, to_pixels


def clip(channels=1, frames=5, height=12, width=20):
    """A bright column that moves, on a ramp."""
    video = torch.linspace(-1, 0, width).expand(channels, frames, height, width).clone()
    video *= torch.linspace(0.5, 1, channels).view(-1, 1, 1, 1)
    for frame in range(frames):
        video[:, frame, :, 3 * frame : 3 * frame + 3] = 1
    return video


def expected(video, factor=1):
    """(T, H, W, 3) uint8"""
    pixels = ((video.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).expand(3, -1, -1, -1).permute(1, 2, 3, 0)
    return pixels.repeat_interleave(factor, 1).repeat_interleave(factor, 2).numpy()


def test_pixels_cover_the_range_and_are_clamped():
    frame = torch.tensor([-2.0, -1.0, 0.0, 1.0, 3.0]).view(1, 1, 5)
    assert to_pixels(frame)[0, :, 0].tolist() == [0, 0, 128, 255, 255]
    assert to_pixels(frame).shape == (1, 5, 3)


def test_gif_frames_come_back_exactly(tmp_path):
    video = clip()
    write_video(tmp_path / "clip.gif", video, fps=10)
    with Image.open(tmp_path / "clip.gif") as file:
        assert file.info["loop"] == 0 and file.info["duration"] == 100 and file.n_frames == 5
        frames = np.stack([np.array(frame.convert("RGB")) for frame in ImageSequence.Iterator(file)])
    assert np.array_equal(frames, expected(video, 13))  # 20 pixels become 260


@pytest.mark.parametrize("fps, milliseconds", [(8, 120), (15, 70), (500, 10)])
def test_gif_pace_is_the_nearest_that_the_format_has(fps, milliseconds, tmp_path):
    write_video(tmp_path / "clip.gif", clip(), fps=fps)
    assert Image.open(tmp_path / "clip.gif").info["duration"] == milliseconds


def test_gif_in_colour_stays_close(tmp_path):
    video = clip(channels=3)
    write_video(tmp_path / "clip.gif", video)
    with Image.open(tmp_path / "clip.gif") as file:
        frames = np.stack([np.array(frame.convert("RGB")) for frame in ImageSequence.Iterator(file)])
    assert np.abs(frames.astype(int) - expected(video, 13)).max() <= 4


@pytest.mark.parametrize("channels", [1, 3])
def test_mp4_frames_come_back_nearly(channels, tmp_path):
    video = clip(channels, height=13, width=21)
    write_video(tmp_path / "clip.mp4", video, fps=12.5)
    with av.open(str(tmp_path / "clip.mp4")) as file:
        stream = file.streams.video[0]
        assert float(stream.average_rate) == 12.5 and stream.pix_fmt == "yuv420p"
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(stream)])
    assert frames.shape == (5, 170, 274, 3)  # 13 times as large, and even
    assert np.abs(frames[:, :169, :273].astype(int) - expected(video, 13)).mean() < 4


def test_contact_sheets_show_every_frame(tmp_path):
    video = clip(channels=3, frames=10)
    write_video(tmp_path / "clip.png", video)
    sheet = np.array(Image.open(tmp_path / "clip.png"))
    assert sheet.shape == (2 * 13 - 1, 8 * 21 - 1, 3)
    for frame, pixels in enumerate(expected(video)):
        top, left = frame // 8 * 13, frame % 8 * 21
        assert np.array_equal(sheet[top : top + 12, left : left + 20], pixels)
    contact_sheet(torch.stack([video, -video]), tmp_path / "rows.png", ["one", "two"], columns=4, title="a title")
    assert Image.open(tmp_path / "rows.png").width > 500
    contact_sheet(video[None], tmp_path / "plain.png")
    assert Image.open(tmp_path / "plain.png").width > 500


def test_tiles_lie_row_by_row():
    frames = torch.arange(5.0).view(5, 1, 1, 1).expand(-1, 1, 2, 3)
    sheet = tile(frames, columns=3)
    assert sheet.shape == (1, 5, 11)
    assert [sheet[0, 3 * (i // 3), 4 * (i % 3)].item() for i in range(5)] == [0, 1, 2, 3, 4]
    assert torch.equal(tile(frames[:1]), frames[0]) and tile(frames[:4]).shape == (1, 5, 7)


def test_raw_frames_go_to_standard_output_as_they_come():
    code = (
        "import torch; from pom_ext.video_files import open_writer\n"
        "with open_writer('-') as writer:\n"
        "    for value in (-1, 1):\n"
        "        writer.add(torch.full((3, 2, 5), float(value)))\n"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout
    assert out == bytes([0] * 30 + [255] * 30)


def test_raw_frames_are_what_the_player_is_told(tmp_path):
    """The options of `ffplay_command`, given to the demuxer that ffplay uses, find the frames in the bytes."""
    words = ffplay_command(12, 20, 12.5).split()
    assert words[0] == "ffplay" and words[-1] == "-"
    options = dict(zip(words[1:-1:2], words[2:-1:2], strict=True))
    kind, options = options.pop("-f"), {name.removeprefix("-"): value for name, value in options.items()}
    (tmp_path / "frames").write_bytes(expected(clip(3)).tobytes())
    with av.open(str(tmp_path / "frames"), format=kind, options=options) as file:
        assert file.streams.video[0].base_rate == 12.5
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)])
    assert np.array_equal(frames, expected(clip(3)))


def test_a_closed_pipe_is_a_broken_pipe_error():
    code = (
        "import os, sys, torch; from pom_ext.video_files import open_writer\n"
        "with open_writer('-') as writer:\n"
        "    writer.add(torch.zeros(3, 2, 5))\n"
        "    sys.stdin.readline()\n"  # the reader has gone
        "    try:\n"
        "        writer.add(torch.zeros(3, 2, 5))\n"
        "    except BrokenPipeError:\n"
        "        os._exit(7)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout.read(30) == bytes([128] * 30)
    process.stdout.close()
    process.communicate(b"go on\n")
    assert process.returncode == 7


def test_an_encoder_that_fails_is_what_is_reported(tmp_path, monkeypatch):
    def full(*args, **options):
        raise OSError("no space left")

    (tmp_path / "clip.mp4").write_text("the old file")
    monkeypatch.setattr(av, "open", full)
    with pytest.raises(OSError, match="no space left"):
        write_video(tmp_path / "clip.mp4", clip())
    assert [p.name for p in tmp_path.iterdir()] == ["clip.mp4"]
    assert (tmp_path / "clip.mp4").read_text() == "the old file"


@pytest.mark.parametrize("suffix", [".mp4", ".gif", ".png"])
@pytest.mark.parametrize("moment", ["before the first frame", "in mid-video"])
def test_a_failure_leaves_what_was_there(suffix, moment, tmp_path):
    target = tmp_path / f"clip{suffix}"
    target.write_text("the old file")

    def fail():
        with open_writer(target) as writer:
            if moment == "in mid-video":
                writer.add(torch.zeros(1, 4, 4))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert target.read_text() == "the old file" and [p.name for p in tmp_path.iterdir()] == [target.name]


@pytest.mark.parametrize("suffix", [".mp4", ".gif", ".png"])
def test_no_frames_are_no_video(suffix, tmp_path):
    with pytest.raises(ValueError, match="frames: none were written to"), open_writer(tmp_path / f"clip{suffix}"):
        pass
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "frame, message",
    [
        (torch.zeros(2, 4, 4), r"frame: expected \(C, H, W\) with 1 or 3 channels .* got \(2, 4, 4\)"),
        (torch.zeros(1, 1, 4, 4), "frame: expected"),
        (torch.zeros(1, 0, 4), r"frame: expected .* some pixels, got \(1, 0, 4\)"),
        (torch.zeros(1, 4, 5), "frame: the frames before are 4 x 4, this one 4 x 5"),
    ],
)
def test_frames_that_do_not_fit_are_named(frame, message, tmp_path):
    with pytest.raises(ValueError, match=message), open_writer(tmp_path / "clip.gif") as writer:
        writer.add(torch.zeros(1, 4, 4))
        writer.add(frame)
    assert not list(tmp_path.iterdir())


def test_other_names_and_rates_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"out: expected a name that ends in .mp4, .gif, .png, or -, got clip.webm"):
        open_writer(Path("clip.webm"))
    with pytest.raises(ValueError, match="fps: expected a positive number, got 0"):
        open_writer(tmp_path / "clip.mp4", fps=0)
    with pytest.raises(ValueError, match="fps: expected a positive number, got inf"):
        open_writer(tmp_path / "clip.mp4", fps=float("inf"))


@pytest.mark.parametrize(
    "shape, options, message",
    [
        ((3, 4, 8, 8), {}, r"videos: expected \(B, C, T, H, W\) with at least one frame, got \(3, 4, 8, 8\)"),
        ((1, 3, 0, 8, 8), {}, "videos: expected .* at least one frame"),
        ((2, 3, 4, 8, 8), {"row_labels": ["a"]}, "row_labels: expected at least 1 and 2, got 12 and 1"),
        ((2, 3, 4, 8, 8), {"columns": 0}, "columns, row_labels: expected at least 1 and 2, got 0 and 2"),
    ],
)
def test_contact_sheets_of_nothing_are_named(shape, options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        contact_sheet(torch.zeros(shape), tmp_path / "rows.png", **options)
    assert not list(tmp_path.iterdir())
