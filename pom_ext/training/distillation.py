"""Distillation of a video model: from many solver steps for a frame to one or two."""

from __future__ import annotations

import os
from typing import Any

import torch

from ..diffusion.distillation import Distillation
from ..models import VideoDiT
from ..models.checkpoint import load_model
from ..models.config import VideoDiTConfig
from ..streaming.stream import fingerprint
from .config import TrainConfig
from .trainer import TrainResult, fit

DRAW_STEPS = (1, 2)


def load_teacher(checkpoint: str | os.PathLike[str]) -> tuple[VideoDiT, dict[str, Any]]:
    """The model of a checkpoint with its averaged weights, and the checkpoint's settings.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no checkpoint, or a model that cannot be distilled: of images, of another objective than flow
            matching, of shared context, or with text.
    """
    teacher, settings = load_model(checkpoint)
    if not isinstance(teacher, VideoDiT):
        raise ValueError(f"checkpoint: expected a video model, {checkpoint} is one of images")
    trained = settings["train"]
    if trained["objective"] != "flow":
        raise ValueError(f"objective: expected a model of flow matching, 'flow', got {trained['objective']!r}")
    if trained["context"] == "shared":
        raise ValueError("context: expected a model trained with finished frames, 'clean' or 'self', got 'shared'")
    if teacher.text_dim:
        raise ValueError(f"text_dim: expected a model without text, got text_dim={teacher.text_dim}")
    return teacher, settings


def make_student(teacher: VideoDiT, seed: int = 0) -> VideoDiT:
    """A model of two times with the teacher's weights, which predicts the same for every span, bit for bit.

    Args:
        teacher: a `VideoDiT` with one time.
        seed: of the new weights, which have no effect until they are trained.
    """
    config = {**teacher.config, "two_times": True, "time_frequency": VideoDiTConfig(**teacher.config).fastest}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        student = VideoDiT(**config).to(teacher.reference_parameter)
    student.load_state_dict(student.state_dict() | teacher.state_dict())
    return student


def distill_config(settings: dict[str, Any], **options: Any) -> TrainConfig:
    """How to train the student of a teacher.

    Args:
        settings: of the teacher's checkpoint. The student has its shift, context, context noise, given frames, batch
            size, learning rate, decay of the average and clipping.
        options: of `TrainConfig`, to have others; `guidance` is that of the teacher in the training, 2 by default, and
            1 without classes.
    """
    names = ("shift", "context", "context_noise", "other_label", "given", "batch_size", "lr", "ema_decay", "grad_clip")
    kept = {name: settings["train"][name] for name in names if name in settings["train"]}
    guidance = Distillation.trained_guidance if settings["model"]["n_classes"] else 1.0
    return TrainConfig(**{"objective": Distillation.name, "guidance": guidance, **kept, **options})


def distill(
    checkpoint: str | os.PathLike[str],
    dataset: Any,
    path: str | os.PathLike[str],
    config: TrainConfig | None = None,
    *,
    draw_steps: int = 1,
    steps: int | None = None,
    seconds: float | None = None,
    resume: bool = False,
    save_every: int = 1000,
    workers: int = 0,
    progress: bool = True,
) -> TrainResult:
    """Train a video model that draws a frame in one or two steps, from one that needs many (`diffusion.Distillation`).

    The student starts with the weights of the teacher. Its checkpoint is that of any model of `MeanFlow`.

    Args:
        checkpoint: of the teacher, a `VideoDiT` trained with flow matching, and clean or self context.
        dataset: a `VideoDataset` like that of the teacher.
        path: the student's checkpoint file.
        config: how to train; None takes `distill_config`.
        draw_steps: solver steps for a frame that the student learns, 1 or 2.
        steps, seconds: training steps or time, as of `train`; and so all that follow.

    Returns:
        the `TrainResult`.

    Raises:
        FileNotFoundError: no checkpoint.
        ValueError: as `load_teacher` and `train`; a config of another objective, or with more context noise than the
            teacher knows; other draw_steps.
        ArithmeticError: as `train`.
    """
    if draw_steps not in DRAW_STEPS:
        raise ValueError(f"draw_steps: expected 1 or 2, got {draw_steps}")
    teacher, settings = load_teacher(checkpoint)
    config = distill_config(settings) if config is None else config
    if config.objective != Distillation.name:
        raise ValueError(f"config: expected objective={Distillation.name!r}, got {config.objective!r}")
    if config.context_noise > settings["train"]["context_noise"]:
        raise ValueError(
            f"context_noise: expected at most {settings['train']['context_noise']}, which the teacher was trained "
            f"with, got {config.context_noise}"
        )
    objective = Distillation(teacher, config.shift, config.guidance, draw_steps)
    distilled = {"distilled": {"teacher": fingerprint(teacher), "draw_steps": draw_steps}}
    run = {"late": None, "steps": steps, "seconds": seconds, "resume": resume, "save_every": save_every}
    student = make_student(teacher, config.seed).train()
    return fit(student, objective, dataset, path, config, distilled, **run, workers=workers, progress=progress)
