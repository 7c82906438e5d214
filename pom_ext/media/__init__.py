"""Pictures and videos written to files."""

from .video import contact_sheet, open_writer, write_video

__all__ = ["contact_sheet", "open_writer", "write_video"]
