"""Diffusion transformers built on PoM."""

from .cache import Past
from .image import ImageDiT, image_dit
from .video import VideoDiT, video_dit

__all__ = ["ImageDiT", "Past", "VideoDiT", "image_dit", "video_dit"]
