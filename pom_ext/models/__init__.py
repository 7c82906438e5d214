"""Diffusion transformers built on PoM."""

from .cache import StreamCache
from .image import ImageDiT, image_dit
from .video import VideoDiT, video_dit

Past = StreamCache  # its name in version 0.1

__all__ = ["ImageDiT", "Past", "StreamCache", "VideoDiT", "image_dit", "video_dit"]
