"""The second part of the demo: the image model learns to move its digits, and streams them for longer than it has seen."""

import time
from dataclasses import asdict

import torch

from ..convert import inflate
from ..data import MovingDigits
from ..diffusion import FlowMatching
from ..media import contact_sheet, write_video
from ..media.figures import save_loss_curve, save_stream_costs
from ..media.video import tile
from ..models import VideoDiT
from ..streaming import VideoStream
from ..training import TrainConfig, train
from .classifier import train_classifier

CLIP, STREAM = 8, 24  # frames: of a clip in training, and of the videos drawn
TRAIN = TrainConfig(lr=7e-3, shift=2.0, batch_size=4, warmup=50, ema_decay=0.995, context_noise=1.0)
# Without context noise a digit's strokes grow or fade from frame to frame: after 16 frames half of the digits were read.
SAMPLING = {"steps": 6, "guidance": 4.0, "solver": "euler", "context_noise": 0.8}
COSTS = 192  # frames over which time and memory are compared with attention


def run_video(out, image_model, *, seconds, per_class, seed):
    """Train for so many seconds, stream `per_class` videos of every digit, and have every frame read.

    Returns:
        the part of the report.
    """
    data = MovingDigits(frames=CLIP, seed=seed)
    config = TrainConfig(**{**asdict(TRAIN), "seed": seed})
    model = inflate(image_model.train(), length=CLIP, size=data.shape[2:])
    result = train(model, data, out / "video.safetensors", config, seconds=seconds)
    save_loss_curve(result.losses, out / "video_loss.png", "flow matching loss on the moving digits")

    labels = torch.arange(len(data.classes)).repeat_interleave(per_class)
    stream = VideoStream(result.model, labels, objective=FlowMatching(config.shift), seed=seed, **SAMPLING)
    start = time.perf_counter()
    video = torch.cat([stream.next() for _ in range(STREAM)], dim=2).float().cpu().clamp(-1, 1)  # (B, 1, T, H, W)
    drawing_seconds = time.perf_counter() - start
    shown = video[::per_class]
    contact_sheet(shown, out / "video.png", row_labels=data.classes)
    tiled = torch.stack([tile(frame, columns=5) for frame in shown.unbind(2)], dim=1)
    for name in ("video.mp4", "video.gif"):
        write_video(out / name, tiled, fps=8)

    classifier, held_out_accuracy = train_classifier(*still_frames(data))
    with torch.no_grad():
        read = (classifier(video.transpose(1, 2).flatten(0, 1)).argmax(1).view(-1, STREAM) == labels[:, None]).float()
    by_frame = read.mean(0).tolist()
    costs = compare_costs(result.model, seed)
    save_stream_costs(costs, out / "stream.png", "one more frame of the stream, against the number of frames before it")
    final = result.losses[-200:]
    return {
        "model": model.config,
        "train": asdict(config),
        "steps": len(result.losses),
        "training_seconds": round(result.seconds, 1),
        "milliseconds_per_step": round(1000 * result.seconds / len(result.losses), 1),
        "final_loss": round(sum(final) / len(final), 4),
        "clip_frames": CLIP,
        "stream": {**SAMPLING, "videos": len(video), "frames": STREAM, "seconds": round(drawing_seconds, 1)},
        "state_bytes_per_video": stream.nbytes // len(video),
        "classifier_accuracy_on_real_frames": held_out_accuracy,
        "frames_read_as_requested": by_frame,
        "read_within_the_trained_length": mean(by_frame[:CLIP]),
        "read_at_twice_the_trained_length": mean(by_frame[2 * CLIP - 4 : 2 * CLIP]),
        "costs": costs,
    }


def mean(values):
    return sum(values) / len(values)


def still_frames(data):
    """One frame of a moving digit for every image, and its label."""
    clips = [data[index] for index in range(data.images_shown)]
    frames = torch.stack([clip[:, index % CLIP] for index, (clip, _) in enumerate(clips)])
    return frames, torch.stack([label for _, label in clips])


def compare_costs(model, seed):
    """Milliseconds and bytes of every frame of a stream, for the model and for its twin with attention.

    Both draw by turns, with one solver step, and nothing is shown; the twin is not trained, which costs it no time.
    """
    torch.manual_seed(seed)
    twin = VideoDiT(**{**model.config, "mixer": "attention"}).to(model.patch_in.weight).eval()
    streams = {"PoM": VideoStream(model, [0], steps=1), "attention": VideoStream(twin, [0], steps=1)}
    costs = {name: {"milliseconds": [], "bytes": []} for name in streams}
    for _ in range(COSTS):
        for name, stream in streams.items():
            start = time.perf_counter()
            stream.next()
            costs[name]["milliseconds"].append(round(1000 * (time.perf_counter() - start), 3))
            costs[name]["bytes"].append(stream.nbytes)
    return costs
