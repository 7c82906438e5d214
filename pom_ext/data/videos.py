"""Video to train on: moving digits, recorded games, a folder of films. Nothing is downloaded."""

import itertools
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import Dataset

from .._random import seeded_generator
from .images import MNIST

SUFFIXES = (".avi", ".gif", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm")


class VideoDataset(Dataset):
    """Clips (C, T, H, W) float32 in [-1, 1], with a label each, or with one for each frame.

    Attributes:
        shape: (C, T, H, W), the same for all clips.
        classes: names of the labels 0, 1, ...; empty where there are none, and every label is 0.
        actions: whether labels are (T,), the action that led to each frame.
        fps: frames a second.
    """

    actions = False
    fps = 8.0

    def describe(self):
        """What a checkpoint records about its data."""
        names = ("shape", "classes", "actions", "fps")
        return {name: list(value) if isinstance(value := getattr(self, name), tuple) else value for name in names}


class MovingDigits(VideoDataset):
    """The MNIST images of `data.MNIST`, each moving in a straight line and bouncing off the edges.

    The first frame is the image in the middle of a black square. From there it moves at 0.4 to 1 pixels a frame.

    Args:
        frames: of a clip.
        size: side of the square in pixels, at least 28.
        seed: clip i shows image i % images_shown on a path that follows from the seed and from i.
    """

    glyph, paths = 20, 20  # side of the square that holds the digit; paths on which every image is seen

    def __init__(self, frames=8, size=28, seed=0):
        if frames < 1 or size < 28:
            raise ValueError(f"frames, size: expected at least 1 and 28, got {frames} and {size}")
        mnist = MNIST()
        edge = (28 - self.glyph) // 2
        self.digits = (mnist.images[:, :, edge:-edge, edge:-edge] + 1) / 2  # (5000, 1, 20, 20) in [0, 1]
        self.labels, self.classes = mnist.labels, mnist.classes
        self.shape, self.seed, self.images_shown = (1, frames, size, size), seed, len(mnist)

    def __len__(self):
        return self.paths * self.images_shown

    def __getitem__(self, index):
        if not 0 <= index < len(self):
            raise IndexError(f"clip {index} of {len(self)}")
        image = index % self.images_shown
        return self._place(self.digits[image], self.path(index)) * 2 - 1, self.labels[image]

    def path(self, index):
        """(T, 2) row and column of the digit's upper left corner, in pixels."""
        draw = seeded_generator(self.seed, index)
        turn, speed = torch.rand(2, generator=draw)
        velocity = (0.4 + 0.6 * speed) * torch.stack([(2 * torch.pi * turn).sin(), (2 * torch.pi * turn).cos()])
        room = self.shape[2] - self.glyph
        way = (room / 2 + velocity * torch.arange(self.shape[1])[:, None]) % (2 * room)
        return torch.where(way > room, 2 * room - way, way)

    def _place(self, digit, corners):
        """(1, 20, 20) at (T, 2) corners -> (1, T, H, W), bilinear between pixels."""
        pixels = torch.arange(self.shape[2]) + 0.5
        rows, columns = ((pixels - corner[:, None]) / self.glyph * 2 - 1 for corner in corners.unbind(1))  # (T, size)
        sizes = (len(corners), len(pixels), len(pixels))
        grid = torch.stack([columns[:, None].expand(sizes), rows[:, :, None].expand(sizes)], dim=-1)  # (T, H, W, 2)
        return F.grid_sample(digit.expand(len(corners), -1, -1, -1), grid, align_corners=False).transpose(0, 1)


class GamePlay(VideoDataset):
    """A game of the Atari 2600, as its emulator `ale_py` carries it, played at random and recorded.

    The player holds every action for a while, so that paddles travel, and presses fire when a game waits for it. One frame
    of a clip is four of the game (the brighter of the last two, since sprites flicker), scaled to a square. `labels[f]` of
    a clip is the action that led to its frame f. No clip spans two games.

    Args:
        game: its name in `ale_py.roms`, such as "pong" or "breakout".
        frames: of a clip.
        size: side in pixels.
        recorded: frames played.
        seed: of the play.

    Raises:
        ValueError: an unknown game, or a recording shorter than a clip.
    """

    actions, fps = True, 15.0
    skip, shortest, longest = 4, 2, 12  # frames of the game for one of ours; ours for which an action is held

    def __init__(self, game="pong", frames=8, size=64, recorded=6000, seed=0):
        if min(frames, recorded) < 1 or size < 8:
            raise ValueError(
                f"frames, size, recorded: expected at least 1, 8 and 1, got {frames}, {size} and {recorded}"
            )
        self.shape = (3, frames, size, size)
        self.pictures, self.labels, self.classes, games = self._play(game, recorded, seed)
        starts = [start for first, last in games for start in range(first, last - frames + 1)]
        if not starts:
            raise ValueError(
                f"recorded: no game of {game!r} in {recorded} frames is as long as a clip of {frames}; record more"
            )
        self.starts = starts

    def __len__(self):
        return len(self.starts)

    def __getitem__(self, index):
        part = slice(self.starts[index], self.starts[index] + self.shape[1])
        return self.pictures[part].permute(1, 0, 2, 3).float() / 127.5 - 1, self.labels[part]

    def _play(self, game, recorded, seed):
        """-> pictures (recorded, 3, size, size) uint8, labels (recorded,), names of actions, [(first, last + 1)] of games."""
        machine = _insert(game)
        choices = machine.getMinimalActionSet()
        names = tuple(action.name for action in choices)
        fire = names.index("FIRE") if "FIRE" in names else 0
        draw = seeded_generator(seed)
        pictures, labels, games, first, held, action = [], [], [], 0, 2, fire
        lives = machine.lives()
        for number in range(recorded):
            if machine.game_over():
                games.append((first, number))
                first, held, action = number, 2, fire
                machine.reset_game()
            elif machine.lives() < lives:
                held, action = 2, fire
            lives = machine.lives()
            if held == 0:
                action = int(torch.randint(len(choices), (), generator=draw))
                held = int(torch.randint(self.shortest, self.longest + 1, (), generator=draw))
            held -= 1
            screens = []
            for _ in range(self.skip):
                machine.act(choices[action])
                screens = [*screens[-1:], torch.from_numpy(machine.getScreenRGB())]
            pictures.append(self._shrink(torch.maximum(*screens)))
            labels.append(action)
        games.append((first, recorded))
        return torch.stack(pictures), torch.tensor(labels), names, games

    def _shrink(self, screen):
        picture = screen.permute(2, 0, 1)[None].float()  # (1, 3, 210, 160)
        return F.interpolate(picture, size=self.shape[2:], mode="area")[0].round().to(torch.uint8)


def _insert(game):
    """The emulator with that game, ready to play."""
    import ale_py
    from ale_py import roms

    known = roms.get_all_rom_ids()
    if game not in known:
        near = [name for name in known if name[:1] == game[:1]] or known
        raise ValueError(f"game: expected one of {len(known)}, such as {', '.join(sorted(near)[:12])}, got {game!r}")
    ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
    machine = ale_py.ALEInterface()
    machine.setFloat("repeat_action_probability", 0.0)  # what is pressed is what is done
    machine.loadROM(roms.get_rom_path(game))
    return machine


class VideoFolder(VideoDataset):
    """A folder of videos that PyAV can read; its sub-folders, if it has any, are the classes.

    Every video is cut into clips that do not overlap. Pictures are cut to a centred square and scaled.

    Args:
        root: the folder.
        frames: of a clip.
        size: side in pixels.
        stride: of the video's frames every so many are taken.

    Raises:
        ValueError: no folder, no videos, one that cannot be read, or none as long as a clip; the message names it.
    """

    def __init__(self, root, frames=16, size=64, stride=1):
        root = Path(root)
        if min(frames, size, stride) < 1:
            raise ValueError(f"frames, size, stride: expected at least 1, got {frames}, {size} and {stride}")
        if not root.is_dir():
            raise ValueError(f"data: expected a folder of videos, got {root}, which is not a folder")
        folders = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
        self.classes, self.shape, self.stride = tuple(f.name for f in folders), (3, frames, size, size), stride
        span, longest = (frames - 1) * stride + 1, 0
        self.clips = []  # (film, first frame, label)
        for label, folder in enumerate(folders or [root]):
            for path in sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file()):
                film = Film(path)
                self.fps, longest = film.rate / stride, max(longest, len(film.times))
                self.clips += [(film, first, label) for first in range(0, len(film.times) - span + 1, span)]
        if not longest:
            raise ValueError(f"data: no videos ({', '.join(SUFFIXES)}) in {root}")
        if not self.clips:
            raise ValueError(
                f"frames: clips of {frames} frames, {stride} apart, are longer than every video in {root}, at most {longest}"
            )

    def __len__(self):
        return len(self.clips)

    def __getitem__(self, index):
        film, first, label = self.clips[index]
        frames = film.read(range(first, first + (self.shape[1] - 1) * self.stride + 1, self.stride))
        pictures = [self._fit(frame) for frame in frames]
        return torch.stack(pictures, dim=1), torch.tensor(label)

    def _fit(self, frame):
        from PIL import ImageOps

        picture = np.array(ImageOps.fit(frame.to_image(), self.shape[:1:-1]), dtype=np.float32)  # (H, W, 3)
        return torch.from_numpy(picture).permute(2, 0, 1) / 127.5 - 1


