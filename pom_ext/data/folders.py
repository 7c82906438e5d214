"""Folders of pictures, and folders of videos."""

from pathlib import Path

import numpy as np
import torch

from .datasets import ImageDataset, VideoDataset
from .video_file import SUFFIXES, VideoFile


class ImageFolder(ImageDataset):
    """A folder of pictures, one sub-folder per class; any format that Pillow reads.

    All pictures have one channel if every one of them is grey, otherwise three (RGB).

    Args:
        root: the folder. Its sub-folders in alphabetical order are the classes.
        size: pictures are cropped to a centred square and scaled to size x size.

    Raises:
        ValueError: there is no folder, no class, a class without pictures, or a picture that cannot be read; the
            message names the folder or the file.
    """

    def __init__(self, root, size):
        from PIL import Image

        root = Path(root)
        if size < 1:
            raise ValueError(f"size: expected a positive number of pixels, got {size}")
        folders = _class_folders(root, "a folder with one sub-folder per class")
        if not folders:
            raise ValueError(f"data: expected one sub-folder per class in {root}, found none")
        suffixes = set(Image.registered_extensions())
        self.files = []  # (path, label)
        for label, folder in enumerate(folders):
            paths = _files(folder, suffixes)
            if not paths:
                raise ValueError(f"data: no pictures in {folder}")
            self.files += [(path, label) for path in paths]
        self.size = size
        self.classes = tuple(folder.name for folder in folders)
        grey = all(_with_picture(path, lambda image: image.mode in ("1", "L")) for path, _ in self.files)
        self.shape = (1 if grey else 3, size, size)

    def __len__(self):
        return len(self.files)

    def __getitem__(self, index):
        path, label = self.files[index]
        return _with_picture(path, self._to_tensor), torch.tensor(label)

    def _to_tensor(self, image):
        from PIL import ImageOps

        image = ImageOps.exif_transpose(image).convert("L" if self.shape[0] == 1 else "RGB")
        return _fit(image, (self.size, self.size))


class VideoFolder(VideoDataset):
    """A folder of videos that PyAV can read; its sub-folders, if it has any, are the classes.

    Every video is cut into clips that do not overlap. Pictures are cropped to a centred square and scaled.

    Args:
        root: the folder.
        frames: frames per clip.
        size: side in pixels.
        stride: use every stride-th frame of the video.

    Raises:
        ValueError: there is no folder, no video, a video that cannot be read, or no video as long as a clip; the
            message names it.
    """

    def __init__(self, root, frames=16, size=64, stride=1):
        root = Path(root)
        if min(frames, size, stride) < 1:
            raise ValueError(f"frames, size, stride: expected at least 1, got {frames}, {size} and {stride}")
        folders = _class_folders(root, "a folder of videos")
        self.classes, self.shape, self.stride = tuple(f.name for f in folders), (3, frames, size, size), stride
        span, longest = (frames - 1) * stride + 1, 0
        self.clips = []  # (file, first frame, label)
        for label, folder in enumerate(folders or [root]):
            for path in _files(folder, SUFFIXES):
                file = VideoFile(path)
                self.fps, longest = file.rate / stride, max(longest, len(file.times))
                self.clips += [(file, first, label) for first in range(0, len(file.times) - span + 1, span)]
        if not longest:
            raise ValueError(f"data: no videos ({', '.join(SUFFIXES)}) in {root}")
        if not self.clips:
            raise ValueError(
                f"frames: clips of {frames} frames, {stride} apart, are longer than every video in {root}, at most "
                f"{longest}"
            )

    def __len__(self):
        return len(self.clips)

    def __getitem__(self, index):
        file, first, label = self.clips[index]
        frames = file.read(range(first, first + (self.shape[1] - 1) * self.stride + 1, self.stride))
        pictures = [_fit(frame.to_image(), self.shape[2:]) for frame in frames]
        return torch.stack(pictures, dim=1), torch.tensor(label)


def _class_folders(root, expected):
    """The sub-folders of `root`, sorted; ValueError unless it is a folder."""
    if not root.is_dir():
        raise ValueError(f"data: expected {expected}, got {root}, which is not a folder")
    return sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))


def _files(folder, suffixes):
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in suffixes and path.is_file())


def _with_picture(path, use):
    """use(the opened picture). Errors name the file."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            return use(image)
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"data: cannot read the picture {path} ({error})") from error


def _fit(image, size):
    """A PIL image, cropped and scaled to a square size, as (C, H, W) float32 in [-1, 1]."""
    from PIL import ImageOps

    pixels = np.array(ImageOps.fit(image, size), dtype=np.float32)  # (H, W) or (H, W, 3)
    return torch.from_numpy(pixels).view(*size, -1).permute(2, 0, 1) / 127.5 - 1
