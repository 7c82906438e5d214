"""Frames of a video file, read by their number."""

import itertools
from contextlib import contextmanager

from .datasets import VideoDataset

SUFFIXES = (".avi", ".gif", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm")


class VideoFile:
    """A video file; any of its frames can be read by number. The file is open only during a read.

    Attributes:
        times: presentation times of all frames, sorted, in the file's unit of time.
        in_order: whether all times are present and different. If not, frames are counted from the start of the file.
        rate: frames per second.
    """

    # Containers that store the presentation time of every packet. Other files must be decoded once to learn the times.
    timed = frozenset({"gif", "matroska", "mov"})

    def __init__(self, path):
        self.path = path
        with self._opened() as (file, video):
            self.rate = float(video.average_rate or VideoDataset.fps)
            if self.timed & set(file.format.name.split(",")):
                packets = (packet for packet in file.demux(video) if not packet.is_discard)
                self.times = sorted(packet.pts for packet in packets if packet.pts is not None)
            else:
                self.times = [frame.pts for frame in file.decode(video)]
        self.in_order = None not in self.times and all(a < b for a, b in itertools.pairwise(self.times))

    def read(self, numbers):
        """The frames with the given numbers, a range.

        Decoding begins at the key frame that seeking finds before the first number. That key frame can be too late,
        since frames shown before it may depend on older ones. Decoding then begins earlier, finally at the start of the
        file.
        """
        start, step = (numbers[0], 16) if self.in_order else (0, 0)
        while len(frames := self._decoded(start, numbers)) != len(numbers) and start:
            start, step = max(0, start - step), 4 * step
        if len(frames) != len(numbers):
            raise ValueError(f"data: {self.path} gave {len(frames)} of {len(numbers)} frames asked for; it is damaged")
        return frames

    def _decoded(self, start, numbers):
        """The frames with the given numbers that appear if decoding begins at frame `start`."""
        with self._opened() as (file, video):
            if start:
                file.seek(self.times[start], stream=video)
            shown = file.decode(video)
            if not self.in_order:
                return list(itertools.islice(shown, numbers.start, numbers.stop, numbers.step))
            wanted, last = {self.times[number] for number in numbers}, self.times[numbers[-1]]
            return [f for f in itertools.takewhile(lambda f: f.pts is None or f.pts <= last, shown) if f.pts in wanted]

    @contextmanager
    def _opened(self):
        """Yield the opened file and its video stream. Errors name the file."""
        import av

        try:
            with av.open(str(self.path)) as file:
                if not file.streams.video:
                    raise ValueError(f"data: {self.path} holds no video")
                yield file, file.streams.video[0]
        except av.FFmpegError as error:
            raise ValueError(f"data: cannot read the video {self.path} ({error})") from error
