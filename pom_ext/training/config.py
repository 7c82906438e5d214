"""TrainConfig: how to train."""

from __future__ import annotations

from dataclasses import dataclass

from ..diffusion.context import TRAINED_CONTEXTS, check_context
from ..diffusion.objectives import OBJECTIVES, list_objectives


@dataclass(frozen=True)
class TrainConfig:
    """How to train; checkpoints keep these settings.

    Attributes:
        objective: a name in `diffusion.OBJECTIVES`.
        shift: see `diffusion.timesteps.resolution_shift`.
        guidance: trained into the network by "meanflow", see `diffusion.MeanFlow`; 1 for the others.
        batch_size: images or clips per step and process.
        lr: the highest learning rate.
        weight_decay: of AdamW.
        warmup: steps over which the learning rate rises.
        ema_decay: of the moving average of the weights, per step.
        grad_clip: the largest norm of the gradient.
        label_dropout: share of samples that train without their label, for guidance.
        context, context_noise, other_label, given: for video, see `diffusion.losses.video_loss`.
        late_from: completed share of the training from which on the late clips of `train` are used, if there are any.
        bf16: bfloat16 autocast.
        seed: of the order of the data, noise and times.

    Raises:
        ValueError: a value out of range.
    """

    objective: str = "flow"
    shift: float = 1.0
    guidance: float = 1.0
    batch_size: int = 32
    lr: float = 2e-3
    weight_decay: float = 0.0
    warmup: int = 100
    ema_decay: float = 0.999
    grad_clip: float = 1.0
    label_dropout: float = 0.1
    context: str = "clean"
    context_noise: float = 0.0
    other_label: float = 0.0
    given: int = 0
    late_from: float = 0.5
    bf16: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("batch_size", "lr", "grad_clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected a positive number, got {getattr(self, name)}")
        check_context(self.context, TRAINED_CONTEXTS)
        kind = OBJECTIVES.get(self.objective)
        if self.guidance != 1 and (kind is None or kind.trained_guidance is None):
            names = list_objectives(lambda kind: kind.trained_guidance is not None)
            raise ValueError(f"guidance: trained in by objective={names!r} only, got {self.guidance}; sample with it")
        for name in ("weight_decay", "warmup", "given", "seed"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}: expected at least 0, got {getattr(self, name)}")
        for name in ("context_noise", "other_label"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: expected 0 to 1, got {getattr(self, name)}")
        for name in ("ema_decay", "label_dropout", "late_from"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 0 and less than 1, got {getattr(self, name)}")
