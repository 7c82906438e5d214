"""Diffusion transformers built on PoM."""

from .image import ImageDiT, image_dit

__all__ = ["ImageDiT", "image_dit"]
