"""Models of this package from checkpoints of other code, and video models from image models."""

from ..models import inflate
from .homm import image_dit_from_homm, pom_from_homm, video_dit_from_homm
from .pom import pom_from_pom

__all__ = ["image_dit_from_homm", "inflate", "pom_from_homm", "pom_from_pom", "video_dit_from_homm"]
