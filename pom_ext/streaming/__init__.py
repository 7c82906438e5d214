"""Videos drawn frame after frame."""

from .stream import VideoStream

__all__ = ["VideoStream"]
