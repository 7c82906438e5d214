"""VideoStream: a video drawn frame after frame, from a memory that does not grow."""

import copy
import hashlib

import torch

from .._random import seeded_generator
from ..diffusion import FlowMatching, MeanFlow, build_objective
from ..diffusion.objectives import OBJECTIVES, TIME_SCALE, check_context
from ..diffusion.solvers import check_solver, denoise, evaluations
from ..models.cache import Past
from ..models.checkpoint import read_checkpoint, save_checkpoint
from ..models.video import VideoDiT

SETTINGS = ("context", "context_noise", "steps", "solver", "guidance", "seed", "frame", "batch", "size")

DRAWN, REMEMBERED = 0, 1  # the two kinds of noise of a frame, drawn apart


class VideoStream:
    """A video that a frame-causal model draws frame after frame. "Frame" is a frame of tokens, patch[0] video frames.

    Args:
        model: a `VideoDiT`; runs on the device and in the dtype of its parameters.
        labels: (B,) integers, 0 to n_classes, for a model with classes: of all frames for which `next` is given no other.
        text, text_weight: (B, L, text_dim) and (B, L), for a model with text.
        batch: videos drawn at once; None takes as many as there are labels or texts, or one.
        size: (H, W); None takes that of the training.
        context: what a frame sees of those before it. "clean": the finished frames, in one `Past`. "shared": their noise
            at the same evaluation of the model, in a `Past` for each; drawing frame after frame is then the same as
            drawing all at once, to rounding. It must be what the model was trained with.
        context_noise: for clean context, the time at which a finished frame is remembered, as a share of 1000, with the
            noise of that time. Above 0 its details count less, and the model corrects them by what it knows of the data:
            a long stream drifts less. Not more than the model was trained with (`video_loss`).
        objective: what the model was trained for, `FlowMatching()` by default.
        steps, solver: of the solver; "heun" asks the model twice a step, "euler" once, and for noise prediction is DDIM.
        guidance: classifier-free guidance as in `guided_prediction`; 1 is none, others draw each video twice, with the
            conditions and without, and remember both.
        seed: the noise of frame f of video i depends on the seed, i and f alone.
        window, decay: what the stream forgets, see `VideoDiT.start`.

    Attributes:
        frame: number of frames so far.
        pasts: tuple of one `Past`, or one for each evaluation. Never written to, only replaced, all at once when a frame
            is finished: after an error the stream stands at its last good frame, and a fork costs nothing.
    """

    def __init__(self, model, labels=None, *, text=None, text_weight=None, batch=None, size=None, context="clean",
                 context_noise=0.0, objective=None, steps=8, solver="euler", guidance=1.0, seed=0, window=0, decay=1.0):  # fmt: skip
        if not isinstance(model, VideoDiT):
            raise TypeError(f"model: expected a VideoDiT, got {type(model).__name__}")
        self.objective = FlowMatching() if objective is None else objective
        check_context(context)
        if isinstance(self.objective, MeanFlow):
            raise TypeError("objective: expected FlowMatching or NoisePrediction, got MeanFlow, which is for images")
        check_solver(self.objective, steps, guidance, solver)
        if not 0 <= context_noise < 1 or (context_noise and context != "clean"):
            raise ValueError(
                f"context_noise: expected at least 0 and less than 1, with context='clean', got {context_noise}"
            )
        if guidance != 1 and not (model.n_classes or model.text_dim):
            raise ValueError(f"guidance: a model without classes and text draws with guidance=1 only, got {guidance}")
        self.model, self.context, self.context_noise = model, context, context_noise
        self.steps, self.solver, self.guidance = steps, solver, guidance
        self.seed, self.frame, self.size = seed, 0, tuple(model.size if size is None else size)
        conditions = [given for given in (labels, text) if given is not None]
        self.batch = (len(conditions[0]) if conditions else 1) if batch is None else batch
        self.labels = None if labels is None else self._labels(labels)
        self.text, self.text_weight = text, text_weight
        start = model.start(self.batch * self._copies, self.size, window=window, decay=decay)
        self.pasts = (start,) * (evaluations(steps, solver) if context == "shared" else 1)

    @property
    def nbytes(self):
        """Bytes of all that the stream remembers."""
        return sum(past.nbytes for past in {id(past): past for past in self.pasts}.values())

    @torch.no_grad()
    def next(self, labels=None, frames=1):
        """Draw the next frame, finished.

        Args:
            labels: (B,) for this frame, such as the action now; None takes those of the stream.
            frames: draw so many at once, for context="shared".

        Returns:
            (B, C, frames * patch[0], H, W), trained range [-1, 1] but not clamped to it.

        Raises:
            ValueError, TypeError: a label out of range or missing, or positions that end here. The stream stays as it is.
        """
        if frames < 1 or (frames > 1 and self.context != "shared"):
            raise ValueError(f"frames: expected 1, or more with context='shared', got {frames}")
        arguments = self._arguments(labels)
        shared, after = self.context == "shared", []

        def predict(x, time):
            past = self.pasts[len(after)] if shared else self.pasts[0]
            out, past = self._evaluate(x, time, past, arguments, return_past=shared)
            after.append(past)
            conditional, *unconditional = out.chunk(self._copies)
            if not unconditional:
                return conditional
            return unconditional[0] + self.guidance * (conditional - unconditional[0])

        drawn = denoise(predict, self._noise(frames, DRAWN), self.objective, self.steps, self.solver)
        if not shared:
            after = [self._remember(drawn, self.pasts[0], arguments)]
        self.pasts, self.frame = tuple(after), self.frame + frames
        return drawn

    @torch.no_grad()
    def watch(self, video, labels=None):
        """Go on from frames that are there already, as if the stream had drawn them.

        video: (B, C, T, H, W) in [-1, 1]; labels: (B,) or (B, T / patch[0]).
        """
        weight = self.model.like
        if not isinstance(video, torch.Tensor) or video.dim() != 5 or video.shape[0] != self.batch:
            got = tuple(video.shape) if isinstance(video, torch.Tensor) else type(video).__name__
            raise ValueError(f"video: expected {self.batch} videos (B, C, T, H, W), got {got}")
        if tuple(video.shape[3:]) != self.size:
            raise ValueError(
                f"video: the stream's frames are {self.size[0]} x {self.size[1]}, got {video.shape[3]} x {video.shape[4]}"
            )
        arguments, video = self._arguments(labels), video.to(weight)
        distinct = {id(past): past for past in self.pasts}  # of shared noise all are one at the start
        after = {i: self._remember(video, past, arguments) for i, past in distinct.items()}
        self.pasts = tuple(after[id(past)] for past in self.pasts)
        self.frame += video.shape[2] // self.model.patch[0]

    def fork(self, seed=None):
        """Another stream with the same past, to continue otherwise: with other labels, or the noise of another seed."""
        fork = copy.copy(self)
        fork.seed = self.seed if seed is None else seed
        return fork

    def rewind(self, kept):
        """Go back to where `kept`, a fork of this stream, stands."""
        if not isinstance(kept, VideoStream) or kept.model is not self.model:
            raise TypeError("kept: expected a stream of the same model, as fork() makes them")
        self.__dict__.update(vars(kept))

    def save(self, path):
        """Write the stream to a safetensors file, whole or not at all; `load` goes on from it, bit for bit."""
        names = {kind: name for name, kind in OBJECTIVES.items()}
        settings = {name: getattr(self, name) for name in SETTINGS}
        settings |= {"objective": names[type(self.objective)], "shift": self.objective.shift}
        given = {"labels": self.labels, "text": self.text, "text_weight": self.text_weight}
        parts = {"conditions": {name: tensor for name, tensor in given.items() if tensor is not None}}
        # Cloned, since at the start they share tensors, which safetensors refuses.
        parts |= {f"past{i}": past.clone().state_dict() for i, past in enumerate(self.pasts)}
        identity = {"model": self.model.config, "weights": fingerprint(self.model)}
        save_checkpoint(path, parts, {"stream": settings, **identity})

    @classmethod
    def load(cls, path, model):
        """The stream of a file that `save` wrote, with the model that drew it.

        Raises:
            FileNotFoundError: no such file.
            ValueError: the file is truncated, holds no stream, or one of another model.
        """
        parts, settings = read_checkpoint(path)
        if "stream" not in settings:
            raise ValueError(f"path: {path} holds a model, not a stream; streams are written by VideoStream.save")
        theirs, ours = settings["model"], model.config
        changed = [name for name in theirs.keys() | ours.keys() if theirs.get(name) != ours.get(name)]
        if changed:
            changes = ", ".join(f"{name} {theirs.get(name)}, not {ours.get(name)}" for name in sorted(changed))
            raise ValueError(f"path: {path} is a stream of another model: {changes}")
        if settings["weights"] != fingerprint(model):
            raise ValueError(
                f"path: {path} is a stream of a model like this one, but with other weights or of another dtype"
            )
        device = model.like.device
        options = dict(settings["stream"])
        frame, objective = options.pop("frame"), build_objective(options.pop("objective"), options.pop("shift"))
        conditions = {name: tensor.to(device) for name, tensor in parts.pop("conditions", {}).items()}
        stream = cls(model, **conditions, **options, objective=objective)
        pasts = tuple(Past.from_state_dict(parts[f"past{i}"]).to(device) for i in range(len(parts)))
        if len(pasts) != len(stream.pasts):
            raise ValueError(f"path: {path} holds {len(pasts)} pasts, its settings ask for {len(stream.pasts)}")
        stream.pasts, stream.frame = pasts, frame
        return stream

    @property
    def _copies(self):
        return 1 if self.guidance == 1 else 2

    def _labels(self, labels):
        labels = torch.as_tensor(labels).to(self.model.like.device)
        if labels.is_floating_point() or labels.dim() not in (1, 2) or len(labels) != self.batch:
            raise ValueError(
                f"labels: expected one integer for each of {self.batch} videos, got {labels.dtype} {tuple(labels.shape)}"
            )
        return labels

    def _arguments(self, labels):
        """Keyword arguments of the model for its conditions; with guidance the batch twice, then without conditions."""
        labels = self.labels if labels is None else self._labels(labels)
        arguments = {"labels": labels, "text": self.text, "text_weight": self.text_weight}
        if self._copies == 1:
            return arguments
        if labels is not None:
            arguments["labels"] = torch.cat([labels, torch.full_like(labels, self.model.n_classes)])
        if self.text is not None:
            weight = self.text.new_ones(self.text.shape[:2]) if self.text_weight is None else self.text_weight
            arguments |= {
                "text": self.text.repeat(2, 1, 1),
                "text_weight": torch.cat([weight, torch.zeros_like(weight)]),
            }
        return arguments

    def _evaluate(self, x, time, past, arguments, return_past):
        x = x.repeat(self._copies, 1, 1, 1, 1)
        time = torch.full((len(x),), float(time), dtype=x.dtype, device=x.device)
        out = self.model(x, time, **arguments, frame_causal=True, past=past, return_past=return_past)
        return out if return_past else (out, None)

    def _remember(self, video, past, arguments):
        """The past after finished frames."""
        time = TIME_SCALE * self.context_noise
        if time:
            noise = self._noise(video.shape[2] // self.model.patch[0], REMEMBERED)
            video = self.objective.add_noise(
                video, noise, torch.full((self.batch,), time, dtype=video.dtype, device=video.device)
            )
        return self._evaluate(video, time, past, arguments, return_past=True)[1]

    def _noise(self, frames, purpose):
        weight, unit = self.model.like, self.model.patch[0]
        shape = (self.model.in_channels, unit, *self.size)

        def of_frame(video, frame):
            return torch.randn(shape, generator=seeded_generator(self.seed, video, frame, purpose))

        numbers = range(self.frame, self.frame + frames)
        videos = [torch.cat([of_frame(i, frame) for frame in numbers], dim=1) for i in range(self.batch)]
        return torch.stack(videos).to(weight)


def fingerprint(model):
    """A hash of all weights, as text."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
