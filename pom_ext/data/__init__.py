"""Data sets of images and of videos."""

from .images import MNIST, ImageDataset, ImageFolder, open_dataset
from .videos import GamePlay, MovingDigits, VideoDataset, VideoFolder, open_video_dataset

__all__ = [
    "GamePlay",
    "ImageDataset",
    "ImageFolder",
    "MNIST",
    "MovingDigits",
    "VideoDataset",
    "VideoFolder",
    "open_dataset",
    "open_video_dataset",
]
