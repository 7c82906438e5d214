"""What an objective is: how noise is added, what the network predicts, its loss, and how to sample with it.

An objective is a subclass of `Objective` in one file, registered under a name by `register_objective`. Nothing else in
the package knows which objectives exist. docs/how-to/add-an-objective.md shows a complete one.

Times are in the network's unit: 0 is the data, 1000 is noise. Images and videos are scaled to [-1, 1].
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from .context import CONTEXTS
from .losses import diffusion_loss, video_loss
from .network import Network
from .timesteps import resolution_shift


class Objective(ABC):
    """Base class of the objectives: what a network learns, and how to sample with a network that has learned it.

    Args:
        shift: how much the noise-to-signal ratio is raised, see `resolution_shift`; above 0.

    Raises:
        ValueError: a shift that is not positive.
    """

    name: ClassVar[str] = ""  # in checkpoints and for `build_objective`; `register_objective` sets name and label
    label: ClassVar[str] = ""  # in messages
    solvers: ClassVar[tuple[str, ...]] = ("euler",)  # that `denoise` knows, of `solvers.SOLVERS`
    default_steps: ClassVar[int] = 30  # of the solver, for an image
    default_guidance: ClassVar[float] = 3.0  # of the sampler, for an image
    trained_guidance: ClassVar[float | None] = None  # default of the argument `guidance`, if the objective takes one
    for_video: ClassVar[bool] = True  # whether it trains on videos and draws them frame after frame
    contexts: ClassVar[tuple[str, ...]] = CONTEXTS  # of `video_loss`, that it has; "self" needs `estimate`
    model_options: ClassVar[Mapping[str, Any]] = MappingProxyType({})  # arguments of the model that it needs

    def __init__(self, shift: float = 1.0) -> None:
        self.shift = check_positive("shift", shift)

    @abstractmethod
    def draw_time(self, batch: int, generator: torch.Generator) -> Tensor:
        """(batch,) times in [0, 1000] to train on, on the device of the generator."""

    @abstractmethod
    def add_noise(self, clean: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        """The noisy data x_t (B, ...) for data and noise (B, ...) at times (B,)."""

    @abstractmethod
    def target(self, clean: Tensor, noise: Tensor) -> Tensor:
        """What the network is trained to predict (B, ...)."""

    def estimate(self, noisy: Tensor, prediction: Tensor, time: Tensor) -> Tensor:
        """The data (B, ...) that the prediction (B, ...) for noisy data (B, ...) at times (B,) amounts to.

        Only needed to train a video model behind its own frames, context="self".

        Raises:
            NotImplementedError: the objective does not say it.
        """
        raise NotImplementedError(f"context: 'self' needs a method {type(self).__name__}.estimate")

    @abstractmethod
    def denoise(self, predict: Callable[..., Tensor], noise: Tensor, steps: int, solver: str = "euler") -> Tensor:
        """Data from noise.

        Args:
            predict: the network as predict(x, time), time a number in [0, 1000]; `MeanFlow` calls predict(x, time,
                span).
            noise: (B, ...).
            steps: solver steps.
            solver: one of `solvers`.

        Returns:
            (B, ...), in the dtype of the noise.
        """

    def loss(
        self,
        model: Network,
        clean: Tensor,
        labels: Tensor | None,
        generator: torch.Generator,
        *,
        progress: float = 1.0,
        **video: Any,
    ) -> Tensor:
        """Loss of one batch, a scalar.

        Args:
            model: the network in training; a wrapper of it has the attribute `module`.
            clean: images (B, C, H, W) or videos (B, C, T, H, W), in [-1, 1].
            labels: (B,), or (B, T') for the frames of videos; None for a model without.
            generator: of noise and times, on the device of `clean`.
            progress: completed share of the training, 0 to 1, for losses that change on the way.
            video: `context`, `context_noise`, `other_label` and `given` of `video_loss`; images do not use them.
        """
        if "length" in getattr(model, "module", model).config:
            return video_loss(model, self, clean, labels, generator, progress=progress, **video)
        return diffusion_loss(model, self, clean, labels, generator)

    def supports(
        self,
        model: Network | None = None,
        *,
        solver: str | None = None,
        guidance: float | None = None,
        video: bool = False,
    ) -> list[str]:
        """Reasons why the objective does not work with these arguments; empty if it does. None is not checked.

        Args:
            model: to train.
            solver: to sample with, one of `solvers.SOLVERS`.
            guidance: to sample with.
            video: whether videos are drawn frame after frame.
        """
        reasons = []
        two_times = None if model is None else model.config.get("two_times", False)
        if model is not None and two_times != self.model_options.get("two_times", False):
            names = list_objectives(lambda kind: kind.model_options.get("two_times", False))
            reasons.append(
                f"model: objective={names!r} needs a model with two_times=True, and the others one without, got "
                f"objective={self.name!r} and {type(model).__name__} with two_times={two_times}"
            )
        if solver is not None and solver not in self.solvers:
            able = list_objectives(lambda kind: solver in kind.solvers, "label", "and")
            unable = list_objectives(lambda kind: solver not in kind.solvers, "label", "and")
            reasons.append(f"solver: {solver!r} is for {able}; use {self.solvers[0]!r} with {unable}")
        if guidance is not None and guidance != 1 and self.trained_guidance is not None:
            reasons.append(f"guidance: expected 1, for it is trained into a {self.label} model, got {guidance}")
        if video and not self.for_video:
            able = list_objectives(lambda kind: kind.for_video, "__name__")
            reasons.append(f"objective: expected {able}, got {type(self).__name__}, which is for images")
        return reasons

    def for_resolution(self, pixels: int, trained_pixels: int) -> Objective:
        """This objective for sampling at another resolution than that of the training, with its shift adapted.

        Args:
            pixels, trained_pixels: positions of an image, see `resolution_shift`.
        """
        resized = copy.copy(self)
        resized.shift = self.shift * resolution_shift(pixels, trained_pixels)
        return resized

    def describe(self) -> dict[str, Any]:
        """{"objective": name, "shift": shift}, the arguments of `build_objective`, to be kept in a file.

        Raises:
            ValueError: the class is not registered, so that no file could name it.
        """
        if OBJECTIVES.get(self.name) is not type(self):
            raise ValueError(
                f"objective: {type(self).__name__} has no name to save; register the class with register_objective"
            )
        return {"objective": self.name, "shift": self.shift}


OBJECTIVES: dict[str, type[Objective]] = {}

Kind = TypeVar("Kind", bound=type[Objective])


def register_objective(name: str, label: str | None = None) -> Callable[[Kind], Kind]:
    """Class decorator that makes an objective known by a name, to `build_objective`, training and the commands.

    Args:
        name: for code and files, such as "flow".
        label: for messages, such as "flow matching"; None takes the name.

    Raises:
        TypeError: the name is no text, or the class no `Objective`.
        ValueError: another class has the name, or the class has another.
    """

    if not isinstance(name, str):
        raise TypeError(f"name: expected text, as in @register_objective('flow'), got {name!r}")

    def register(kind: Kind) -> Kind:
        if not (isinstance(kind, type) and issubclass(kind, Objective)):
            raise TypeError(f"objective: expected a subclass of Objective, got {kind!r}")
        if name in OBJECTIVES:
            raise ValueError(f"objective: the name {name!r} is taken by {OBJECTIVES[name].__name__}")
        if kind in OBJECTIVES.values():
            raise ValueError(f"objective: {kind.__name__} has the name {kind.name!r} already; register a subclass")
        kind.name, kind.label = name, name if label is None else label
        OBJECTIVES[name] = kind
        return kind

    return register


def list_objectives(condition: Callable[[type[Objective]], bool], attribute: str = "name", word: str = "or") -> str:
    """The registered objectives for which `condition` is true, for messages: "flow or noise"."""
    return f" {word} ".join(getattr(kind, attribute) for kind in OBJECTIVES.values() if condition(kind))


def objective_class(name: str) -> type[Objective]:
    """The class of a name in OBJECTIVES: "flow", "noise", "meanflow", or one that was registered.

    Raises:
        ValueError: another name.
    """
    if name not in OBJECTIVES:
        raise ValueError(f"objective: expected one of {sorted(OBJECTIVES)}, got {name!r}")
    return OBJECTIVES[name]


def build_objective(name: str, shift: float = 1.0, **options: Any) -> Objective:
    """The objective of a name in OBJECTIVES. `options` are further arguments of its class: `guidance` of "meanflow".

    Raises:
        ValueError: another name, or a shift that is not positive.
    """
    return objective_class(name)(shift, **options)


def check_objective(objective: Any) -> None:
    """TypeError unless this is an `Objective`."""
    if not isinstance(objective, Objective):
        raise TypeError(f"objective: expected an Objective such as FlowMatching(), got {type(objective).__name__}")


def check_positive(name: str, value: float) -> float:
    """`value` as a float; ValueError unless it is positive and finite."""
    if not (0 < value < math.inf):
        raise ValueError(f"{name}: expected a positive number, got {value}")
    return float(value)
