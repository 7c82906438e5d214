"""Videos drawn frame after frame."""

from .config import StreamConfig
from .stream import VideoStream

__all__ = ["StreamConfig", "VideoStream"]
