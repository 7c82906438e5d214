"""What a model learns (objectives and losses), and the way back from noise to data (solvers, guidance)."""

# Importing an objective registers it, and messages list the objectives in this order.
# isort: off
from .flow_matching import FlowMatching
from .noise_prediction import NoisePrediction
from .meanflow import MeanFlow

# isort: on
from .distillation import Distillation
from .guidance import drop_labels, guided_prediction
from .losses import diffusion_loss, video_loss
from .objectives import OBJECTIVES, Objective, build_objective, register_objective

__all__ = [
    "OBJECTIVES",
    "Distillation",
    "FlowMatching",
    "MeanFlow",
    "NoisePrediction",
    "Objective",
    "build_objective",
    "diffusion_loss",
    "drop_labels",
    "guided_prediction",
    "register_objective",
    "video_loss",
]
