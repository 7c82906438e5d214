"""What a model learns (objectives and losses), and the way back from noise to data (solvers, guidance)."""

# isort: off -- importing an objective registers it, and messages list them in this order
from .flow_matching import FlowMatching
from .meanflow import MeanFlow
from .noise_prediction import NoisePrediction

# isort: on
from .objectives import OBJECTIVES, Objective, build_objective, register_objective

__all__ = [
    "OBJECTIVES",
    "FlowMatching",
    "MeanFlow",
    "NoisePrediction",
    "Objective",
    "build_objective",
    "register_objective",
]
