"""The operations: polynomial state and readout, alone, together, and one frame after the other."""

from .functional import polynomial_mix, polynomial_readout, polynomial_state, polynomial_update
from .rotary import Rotary, rotary_table
from .state import State

__all__ = [
    "Rotary",
    "State",
    "polynomial_mix",
    "polynomial_readout",
    "polynomial_state",
    "polynomial_update",
    "rotary_table",
]
