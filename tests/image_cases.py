"""Small image models and their inputs."""

import torch

from pom_ext.models import ImageDiT


def image_model(**options):
    """A small model that has left its initialisation, where the output is 0."""
    torch.manual_seed(0)
    model = ImageDiT(3, 5, 8, patch=2, dim=16, n_heads=2, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def images(batch=2, height=8, width=8, channels=3):
    torch.manual_seed(1)
    return torch.randn(batch, channels, height, width), torch.linspace(3, 990, batch), torch.arange(batch) % 5