class Film:
    """A video file, any frames of which can be read by number; it is open only while they are read.

    Attributes:
        times: of all frames in the order in which they are shown, in units of the file.
        in_order: whether these times tell all frames apart; where they do not, frames are counted from the start.
        rate: frames a second.
    """

    # Containers that say of every packet when it is shown. Elsewhere only the decoder knows, so the file is decoded once.
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
        """The frames of those numbers, a range.

        Decoding begins at the key frame that seeking finds before the first. That can be too late, since frames shown
        before a key frame may depend on older ones: then it begins earlier, at last with the file.
        """
        start, step = (numbers[0], 16) if self.in_order else (0, 0)
        while len(frames := self._decoded(start, numbers)) != len(numbers) and start:
            start, step = max(0, start - step), 4 * step
        if len(frames) != len(numbers):
            raise ValueError(f"data: {self.path} gave {len(frames)} of {len(numbers)} frames asked for; it is damaged")
        return frames

    def _decoded(self, start, numbers):
        """Those of the frames that are found when decoding begins at frame `start`."""
        with self._opened() as (file, video):
            if start:
                file.seek(self.times[start], stream=video)
            shown = file.decode(video)
            if not self.in_order:  # then they are counted
                return list(itertools.islice(shown, numbers.start, numbers.stop, numbers.step))
            wanted, last = {self.times[number] for number in numbers}, self.times[numbers[-1]]
            return [f for f in itertools.takewhile(lambda f: f.pts is None or f.pts <= last, shown) if f.pts in wanted]

    @contextmanager
    def _opened(self):
        """The opened file and its video, with errors that name the file."""
        import av

        try:
            with av.open(str(self.path)) as file:
                if not file.streams.video:
                    raise ValueError(f"data: {self.path} holds no video")
                yield file, file.streams.video[0]
        except av.FFmpegError as error:
            raise ValueError(f"data: cannot read the video {self.path} ({error})") from error


def is_video(data):
    """Whether the command line's `data` names a source of video. A folder can be either, and is not."""
    return str(data) == "moving-digits" or str(data).startswith("game:")


def open_video_dataset(data, frames=None, size=None):
    """The dataset that the command line calls `data`: "moving-digits", "game:pong", or the path of a folder of videos.

    frames, size: of a clip; None takes what the source takes by itself. Raises what the sources raise.
    """
    given = {name: value for name, value in (("frames", frames), ("size", size)) if value is not None}
    if str(data) == "moving-digits":
        return MovingDigits(**given)
    if str(data).startswith("game:"):
        return GamePlay(str(data).removeprefix("game:"), **given)
    return VideoFolder(data, **given)
