"""The compiled polynomial mixer (PoM) for PyTorch, and the diffusion transformers on top of it."""

from .module import PoM
from .ops import polynomial_mix, polynomial_readout, polynomial_state, polynomial_update
from .state import State

__all__ = ["PoM", "State", "polynomial_mix", "polynomial_readout", "polynomial_state", "polynomial_update"]
__version__ = "0.1.0"
