"""What a model learns, and the way back from noise to data."""

from .objectives import FlowMatching, MeanFlow, NoisePrediction, build_objective

__all__ = ["FlowMatching", "MeanFlow", "NoisePrediction", "build_objective"]
