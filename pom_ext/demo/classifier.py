"""A digit classifier, trained on real images, that judges the drawn ones."""

import torch
import torch.nn.functional as F
from torch import nn
from tqdm.auto import tqdm

from .._random import seeded_generator


def build_classifier():
    """A small convolutional network: (B, 1, 28, 28) images to (B, 10) scores."""

    def layer(inputs, outputs, size, stride):
        conv = nn.Conv2d(inputs, outputs, size, stride=stride, padding=size // 2)
        return conv, nn.BatchNorm2d(outputs), nn.ReLU()

    return nn.Sequential(
        *layer(1, 32, 5, stride=2),  # (B, 32, 14, 14)
        *layer(32, 64, 3, stride=2),  # (B, 64, 7, 7)
        *layer(64, 64, 3, stride=1),  # (B, 64, 7, 7)
        *(nn.Flatten(), nn.Dropout(0.3), nn.Linear(64 * 7 * 7, 10)),  # (B, 10)
    )


def train_classifier(images, labels, *, held_out=1000, epochs=8, batch_size=64, seed=0):
    """Train a classifier on all images except `held_out`; return it and its accuracy on the held-out images."""
    order = torch.randperm(len(images), generator=seeded_generator(seed))
    test, train = order[:held_out], order[held_out:]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        classifier = build_classifier()
        optimizer = torch.optim.AdamW(classifier.parameters(), lr=3e-3)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
        for _ in tqdm(range(epochs), desc="classifier", unit="epoch"):
            for batch in train[torch.randperm(len(train))].split(batch_size):
                shifted = torch.roll(images[batch], torch.randint(-2, 3, (2,)).tolist(), dims=(2, 3))
                F.cross_entropy(classifier(shifted), labels[batch]).backward()
                optimizer.step()
                optimizer.zero_grad()
            schedule.step()
    classifier.eval()
    return classifier, accuracy(classifier, images[test], labels[test])


@torch.no_grad()
def accuracy(classifier, images, labels):
    """Share of the images that the classifier assigns to their label."""
    return (classifier(images).argmax(1) == labels).float().mean().item()
