"""Images in one step: the demo's model trained by MeanFlow, beside the same one trained by flow matching.

    python -m benchmarks.one_step --out out/one_step --json benchmarks/results/NAME.json

A classifier that learned from real images reads 60 drawn ones of every digit. `spread` is the standard deviation of a
pixel over the images of a digit, as a share of that of the real ones: a model that always draws the same has none.
"""

import argparse
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from pom_ext.data import MNIST
from pom_ext.demo.classifier import accuracy, train_classifier
from pom_ext.demo.images import MODEL, TRAIN
from pom_ext.diffusion import build_objective
from pom_ext.media.figures import save_grid
from pom_ext.models import ImageDiT
from pom_ext.sampling import sample
from pom_ext.training import train

from .run import machine, machine_line, save

PER_DIGIT, GUIDANCE = 60, 2.0
SAMPLING = {  # solver steps, and the guidance of a sampler that has to apply it
    "meanflow": [{"steps": steps} for steps in (1, 2, 4)],
    "flow": [{"steps": 1, "guidance": 1.0}, {"steps": 1, "guidance": GUIDANCE}, {"steps": 30, "guidance": GUIDANCE}],
}


def train_model(name, data, steps):
    """The averaged model that `steps` of training by an objective leave, its `TrainResult` and objective."""
    guidance = GUIDANCE if name == "meanflow" else 1.0
    config = replace(TRAIN, objective=name, guidance=guidance)
    torch.manual_seed(0)
    model = ImageDiT(data.shape[0], len(data.classes), data.shape[1], **MODEL, two_times=name == "meanflow")
    with tempfile.TemporaryDirectory() as folder:
        result = train(model, data, Path(folder) / "model.safetensors", config, steps=steps)
    return result, build_objective(name, config.shift)


def spread(images, labels):
    """Mean over the classes of the standard deviation of a pixel within one."""
    return torch.stack([images[labels == label].std(0).square().mean().sqrt() for label in labels.unique()]).mean()


def measure(data, classifier, result, objective, options):
    """The JSON of one way to draw, and the first images of every class."""
    labels = torch.arange(len(data.classes)).repeat_interleave(PER_DIGIT)
    start = time.perf_counter()
    images = sample(result.model, labels, shape=data.shape, objective=objective, **options).clamp(-1, 1)
    seconds = time.perf_counter() - start
    of_real = spread(images, labels) / spread(data.images, data.labels)
    read = accuracy(classifier, images, labels)
    shown = images.unflatten(0, (-1, PER_DIGIT))[:, :10].flatten(0, 1)
    return {
        **options,
        "read_as_requested": round(read, 4),
        "spread": round(of_real.item(), 3),
        "ms_an_image": round(1000 * seconds / len(images), 2),
    }, shown


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m benchmarks.one_step", description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=3500, help="of either training")
    parser.add_argument("--out", type=Path, help="folder for the pictures")
    parser.add_argument("--json", metavar="FILE", help="write the results there")
    options = parser.parse_args(arguments)
    if options.json and not Path(options.json).parent.is_dir():
        parser.error(f"--json: there is no folder {Path(options.json).parent}")
    content = {"machine": machine(), "model": MODEL, "training_steps": options.steps, "cases": []}
    print(machine_line(content["machine"]), flush=True)
    data = MNIST()
    classifier, held_out = train_classifier(data.images, data.labels)
    content["classifier_accuracy_on_real_images"] = round(held_out, 4)
    for name, ways in SAMPLING.items():
        result, objective = train_model(name, data, options.steps)
        for way in ways:
            drawn, shown = measure(data, classifier, result, objective, way)
            case = {"objective": name, "training_seconds": round(result.seconds, 1), **drawn}
            content["cases"].append(case)
            print(
                f"{name:9} {way!s:36} {case['read_as_requested']:6.1%} read as requested, spread {case['spread']:.2f}, "
                f"{case['ms_an_image']:.2f} ms an image",
                flush=True,
            )
            if options.out:
                save_grid(shown, data.classes, options.out / f"{name}-{way['steps']}-{way.get('guidance', 'in')}.png")
            if options.json:
                save(content, options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
