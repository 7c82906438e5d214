"""The training loop: Accelerate for device and processes, AdamW, a running average of the weights, resume."""

import itertools
import math
import time
from collections import deque
from dataclasses import asdict, dataclass

import torch
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, Sampler
from tqdm.auto import tqdm

from .._random import seeded_generator
from ..diffusion import MeanFlow, build_objective
from ..diffusion.meanflow import meanflow_loss
from ..diffusion.objectives import check_context, diffusion_loss, drop_labels, video_loss
from ..models.checkpoint import read_checkpoint, save_checkpoint
from ..models.video import VideoDiT
from ..ops import _library


@dataclass(frozen=True)
class TrainConfig:
    """How to train. `shift` is explained at `diffusion.noise_shift`, `guidance`, which is for "meanflow", at
    `diffusion.MeanFlow`, `context`, `context_noise` and `given`, which are for video, at `diffusion.video_loss`;
    `warmup` counts steps."""

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
    given: int = 0
    bf16: bool = False
    seed: int = 0

    def __post_init__(self):
        for name in ("batch_size", "lr", "grad_clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected a positive number, got {getattr(self, name)}")
        check_context(self.context)
        if self.guidance != 1 and self.objective != "meanflow":
            raise ValueError(f"guidance: trained in by objective='meanflow' only, got {self.guidance}; sample with it")
        for name in ("weight_decay", "warmup", "given", "seed"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}: expected at least 0, got {getattr(self, name)}")
        if not 0 <= self.context_noise <= 1:
            raise ValueError(f"context_noise: expected 0 to 1, got {self.context_noise}")
        for name in ("ema_decay", "label_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 0 and less than 1, got {getattr(self, name)}")


@dataclass
class TrainResult:
    """model: the averaged weights; losses: one per step since step 0; seconds: training time, over all resumes."""

    model: torch.nn.Module
    losses: list
    seconds: float


