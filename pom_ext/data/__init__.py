"""Data sets of images and of videos. Nothing is downloaded."""

from .datasets import ImageDataset, VideoDataset
from .folders import ImageFolder, VideoFolder
from .games import GamePlay
from .mnist import MNIST
from .moving_digits import MovingDigits
from .sources import is_video, open_dataset, open_video_dataset

__all__ = [
    "GamePlay",
    "ImageDataset",
    "ImageFolder",
    "MNIST",
    "MovingDigits",
    "VideoDataset",
    "VideoFolder",
    "is_video",
    "open_dataset",
    "open_video_dataset",
]
