"""The training loop: Accelerate for device and processes, AdamW, a moving average of the weights, resume."""

from __future__ import annotations

import math
import os
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from .._random import seeded_generator
from ..diffusion import Objective, build_objective
from ..diffusion.context import TRAINED_CONTEXTS, check_context
from ..diffusion.guidance import drop_labels
from ..models import ImageDiT, VideoDiT
from ..models.checkpoint import changed_settings, read_checkpoint, save_checkpoint
from ..ops import _library
from .batches import ShuffledBatches
from .config import TrainConfig
from .ema import make_ema

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass
class TrainResult:
    """The result of a training.

    Attributes:
        model: with the averaged weights, in eval mode.
        losses: one per step since step 0.
        seconds: training time, over all resumes.
    """

    model: nn.Module
    losses: list[float]
    seconds: float


def learning_rate(config: TrainConfig, step: int, progress: float) -> float:
    """Linear warmup over the first steps, times a cosine that ends at 0 when `progress`, from 0 to 1, is complete."""
    return config.lr * min(1.0, (step + 1) / (config.warmup + 1)) * (1 + math.cos(math.pi * min(1.0, progress))) / 2


class Trainer:
    """Everything that changes during training, and its way to and from a checkpoint.

    Args:
        model: moved to the device of the accelerator.
        objective: what to train it for.
        config: how to train it.
        settings: groups such as that of the data, kept in the checkpoint and compared on resume.
        accelerator: chooses the device, and connects the processes.
    """

    def __init__(
        self,
        model: ImageDiT | VideoDiT,
        objective: Objective,
        config: TrainConfig,
        settings: dict[str, Any],
        accelerator: Accelerator,
    ) -> None:
        self.model, self.objective, self.config, self.accelerator = model, objective, config, accelerator
        self.settings = {"model": model.config, "train": asdict(config), **settings}
        self.ema = make_ema(model.to(accelerator.device), config.ema_decay)
        options = {"lr": config.lr, "weight_decay": config.weight_decay, "betas": (0.9, 0.99)}
        optimizer = torch.optim.AdamW(model.parameters(), **options)
        self.wrapped, self.optimizer = accelerator.prepare(model, optimizer)
        self.losses, self.seconds = [], 0.0

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a checkpoint (main process only)."""
        if not self.accelerator.is_main_process:
            return
        moments = self.optimizer.state_dict()["state"]
        parts = {
            "model": self.model.state_dict(),
            "ema": self.ema.module.state_dict(),
            "optimizer": {f"{index}.{name}": t for index, named in moments.items() for name, t in named.items()},
            "history": {"losses": torch.tensor(self.losses, dtype=torch.float64), "averaged": self.ema.n_averaged},
        }
        made = {"architecture": type(self.model).__name__, "step": len(self.losses), "seconds": self.seconds}
        save_checkpoint(path, parts, {**self.settings, **made})

    def resume(self, path: str | os.PathLike[str]) -> None:
        """Continue from a checkpoint.

        Raises:
            ValueError: the checkpoint is broken, or was made with other settings than these.
        """
        parts, settings = read_checkpoint(path)
        settings["train"] = asdict(TrainConfig()) | settings["train"]  # settings that are newer than the file
        for group, expected in ({"distilled": {}} | self.settings).items():
            _check_same(path, group, settings.get(group, {}), expected)
        self.model.load_state_dict(parts["model"])
        self.ema.module.load_state_dict(parts["ema"])
        self.ema.n_averaged.copy_(parts["history"]["averaged"])
        moments = {}
        for key, tensor in parts.get("optimizer", {}).items():
            index, name = key.split(".")
            moments.setdefault(int(index), {})[name] = tensor
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": moments})
        self.losses, self.seconds = parts["history"]["losses"].tolist(), settings["seconds"]

    def step(self, clean: Tensor, labels: Tensor, progress: float) -> None:
        """One step of gradient descent. All its randomness follows from the seed and the number of the step.

        Args:
            clean: images (B, C, H, W) or videos (B, C, T, H, W) in [-1, 1].
            labels: (B,), or (B, T') for the frames of videos.
            progress: completed share of the training, 0 to 1.

        Raises:
            ArithmeticError: the loss is not finite.
        """
        config, device, step = self.config, self.accelerator.device, len(self.losses)
        generator = seeded_generator(config.seed, step, self.accelerator.process_index, device=device)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(config, step, progress)
        n_classes = self.model.config["n_classes"]
        dropped = drop_labels(labels.to(device), n_classes, config.label_dropout, generator) if n_classes else None
        names = ("context", "context_noise", "other_label", "given")
        context = {name: getattr(config, name) for name in names}
        with torch.autocast(device.type, torch.bfloat16, enabled=config.bf16):
            loss = self.objective.loss(self.wrapped, clean.to(device), dropped, generator, progress=progress, **context)
        value = loss.item()
        if not math.isfinite(value):
            raise ArithmeticError(f"the loss is {value} at step {step}: try a lower learning rate than {config.lr}")
        self.accelerator.backward(loss)
        self.accelerator.clip_grad_norm_(self.wrapped.parameters(), config.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.update_parameters(self.model)
        self.losses.append(value)


def _check_same(path: str | os.PathLike[str], group: str, stored: dict[str, Any], expected: dict[str, Any]) -> None:
    """Raise ValueError if the settings of a checkpoint are not the expected ones."""
    changed = changed_settings(stored, expected)
    if changed:
        changes = ", ".join(f"{key} is {stored.get(key)}, given {expected.get(key)}" for key in changed)
        raise ValueError(f"resume: {path} was trained with another {group}: {changes}")


def _check_late(model: ImageDiT | VideoDiT, dataset: Any, late: Any, config: TrainConfig) -> None:
    """Raise ValueError, before the training begins, for late clips that it could not use when their time comes."""
    if not isinstance(model, VideoDiT):
        raise ValueError(f"late: expected None for images, got {type(late).__name__}; late clips are for a VideoDiT")
    clip, shape, unit = list(dataset.shape), list(late.shape), model.patch[0]
    if shape[:1] + shape[2:] != clip[:1] + clip[2:]:
        raise ValueError(f"late: expected clips (C, T, H, W) like those of the data, {clip}, but for T, got {shape}")
    if shape[1] % unit or shape[1] // unit <= config.given:
        raise ValueError(
            f"late: expected a multiple of patch[0]={unit} video frames, more than given={config.given} frames of "
            f"tokens, got {shape[1]}"
        )
    if model.positions == "sincos" and shape[1] > model.length:
        raise ValueError(
            f"late: expected at most length={model.length} video frames, where positions='sincos' end, got {shape[1]}; "
            "a model with positions='space' or 'rotary' has no end"
        )


def train(
    model: ImageDiT | VideoDiT,
    dataset: Any,
    path: str | os.PathLike[str],
    config: TrainConfig | None = None,
    *,
    late: Any | None = None,
    steps: int | None = None,
    seconds: float | None = None,
    resume: bool = False,
    save_every: int = 1000,
    workers: int = 0,
    progress: bool = True,
) -> TrainResult:
    """Train a model and leave checkpoints, the last one complete, at `path`.

    Args:
        model: an `ImageDiT` or a `VideoDiT`, moved to the device that Accelerate chooses.
        dataset: an `ImageDataset` with images of the size and classes the model was made for, or a `VideoDataset`.
        path: the checkpoint file.
        config: a `TrainConfig`; None takes its defaults.
        late: a `VideoDataset` of other, usually longer clips, for the rest of the training from `config.late_from` on.
            A batch holds as many frames as before.
        steps, seconds: when to stop, one or the other, counted from step 0 even after a resume. With `seconds` the
            learning rate follows the time, so that a slower machine does fewer steps but finishes them properly.
        resume: continue from the checkpoint at `path`. With `steps` the result is bit for bit that of a run that was
            never interrupted; the settings must be the same.
        save_every: steps between checkpoints.
        workers: processes that read the data.
        progress: show a progress bar with loss and steps per second.

    Returns:
        the `TrainResult`.

    Raises:
        ValueError: an argument is out of range, the model does not fit the data or the objective, or the checkpoint
            to resume from is broken or was made with other settings.
        ArithmeticError: the loss is not finite any more. The last checkpoint is kept.
    """
    config = TrainConfig() if config is None else config
    trained_in = {} if config.guidance == 1 else {"guidance": config.guidance}
    objective = build_objective(config.objective, config.shift, **trained_in)
    run = {"late": late, "steps": steps, "seconds": seconds, "resume": resume, "save_every": save_every}
    return fit(model, objective, dataset, path, config, {}, **run, workers=workers, progress=progress)


def fit(
    model: ImageDiT | VideoDiT,
    objective: Objective,
    dataset: Any,
    path: str | os.PathLike[str],
    config: TrainConfig,
    settings: dict[str, Any],
    *,
    late: Any | None,
    steps: int | None,
    seconds: float | None,
    resume: bool,
    save_every: int,
    workers: int,
    progress: bool,
) -> TrainResult:
    """`train` for an objective that is given, with further settings to keep in the checkpoint and compare on resume."""
    from accelerate import Accelerator

    if (steps is None) == (seconds is None):
        raise ValueError(f"steps, seconds: expected one of the two, got steps={steps}, seconds={seconds}")
    if not (steps if seconds is None else seconds) > 0 or save_every < 1:
        raise ValueError(f"expected positive numbers, got steps={steps}, seconds={seconds}, save_every={save_every}")
    for data in (dataset, late):
        if data is not None and model.config["n_classes"] != len(data.classes):
            raise ValueError(f"model: made for {model.config['n_classes']} classes, the data has {len(data.classes)}")
    if late is not None:
        _check_late(model, dataset, late, config)
    for reason in objective.supports(model):
        raise ValueError(reason)
    if "length" in model.config:
        check_context(config.context, TRAINED_CONTEXTS, objective)
    accelerator = Accelerator(cpu=_library.default_device() == "cpu")
    if seconds is not None and accelerator.num_processes > 1:
        raise ValueError("seconds: processes would stop at different steps; use steps with several processes")

    described = dataset.describe() | ({} if late is None else {"late": late.describe()})
    trainer = Trainer(model, objective, config, {"data": described, **settings}, accelerator)
    if resume:
        trainer.resume(path)
    rank, ranks = accelerator.process_index, accelerator.num_processes
    begin = time.perf_counter() - trainer.seconds
    recent = deque(trainer.losses[-100:], maxlen=100)

    def done():
        return len(trainer.losses) / steps if seconds is None else trainer.seconds / seconds

    def load(data: Any, batch_size: int) -> Iterator[Any]:
        """The batches from the current step on."""
        first = len(trainer.losses) * ranks + rank
        batches = ShuffledBatches(len(data), batch_size, config.seed, first, ranks)
        return iter(DataLoader(data, batch_sampler=batches, num_workers=workers))

    loader, is_late = load(dataset, config.batch_size), False
    layout = "{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"
    with tqdm(
        desc="train", total=1.0, initial=min(1.0, done()), bar_format=layout, disable=not progress or rank > 0
    ) as bar:
        while done() < 1:
            if late is not None and not is_late and done() >= config.late_from:
                clips = config.batch_size * dataset.shape[1] // late.shape[1]
                loader, is_late = load(late, max(1, clips)), True
            trainer.step(*next(loader), done())
            trainer.seconds = time.perf_counter() - begin
            recent.append(trainer.losses[-1])
            rate = len(trainer.losses) / trainer.seconds
            shown = f"step {len(trainer.losses)}, loss {sum(recent) / len(recent):.4f}, {rate:.1f} it/s"
            bar.set_postfix_str(shown, refresh=False)
            bar.update(min(1.0, done()) - bar.n)
            if len(trainer.losses) % save_every == 0 and done() < 1:
                trainer.save(path)
    trainer.save(path)
    return TrainResult(trainer.ema.module.eval(), trainer.losses, trainer.seconds)
