"""The reader of digits: a small convolutional network trained on the real images."""

import torch
import torch.nn.functional as F
from torch import nn
from tqdm.auto import tqdm

from .._random import seeded_generator


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
