"""A small model and data set to train."""

import torch

from pom_ext.data import ImageDataset
from pom_ext.models.image import ImageDiT
from pom_ext.training import TrainConfig, train

CONFIG = TrainConfig(batch_size=4, warmup=2, lr=1e-2)


class Stripes(ImageDataset):
    """Twelve 8x8 images of two classes: bright above, or bright below."""

    shape, classes = (1, 8, 8), ("above", "below")

    def __len__(self):
        return 12

    def __getitem__(self, index):
        image = torch.full(self.shape, -1.0)
        image[:, 4 * (index % 2) : 4 * (index % 2) + 4] = 1 - index / 20
        return image, torch.tensor(index % 2)


def tiny_model(**options):
    torch.manual_seed(0)
    return ImageDiT(1, 2, 8, **{"patch": 4, "dim": 16, "n_layers": 1, "n_heads": 2, **options})


def assert_same_weights(model, other):
    for (name, tensor), expected in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(tensor, expected), name


def run(path, steps=6, config=CONFIG, **options):
    return train(tiny_model(), Stripes(), path, config, steps=steps, progress=False, **options)
