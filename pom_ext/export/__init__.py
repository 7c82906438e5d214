"""Video models as files for programs in C++, which run them with the engine or with libtorch."""

from .aoti import export_frame_step, trace_frame_step
from .native import export_model

__all__ = ["export_frame_step", "export_model", "trace_frame_step"]
