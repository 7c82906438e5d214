"""The compiled polynomial mixer (PoM) for PyTorch, and the diffusion transformers on top of it."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .layers import PoM
    from .ops import State, polynomial_mix, polynomial_readout, polynomial_state, polynomial_update

__all__ = ["PoM", "State", "polynomial_mix", "polynomial_readout", "polynomial_state", "polynomial_update"]
__version__ = "0.1.0"


def __getattr__(name):
    """What `__all__` lists, when it is first asked for: the engine (`pom_ext.engine`) runs without torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = ".layers" if name == "PoM" else ".ops"
    globals()[name] = getattr(importlib.import_module(home, __name__), name)
    return globals()[name]
