"""The training loop."""

from .config import TrainConfig
from .distillation import distill, distill_config
from .trainer import TrainResult, train

__all__ = ["TrainConfig", "TrainResult", "distill", "distill_config", "train"]
