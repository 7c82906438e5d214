"""VideoStream: a video drawn frame after frame, from a cache that does not grow."""

from __future__ import annotations

import copy
import hashlib
import os
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from .._random import seeded_generator
from ..diffusion import FlowMatching, Objective, build_objective
from ..diffusion.context import check_context
from ..diffusion.guidance import append_empty_text, append_unconditional_labels, apply_guidance, num_copies
from ..diffusion.objectives import check_objective
from ..diffusion.solvers import check_solver, num_function_evals
from ..layers.embeddings import MAX_TIME
from ..models.cache import StreamCache
from ..models.checkpoint import changed_settings, read_checkpoint, save_checkpoint
from ..models.video import VideoDiT
from .config import StreamConfig, with_settings

DRAWN, REMEMBERED = 0, 1  # the two kinds of noise of a frame: it is drawn from one, and enters the cache with the other


class VideoStream:
    """A video that a frame-causal model draws frame after frame. "Frame" is a frame of tokens, patch[0] video frames.

    Args:
        model: a `VideoDiT`; runs on the device and in the dtype of its parameters.
        labels: (B,) integers, 0 to n_classes, for a model with classes: of all frames for which `next` gets no others.
        text, text_weight: (B, L, text_dim) and (B, L), for a model with text.
        batch: videos drawn together; None takes as many as there are labels or texts, or one.
        size: (H, W); None takes that of the training.
        window, decay: how the stream forgets older frames, see `VideoDiT.start`.
        objective: what the model was trained for, `FlowMatching()` by default.
        options: `context`, `context_noise`, `steps`, `solver`, `guidance` and `seed`, see `StreamConfig`.

    Attributes:
        frame: number of frames so far.
        config: the `StreamConfig`.
        caches: tuple of one `StreamCache`, or one for each evaluation of a frame. Never written to, only replaced, all
            together when a frame is finished: after an error the stream is at its last good frame, and a fork costs
            nothing.

    Raises:
        TypeError, ValueError: an argument of another type or out of range.
    """

    @with_settings
    def __init__(
        self,
        model: VideoDiT,
        labels: Tensor | Sequence[int] | None = None,
        *,
        text: Tensor | None = None,
        text_weight: Tensor | None = None,
        batch: int | None = None,
        size: Sequence[int] | None = None,
        window: int = 0,
        decay: float = 1.0,
        objective: Objective | None = None,
        **options: Any,
    ) -> None:
        if not isinstance(model, VideoDiT):
            raise TypeError(f"model: expected a VideoDiT, got {type(model).__name__}")
        self.objective = FlowMatching() if objective is None else objective
        self.config = config = StreamConfig(**options)
        check_objective(self.objective)
        for reason in self.objective.supports(video=True):
            raise TypeError(reason)
        for reason in self.objective.supports(model):
            raise ValueError(reason)
        check_context(config.context, objective=self.objective)
        check_solver(self.objective, config.steps, config.guidance, config.solver)
        if config.guidance != 1 and not (model.n_classes or model.text_dim):
            raise ValueError(
                f"guidance: a model without classes and text draws with guidance=1 only, got {config.guidance}"
            )
        self.model, self.frame = model, 0
        self.size = cast("tuple[int, int]", tuple(model.size if size is None else size))
        conditions = [given for given in (labels, text) if given is not None]
        self.batch = (len(conditions[0]) if conditions else 1) if batch is None else batch
        self.labels = None if labels is None else self._to_labels(labels)
        self.text, self.text_weight = text, text_weight
        start = model.start(self.batch * num_copies(config.guidance), self.size, window=window, decay=decay)
        evaluations = num_function_evals(config.steps, config.solver) if config.context == "shared" else 1
        self.caches = (start,) * evaluations

    @property
    def nbytes(self) -> int:
        """Bytes of all caches."""
        return sum(cache.nbytes for cache in {id(cache): cache for cache in self.caches}.values())

    @torch.no_grad()
    def next(self, labels: Tensor | Sequence[int] | None = None, frames: int = 1) -> Tensor:
        """Draw the next frame.

        Args:
            labels: (B,) for this frame, such as the current action; None takes those of the stream.
            frames: draw so many frames together, for context="shared".

        Returns:
            (B, C, frames * patch[0], H, W), trained range [-1, 1] but not clamped to it.

        Raises:
            ValueError, TypeError: a label out of range or missing, or positions that end here. The stream does not
            change.
        """
        config, shared, after = self.config, self.config.context == "shared", []
        if frames < 1 or (frames > 1 and not shared):
            raise ValueError(f"frames: expected 1, or more with context='shared', got {frames}")
        conditions = self._conditions(labels)

        def predict(x, time, span=None):
            if shared:
                prediction, cache = self._evaluate(x, time, self.caches[len(after)], conditions, return_past=True)
                after.append(cache)
            else:
                prediction = self._evaluate(x, time, self.caches[0], conditions, span=span)
            return apply_guidance(prediction, config.guidance)

        drawn = self.objective.denoise(predict, self._noise(frames, DRAWN), config.steps, config.solver)
        if not shared:
            after = [self._append(drawn, self.caches[0], conditions)]
        self.caches, self.frame = tuple(after), self.frame + frames
        return drawn

    @torch.no_grad()
    def prefill(self, video: Tensor, labels: Tensor | None = None) -> None:
        """Fill the cache with existing frames, as if the stream had drawn them; `next` continues them.

        Args:
            video: (B, C, T, H, W) in [-1, 1].
            labels: (B,) or (B, T / patch[0]); None takes those of the stream.

        Raises:
            ValueError, TypeError: a video of another shape, or a label out of range or missing. The stream does not
            change.
        """
        weight = self.model.reference_parameter
        if not isinstance(video, Tensor) or video.dim() != 5 or video.shape[0] != self.batch:
            got = tuple(video.shape) if isinstance(video, Tensor) else type(video).__name__
            raise ValueError(f"video: expected {self.batch} videos (B, C, T, H, W), got {got}")
        if tuple(video.shape[3:]) != self.size:
            raise ValueError(
                f"video: the stream's frames are {self.size[0]} x {self.size[1]}, "
                f"got {video.shape[3]} x {video.shape[4]}"
            )
        conditions, video = self._conditions(labels), video.to(weight)
        distinct = {id(cache): cache for cache in self.caches}  # with shared noise all are one at the start
        after = {i: self._append(video, cache, conditions) for i, cache in distinct.items()}
        self.caches = tuple(after[id(cache)] for cache in self.caches)
        self.frame += video.shape[2] // self.model.patch[0]

    def fork(self, seed: int | None = None) -> VideoStream:
        """A copy of the stream, to continue with other labels, or with the noise of another seed. It costs nothing."""
        fork = copy.copy(self)
        if seed is not None:
            fork.config = replace(self.config, seed=seed)
        return fork

    def restore(self, snapshot: VideoStream) -> None:
        """Go back to the frame of `snapshot`, an earlier fork of this stream.

        Raises:
            TypeError: `snapshot` is no stream of the same model.
        """
        if not isinstance(snapshot, VideoStream) or snapshot.model is not self.model:
            raise TypeError("snapshot: expected a stream of the same model, as fork() makes them")
        self.__dict__.update(vars(snapshot))

    # The names of 0.1, for one more release.

    watch = prefill

    def rewind(self, kept: VideoStream) -> None:
        """The name of `restore` in 0.1."""
        self.restore(kept)

    @property
    def pasts(self) -> tuple[StreamCache, ...]:
        """The name of `caches` in 0.1."""
        return self.caches

    def __getattr__(self, name: str) -> Any:
        """The settings, such as `guidance`, as attributes of the stream."""
        if name in StreamConfig.__dataclass_fields__:
            return getattr(self.config, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the stream to a safetensors file, whole or not at all; `load` continues it, bit for bit.

        Raises:
            ValueError: the objective is not registered, so that no file could name it.
        """
        settings = asdict(self.config) | {"frame": self.frame, "batch": self.batch, "size": self.size}
        settings |= self.objective.describe()
        conditions = {"labels": self.labels, "text": self.text, "text_weight": self.text_weight}
        parts = {"conditions": {name: tensor for name, tensor in conditions.items() if tensor is not None}}
        # Cloned, since at the start they share tensors, which safetensors refuses.
        parts |= {f"past{i}": cache.clone().state_dict() for i, cache in enumerate(self.caches)}
        identity = {"model": self.model.config, "weights": fingerprint(self.model)}
        save_checkpoint(path, parts, {"stream": settings, **identity})

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: VideoDiT) -> VideoStream:
        """The stream of a file that `save` wrote, with the model that drew it.

        Raises:
            FileNotFoundError: no such file.
            ValueError: the file is truncated, holds no stream, or one of another model.
        """
        parts, settings = read_checkpoint(path)
        if "stream" not in settings:
            raise ValueError(f"path: {path} holds a model, not a stream; streams are written by VideoStream.save")
        theirs, ours = settings["model"], model.config
        changed = changed_settings(theirs, ours)
        if changed:
            changes = ", ".join(f"{name} {theirs.get(name)}, not {ours.get(name)}" for name in changed)
            raise ValueError(f"path: {path} is a stream of another model: {changes}")
        if settings["weights"] != fingerprint(model):
            raise ValueError(
                f"path: {path} is a stream of a model like this one, but with other weights or of another dtype"
            )
        device = model.reference_parameter.device
        options = dict(settings["stream"])
        frame, objective = options.pop("frame"), build_objective(options.pop("objective"), options.pop("shift"))
        conditions = {name: tensor.to(device) for name, tensor in parts.pop("conditions", {}).items()}
        stream = cls(model, **conditions, **options, objective=objective)
        caches = tuple(StreamCache.from_state_dict(parts[f"past{i}"]).to(device) for i in range(len(parts)))
        if len(caches) != len(stream.caches):
            raise ValueError(f"path: {path} holds {len(caches)} pasts, its settings ask for {len(stream.caches)}")
        start = stream.caches[0]
        for cache in caches:
            try:
                model.check_cache(cache, stream.batch * num_copies(stream.config.guidance), start.height, start.width)
            except ValueError as error:
                raise ValueError(f"path: {path} holds no stream of this model ({error})") from None
        stream.caches, stream.frame = caches, frame
        return stream

    def _to_labels(self, labels: Tensor | Sequence[int]) -> Tensor:
        labels = torch.as_tensor(labels).to(self.model.reference_parameter.device)
        if labels.is_floating_point() or labels.dim() not in (1, 2) or len(labels) != self.batch:
            raise ValueError(
                f"labels: expected one integer for each of {self.batch} videos, "
                f"got {labels.dtype} {tuple(labels.shape)}"
            )
        return labels

    def _conditions(self, labels: Tensor | Sequence[int] | None) -> dict[str, Tensor | None]:
        """Arguments of the model for its conditions; with guidance those of 2 B videos, the second half without."""
        labels = self.labels if labels is None else self._to_labels(labels)
        conditions = {"labels": labels, "text": self.text, "text_weight": self.text_weight}
        if num_copies(self.config.guidance) == 1:
            return conditions
        if labels is not None:
            conditions["labels"] = append_unconditional_labels(labels, self.model.n_classes)
        if self.text is not None:
            conditions |= append_empty_text(self.text, self.text_weight)
        return conditions

    def _evaluate(
        self,
        x: Tensor,
        time: float | list[float],
        cache: StreamCache,
        conditions: dict[str, Tensor | None],
        return_past: bool = False,
        span: float | None = None,
    ) -> Any:
        """The prediction for frames x (B, C, T, H, W) of one time, or of one each; with return_past also the cache."""
        x = x.repeat(num_copies(self.config.guidance), 1, 1, 1, 1)
        if isinstance(time, list):
            times = torch.tensor(time, dtype=x.dtype, device=x.device).expand(len(x), -1)
        else:
            times = torch.full((len(x),), float(time), dtype=x.dtype, device=x.device)
        spans = None if span is None else torch.full_like(times, float(span))
        return self.model(x, times, **conditions, span=spans, frame_causal=True, past=cache, return_past=return_past)

    def _append(self, video: Tensor, cache: StreamCache, conditions: dict[str, Tensor | None]) -> StreamCache:
        """The cache after finished frames (B, C, T, H, W)."""
        time = MAX_TIME * self.config.context_noise
        frames, unit = video.shape[2] // self.model.patch[0], self.model.patch[0]
        if not time:
            return self._evaluate(video, 0.0, cache, conditions, return_past=True)[1]
        level = torch.full((self.batch,), time, dtype=video.dtype, device=video.device)
        noisy = self.objective.add_noise(video, self._noise(frames, REMEMBERED), level)
        times = [time] * frames
        clean = max(0, min(frames, self.model.sink - self.frame))  # a sink stays for ever, so it is kept without noise
        if clean:
            noisy[:, :, : clean * unit] = video[:, :, : clean * unit]
            times[:clean] = [0.0] * clean
        return self._evaluate(noisy, times if clean else time, cache, conditions, return_past=True)[1]

    def _noise(self, frames: int, purpose: int) -> Tensor:
        """(B, C, frames * patch[0], H, W), the noise of the next frames for DRAWN or REMEMBERED."""
        weight, unit = self.model.reference_parameter, self.model.patch[0]
        shape = (self.model.in_channels, unit, *self.size)

        def draw(video, frame):
            return torch.randn(shape, generator=seeded_generator(self.config.seed, video, frame, purpose))

        numbers = range(self.frame, self.frame + frames)
        videos = [torch.cat([draw(i, frame) for frame in numbers], dim=1) for i in range(self.batch)]
        return torch.stack(videos).to(weight)


def fingerprint(model: nn.Module) -> str:
    """A hash of all weights, as text."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
