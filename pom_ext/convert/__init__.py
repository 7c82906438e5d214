"""Checkpoints of other code, and image models, turned into models of this one."""

from .authors import image_dit_from_homm, pom_from_homm, pom_from_pom, video_dit_from_homm
from .inflate import inflate

__all__ = ["image_dit_from_homm", "inflate", "pom_from_homm", "pom_from_pom", "video_dit_from_homm"]
