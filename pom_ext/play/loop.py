"""The loop of interactive video: read the keys, draw a frame, show it, repeat."""

import time
from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from ..media.frames import to_pixels as frame_to_pixels
from .keys import Keys


class Turn(NamedTuple):
    """The player's input for the next frame."""

    keys: frozenset = frozenset()
    reset: bool = False


@dataclass(frozen=True)
class Picture:
    """A frame to show."""

    pixels: np.ndarray  # (H, W, 3) uint8
    frame: int  # 1 is the first of the stream
    milliseconds: float  # from reading the keys to the pixels
    fps: float  # recent frames per second, pauses excluded; 0 at the first frame
    nbytes: int  # memory of the stream
    action: str  # name of the class; "" for a model without classes

    def __str__(self):
        action = f"   {self.action}" if self.action else ""
        return f"frame {self.frame}   {self.milliseconds:.1f} ms   {self.fps:.1f} fps{action}"


class Terminal:
    """A screen without a player that writes a line for each frame. `Browser` and `Window` have the same methods."""

    def __init__(self, write=print):
        self.write = write

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def turn(self):
        """The `Turn` of the player, or None to end. Waits while the player pauses."""
        return Turn()

    def show(self, picture):
        """Show a `Picture`. Does not wait."""
        self.write(str(picture))


@dataclass
class Statistics:
    """Statistics of the frames of a loop. Only the latest 10,000 times are stored, so a loop can run forever."""

    frames: int = 0
    seconds: float = 0.0  # waits for the maximum fps included, pauses of the player excluded
    milliseconds: deque = field(default_factory=lambda: deque(maxlen=10_000), repr=False)

    @property
    def median(self):
        """Median milliseconds per frame."""
        return float(np.median(self.milliseconds))

    @property
    def p99(self):
        """99th percentile of the milliseconds per frame."""
        return float(np.percentile(self.milliseconds, 99))

    @property
    def fps(self):
        """Frames per second."""
        return self.frames / self.seconds if self.seconds else 0.0

    def __str__(self):
        if not self.frames:
            return "no frames"
        return (
            f"{self.frames} frames, {self.median:.1f} ms each (median), {self.p99:.1f} ms (99th percentile), "
            f"{self.fps:.1f} frames a second"
        )


class Pacer:
    """Limits a loop to `fps` frames per second (None: no limit).

    It waits until fixed points in time, so that the errors of single waits do not add up. After a late frame all later
    points shift, so that the next frames do not have to catch up.
    """

    def __init__(self, fps=None, clock=time.perf_counter, sleep=time.sleep):
        if fps is not None and not fps > 0:
            raise ValueError(f"fps: expected more than 0 frames a second, or None for no limit, got {fps}")
        self.interval = 0 if fps is None else 1 / fps
        self.clock, self.sleep = clock, sleep
        self.due = clock()

    def wait(self):
        """Wait until the next frame may begin."""
        now = self.clock()
        self.due = max(self.due + self.interval, now)
        if self.due > now:
            self.sleep(self.due - now)


def play(stream, screen, classes=(), *, script=None, fps=None, frames=None, clock=time.perf_counter, sleep=time.sleep):
    """Draw frame after frame for a player, until the player ends it or presses Ctrl-C.

    Args:
        stream: a `VideoStream` of one video. A reset returns it to the frame at which the loop began.
        screen: a `Browser`, a `Window` or a `Terminal`, already entered as a context manager.
        classes: names of the model's labels, such as the actions of a game.
        script: labels, one per frame, in place of the keys; the loop ends after the last.
        fps: maximum frames per second; None: no limit. The keys are read after the wait.
        frames: number of frames of the stream after which to end.
        clock, sleep: functions like those of the module time, in seconds.

    Returns:
        The `Statistics` of the frames.

    Raises:
        ValueError: an argument is out of range.
        Exception: whatever the stream raises; the stream is then at its last good frame.
    """
    if frames is not None and frames < 1:
        raise ValueError(f"frames: expected at least 1, or None for no end, got {frames}")
    keys, pacer, statistics = Keys(classes), Pacer(fps, clock, sleep), Statistics()
    start, recent, steps = stream.fork(), deque(maxlen=30), 0  # recent: seconds from frame to frame
    try:
        while (frames is None or steps < frames) and (script is None or stream.frame - start.frame < len(script)):
            turn = screen.turn()
            if turn is None:
                break
            if turn.reset:
                stream.restore(start)
            begun = clock()
            label = keys.label(turn.keys) if script is None else script[stream.frame - start.frame]
            pictures = to_pixels(stream.next(None if label is None else torch.tensor([label])))
            milliseconds = 1000 * (clock() - begun) / len(pictures)
            steps += 1
            for i, pixels in enumerate(pictures):
                number = (stream.frame - 1) * len(pictures) + i + 1
                rate = len(recent) / sum(recent) if sum(recent) else 0.0
                action = "" if label is None else keys.classes[label]
                screen.show(Picture(pixels, number, milliseconds, rate, stream.nbytes, action))
                pacer.wait()
                shown = clock()
                statistics.frames += 1
                statistics.seconds += shown - begun
                statistics.milliseconds.append(milliseconds)
                recent.append(shown - begun)
                begun = shown
    except KeyboardInterrupt:
        pass
    return statistics


def to_pixels(video):
    """(t, H, W, 3) uint8 pixels of one video (1, C, t, H, W) in [-1, 1] (clamped), C 1 or 3."""
    if video.dim() != 5 or video.shape[0] != 1 or video.shape[1] not in (1, 3):
        raise ValueError(f"stream: expected one video (1, 1 or 3, t, H, W) to show, got {tuple(video.shape)}")
    return np.stack([frame_to_pixels(frame).numpy() for frame in video[0].unbind(1)])
