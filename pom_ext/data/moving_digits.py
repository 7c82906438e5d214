"""MNIST digits that move through a square."""

import torch
import torch.nn.functional as F

from .._random import seeded_generator
from .datasets import VideoDataset
from .mnist import MNIST


class MovingDigits(VideoDataset):
    """The MNIST images, each moving in a straight line and bouncing off the edges.

    A path begins with the image in the middle of a black square. It moves at 0.4 to 1 pixels per frame.

    Args:
        frames: frames per clip.
        size: side of the square in pixels, at least 28.
        seed: clip i shows image i % images_shown on a path that depends on the seed and on i.
        begin: clip i begins at a frame of its path between 0 and `begin`, which depends on the seed and on i.

    Raises:
        ValueError: an argument is too small.
    """

    glyph, paths = 20, 20  # side of the square that holds the digit; paths on which every image is seen

    def __init__(self, frames=8, size=28, seed=0, begin=0):
        if frames < 1 or size < 28:
            raise ValueError(f"frames, size: expected at least 1 and 28, got {frames} and {size}")
        if begin < 0:
            raise ValueError(f"begin: expected at least 0, the first frame of a path, got {begin}")
        mnist = MNIST()
        edge = (28 - self.glyph) // 2
        self.digits = (mnist.images[:, :, edge:-edge, edge:-edge] + 1) / 2  # (5000, 1, 20, 20) in [0, 1]
        self.labels, self.classes = mnist.labels, mnist.classes
        self.shape, self.seed, self.images_shown = (1, frames, size, size), seed, len(mnist)
        self.begin = begin

    def __len__(self):
        return self.paths * self.images_shown

    def __getitem__(self, index):
        if not 0 <= index < len(self):
            raise IndexError(f"clip {index} of {len(self)}")
        image = index % self.images_shown
        return self._place(self.digits[image], self.path(index)) * 2 - 1, self.labels[image]

    def path(self, index):
        """(T, 2) row and column of the digit's upper left corner, in pixels."""
        generator = seeded_generator(self.seed, index)
        turn, speed = torch.rand(2, generator=generator)
        first = torch.randint(self.begin + 1, (), generator=generator)
        velocity = (0.4 + 0.6 * speed) * torch.stack([(2 * torch.pi * turn).sin(), (2 * torch.pi * turn).cos()])
        room = self.shape[2] - self.glyph
        way = (room / 2 + velocity * (first + torch.arange(self.shape[1]))[:, None]) % (2 * room)
        return torch.where(way > room, 2 * room - way, way)

    def _place(self, digit, corners):
        """Draw a digit (1, 20, 20) at corners (T, 2): (1, T, H, W), bilinear between pixels."""
        pixels = torch.arange(self.shape[2]) + 0.5
        rows, columns = ((pixels - corner[:, None]) / self.glyph * 2 - 1 for corner in corners.unbind(1))  # (T, size)
        sizes = (len(corners), len(pixels), len(pixels))
        grid = torch.stack([columns[:, None].expand(sizes), rows[:, :, None].expand(sizes)], dim=-1)  # (T, H, W, 2)
        return F.grid_sample(digit.expand(len(corners), -1, -1, -1), grid, align_corners=False).transpose(0, 1)
