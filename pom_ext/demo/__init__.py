"""The demo: train a small PoM transformer on the MNIST images, draw digits, teach it to move them, and stream video."""

import json
import os
import platform
import time
from pathlib import Path

import torch

from .._io import atomic_write
from .images import run_images
from .report import markdown
from .video import run_video


def run_demo(out="out/demo", *, image_seconds=150.0, video_seconds=300.0, per_class=60, streams=6, seed=0):
    """Run the demo and return the contents of its report.json.

    Args:
        out: folder for what README.md says; files there are replaced.
        image_seconds, video_seconds: training time of each part. All else adds about two minutes on two cores.
        per_class: samples that the classifier reads, per digit; the picture shows the first ten.
        streams: videos that it reads, per digit.
        seed: of the weights, the training and the samples.
    """
    begin = time.perf_counter()
    out = Path(out)
    model, images = run_images(out, seconds=image_seconds, per_class=per_class, seed=seed)
    report = {"machine": machine(), "images": images}
    report["video"] = run_video(out, model, seconds=video_seconds, per_class=streams, seed=seed)
    report["total_seconds"] = round(time.perf_counter() - begin, 1)
    for name, text in (("report.json", json.dumps(report, indent=2) + "\n"), ("report.md", markdown(report))):
        with atomic_write(out / name) as aside:
            aside.write_text(text, encoding="utf-8")
    return report


def machine():
    """One line that names the machine and the versions that matter."""
    return (
        f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, "
        f"Python {platform.python_version()}, torch {torch.__version__}"
    )
