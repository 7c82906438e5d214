"""Diffusion transformers built on PoM."""

from .cache import StreamCache
from .checkpoint import load_model
from .image import ImageDiT, image_dit
from .inflate import inflate
from .video import VideoDiT, video_dit

Past = StreamCache  # its name in version 0.1

__all__ = ["ImageDiT", "Past", "StreamCache", "VideoDiT", "image_dit", "inflate", "load_model", "video_dit"]
