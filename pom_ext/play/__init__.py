"""Interactive video: a stream of frames that follows the keys of a player, on a web page or in a window."""

from .browser import Browser
from .keys import Keys, script
from .loop import Picture, Statistics, Terminal, Turn, play
from .window import Window

__all__ = ["Browser", "Keys", "Picture", "Statistics", "Terminal", "Turn", "Window", "play", "script"]
