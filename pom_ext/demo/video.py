"""The second part of the demo: the image model learns moving digits, and streams them beyond its training length."""

import time
from dataclasses import asdict

import torch
from tqdm.auto import tqdm

from ..convert import inflate
from ..data import MovingDigits
from ..diffusion import FlowMatching
from ..media import contact_sheet, write_video
from ..media.figures import save_loss_curve, save_stream_costs
from ..media.frames import tile
from ..models import VideoDiT
from ..streaming import VideoStream
from ..training import TrainConfig, train
from .measures import by_length, read_as, real_videos, train_judges

CLIP, LATE_CLIP, STREAM = 8, 16, 192  # frames of a clip early and late in the training, and of a drawn video
MEMORY = {"read": "split", "fade": "head", "sink": 1}  # of the video model
TRAIN = TrainConfig(
    lr=7e-3, shift=2.0, batch_size=4, warmup=50, ema_decay=0.995, context="self", context_noise=0.5, late_from=0.5
)
SAMPLING = {"steps": 6, "guidance": 3.0, "solver": "euler"}
COSTS = 192  # frames over which time and memory are compared with attention


def run_video(out, image_model, *, seconds, per_class, seed):
    """Train for `seconds`, stream `per_class` videos of every digit, and classify every frame.

    Returns:
        the report on video as a dict.
    """
    data, late = (MovingDigits(frames=frames, seed=seed) for frames in (CLIP, LATE_CLIP))
    config = TrainConfig(**{**asdict(TRAIN), "seed": seed})
    model = inflate(image_model.train(), length=CLIP, size=data.shape[2:], **MEMORY)
    result = train(model, data, out / "video.safetensors", config, late=late, seconds=seconds)
    save_loss_curve(result.losses, out / "video_loss.png", "flow matching loss on the moving digits")

    labels = torch.arange(len(data.classes)).repeat_interleave(per_class)
    stream = VideoStream(result.model, labels, objective=FlowMatching(config.shift), seed=seed, **SAMPLING)
    start = time.perf_counter()
    video = draw_video(stream, STREAM)
    drawing_seconds = time.perf_counter() - start
    show_video(video[::per_class], data.classes, out / "video.png", out / "video.mp4", out / "video.gif")

    classifier, clip_net, reached = train_judges(STREAM, seed)
    by_frame = read_as(video, labels, classifier).float().mean(0).tolist()
    real = real_videos(MovingDigits(frames=STREAM, seed=seed + 1, begin=data.begin), labels.repeat(2), seed)
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
        **reached,
        "frames_read_as_requested": by_frame,
        "read_within_the_trained_length": mean(by_frame[:CLIP]),
        "read_at_twice_the_trained_length": mean(by_frame[2 * CLIP - 4 : 2 * CLIP]),
        "by_length": by_length(video, labels, classifier, clip_net, real),
        "costs": costs,
    }


def mean(values):
    return sum(values) / len(values)


def draw_video(stream, frames):
    """(B, C, T, H, W) in [-1, 1] on the CPU: the next frames of a stream."""
    drawn = [stream.next().float().cpu() for _ in tqdm(range(frames), desc="stream", unit="frame")]
    return torch.cat(drawn, dim=2).clamp(-1, 1)


def show_video(video, names, sheet, *movies):
    """Write a contact sheet of videos (B, 1, T, H, W), a named row for each, and movies with five of them in a row.

    Movies play 24 frames a second. To stay small, a GIF has every second frame only, in 16 shades of grey.
    """
    contact_sheet(video, sheet, row_labels=names)
    tiled = torch.stack([tile(frame, columns=5) for frame in video.unbind(2)], dim=1)
    for path in movies:
        if path.suffix == ".gif":
            write_video(path, (7.5 * (tiled[:, ::2] + 1)).round() / 7.5 - 1, fps=12)
        else:
            write_video(path, tiled, fps=24)


def compare_costs(model, seed):
    """Milliseconds and bytes of every frame of a stream, for the model and for the same model with attention.

    Both draw by turns, with one solver step. The attention model is not trained, which does not change its times.
    """
    torch.manual_seed(seed)
    attention = VideoDiT(**{**model.config, "mixer": "attention"}).to(model.patch_in.weight).eval()
    streams = {"PoM": VideoStream(model, [0], steps=1), "attention": VideoStream(attention, [0], steps=1)}
    costs = {name: {"milliseconds": [], "bytes": []} for name in streams}
    for _ in range(COSTS):
        for name, stream in streams.items():
            start = time.perf_counter()
            stream.next()
            costs[name]["milliseconds"].append(round(1000 * (time.perf_counter() - start), 3))
            costs[name]["bytes"].append(stream.nbytes)
    return costs
