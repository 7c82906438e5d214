"""Models for programs in C++: on the engine, or on libtorch."""

from .aoti import export_frame_step, trace_frame_step
from .native import export_model

__all__ = ["export_frame_step", "export_model", "trace_frame_step"]
