"""Modules that are no model: the mixer and what stands beside it in a transformer block."""

from .pom import PoM

__all__ = ["PoM"]
