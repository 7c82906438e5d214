"""Diffusion transformers built on PoM."""

from .image import ImageDiT, image_dit
from .inflate import inflate
from .past import Past
from .video import VideoDiT, video_dit

__all__ = ["ImageDiT", "Past", "VideoDiT", "image_dit", "inflate", "video_dit"]
