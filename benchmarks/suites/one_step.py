"""Images in one step: the demo's model trained by MeanFlow, beside the same model trained by flow matching.

A classifier trained on real images reads 60 generated images of every digit. `spread` is the standard deviation of a
pixel over the images of a digit, divided by that of the real images: 0 for a model that always draws the same image.
"""

import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from pom_ext.data import MNIST
from pom_ext.demo.classifier import accuracy, train_classifier
from pom_ext.demo.images import MODEL, TRAIN
from pom_ext.diffusion import OBJECTIVES, build_objective
from pom_ext.media.figures import save_grid
from pom_ext.models import ImageDiT
from pom_ext.sampling import sample
from pom_ext.training import train

from ..harness import report
from ..harness.command import parse, suite_parser

PER_DIGIT, GUIDANCE = 60, 2.0
SAMPLING = {  # solver steps, and the guidance of a sampler that has to apply it
    "meanflow": [{"steps": steps} for steps in (1, 2, 4)],
    "flow": [{"steps": 1, "guidance": 1.0}, {"steps": 1, "guidance": GUIDANCE}, {"steps": 30, "guidance": GUIDANCE}],
}


def train_model(name, data, steps):
    """Train the demo's model by an objective. Returns its `TrainResult`, with the averaged model, and the objective."""
    kind = OBJECTIVES[name]
    guidance = 1.0 if kind.trained_guidance is None else GUIDANCE
    config = replace(TRAIN, objective=name, guidance=guidance)
    torch.manual_seed(0)
    model = ImageDiT(data.shape[0], len(data.classes), data.shape[1], **MODEL, **kind.model_options)
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
    parser = suite_parser("one-step")
    parser.add_argument("--steps", type=int, default=3500, help="training steps of each model")
    parser.add_argument("--out", type=Path, help="folder for the pictures")
    options = parse(parser, arguments)
    content = report.begin(model=MODEL, training_steps=options.steps, cases=[])
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
            report.save(content, options.json)
    return 0
