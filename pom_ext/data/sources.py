"""Data sets by the names that the command line uses."""

from .folders import ImageFolder, VideoFolder
from .games import GamePlay
from .mnist import MNIST
from .moving_digits import MovingDigits


def open_dataset(data, size=None):
    """The image data set named "mnist", or that of a folder of pictures.

    Raises:
        ValueError: a size for mnist other than 28, no size for a folder, or what `ImageFolder` raises.
    """
    if str(data) == "mnist":
        if size not in (None, 28):
            raise ValueError(f"size: mnist images are 28 pixels wide, got {size}")
        return MNIST()
    if size is None:
        raise ValueError(f"size: needed for the folder {data}: the width in pixels to scale its pictures to")
    return ImageFolder(data, size)


def is_video(data):
    """Whether `data` names a source of video. False for every folder, which can hold pictures or videos."""
    return str(data) == "moving-digits" or str(data).startswith("game:")


def open_video_dataset(data, frames=None, size=None):
    """The video data set named "moving-digits" or "game:pong", or that of a folder of videos.

    Args:
        data: name, or path of a folder.
        frames, size: frames per clip and side in pixels; None: the default of the data set.

    Raises:
        ValueError: what the data set raises.
    """
    options = {name: value for name, value in (("frames", frames), ("size", size)) if value is not None}
    if str(data) == "moving-digits":
        return MovingDigits(**options)
    if str(data).startswith("game:"):
        return GamePlay(str(data).removeprefix("game:"), **options)
    return VideoFolder(data, **options)
