"""The demo: train a small PoM transformer on the MNIST images, draw all ten digits, and have a classifier read them."""

import json
import os
import platform
import time
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from tqdm.auto import tqdm

from .checkpoint import written_aside
from .data import MNIST
from .diffusion import FlowMatching, seeded_generator
from .models.image import ImageDiT
from .plots import save_grid, save_loss_curve
from .sampling import sample
from .training import TrainConfig, train

MODEL = {"patch": 4, "dim": 96, "n_layers": 4, "n_heads": 8, "mixer": "power"}
# Shift 2, not 1: after 1,500 steps a classifier read 99 % of the samples instead of 93 % (guidance 2).
TRAIN = TrainConfig(lr=8e-3, shift=2.0)
SAMPLING = {"steps": 30, "guidance": 2.5, "solver": "euler"}


def build_classifier():
    """A small convolutional network: (B, 1, 28, 28) images to (B, 10) scores."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 5, stride=2, padding=2), nn.BatchNorm2d(32), nn.ReLU(),  # (B, 32, 14, 14)
        nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.BatchNorm2d(64), nn.ReLU(),  # (B, 64, 7, 7)
        nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(),  # (B, 64, 7, 7)
        nn.Flatten(), nn.Dropout(0.3), nn.Linear(64 * 7 * 7, 10),  # (B, 10)
    )  # fmt: skip


def train_classifier(images, labels, *, held_out=1000, epochs=8, batch_size=64, seed=0):
    """Train a classifier on all images but `held_out` of them; return it with its accuracy on those."""
    order = torch.randperm(len(images), generator=seeded_generator(seed))
    test, rest = order[:held_out], order[held_out:]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        classifier = build_classifier()
        optimizer = torch.optim.AdamW(classifier.parameters(), lr=3e-3)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
        for _ in tqdm(range(epochs), desc="classifier", unit="epoch"):
            for batch in rest[torch.randperm(len(rest))].split(batch_size):
                moved = torch.roll(images[batch], torch.randint(-2, 3, (2,)).tolist(), dims=(2, 3))
                F.cross_entropy(classifier(moved), labels[batch]).backward()
                optimizer.step()
                optimizer.zero_grad()
            schedule.step()
    classifier.eval()
    return classifier, accuracy(classifier, images[test], labels[test])


@torch.no_grad()
def accuracy(classifier, images, labels):
    """Share of the images in which the classifier reads the label."""
    return (classifier(images).argmax(1) == labels).float().mean().item()


def run_demo(out="out/demo", *, seconds=220.0, per_class=60, seed=0):
    """Run the demo and return the contents of its report.json.

    Args:
        out: folder for samples.png, loss.png, model.safetensors, report.md and report.json; files there are replaced.
        seconds: training time. Everything else adds about a minute on two cores.
        per_class: samples that the classifier reads, per digit; the picture shows the first ten.
        seed: of the weights, the training and the samples.
    """
    begin = time.perf_counter()
    out = Path(out)
    data = MNIST()
    config = TrainConfig(**{**asdict(TRAIN), "seed": seed})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = ImageDiT(data.shape[0], len(data.classes), data.shape[1], **MODEL)
    result = train(model, data, out / "model.safetensors", config, seconds=seconds)
    save_loss_curve(result.losses, out / "loss.png", "flow matching loss on the MNIST images")

    labels = torch.arange(len(data.classes)).repeat_interleave(per_class)
    start = time.perf_counter()
    objective = FlowMatching(config.shift)
    images = sample(result.model, labels, shape=data.shape, objective=objective, seed=seed, progress=True, **SAMPLING)
    images = images.float().cpu().clamp(-1, 1)
    sampling_seconds = time.perf_counter() - start
    shown = images.unflatten(0, (-1, per_class))[:, :10].flatten(0, 1)
    save_grid(shown, data.classes, out / "samples.png", "drawn by PoM: one row per requested digit")

    classifier, held_out_accuracy = train_classifier(data.images, data.labels)
    final = result.losses[-200:]
    report = {
        "machine": machine(),
        "device": str(next(result.model.parameters()).device),
        "model": model.config,
        "parameters": sum(p.numel() for p in model.parameters()),
        "train": asdict(config),
        "steps": len(result.losses),
        "training_seconds": round(result.seconds, 1),
        "milliseconds_per_step": round(1000 * result.seconds / len(result.losses), 1),
        "final_loss": round(sum(final) / len(final), 4),
        "sampling": {**SAMPLING, "images": len(images), "seconds": round(sampling_seconds, 1)},
        "classifier_accuracy_on_real_images": held_out_accuracy,
        "samples_read_as_requested": accuracy(classifier, images, labels),
        "samples_read_as_requested_by_digit": {
            name: accuracy(classifier, images[labels == label], labels[labels == label])
            for label, name in enumerate(data.classes)
        },
        "total_seconds": round(time.perf_counter() - begin, 1),
    }
    for name, text in (("report.json", json.dumps(report, indent=2) + "\n"), ("report.md", markdown(report))):
        with written_aside(out / name) as aside:
            aside.write_text(text, encoding="utf-8")
    return report


def machine():
    """One line that names the machine and the versions that matter."""
    return (
        f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, "
        f"Python {platform.python_version()}, torch {torch.__version__}"
    )


def markdown(report):
    """report.md"""
    sampling = report["sampling"]
    digits = report["samples_read_as_requested_by_digit"]
    return f"""# Demo: MNIST digits drawn by PoM

| | |
|---|---|
| machine | {report["machine"]}, on {report["device"]} |
| model | ImageDiT, {report["parameters"]:,} parameters, mixer {report["model"]["mixer"]} |
| training | {report["steps"]:,} steps in {report["training_seconds"]} s ({report["milliseconds_per_step"]} ms a step) |
| final loss | {report["final_loss"]} |
| sampling | {sampling["images"]} images in {sampling["seconds"]} s, {sampling["steps"]} {sampling["solver"]} steps, guidance {sampling["guidance"]} |
| requested digit read in | **{report["samples_read_as_requested"]:.1%}** of the samples |
| the classifier itself | {report["classifier_accuracy_on_real_images"]:.1%} on 1,000 real images it was not trained on |
| everything | {report["total_seconds"]} s |

| digit | {" | ".join(digits)} |
|---|{"---|" * len(digits)}
| read | {" | ".join(f"{share:.0%}" for share in digits.values())} |

![samples](samples.png)

![loss](loss.png)
"""
