"""The command train, for images and for video."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from .common import interrupts, new_checkpoint, report_training
from .options import Seed


@dataclass
class DataOptions:
    """What to train on."""

    data: Annotated[
        str,
        typer.Option(
            help="Images: mnist, or a folder with one sub-folder of pictures per class. Video: moving-digits, "
            "game:pong (or another game), or with --frames a folder of videos."
        ),
    ] = "mnist"
    size: Annotated[int | None, typer.Option(help="Width in pixels to scale pictures and videos to.")] = None
    frames: Annotated[int | None, typer.Option(help="Frames per video clip.")] = None
    late_frames: Annotated[
        int | None, typer.Option(help="Frames per clip in the second half of the training, such as twice as many.")
    ] = None
    workers: Annotated[int, typer.Option(help="Processes that load the data.")] = 0

    @property
    def video(self):
        """Whether the data are videos."""
        from ..data import is_video

        return is_video(self.data) or self.frames is not None

    def open(self):
        """The data set, and that of the late clips or None."""
        from ..data import open_dataset, open_video_dataset

        if not self.video:
            if self.late_frames is not None:
                raise ValueError(f"late-frames: for videos only, and {self.data} are images")
            return open_dataset(self.data, self.size), None
        late = None if self.late_frames is None else open_video_dataset(self.data, self.late_frames, self.size)
        return open_video_dataset(self.data, self.frames, self.size), late


@dataclass
class RunOptions:
    """Where the run writes, and how long it is."""

    out: Annotated[Path, typer.Option(help="Folder for model.safetensors and loss.png.")] = Path("out/train")
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the checkpoint in --out.")] = False
    steps: Annotated[int | None, typer.Option(help="Training steps, those before --resume included.")] = None
    seconds: Annotated[float | None, typer.Option(help="Training time, in place of --steps.")] = None
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 1000


@dataclass
class ModelOptions:
    """The network."""

    start: Annotated[Path | None, typer.Option(help="Start a video model from this image model's checkpoint.")] = None
    model: Annotated[str | None, typer.Option(help="S/2 to XL/8. Default: the small model of the demo.")] = None
    patch: Annotated[int | None, typer.Option(help="Side of a patch, in pixels.")] = None
    dim: Annotated[int | None, typer.Option(help="Width of the tokens.")] = None
    layers: Annotated[int | None, typer.Option(help="Number of blocks.")] = None
    heads: Annotated[int | None, typer.Option(help="Heads of the mixer.")] = None
    mixer: Annotated[str, typer.Option(help="product, power, attention, local; or one per layer: power,...")] = "power"
    degree: Annotated[int | None, typer.Option(help="Degree of the polynomial.")] = None
    local_conv: Annotated[bool, typer.Option(help="Depthwise convolution over 3 x 3 patches in every block.")] = True
    conv_frames: Annotated[
        str | None,
        typer.Option(help="Video: earlier frames that the convolution sees, 0, 1 or 2; or one per layer: 1,0,0,0."),
    ] = None
    read: Annotated[
        str | None, typer.Option(help="Video: shared (one mean of everything seen) or split (the frame, and the past).")
    ] = None
    fade: Annotated[str | None, typer.Option(help="Video, --read split: how the past fades: head or gated.")] = None
    sink: Annotated[int | None, typer.Option(help="Video, --read split: first frames that never fade.")] = None

    def build(self, dataset, video, **extra):
        """A new network for the data set, or with --start a video model from an image model."""
        sizes = {"patch": self.patch, "dim": self.dim, "n_layers": self.layers, "n_heads": self.heads}
        sizes["degree"] = self.degree
        options = {name: value for name, value in sizes.items() if value is not None} | extra
        options |= {"local_conv": self.local_conv, "mixer": self.mixer.split(",") if "," in self.mixer else self.mixer}
        memory = self._memory(video)
        if video and self.start is not None:
            return self._inflated_network(dataset, memory)
        options |= memory
        return self._new_network(dataset, video, options)

    def _memory(self, video):
        """The arguments of a video model on what it keeps of earlier frames, as far as they were given."""
        given = {"read": self.read, "fade": self.fade, "sink": self.sink, "local_conv": self.conv_frames}
        given = {name: value for name, value in given.items() if value is not None}
        if given and not video:
            raise ValueError("conv-frames, read, fade, sink: for video models only")
        if self.conv_frames is not None:
            frames = self.conv_frames.split(",")
            if not self.local_conv or not all(word.isdecimal() for word in frames):
                raise ValueError(
                    "conv-frames: expected a number or one per layer, with a local convolution, got "
                    f"{self.conv_frames!r}{'' if self.local_conv else ' and --no-local-conv'}"
                )
            given["local_conv"] = int(frames[0]) if len(frames) == 1 else list(map(int, frames))
        return given

    def _new_network(self, dataset, video, options):
        from ..demo.images import MODEL
        from ..models import ImageDiT, VideoDiT, image_dit, video_dit

        channels, *lengths, side = dataset.shape
        options |= {"in_channels": channels, "n_classes": len(dataset.classes)}
        if self.model is None:
            options = {**MODEL, **options}
        if not video:
            options["image_size"] = side
            return ImageDiT(**options) if self.model is None else image_dit(self.model, **options)
        frames, height = lengths
        options |= {"size": (height, side), "length": frames, "positions": "space"}  # a stream has no end
        if "patch" in options:
            options["patch"] = (1, options["patch"], options["patch"])
        return VideoDiT(**options) if self.model is None else video_dit(self.model, **options)

    def _inflated_network(self, dataset, memory):
        from ..convert import inflate
        from ..models.checkpoint import load_model

        if self.model is not None:
            raise ValueError("start and model: the image model says what the video model is; give one of them")
        channels, frames, *size = dataset.shape
        network = inflate(load_model(self.start)[0].train(), length=frames, size=size, **memory)
        trained = network.config["in_channels"], network.config["n_classes"]
        if trained != (channels, len(dataset.classes)):
            raise ValueError(
                f"start: {self.start} is a model of {trained[0]} channels and {trained[1]} classes, the videos have "
                f"{channels} and {len(dataset.classes)}"
            )
        return network


@dataclass
class LearningOptions:
    """What the network learns, and how."""

    objective: Annotated[
        str, typer.Option(help="flow (matching), noise (prediction), or meanflow (draws in one step).")
    ] = "flow"
    guidance: Annotated[float | None, typer.Option(help="meanflow: trained guidance; 1: none. Default: 2.")] = None
    shift: Annotated[float | None, typer.Option(help="Noise shift. Default: computed from the size.")] = None
    context: Annotated[
        str,
        typer.Option(
            help="Video: clean (a noisy frame sees finished frames), self (partly frames that the model drew itself: "
            "streams last longer) or shared (it sees noisy frames)."
        ),
    ] = "clean"
    context_noise: Annotated[float, typer.Option(help="Video: most noise in finished frames, 0 to 1.")] = 0.5
    other_label: Annotated[
        float, typer.Option(help="Video, --context self: share of its own clips drawn for another class; 0.3 if long.")
    ] = 0.0
    batch_size: Annotated[int | None, typer.Option(help="Per step and process. Default: 32 images, 8 clips.")] = None
    lr: Annotated[float | None, typer.Option(help="Highest learning rate. Default: 0.4 / width of the tokens.")] = None
    ema_decay: Annotated[float, typer.Option(help="Decay per step of the averaged weights.")] = 0.999
    bf16: Annotated[bool, typer.Option("--bf16", help="bfloat16 autocast.")] = False
    seed: Seed = 0

    def config(self, network, dataset, video):
        """The `TrainConfig`; options left out follow from the network and the data."""
        from ..diffusion.objectives import objective_class
        from ..diffusion.timesteps import resolution_shift
        from ..training import TrainConfig

        shift = resolution_shift(dataset.shape[-1] * dataset.shape[-2])
        trained_in = objective_class(self.objective).trained_guidance or 1.0
        guidance = trained_in if network.config["n_classes"] else 1.0
        batch_size, lr = 8 if video else 32, 0.4 / network.config["dim"]
        computed = {"shift": shift, "guidance": guidance, "batch_size": batch_size, "lr": lr}
        options = computed | {name: value for name, value in vars(self).items() if value is not None}
        return TrainConfig(**options | ({} if video else {"context_noise": 0.0}))


def train(data: DataOptions, run: RunOptions, model: ModelOptions, learning: LearningOptions):
    """Train an image or a video model. Interrupt it at any time; --resume continues from the last checkpoint."""
    import torch

    from ..diffusion.objectives import list_objectives, objective_class
    from ..training import train as run_training

    checkpoint = new_checkpoint(run.out, run.resume)
    (dataset, late), video = data.open(), data.video
    kind = objective_class(learning.objective)
    if video and not kind.for_video:
        able = list_objectives(lambda kind: kind.for_video)
        raise ValueError(f"objective: {learning.objective} is for images; expected {able} for video")
    torch.manual_seed(learning.seed)
    network = model.build(dataset, video, **kind.model_options)
    config = learning.config(network, dataset, video)
    options = {name: value for name, value in vars(run).items() if name != "out"}
    with interrupts(checkpoint):
        result = run_training(network, dataset, checkpoint, config, late=late, **options, workers=data.workers)
    report_training(result, checkpoint, f"pom-ext {'stream' if video else 'sample'} {checkpoint}")
