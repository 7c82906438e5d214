"""The demo: train a small PoM transformer on MNIST, draw digits, train it on moving digits, and stream video."""

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


def run_demo(out="out/demo", *, image_seconds=105.0, video_seconds=375.0, per_class=30, streams=2, seed=0):
    """Run the demo and return the contents of its report.json.

    Args:
        out: folder for the files that README.md lists; existing files are replaced.
        image_seconds: training time of the image model. The rest of the demo takes about two minutes on two cores.
        video_seconds: training time of the video model.
        per_class: samples per digit for the classifier; the picture shows the first ten.
        streams: videos per digit for the classifier.
        seed: random seed of weights, training and samples.
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
    """One line with the machine and the relevant versions."""
    return (
        f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, "
        f"Python {platform.python_version()}, torch {torch.__version__}"
    )