class ShuffledBatches(Sampler):
    """Endless batches of indices. Batch i depends on the seed and on i alone, so training can go on at any batch."""

    def __init__(self, length, batch_size, seed, start=0, stride=1):
        self.length, self.batch_size, self.seed, self.start, self.stride = length, batch_size, seed, start, stride

    def __iter__(self):
        per_epoch = max(1, self.length // self.batch_size)
        shuffled = None
        for batch in itertools.count(self.start, self.stride):
            epoch, position = divmod(batch, per_epoch)
            if epoch != shuffled:
                order, shuffled = torch.randperm(self.length, generator=seeded_generator(self.seed, epoch)), epoch
            yield order[position * self.batch_size : (position + 1) * self.batch_size].tolist()


def learning_rate(config, step, progress):
    """Linear warmup over the first steps, times a cosine that ends at 0 when `progress`, from 0 to 1, is complete."""
    return config.lr * min(1.0, (step + 1) / (config.warmup + 1)) * (1 + math.cos(math.pi * min(1.0, progress))) / 2


def average_of(model, decay):
    """A running average of the model's weights. Early on it forgets faster, as its first values are worth little."""

    def update(averages, parameters, count):
        rate = min(decay, (1 + float(count)) / (10 + float(count)))
        torch._foreach_lerp_(averages, parameters, 1 - rate)

    return AveragedModel(model, multi_avg_fn=torch.no_grad()(update))


class Trainer:
    """Everything that changes during training, and its way to and from a checkpoint."""

    def __init__(self, model, config, settings, accelerator):
        self.model, self.config, self.accelerator = model, config, accelerator
        self.settings = {"model": model.config, "train": asdict(config), **settings}
        self.ema = average_of(model.to(accelerator.device), config.ema_decay)
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=config.lr, weight_decay=config.weight_decay, betas=(0.9, 0.99)
        )
        self.wrapped, self.optimizer = accelerator.prepare(model, optimizer)
        guidance = {"guidance": config.guidance} if config.objective == "meanflow" else {}
        self.objective = build_objective(config.objective, config.shift, **guidance)
        self.losses, self.seconds = [], 0.0

    def save(self, path):
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

    def resume(self, path):
        """Go on from a checkpoint.

        Raises:
            ValueError: the checkpoint is broken, or was made with other settings than these.
        """
        parts, settings = read_checkpoint(path)
        for group, expected in self.settings.items():
            _check_same(path, group, settings[group], expected)
        self.model.load_state_dict(parts["model"])
        self.ema.module.load_state_dict(parts["ema"])
        self.ema.n_averaged.copy_(parts["history"]["averaged"])
        moments = {}
        for key, tensor in parts.get("optimizer", {}).items():
            index, name = key.split(".")
            moments.setdefault(int(index), {})[name] = tensor
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": moments})
        self.losses, self.seconds = parts["history"]["losses"].tolist(), settings["seconds"]

    def step(self, clean, labels, progress):
        """One step of gradient descent. All its randomness follows from the seed and the number of the step."""
        config, device, step = self.config, self.accelerator.device, len(self.losses)
        generator = seeded_generator(config.seed, step, self.accelerator.process_index, device=device)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(config, step, progress)
        n_classes = self.model.config["n_classes"]
        labels = drop_labels(labels.to(device), n_classes, config.label_dropout, generator) if n_classes else None
        given = (self.wrapped, self.objective, clean.to(device), labels, generator)
        with torch.autocast(device.type, torch.bfloat16, enabled=config.bf16):
            if isinstance(self.model, VideoDiT):
                loss = video_loss(
                    *given, context=config.context, context_noise=config.context_noise, given=config.given
                )
            else:
                spans = isinstance(self.objective, MeanFlow) and progress >= MeanFlow.VELOCITY_FIRST
                loss = meanflow_loss(*given) if spans else diffusion_loss(*given)
        value = loss.item()
        if not math.isfinite(value):
            raise ArithmeticError(f"the loss is {value} at step {step}: try a lower learning rate than {config.lr}")
        self.accelerator.backward(loss)
        self.accelerator.clip_grad_norm_(self.wrapped.parameters(), config.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.update_parameters(self.model)
        self.losses.append(value)


def _check_same(path, group, stored, expected):
    changed = sorted(key for key in stored.keys() | expected.keys() if stored.get(key) != expected.get(key))
    if changed:
        changes = ", ".join(f"{key} is {stored.get(key)}, given {expected.get(key)}" for key in changed)
        raise ValueError(f"resume: {path} was trained with another {group}: {changes}")


def train(
    model,
    dataset,
    path,
    config=None,
    *,
    steps=None,
    seconds=None,
    resume=False,
    save_every=1000,
    workers=0,
    progress=True,
):
    """Train a model and leave checkpoints, the last one complete, at `path`.

    Args:
        model: an `ImageDiT` or a `VideoDiT`, moved to the device that Accelerate chooses.
        dataset: an `ImageDataset` with images of the size and classes the model was made for, or a `VideoDataset`.
        path: the checkpoint file.
        config: a `TrainConfig`.
        steps, seconds: when to stop, one or the other, counted from step 0 even after a resume. With `seconds` the
            learning rate follows the time, so that a slower machine does fewer steps but finishes them properly.
        resume: go on from the checkpoint at `path`. With `steps` the result is bit for bit that of a run that was
            never interrupted; the settings must be the same.
        save_every: steps between checkpoints.
        workers: processes that read the data.
        progress: show a progress bar with loss and steps per second.

    Returns:
        TrainResult

    Raises:
        ValueError: an argument is out of range, the model and the data do not fit, or what `Trainer.resume` raises.
        ArithmeticError: the loss is not finite any more. The last checkpoint is kept.
    """
    from accelerate import Accelerator

    config = TrainConfig() if config is None else config
    if (steps is None) == (seconds is None):
        raise ValueError(f"steps, seconds: expected one of the two, got steps={steps}, seconds={seconds}")
    if not (steps if seconds is None else seconds) > 0 or save_every < 1:
        raise ValueError(f"expected positive numbers, got steps={steps}, seconds={seconds}, save_every={save_every}")
    if model.config["n_classes"] != len(dataset.classes):
        raise ValueError(f"model: made for {model.config['n_classes']} classes, the data has {len(dataset.classes)}")
    two_times = model.config.get("two_times", False)
    if (config.objective == "meanflow") != two_times:
        raise ValueError(
            "model: objective='meanflow' needs an ImageDiT with two_times=True, and the others one without, got "
            f"objective={config.objective!r} and {type(model).__name__} with two_times={two_times}"
        )
    accelerator = Accelerator(cpu=_library.default_device() == "cpu")
    if seconds is not None and accelerator.num_processes > 1:
        raise ValueError("seconds: processes would stop at different steps; use steps with several processes")

    trainer = Trainer(model, config, {"data": dataset.describe()}, accelerator)
    if resume:
        trainer.resume(path)
    rank, ranks = accelerator.process_index, accelerator.num_processes
    first = len(trainer.losses) * ranks + rank
    batches = ShuffledBatches(len(dataset), config.batch_size, config.seed, first, ranks)
    loader = iter(DataLoader(dataset, batch_sampler=batches, num_workers=workers))
    begin = time.perf_counter() - trainer.seconds
    recent = deque(trainer.losses[-100:], maxlen=100)

    def done():
        return len(trainer.losses) / steps if seconds is None else trainer.seconds / seconds

    layout = "{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"
    with tqdm(
        desc="train", total=1.0, initial=min(1.0, done()), bar_format=layout, disable=not progress or rank > 0
    ) as bar:
        while done() < 1:
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
