"""Streams that last: study models of moving digits, measured over 192 frames beside real videos.

Every model learns images first, then video, by the same recipe: the constants below. Rows differ in the seed, or in the
mixer: attention with its cache in place of the polynomial mixer, for the same training time.
"""

import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from pom_ext.data import MNIST, MovingDigits
from pom_ext.demo import images, video
from pom_ext.demo.measures import by_length, real_videos, train_judges
from pom_ext.diffusion import FlowMatching
from pom_ext.models import ImageDiT, inflate
from pom_ext.streaming import VideoStream
from pom_ext.training import train

from ..harness import report
from ..harness.command import parse, suite_parser

# The recipe: that of the demo, trained for longer, also behind own frames of other classes.
MODEL = images.MODEL
MEMORY = video.MEMORY  # options of `inflate`; of a polynomial mixer
ATTENTION: dict[str, Any] = {}
IMAGE_TRAIN = images.TRAIN
VIDEO_TRAIN = replace(video.TRAIN, other_label=0.3)
CLIP, LATE_CLIP = video.CLIP, video.LATE_CLIP  # frames of a clip early and late in the training
SAMPLING = video.SAMPLING
SECONDS = (300.0, 5100.0)  # training on images and on video

FRAMES, PER_DIGIT = 192, 10  # of the streams that are measured
REAL = 1000  # seed of the real videos beside them; no model is trained on their paths


def train_model(mixer, memory, seed, seconds):
    """Train a model on images, then on video.

    Args:
        mixer: of all layers.
        memory: options of `inflate`.
        seed: of weights, data and noise.
        seconds: for images and for video.

    Returns:
        `TrainResult` of the images and of the videos.
    """
    data, clips, late = MNIST(), MovingDigits(CLIP, seed=seed), MovingDigits(LATE_CLIP, seed=seed)
    torch.manual_seed(seed)
    model = ImageDiT(data.shape[0], len(data.classes), data.shape[1], **MODEL | {"mixer": mixer})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        still = train(model, data, path, replace(IMAGE_TRAIN, seed=seed), seconds=seconds[0])
        model = inflate(still.model.train(), length=CLIP, size=clips.shape[2:], **memory)
        return still, train(model, clips, path, replace(VIDEO_TRAIN, seed=seed), late=late, seconds=seconds[1])


def measure(result, seed, judges, real, pictures=None):
    """The JSON of the stream of a trained model; writes its pictures to the files `pictures`, if there are any."""
    labels = torch.arange(10).repeat_interleave(PER_DIGIT)
    objective = FlowMatching(VIDEO_TRAIN.shift)
    stream = VideoStream(result.model, labels, objective=objective, seed=seed, **SAMPLING)
    start = time.perf_counter()
    drawn = video.draw_video(stream, FRAMES)
    seconds = time.perf_counter() - start
    if pictures:
        video.show_video(drawn[::PER_DIGIT], "0123456789", *pictures)
    return {
        "parameters": sum(parameter.numel() for parameter in result.model.parameters()),
        "bytes_per_video": stream.nbytes // len(labels),
        "streaming_seconds": round(seconds, 1),
        "by_length": by_length(drawn, labels, *judges, real),
    }


def print_row(name, row):
    print(f"{name}: {row['image_steps']:,} steps on images, {row['steps']:,} on video", flush=True)
    for part in row["by_length"]:
        motion = ", ".join(
            f"{key} {part[key]:.2f} ({part[key + '_real']:.2f})" for key in ("speed", "acceleration", "cosine")
        )
        print(
            f"  frames {part['frames'][0]:3} to {part['frames'][1]:3}: read {part['read']:6.1%}, {motion}, "
            f"mass {part['mass']:.0f} ({part['mass_real']:.0f}), "
            f"distance {part['frechet']:.1f} ({part['frechet_real']:.1f})",
            flush=True,
        )


def main(arguments=None):
    parser = suite_parser("video-lasts")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="a model for each")
    parser.add_argument(
        "--seconds",
        type=float,
        nargs=2,
        default=SECONDS,
        metavar=("IMAGE", "VIDEO"),
        help="training of a model on images and on video",
    )
    parser.add_argument("--attention", action="store_true", help="also train each with attention and its cache")
    parser.add_argument(
        "--pictures", type=Path, metavar="FOLDER", help="write a contact sheet and a GIF of each stream"
    )
    options = parse(parser, arguments)
    content = report.begin(
        model=MODEL,
        memory=MEMORY,
        memory_of_attention=ATTENTION,
        image_train=asdict(IMAGE_TRAIN),
        video_train=asdict(VIDEO_TRAIN),
        clip=CLIP,
        late_clip=LATE_CLIP,
        sampling=SAMPLING,
        training_seconds=list(options.seconds),
        frames=FRAMES,
        videos_per_digit=PER_DIGIT,
    )
    *judges, reached = train_judges(FRAMES)
    content |= reached | {"seeds": [], "attention": []}
    paths = MovingDigits(FRAMES, seed=REAL)
    real = real_videos(paths, torch.arange(10).repeat_interleave(PER_DIGIT).repeat(2))
    rows = [("seeds", seed, MODEL["mixer"], MEMORY) for seed in options.seeds]
    rows += [("attention", seed, "attention", ATTENTION) for seed in options.seeds if options.attention]
    for group, seed, mixer, memory in rows:
        name = f"{mixer}-{seed}"
        files = [options.pictures / f"{name}{ending}" for ending in (".png", ".gif")] if options.pictures else None
        still, result = train_model(mixer, memory, seed, options.seconds)
        row = {"seed": seed, "image_steps": len(still.losses), "steps": len(result.losses)}
        row |= {"loss": round(sum(result.losses[-200:]) / len(result.losses[-200:]), 4)}
        row |= measure(result, seed, judges, real, files)
        content[group].append(row)
        print_row(name, row)
        report.save(content, options.json)
    return 0
